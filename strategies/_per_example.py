"""The gradient of each example by itself: evaluated one after the other, which is right for any model."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from trainstep import _seam
from trainstep.errors import ModelConflictError, UnsupportedInputError
from trainstep.gradients import Gradients, dense, scale
from trainstep.step import Batch, Evaluation, num_loss_terms


def check_layers(model: Any) -> None:
    """Raise `ModelConflictError` where a layer of `model` normalizes examples with each other's statistics."""
    for layer in _seam.layers_of(model):
        if _seam.is_batch_norm(layer) and layer.trainable:
            raise ModelConflictError(
                f"dp_sgd needs the gradient of each example by itself, and the layer {layer.name!r} normalizes all "
                "with each other's statistics. Use LayerNormalization or GroupNormalization, or set its "
                "`trainable = False`."
            )


def has_ragged(batch: Batch) -> bool:
    """Tell whether a tensor of `batch` is ragged.

    Raises:
        UnsupportedInputError: one is sparse.
    """
    tensors = tf.nest.flatten((batch.x, batch.y, batch.sample_weight, dict(batch.extra)))
    if any(isinstance(tensor, tf.SparseTensor) for tensor in tensors):
        raise UnsupportedInputError(
            "dp_sgd takes single examples from dense and ragged tensors, not from sparse ones. Make them dense in the "
            "data pipeline (tf.sparse.to_dense)."
        )
    return any(isinstance(tensor, tf.RaggedTensor) for tensor in tensors)


def clip_factors(squared_norms: tf.Tensor, clip: float) -> tf.Tensor:
    """Return what scales gradients of these squared L2 norms to a norm of at most `clip`; NaN stays NaN."""
    return clip / tf.maximum(tf.sqrt(squared_norms), clip)


def squared_norm(gradients: Gradients) -> tf.Tensor:
    """Return the squared L2 norm over all `gradients` together, a float32 scalar; a None counts as zero."""
    squares = [tf.reduce_sum(tf.square(tf.cast(g, tf.float32))) for g in gradients if g is not None]
    return tf.add_n(squares) if squares else tf.zeros(())


def of_regularization(model: Any) -> Gradients:
    """Return the gradients of those losses of `model` that are of its weights alone."""
    with tf.GradientTape() as tape:
        losses = _seam.regularization(model)
        total = tf.add_n(losses) if losses else tf.zeros(())
    return tape.gradient(total, model.trainable_variables)


def added(left: Gradients, right: Gradients) -> Gradients:
    """Return the sum of two lists of gradients; where only one of both is not None, that one."""

    def add(one: Any, other: Any) -> Any:
        if one is None or other is None:
            return other if one is None else one
        return dense(one) + dense(other)

    return [add(one, other) for one, other in zip(left, right, strict=True)]


def one_by_one(
    evaluate: Callable[[Batch], Evaluation], batch: Batch, regularized: Gradients, clip: float
) -> tuple[Evaluation, Gradients]:
    """Return the evaluation of the examples of `batch`, one after the other, and the sum of their clipped gradients.

    Args:
        evaluate: returns the objective and the gradients of a batch, here of one example.
        batch: examples; the first is evaluated by itself, so that what is made at a first call is not made in a loop.
        regularized: the gradients of what is in every loss and of no example.
        clip: largest L2 norm of the gradient of an example.
    """
    replicas = tf.distribute.get_strategy().num_replicas_in_sync

    def clipped(example: Batch) -> tuple[Evaluation, tf.Tensor, Gradients]:
        evaluation = evaluate(example)
        terms = num_loss_terms(example, evaluation.y_pred)  # None, where all is masked, or there is no example.
        gradients = [None if g is None else replicas * dense(g) for g in evaluation.gradients]
        own = [
            None if g is None else tf.math.multiply_no_nan(g, tf.cast(terms, g.dtype))
            for g in added(gradients, scale(regularized, -1.0))
        ]
        return evaluation, terms, scale(own, clip_factors(squared_norm(own), clip))

    first, terms, gradients = clipped(_example(batch, None))
    present = [index for index, gradient in enumerate(gradients) if gradient is not None]
    count = _seam.num_examples(batch.x)
    arrays = [
        tf.TensorArray(row.dtype, size=tf.maximum(count - 1, 0), element_shape=row.shape[1:]) for row in _rows(first)
    ]

    def more(index: tf.Tensor, *others: Any) -> tf.Tensor:
        del others
        return index < count

    def step(index: tf.Tensor, loss: tf.Tensor, terms: tf.Tensor, sums: list[Any], arrays: list[Any]) -> Any:
        evaluation, own_terms, own = clipped(_example(batch, index))
        written = [array.write(index - 1, row[0]) for array, row in zip(arrays, _rows(evaluation), strict=True)]
        sums = [total + own[place] for total, place in zip(sums, present, strict=True)]
        return index + 1, loss + _weighted(evaluation, own_terms), terms + own_terms, sums, written

    start = (tf.constant(1), _weighted(first, terms), terms, [gradients[place] for place in present], arrays)
    _, loss, terms, sums, arrays = tf.while_loop(more, step, start, parallel_iterations=1)
    for place, total in zip(present, sums, strict=True):
        gradients[place] = total
    loss = tf.cast(tf.math.divide_no_nan(loss, terms), first.loss.dtype)
    return Evaluation(loss, _joined(first, [array.stack() for array in arrays]), []), gradients


def _example(batch: Batch, index: tf.Tensor | None) -> Batch:
    """Return the example of `batch` at `index`, as a batch; the first, if there is one, for None."""

    def of_one(tensor: Any) -> Any:
        if tensor is None:
            return None
        return tensor[:1] if index is None else tf.gather(tensor, tf.reshape(index, [1]))

    def of_all(tensors: Any) -> Any:
        return tf.nest.map_structure(of_one, tensors)

    return Batch(of_all(batch.x), of_all(batch.y), of_all(batch.sample_weight), of_all(dict(batch.extra)))


def _weighted(evaluation: Evaluation, terms: tf.Tensor) -> tf.Tensor:
    return tf.math.multiply_no_nan(tf.cast(evaluation.loss, tf.float32), terms)


def _rows(evaluation: Evaluation) -> list[tf.Tensor]:
    """Return the outputs of an evaluation, and the masks they have."""
    outputs = tf.nest.flatten(evaluation.y_pred)
    masks = [_seam.mask_of(output) for output in outputs]
    return [*outputs, *(mask for mask in masks if mask is not None)]


def _joined(first: Evaluation, others: list[tf.Tensor]) -> Any:
    """Return the outputs of all examples, with their masks: those of `first`, and what is stacked of the `others`."""
    rows = [tf.concat([one, more], axis=0) for one, more in zip(_rows(first), others, strict=True)]
    outputs = tf.nest.flatten(first.y_pred)
    masks = iter(rows[len(outputs) :])
    whole = [
        _seam.with_mask(row, None if _seam.mask_of(output) is None else next(masks))
        for row, output in zip(rows, outputs, strict=False)
    ]
    return tf.nest.pack_sequence_as(first.y_pred, whole)
