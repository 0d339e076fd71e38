"""The gradient of each example by itself: of layers whose weights meet an input once, without a pass for each example.

What a dense layer, a convolution or an embedding got, and the gradient of the loss to what it made of it, hold the
gradients of all examples: with the inputs a_it of example i at place t, and the gradients e_it there,

    g_i = sum_t a_it e_it^T          ||g_i||^2 = sum_ts (a_it . a_is)(e_it . e_is)

of which the one with fewer products is computed. A convolution is a dense layer on patches.

Goodfellow, "Efficient Per-Example Gradient Computations", 2015, https://arxiv.org/abs/1510.01799; Lee and Kifer,
"Scaling up Differentially Private Deep Learning with Fast Per-Example Gradient Clipping", PETS 2021,
https://arxiv.org/abs/2009.03106; Bu et al., "Scalable and Efficient Training of Large Convolutional Neural Networks
with Differential Privacy", NeurIPS 2022, https://arxiv.org/abs/2205.10683
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from trainstep import _seam
from trainstep.gradients import Gradients
from trainstep.step import Batch, Evaluation, num_loss_terms
from trainstep.strategies._per_example import clip_factors

_TRAINED = (keras.layers.Dense, keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Embedding)
_PASSED = tuple(
    getattr(keras.layers, name)
    for name in (
        *("InputLayer", "Activation", "ReLU", "LeakyReLU", "ELU", "Rescaling", "Masking"),
        *("Flatten", "Reshape", "Permute", "RepeatVector"),
        *("Dropout", "SpatialDropout1D", "SpatialDropout2D", "GaussianNoise", "GaussianDropout"),
        *("MaxPooling1D", "MaxPooling2D", "AveragePooling1D", "AveragePooling2D"),
        *("GlobalMaxPooling1D", "GlobalMaxPooling2D", "GlobalAveragePooling1D", "GlobalAveragePooling2D"),
        *("ZeroPadding1D", "ZeroPadding2D", "Cropping1D", "Cropping2D", "UpSampling1D", "UpSampling2D"),
        *("Add", "Subtract", "Multiply", "Average", "Maximum", "Minimum", "Softmax", "Concatenate"),
    )
)


class OfWeight(NamedTuple):
    """The gradients of one weight, of each example by itself."""

    squared_norms: tf.Tensor
    """(examples,), float32."""
    weighted_sum: Callable[[tf.Tensor], Any]
    """Maps factors, (examples,), to the sum of the gradients times these."""


def trained_layers(model: Any) -> list[Any]:
    """Return the layers of `model` that have weights to train, and no layers inside."""
    return [layer for layer in _seam.layers_of(model) if type(layer) in _TRAINED and layer.trainable_variables]


def obstacle(model: Any) -> str | None:
    """Return what keeps the gradients of examples from being told apart in one pass; None where nothing does."""
    if not _seam.is_separable(model):
        return f"the loss {model.loss!r} is not known to be a mean of losses of one example each"
    masks = False
    for layer in _seam.layers_of(model):
        if isinstance(layer, keras.Model):
            if not _seam.calls_its_layers_only(layer):
                return f"{type(layer).__name__} {layer.name!r} does more than to call its layers"
            continue
        if not _is_known(layer):
            return f"the layer {type(layer).__name__} {layer.name!r} is not among those it is worked out for"
        masks = masks or getattr(layer, "mask_zero", False) or isinstance(layer, keras.layers.Masking)
    if masks and len(tf.nest.flatten(model.outputs)) > 1:
        return "there are masks and several outputs, whose entries count differently"
    return None


def _is_known(layer: Any) -> bool:
    if getattr(layer, "activity_regularizer", None) is not None:
        return False
    if getattr(layer, "activation", None) not in [None, *vars(keras.activations).values()]:
        return False
    if type(layer) in _TRAINED:
        weights = [getattr(layer, name, None) for name in ("kernel", "bias", "embeddings")]
        known = {_seam.key_of(weight) for weight in weights if weight is not None}
        options = layer.get_config()
        return (
            {_seam.key_of(weight) for weight in layer.trainable_variables} <= known
            and options.get("data_format", "channels_last") == "channels_last"
            and options.get("groups", 1) == 1
        )
    if isinstance(layer, (keras.layers.Softmax, keras.layers.Concatenate)):
        return type(layer) in _PASSED and layer.axis == -1  # Along the first axis they would mix examples.
    return type(layer) in _PASSED or (_seam.is_batch_norm(layer) and not layer.trainable)


def in_one_pass(model: Any, batch: Batch, clip: float) -> tuple[Evaluation, Gradients]:
    """Return the evaluation of all examples of `batch` at once, and the sum of their gradients, each clipped to `clip`.

    Args:
        model: which has no `obstacle`.
        batch: examples.
        clip: largest L2 norm of the gradient of an example.
    """
    layers = trained_layers(model)
    with tf.GradientTape() as tape, _seam.watched_calls(layers) as calls:
        loss, y_pred = model.compute_objective(batch)
    factor = model.loss_scale()
    factor = tf.ones(()) if factor is None else factor
    seed = tf.ones_like(loss) * tf.cast(factor, loss.dtype)
    found: Any = tape.gradient(loss, [call.outputs for call in calls], output_gradients=seed)
    # From the mean to the sum, and unscaled, in float32: small ones would vanish in float16.
    to_sum = tf.distribute.get_strategy().num_replicas_in_sync * num_loss_terms(batch, y_pred)
    to_sum /= tf.cast(factor, tf.float32)
    weights: dict[int, OfWeight] = {}
    for layer in layers:
        pairs = [
            (call.inputs, to_sum * tf.cast(gradient, tf.float32))
            for call, gradient in zip(calls, found, strict=True)
            if call.layer is layer and gradient is not None
        ]
        if pairs:
            weights |= of_layer(layer, [inputs for inputs, _ in pairs], [gradient for _, gradient in pairs])
    factors = clip_factors(tf.add_n([each.squared_norms for each in weights.values()]), clip)
    clipped: Gradients = []
    for weight in model.trainable_variables:
        of_weight = weights.get(_seam.key_of(weight))
        clipped.append(None if of_weight is None else tf.cast(of_weight.weighted_sum(factors), weight.dtype))
    return Evaluation(loss, y_pred, []), clipped


def of_layer(layer: Any, inputs: Sequence[tf.Tensor], gradients: Sequence[tf.Tensor]) -> dict[int, OfWeight]:
    """Return the gradients of each trainable weight of `layer`, by `_seam.key_of`.

    Args:
        layer: one of `trained_layers`.
        inputs: what it got, at each of its calls: (examples, ...).
        gradients: of the sum of the losses of examples, to what it made of that before its activation; float32.
    """
    if isinstance(layer, keras.layers.Embedding):
        rows = [_by_place(each, 1)[:, :, 0] for each in inputs]
        e = tf.concat([_by_place(each, int(each.shape[-1] or 0)) for each in gradients], axis=1)
        found = {_seam.key_of(layer.embeddings): _of_table(layer.embeddings, tf.concat(rows, axis=1), e)}
    else:
        units = layer.kernel.shape[-1]
        a = tf.concat([_unfolded(layer, tf.cast(each, tf.float32)) for each in inputs], axis=1)
        e = tf.concat([_by_place(each, units) for each in gradients], axis=1)
        found = {_seam.key_of(layer.kernel): _of_kernel(layer.kernel, a, e)}
        if layer.bias is not None:
            found[_seam.key_of(layer.bias)] = _of_bias(e)
    trained = {_seam.key_of(weight) for weight in layer.trainable_variables}
    return {key: value for key, value in found.items() if key in trained}


def _by_place(values: tf.Tensor, size: int) -> tf.Tensor:
    """Return `values` as (examples, places, size), the number of places static where it is known."""
    known = values.shape[1:].num_elements()
    if known is not None:
        return tf.reshape(values, [-1, known // size, size])
    return tf.reshape(values, [tf.shape(values)[0], -1, size])  # Never empty: an example has a place.


def _unfolded(layer: Any, inputs: tf.Tensor) -> tf.Tensor:
    """Return what the kernel of `layer` is multiplied by, in order of its entries: (examples, places, entries)."""
    entries = tf.TensorShape(layer.kernel.shape[:-1]).num_elements()
    if isinstance(layer, keras.layers.Dense):
        return _by_place(inputs, entries)
    sizes, strides, rates = (list(each) for each in (layer.kernel_size, layer.strides, layer.dilation_rate))
    padding = layer.padding.upper()
    if isinstance(layer, keras.layers.Conv1D):
        if padding == "CAUSAL":
            inputs, padding = tf.pad(inputs, [[0, 0], [rates[0] * (sizes[0] - 1), 0], [0, 0]]), "VALID"
        inputs, sizes, strides, rates = inputs[:, :, None], [*sizes, 1], [*strides, 1], [*rates, 1]
    arguments = {"sizes": sizes, "strides": strides, "rates": rates}
    patches = tf.image.extract_patches(
        inputs, padding=padding, **{name: [1, *each, 1] for name, each in arguments.items()}
    )
    return _by_place(patches, entries)


def _of_kernel(kernel: Any, a: tf.Tensor, e: tf.Tensor) -> OfWeight:
    shapes: Any = (a.shape[1], a.shape[2], e.shape[2])
    places, entries, units = shapes
    if places is not None and 2 * places**2 <= entries * units:
        products = tf.matmul(a, a, transpose_b=True) * tf.matmul(e, e, transpose_b=True)

        def of_sums(factors: tf.Tensor) -> tf.Tensor:
            weighted = tf.reshape(e * factors[:, None, None], [-1, units])
            return tf.reshape(tf.matmul(tf.reshape(a, [-1, entries]), weighted, transpose_a=True), kernel.shape)

        return OfWeight(tf.reduce_sum(products, axis=[1, 2]), of_sums)
    each = tf.matmul(a, e, transpose_a=True)

    def of_each(factors: tf.Tensor) -> tf.Tensor:
        return tf.reshape(tf.tensordot(factors, each, 1), kernel.shape)

    return OfWeight(tf.reduce_sum(tf.square(each), axis=[1, 2]), of_each)


def _of_bias(e: tf.Tensor) -> OfWeight:
    each = tf.reduce_sum(e, axis=1)

    def weighted_sum(factors: tf.Tensor) -> tf.Tensor:
        return tf.linalg.matvec(each, factors, transpose_a=True)

    return OfWeight(tf.reduce_sum(tf.square(each), axis=1), weighted_sum)


def _of_table(table: Any, rows: tf.Tensor, e: tf.Tensor) -> OfWeight:
    # A row that occurs twice in an example gets the sum of both.
    same = tf.cast(rows[:, :, None] == rows[:, None, :], e.dtype)
    norms = tf.reduce_sum(same * tf.matmul(e, e, transpose_b=True), axis=[1, 2])

    def weighted_sum(factors: tf.Tensor) -> tf.IndexedSlices:
        values = tf.reshape(e * factors[:, None, None], [-1, e.shape[2]])
        return tf.IndexedSlices(values, tf.cast(tf.reshape(rows, [-1]), tf.int32), tf.constant(list(table.shape)))

    return OfWeight(norms, weighted_sum)
