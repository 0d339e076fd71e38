"""Gradients, as strategies hand them on: what is done with a list of them.

A list is aligned with `model.trainable_variables`. A weight the loss does not depend on has None; the
gradient of an embedding is a `tf.IndexedSlices`, and stays sparse until something needs it dense.
"""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

Gradients = list[Any]


def differentiate(model: Any, tape: tf.GradientTape, loss: tf.Tensor, sources: Any) -> Any:
    """Return the gradients of `loss` with respect to `sources`, through the model's loss scale and free of it."""
    factor = model.loss_scale()
    if factor is None:
        return tape.gradient(loss, sources)
    # Seeding the backward pass with the scale is the same as scaling the loss, and leaves the loss as it is.
    gradients = tape.gradient(loss, sources, output_gradients=tf.cast(factor, loss.dtype))
    return scale(gradients, 1 / factor)


def scale(gradients: Sequence[Any], factor: tf.Tensor | float) -> list[Any]:
    """Multiply each gradient by the scalar `factor`; a None stays None, an `IndexedSlices` sparse."""
    return [_scaled(gradient, factor) for gradient in gradients]


def _scaled(gradient: Any, factor: tf.Tensor | float) -> Any:
    if gradient is None:
        return None
    if isinstance(gradient, tf.IndexedSlices):
        values = gradient.values * tf.cast(factor, gradient.values.dtype)
        return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)
    return gradient * tf.cast(factor, gradient.dtype)


def dense(gradient: Any) -> Any:
    """Return an `IndexedSlices` as the tensor it stands for, each row the sum of its slices."""
    if not isinstance(gradient, tf.IndexedSlices):
        return gradient
    shape: Any = gradient.dense_shape
    rows = tf.cast(shape[0], tf.int64)
    return tf.math.unsorted_segment_sum(gradient.values, gradient.indices, rows)


def all_finite(gradients: Sequence[Any]) -> tf.Tensor:
    """Return whether every entry of every gradient is finite, a boolean scalar; a None is."""
    values = [g.values if isinstance(g, tf.IndexedSlices) else g for g in gradients if g is not None]
    return tf.reduce_all([tf.reduce_all(tf.math.is_finite(value)) for value in values])
