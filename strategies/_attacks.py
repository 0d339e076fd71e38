"""Perturbations of the input within a ball: what attacks have in common.

Pure functions of tensors, for strategies that train on adversarial examples and for evaluation.
All balls are around each example by itself: `norm` is over everything but the first dimension. A radius
and the length of a step are numbers, or float32 scalar tensors where they are on a schedule.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import tensorflow as tf

from trainstep.errors import UnsupportedInputError, nearest
from trainstep.replicas import place_among_replicas

Norm = Literal["linf", "l2"]
Length = float | tf.Tensor


def _as(dtype: tf.DType, length: Length) -> tf.Tensor:
    """Return `length` in `dtype`: a number without a detour over float32."""
    return tf.cast(length, dtype) if tf.is_tensor(length) else tf.constant(length, dtype)


def l2_norm(x: tf.Tensor) -> tf.Tensor:
    """Return the L2 norm of each example, of shape (batch, 1, ..., 1)."""
    axes = list(range(1, len(x.shape)))
    return tf.sqrt(tf.reduce_sum(tf.square(x), axis=axes, keepdims=True))


def ascent_direction(gradient: tf.Tensor, norm: Norm) -> tf.Tensor:
    """Return the direction of length 1 in `norm` in which a linear loss grows most; zero for a zero gradient.

    An entry that is not finite counts as zero: a loss scale that overflows must not make the examples NaN, nor, by
    way of them, the batch-norm statistics.
    """
    gradient = tf.where(tf.math.is_finite(gradient), gradient, tf.zeros_like(gradient))
    if norm == "linf":
        return tf.sign(gradient)
    # Scaled to 1 first: squares of small gradients underflow, and a confident model's are small.
    largest = tf.reduce_max(tf.abs(gradient), axis=list(range(1, len(gradient.shape))), keepdims=True)
    scaled = tf.math.divide_no_nan(gradient, largest)
    return tf.math.divide_no_nan(scaled, l2_norm(scaled))


def project(delta: tf.Tensor, epsilon: Length, norm: Norm) -> tf.Tensor:
    """Return the point of the ball of radius `epsilon` nearest to `delta`."""
    radius = _as(delta.dtype, epsilon)
    if norm == "linf":
        return tf.clip_by_value(delta, -radius, radius)
    return delta * tf.math.divide_no_nan(radius, tf.maximum(l2_norm(delta), radius))


def perturbed(
    x: tf.Tensor, delta: tf.Tensor, epsilon: Length, norm: Norm, clip_range: tuple[float, float] | None
) -> tf.Tensor:
    """Return `x + delta`, within the ball and the range to the last float.

    The sum is rounded towards `x`, so that in exact arithmetic the result is no further from `x`
    than `epsilon`. Where `x` is itself out of the range it is moved no further out.
    """
    wide, x_wide = tf.cast(delta, tf.float64), tf.cast(x, tf.float64)
    # Short of epsilon by more than the norm can be off, itself computed in float64.
    wide = project(wide, _as(wide.dtype, epsilon) * (1 if norm == "linf" else 1 - 1e-12), norm)
    result = tf.cast(x_wide + wide, x.dtype)
    too_far = tf.abs(tf.cast(result, tf.float64) - x_wide) > tf.abs(wide)
    result = tf.where(too_far, tf.math.nextafter(result, x), result)
    if clip_range is None:
        return result
    low, high = _rounded_inwards(clip_range, x.dtype.as_numpy_dtype)
    return tf.clip_by_value(result, tf.minimum(x, low), tf.maximum(x, high))  # A move towards x, so within the ball.


def _rounded_inwards(bounds: tuple[float, float], dtype: Any) -> tuple[Any, Any]:
    """Return the least and the greatest float of `dtype` within `bounds`."""
    low, high = dtype(bounds[0]), dtype(bounds[1])
    return (
        np.nextafter(low, dtype(np.inf)) if float(low) < bounds[0] else low,
        np.nextafter(high, dtype(-np.inf)) if float(high) > bounds[1] else high,
    )


def in_range(x: tf.Tensor, clip_range: tuple[float, float]) -> tf.Tensor:
    """Return whether the finite entries of `x` lie in the range, a boolean scalar; a thousandth of it is forgiven."""
    low, high = clip_range
    slack = 1e-3 * (high - low)
    return ~tf.reduce_any(tf.math.is_finite(x) & ((x < low - slack) | (x > high + slack)))


def _rows(x: tf.Tensor) -> tuple[slice, tf.Tensor]:
    """Return which rows of a draw for all replicas are for the examples of `x`, and the shape of the whole."""
    examples = tf.shape(x)[0]
    first, all_examples = place_among_replicas(examples)
    return slice(first, first + examples), tf.concat([[all_examples], tf.shape(x)[1:]], axis=0)


def normal_delta(x: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Return a point of the standard normal distribution for each example of `x`; `seed` as in `random_delta`."""
    rows, shape = _rows(x)
    return tf.random.stateless_normal(shape, seed, dtype=x.dtype)[rows]


