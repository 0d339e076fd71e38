"""Batches drawn from, and mixed with themselves: what mixup, cutmix and their kind have in common.

Replicas draw what one device would, and mix with examples of one another: rows of all of them are gathered first.
"""

import math
from typing import Any, NamedTuple

import tensorflow as tf

from trainstep import _seam
from trainstep.errors import UnsupportedInputError
from trainstep.replicas import gather_over_replicas, place_among_replicas
from trainstep.step import Batch
from trainstep.strategies._seeds import next_seed


class Rows(NamedTuple):
    """The place of a replica's examples among those of the whole batch: int32 scalars."""

    first: tf.Tensor
    here: tf.Tensor
    of_all: Any

    def of(self, values: tf.Tensor) -> tf.Tensor:
        """Return those of this replica among `values` of all examples."""
        return values[self.first : self.first + self.here]


def rows_of(x: Any) -> Rows:
    """Return the place of the examples `x`."""
    count = _seam.num_examples(x)
    first, of_all = place_among_replicas(count)
    return Rows(first, count, of_all)


def seeds_of_step(strategy: str, model: Any, count: int) -> list[tf.Tensor]:
    """Return so many seeds for stateless random numbers, others at each step, see `next_seed`."""
    return tf.unstack(tf.random.split(next_seed(strategy, model), count))


def symmetric_beta(alpha: float, shape: Any, seed: tf.Tensor) -> tf.Tensor:
    """Return draws from Beta(alpha, alpha), without rejection: XLA has no gamma.

    T = sqrt(2 alpha (U^(-1 / alpha) - 1)) cos(2 pi V) has Student's distribution of 2 alpha degrees of freedom, for
    uniform U and V (Bailey, Mathematics of Computation 1994), and (1 + T / sqrt(2 alpha + T^2)) / 2 this one. Written
    so that nothing overflows.
    """
    u, v = tf.unstack(tf.random.stateless_uniform(tf.concat([[2], shape], axis=0), seed))
    log_power = tf.math.log(u) / alpha
    power, rest = tf.exp(log_power), -tf.math.expm1(log_power)
    cosine = tf.cos(2 * math.pi * v)
    return (1 + tf.math.divide_no_nan(tf.sqrt(rest) * cosine, tf.sqrt(power + rest * tf.square(cosine)))) / 2


def partners(batch: Batch, rows: Rows, seed: tf.Tensor) -> Batch:
    """Return for each example another of the whole batch, by one random permutation of it.

    Inputs that are no dense tensors are left as they are.
    """
    return examples_at(batch, rows.of(tf.argsort(tf.random.stateless_uniform([rows.of_all], seed))))


def examples_at(batch: Batch, places: tf.Tensor) -> Batch:
    """Return the examples at these places among those of all replicas; sparse tensors are left as they are."""
    structure = (batch.x, batch.y, batch.sample_weight)
    flat, replicas = tf.nest.flatten(structure), tf.distribute.get_strategy().num_replicas_in_sync
    able = [index for index, value in enumerate(flat) if can_be_taken(value, replicas)]
    dense = [index for index in able if isinstance(flat[index], tf.Tensor)]
    for index, values in zip(dense, gather_over_replicas([flat[index] for index in dense]), strict=True):
        flat[index] = values
    for index in able:
        flat[index] = tf.gather(flat[index], places)
    return Batch(*tf.nest.pack_sequence_as(structure, flat))


def can_be_taken(value: Any, replicas: int) -> bool:
    """Tell whether examples of `value` can be exchanged between so many replicas."""
    if replicas == 1:
        return isinstance(value, (tf.Tensor, tf.RaggedTensor))
    return isinstance(value, tf.Tensor) and value.dtype != tf.string


def mixed(values: tf.Tensor, others: tf.Tensor, share: tf.Tensor) -> tf.Tensor:
    """Return `share * values + (1 - share) * others`, of shape (batch, ...); `share` may have fewer axes."""
    share = tf.cast(of_rank(share, len(values.shape)), values.dtype)
    return share * values + (1 - share) * others


def with_mixed_labels(batch: Batch, others: Batch, share: tf.Tensor) -> Batch:
    """Return `batch` with its labels and weights mixed with those of its partners.

    The loss of a mixed label is to be that of both, each counting as much as its example does: `share * w * L(y)` and
    `(1 - share) * w' * L(y')`. So the new weight is the mixture of both, and the label that by their parts of it.

    Args:
        batch: the examples.
        others: the partner of each.
        share: of the example itself: float32 (batch,).

    Raises:
        UnsupportedInputError: weights have names, and labels none.
    """
    if isinstance(batch.sample_weight, dict) and not isinstance(batch.y, dict):
        raise UnsupportedInputError(
            f"Sample weights by name ({', '.join(batch.sample_weight)}) are mixed with labels by name, and the labels "
            "are none of a dict. Give both as dicts, or both in the order of the outputs."
        )
    labels = []
    for index, (y, other) in enumerate(zip(tf.nest.flatten(batch.y), tf.nest.flatten(others.y), strict=True)):
        weights, other_weights = (
            _seam.for_each_output(None, each.sample_weight, each.y)[index] for each in (batch, others)
        )
        labels.append(mixed(y, other, _part_of_weight(share, weights, other_weights)))
    flat = zip(tf.nest.flatten(batch.sample_weight), tf.nest.flatten(others.sample_weight), strict=True)
    weights = [None if w is None else mixed(_float(w), _float(other), share) for w, other in flat]
    return batch._replace(
        y=tf.nest.pack_sequence_as(batch.y, labels),
        sample_weight=tf.nest.pack_sequence_as(batch.sample_weight, weights),
    )


def _part_of_weight(share: tf.Tensor, weights: Any, other_weights: Any) -> tf.Tensor:
    if weights is None:
        return share
    weights = _float(weights)
    total, share = mixed(weights, _float(other_weights), share), of_rank(share, len(weights.shape))
    return tf.where(total == 0, share, tf.math.divide_no_nan(share * weights, total))


def _float(weights: tf.Tensor) -> tf.Tensor:
    return tf.cast(weights, tf.float32)


def of_rank(values: tf.Tensor, rank: int) -> tf.Tensor:
    """Return `values`, of shape (batch, ...), with ones at the end of its shape, or less of them."""
    if len(values.shape) > rank:
        return tf.squeeze(values, axis=-1)
    return tf.reshape(values, tf.concat([tf.shape(values), [1] * (rank - len(values.shape))], axis=0))


def check_labels(strategy: str, y: Any) -> None:
    """Refuse labels that cannot be mixed.

    Raises:
        UnsupportedInputError: there are none, or they are integers.
    """
    labels = tf.nest.flatten(y)
    if None in labels:
        raise UnsupportedInputError(f"{strategy} mixes inputs and labels, and there are no labels. Pass `y` to `fit`.")
    for label in labels:
        if not isinstance(label, tf.Tensor) or not label.dtype.is_floating:
            found = label.dtype.name if isinstance(label, tf.Tensor) else type(label).__name__
            raise UnsupportedInputError(
                f"{strategy} mixes labels, which must be dense and of a floating dtype, and these are {found}. Turn "
                "class numbers into one-hot labels, keras.utils.to_categorical(y).astype('float32'), and cast numbers."
            )
