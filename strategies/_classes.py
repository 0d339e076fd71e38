"""Outputs that are classes: their probabilities, whatever cross-entropy they are trained by.

All are functions of tensors in float32: probabilities of 16 bits are too coarse for a logarithm.
"""

from collections.abc import Collection, Mapping
from typing import Any, Literal, NamedTuple

import keras
import tensorflow as tf

from trainstep import _seam
from trainstep.definition import without_classes
from trainstep.errors import ModelConflictError

Kind = Literal["categorical", "sparse", "binary"]


class Classes(NamedTuple):
    """One output that is trained by a cross-entropy."""

    place: int
    """Its place among the flattened outputs, and labels."""
    kind: Kind
    from_logits: bool

    def log_probabilities(self, outputs: Any) -> tf.Tensor:
        """Return the logarithms of the probabilities in `outputs`, those of the whole model: (batch, ..., classes).

        A binary output is (batch, ..., 2 * units) there, those against before those for.
        """
        values = tf.cast(tf.nest.flatten(outputs)[self.place], tf.float32)
        epsilon = keras.backend.epsilon()  # What Keras's cross-entropies clip probabilities at.
        if self.kind == "binary":
            if self.from_logits:
                return tf.concat([tf.math.log_sigmoid(-values), tf.math.log_sigmoid(values)], axis=-1)
            values = tf.clip_by_value(values, epsilon, 1 - epsilon)
            return tf.concat([tf.math.log(1 - values), tf.math.log(values)], axis=-1)
        if self.from_logits:
            return tf.nn.log_softmax(values, axis=-1)
        values = tf.math.divide_no_nan(values, tf.reduce_sum(values, axis=-1, keepdims=True))
        return tf.math.log(tf.clip_by_value(values, epsilon, 1 - epsilon))

    def targets(self, y: Any, outputs: Any) -> tf.Tensor:
        """Return the labels among `y`, those of the whole model, as probabilities: shaped as `log_probabilities`."""
        labels, values = tf.nest.flatten(y)[self.place], tf.nest.flatten(outputs)[self.place]
        if self.kind == "sparse":
            if labels.shape.rank == values.shape.rank:  # Keras takes a last axis of one.
                labels = tf.squeeze(labels, axis=-1)
            return tf.one_hot(tf.cast(labels, tf.int32), values.shape[-1], dtype=tf.float32)
        labels = tf.cast(labels, tf.float32)
        if self.kind == "binary":
            labels = tf.reshape(labels, tf.shape(values)) if labels.shape.rank != values.shape.rank else labels
            return tf.concat([1 - labels, labels], axis=-1)
        return labels

    def by_question(self, values: tf.Tensor) -> tf.Tensor:
        """Return `values`, shaped as `log_probabilities`, as (batch, ..., questions, classes).

        An output has one question, but for a binary one: each of its units is asked for yes or no.
        """
        if self.kind != "binary":
            return tf.expand_dims(values, axis=-2)
        return tf.stack(tf.split(values, 2, axis=-1), axis=-1)


def class_outputs(strategy: str, model: Any, y_pred: Any) -> list[Classes]:
    """Return the outputs of `model` that are trained by one of Keras's cross-entropies.

    Raises:
        ModelConflictError: there is none, or a loss leaves out the entries of a class.
    """
    found = []
    losses = _seam.losses_of_outputs(model, y_pred)
    for index, loss in enumerate(losses):
        described = _seam.cross_entropy(loss)
        if described is not None:
            _check_all_count(strategy, loss)
            found.append(Classes(index, *described))
    if not found:
        raise without_classes(strategy, losses)
    return found


def _check_all_count(strategy: str, loss: Any) -> None:
    """Raise `ModelConflictError` where `loss` is neither a mean over all entries nor a sum, nor each one alone."""
    if getattr(loss, "reduction", None) == "mean_with_sample_weight":
        raise ModelConflictError(
            f"{strategy} weighs entries, and the loss {loss.name!r} has reduction='mean_with_sample_weight', which "
            "divides by what they weigh. Take 'sum_over_batch_size' or 'sum'."
        )
    ignored = loss.get_config().get("ignore_class") if isinstance(loss, keras.losses.Loss) else None
    if ignored is not None:
        raise ModelConflictError(
            f"{strategy} looks at every entry, and the loss {loss.name!r} has ignore_class={ignored}. Give the "
            "entries to ignore a sample weight of 0 instead."
        )


def divergence(log_p: tf.Tensor, log_q: tf.Tensor) -> tf.Tensor:
    """Return the Kullback-Leibler divergence KL(p || q) of each entry, from logarithms: (batch, ...)."""
    return tf.reduce_sum(tf.exp(log_p) * (log_p - log_q), axis=-1)