def random_delta(x: tf.Tensor, epsilon: Length, norm: Norm, seed: tf.Tensor) -> tf.Tensor:
    """Return a point drawn uniformly from the ball around 0, for each example of `x`.

    `seed` is an int32 tensor of shape (2,). Replicas draw the rows that one device would; a step
    compiled by XLA draws other numbers than one that is not, of the same distribution.
    """
    rows, shape = _rows(x)
    limit = _as(x.dtype, epsilon)
    if norm == "linf":
        return tf.random.stateless_uniform(shape, seed, -limit, limit, x.dtype)[rows]
    normal = tf.random.stateless_normal(shape, seed, dtype=x.dtype)[rows]
    radii_seed = seed + tf.constant([0, 1])
    uniform = tf.random.stateless_uniform(shape[:1], radii_seed, dtype=x.dtype)[rows]
    dimensions = tf.cast(tf.size(x) / tf.maximum(tf.shape(x)[0], 1), x.dtype)
    # The share of a ball of radius r in the ball of radius 1 is r ** dimensions.
    radius = limit * tf.reshape(uniform, [-1] + [1] * (len(x.shape) - 1)) ** (1 / dimensions)
    return radius * ascent_direction(normal, "l2")


# Steps up to which an attack is traced step by step: on a processor with AVX512-BF16, a pass within a loop of
# TensorFlow takes 1.37 times as long, as oneDNN lays out its tensors anew in each.
_UNROLLED = 10


