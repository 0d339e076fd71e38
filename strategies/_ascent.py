"""Gradients at other weights than the model's own: what SAM and its kind have in common."""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from trainstep import _seam
from trainstep.gradients import Gradients, dense, differentiate
from trainstep.replicas import assign


def along(gradients: Gradients, length: float | tf.Tensor) -> Gradients:
    """Return the step of L2 norm `length`, over all together, along `gradients`; zero where all are zero."""
    gradients = [dense(gradient) for gradient in gradients]
    factor = length / (tf.linalg.global_norm(gradients) + 1e-12)
    return [None if gradient is None else gradient * tf.cast(factor, gradient.dtype) for gradient in gradients]


def gradients_after(
    model: Any, steps: Gradients, loss: Callable[[], tf.Tensor], random_state: Sequence[tuple[Any, Any]]
) -> Gradients:
    """Return the gradients where `steps` lead, and leave the weights where they were, to the bit.

    Args:
        model: whose `trainable_variables` they are.
        steps: what is added to each weight, the same on every replica; None for one that stays.
        loss: evaluates the model there; leaves no trace in metrics and batch-norm statistics.
        random_state: what `_seam.random_state` returned before the evaluation at the weights, for the same masks of
            dropout.
    """
    weights = model.trainable_variables
    before = [(weight, tf.identity(weight)) for weight in weights]  # A copy: to add and subtract leaves rounding error.
    moved = [(w, at + tf.cast(step, at.dtype)) for (w, at), step in zip(before, steps, strict=True) if step is not None]
    assign(moved)
    with tf.GradientTape() as tape:
        value = _seam.without_trace(model, loss, training=True, random_state=random_state)
    gradients = differentiate(model, tape, value, weights)
    assign(before)
    return gradients