def entropy(log_p: tf.Tensor) -> tf.Tensor:
    """Return the entropy of each entry, in nats: (batch, ...)."""
    return -tf.reduce_sum(tf.exp(log_p) * log_p, axis=-1)


def share_of_loss(model: Any, y_pred: Any, sample_weight: Any, values: Mapping[int, tf.Tensor]) -> tf.Tensor:
    """Return this replica's share of what `values` are to the loss of `model`: a float32 scalar.

    Of each output it is their mean, or sum, as its own loss takes it, times its loss weight.

    Args:
        model: compiled.
        y_pred: all its outputs.
        sample_weight: of the batch, or None.
        values: (batch, ...), by the place of their output among the flattened ones.
    """
    outputs, losses = tf.nest.flatten(y_pred), _seam.losses_of_outputs(model, y_pred)
    loss_weights = _seam.weights_of_outputs(model, y_pred)
    weights = _seam.for_each_output(model, sample_weight, y_pred)
    return tf.add_n(
        [
            loss_weights[place] * share_of_mean(losses[place], entries, outputs[place], weights[place])
            for place, entries in values.items()
        ]
    )


def share_of_mean(loss: Any, values: tf.Tensor, y_pred: tf.Tensor, sample_weight: Any) -> tf.Tensor:
    """Return this replica's share of the mean of `values`, taken as Keras takes that of a loss: a float32 scalar.

    Args:
        loss: of this output; it says whether it is a mean, or a sum.
        values: one for each entry: (batch, ...).
        y_pred: the output they are of, whose mask they have, if it has one.
        sample_weight: (batch, ...), or None; of a model with several outputs, that of this one.
    """
    weights = tf.ones_like(values)
    if sample_weight is not None:
        given = tf.cast(sample_weight, tf.float32)
        given = tf.squeeze(given, axis=-1) if given.shape.rank == values.shape.rank + 1 else given
        given = tf.reshape(given, tf.concat([tf.shape(given), [1] * (values.shape.rank - given.shape.rank)], axis=0))
        weights *= given
    mask, count = _seam.mask_of(y_pred), tf.cast(tf.size(values), tf.float32)
    if mask is not None:
        mask = tf.cast(mask, tf.float32)
        weights, count = weights * mask, tf.reduce_sum(mask)
    total = tf.reduce_sum(values * weights)
    if _seam.is_sum(loss):
        return total
    return tf.math.divide_no_nan(total, count * tf.distribute.get_strategy().num_replicas_in_sync)


def mean_divergence(
    strategy: str, model: Any, y_pred: Any, other: Any, sample_weight: Any, *, fixed: bool = False
) -> tf.Tensor:
    """Return this replica's share of the mean of KL(p || q): a float32 scalar.

    It is summed over the outputs of classes, each times its loss weight. Of an output of several yes-or-no answers it
    is the mean over these, as the cross-entropy is.

    Args:
        strategy: that asks.
        model: compiled.
        y_pred: all its outputs; p are the probabilities of those that are classes.
        other: outputs of the same structure; q is of these.
        sample_weight: of the batch, or None.
        fixed: whether p is a constant, through which there is no gradient.
    """
    found = {}
    for output in class_outputs(strategy, model, y_pred):
        log_p, log_q = output.log_probabilities(y_pred), output.log_probabilities(other)
        values = divergence(output.by_question(tf.stop_gradient(log_p) if fixed else log_p), output.by_question(log_q))
        found[output.place] = tf.reduce_mean(values, axis=-1)
    return share_of_loss(model, y_pred, sample_weight, found)


def weighed(model: Any, batch: Any, factor: float | tf.Tensor, indices: Collection[int] | None = None) -> Any:
    """Return sample weights with which losses count `factor` times as much as with those of `batch`.

    Args:
        model: compiled.
        batch: with labels.
        factor: a number, or a scalar tensor.
        indices: of the flattened outputs whose losses they are; None: all.
    """
    labels, given = tf.nest.flatten(batch.y), tf.nest.flatten(batch.sample_weight)
    weights = []
    for index, loss in enumerate(_seam.losses_of_outputs(model, batch.y)):
        weight = given[index] if len(given) > 1 else given[0]
        weight = tf.ones(_shape_of_entries(labels[index], loss)) if weight is None else tf.cast(weight, tf.float32)
        weights.append(weight * factor if indices is None or index in indices else weight)
    return weights[0] if len(weights) == 1 else tf.nest.pack_sequence_as(batch.y, weights)


def _shape_of_entries(labels: tf.Tensor, loss: Any) -> tf.Tensor:
    """Return the shape of what a loss has one value for: (batch, ...). Keras 3 takes weights of no other for a mask."""
    described = _seam.cross_entropy(loss)
    of_numbers = described is not None and described[0] == "sparse" and labels.shape[-1] != 1
    return tf.shape(labels) if of_numbers or labels.shape.rank == 1 else tf.shape(labels)[:-1]