def ascend(
    input_gradients: Callable[[list[tf.Tensor]], Sequence[tf.Tensor | None]],
    inputs: list[tf.Tensor],
    deltas: list[tf.Tensor],
    *,
    epsilon: Length,
    norm: Norm,
    steps: int,
    step_size: Length,
    clip_range: tuple[float, float] | None,
) -> list[tf.Tensor]:
    """Return `inputs` moved by `steps` projected steps of gradient ascent, from `inputs + deltas`.

    Args:
        input_gradients: maps the moved inputs to the gradients of the loss; None counts as zero.
        inputs: tensors of shape (batch, ...), of a floating dtype.
        deltas: where to start from, of the same shapes; zeros, or `random_delta`.
        epsilon: radius of the ball, in the units of the inputs.
        norm: "linf" or "l2".
        steps: number of gradients taken.
        step_size: length of one step in `norm`, in the units of the inputs.
        clip_range: lowest and highest allowed value of an input, or None.
    """

    def moved(deltas: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        sums = [x + delta for x, delta in zip(inputs, deltas, strict=True)]
        return sums if clip_range is None else [tf.clip_by_value(each, *clip_range) for each in sums]

    def step(*deltas: tf.Tensor) -> list[tf.Tensor]:
        ends = []
        for delta, gradient in zip(deltas, input_gradients(moved(deltas)), strict=True):
            change = 0.0 if gradient is None else _as(delta.dtype, step_size) * ascent_direction(gradient, norm)
            ends.append(project(delta + change, epsilon, norm))
        return ends

    if steps <= _UNROLLED:
        for _ in range(steps):
            deltas = step(*deltas)
    else:
        loop = (tf.constant(0), *deltas)
        _, *deltas = tf.while_loop(
            lambda i, *_: i < steps, lambda i, *each: (i + 1, *step(*each)), loop, maximum_iterations=steps
        )
    return [
        tf.stop_gradient(perturbed(x, delta, epsilon, norm, clip_range))
        for x, delta in zip(inputs, deltas, strict=True)
    ]


def movable(x: Any, able: Sequence[bool]) -> tuple[list[tf.Tensor], Callable[[Sequence[tf.Tensor]], Any]]:
    """Return the tensors of the structure `x` that are to be moved, and what puts others in their place.

    Args:
        x: a tensor, or nested tensors, of shape (batch, ...).
        able: for each tensor of the flattened `x`, whether to move it; see `attackable`.
    """
    tensors = tf.nest.flatten(x)
    chosen = [position for position, ok in enumerate(able) if ok]

    def with_moved(moved: Sequence[tf.Tensor]) -> Any:
        replaced = dict(zip(chosen, moved, strict=True))
        return tf.nest.pack_sequence_as(x, [replaced.get(i, tensor) for i, tensor in enumerate(tensors)])

    # Half precision could not tell neighbouring points of a small ball apart.
    half = (tf.float16, tf.bfloat16)
    return [tf.cast(t, tf.float32) if t.dtype in half else t for t in (tensors[i] for i in chosen)], with_moved


def attack(
    x: Any,
    able: Sequence[bool],
    loss_at: Callable[[Any], tf.Tensor],
    differentiate: Callable[[tf.GradientTape, tf.Tensor, list[tf.Tensor]], Any],
    *,
    seed: tf.Tensor | None,
    stddev: float | None = None,
    **ball: Any,
) -> Any:
    """Return the structure `x` with some of its tensors moved to where the loss is high.

    Args:
        x: a tensor, or nested tensors, of shape (batch, ...).
        able: for each tensor of the flattened `x`, whether to move it; see `attackable`.
        loss_at: maps a structure like `x` to a scalar loss, without a trace in the model's state.
        differentiate: maps a tape, a loss and tensors to gradients.
        seed: of the point to start from, an int32 tensor of shape (2,); None starts at `x` itself.
        stddev: of a normal distribution around `x` to start from; None: anywhere in the ball.
        **ball: `epsilon`, `norm`, `steps`, `step_size` and `clip_range`, see `ascend`.
    """
    originals, with_moved = movable(x, able)

    def start(index: int, original: tf.Tensor) -> tf.Tensor:
        if seed is None:
            return tf.zeros_like(original)
        own = seed + tf.constant([index, 0])
        if stddev is None:
            return random_delta(original, ball["epsilon"], ball["norm"], own)
        return project(stddev * normal_delta(original, own), ball["epsilon"], ball["norm"])

    def input_gradients(moved: list[tf.Tensor]) -> Sequence[tf.Tensor | None]:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(moved)
            loss = loss_at(with_moved(moved))
        return differentiate(tape, loss, moved)

    deltas = [start(index, original) for index, original in enumerate(originals)]
    return with_moved(ascend(input_gradients, originals, deltas, **ball))


def attackable(x: Any, model: Any, chosen: Sequence[str] | None) -> list[bool]:
    """Tell for each tensor in the flattened structure `x` whether an attack may change it.

    Args:
        x: a tensor, or a list, tuple or dict of tensors.
        model: gives the names of its inputs, where it knows them.
        chosen: names of inputs (the keys of a dict; else the names of the model's inputs, or their
            positions); None stands for all of a floating dtype.

    Raises:
        UnsupportedInputError: a name is unknown, or there is no dense floating input to change.
    """
    tensors, names = tf.nest.flatten(x), _input_names(x, model)
    for name in chosen or ():
        if name not in names:
            raise UnsupportedInputError(
                f"There is no input {name!r}.{nearest(name, names)} Inputs: {', '.join(names)}."
            )
    able = [isinstance(tensor, tf.Tensor) and tensor.dtype.is_floating for tensor in tensors]
    unable = [name for name, ok in zip(names, able, strict=True) if not ok and name in (chosen or ())]
    if unable or not any(able):
        found = [f"{name}: {_kind(tensor)}" for name, tensor in zip(names, tensors, strict=True)]
        kinds = ", ".join(found[:8]) + (", ..." if len(found) > 8 else "")
        raise UnsupportedInputError(
            f"An attack moves dense inputs of a floating dtype by small amounts, and {unable or 'no input'} "
            f"{'is not' if unable else 'is'} one ({kinds}). Cast images to float32, and make sparse and ragged "
            "tensors dense, before `fit`; for tokens, attack the output of an embedding instead, as the input of a "
            "model of its own."
        )
    return [ok and (not chosen or name in chosen) for name, ok in zip(names, able, strict=True)]


def _kind(value: Any) -> str:
    dtype = getattr(getattr(value, "dtype", None), "name", "")
    return dtype if isinstance(value, tf.Tensor) else f"{type(value).__name__} {dtype}".rstrip()


def _input_names(x: Any, model: Any) -> list[str]:
    if isinstance(x, Mapping):
        return [str(name) for name in sorted(x) for _ in tf.nest.flatten(x[name])]  # All that is under one key.
    known = [tensor.name for tensor in getattr(model, "inputs", None) or []]
    count = len(tf.nest.flatten(x))
    return known if len(known) == count else [str(position) for position in range(count)]
