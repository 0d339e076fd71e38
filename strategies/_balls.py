"""Balls around examples: points in them, directions, projections, for perturbations of the input.

All balls are around each example by itself: `norm` is over everything but the first dimension. A radius is a number or
a scalar tensor, in units of the input.
"""

from typing import Any, Literal

import numpy as np
import tensorflow as tf

from trainstep.replicas import place_among_replicas

Norm = Literal["linf", "l2"]
Length = float | tf.Tensor


def step_length(epsilon: Length, steps: int) -> Length:
    """Return how long each of `steps` steps is where nobody says: 2.5 epsilon / steps, enough to cross the ball.

    Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018, section 5 and appendix B.
    """
    return 2.5 * epsilon / steps


def as_dtype(dtype: tf.DType, length: Length) -> tf.Tensor:
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
    radius = as_dtype(delta.dtype, epsilon)
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
    wide = project(wide, as_dtype(wide.dtype, epsilon) * (1 if norm == "linf" else 1 - 1e-12), norm)
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
    limit = as_dtype(x.dtype, epsilon)
    if norm == "linf":
        return tf.random.stateless_uniform(shape, seed, -limit, limit, x.dtype)[rows]
    normal = tf.random.stateless_normal(shape, seed, dtype=x.dtype)[rows]
    radii_seed = seed + tf.constant([0, 1])
    uniform = tf.random.stateless_uniform(shape[:1], radii_seed, dtype=x.dtype)[rows]
    dimensions = tf.cast(tf.size(x) / tf.maximum(tf.shape(x)[0], 1), x.dtype)
    # The share of a ball of radius r in the ball of radius 1 is r ** dimensions.
    radius = limit * tf.reshape(uniform, [-1] + [1] * (len(x.shape) - 1)) ** (1 / dimensions)
    return radius * ascent_direction(normal, "l2")
