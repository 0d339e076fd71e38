"""Losses of single examples, as a model is compiled with them."""

from typing import Any

import tensorflow as tf

from trainstep import _seam
from trainstep.errors import ModelConflictError
from trainstep.step import Batch
from trainstep.strategies._mixing import of_rank


def losses_of_examples(strategy: str, model: Any, batch: Batch, y_pred: Any) -> tf.Tensor:
    """Return the loss of each example, as `model` is compiled: float32 (batch,).

    Args:
        strategy: that asks.
        model: compiled.
        batch: labels and weights.
        y_pred: all outputs of the model.

    Raises:
        ModelConflictError: it is compiled with none, or with one that has no value for each example.
    """
    outputs, labels, totals = tf.nest.flatten(y_pred), tf.nest.flatten(batch.y), []
    weights_of_outputs = _seam.weights_of_outputs(model, y_pred)
    weights_of_examples = _seam.for_each_output(model, batch.sample_weight, y_pred)
    for index, loss in enumerate(_seam.losses_of_outputs(model, y_pred)):
        if loss is None:
            continue
        values = tf.cast(_seam.losses_of_entries(loss, labels[index], outputs[index]), tf.float32)
        if values.shape.rank == 0:
            raise ModelConflictError(
                f"{strategy} needs the loss of each example, and that of the model is one number for all. "
                "Return the loss of each example, (batch,): Keras takes the mean of it."
            )
        mask, weights = _seam.mask_of(outputs[index]), weights_of_examples[index]
        counts = tf.ones_like(values) if mask is None else tf.cast(mask, tf.float32)
        if weights is not None:
            values *= of_rank(tf.cast(weights, tf.float32), values.shape.rank)
        axes = list(range(1, values.shape.rank))
        mean = tf.math.divide_no_nan(tf.reduce_sum(values * counts, axes), tf.reduce_sum(counts, axes))
        totals.append(weights_of_outputs[index] * mean)
    if not totals:
        raise ModelConflictError(
            f"{strategy} needs the loss of each example, and the model is compiled without one. Give `compile` "
            "a loss; what a model computes in a `compute_loss` of its own, or adds to the loss, is for all together."
        )
    return tf.add_n(totals)
