"""Averages of weights: judging a model by them, while training goes on from the weights themselves."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import tensorflow as tf
from pydantic import Field

from trainstep import _seam
from trainstep.declaration import Slot
from trainstep.errors import ModelConflictError
from trainstep.replicas import assign, sum_over_replicas


def begin_average(averages: Sequence[Any], weights: Sequence[Any]) -> None:
    """Let each average be its weight."""
    assign([(average, tf.convert_to_tensor(w)) for average, w in zip(averages, weights, strict=True)])


def move_average(averages: Sequence[Any], weights: Sequence[Any], share: tf.Tensor) -> None:
    """Let each average go `share`, a float32 scalar, of the way to its weight."""
    pairs = [(tf.convert_to_tensor(a), tf.convert_to_tensor(w)) for a, w in zip(averages, weights, strict=True)]
    moved = [average + tf.cast(share, average.dtype) * (w - average) for average, w in pairs]
    assign(list(zip(averages, moved, strict=True)))


def move_statistics(averages: Sequence[Any], statistics: Sequence[Any], share: tf.Tensor) -> None:
    """Let each average go `share` of the way to its statistic; of one for each replica, to their mean."""
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    totals = sum_over_replicas([tf.convert_to_tensor(statistic) for statistic in statistics])
    move_average(averages, [total / replicas for total in totals], share)


BatchNorm = Literal["average", "copy", "reestimate"]


def batch_norm_option(default: BatchNorm) -> Any:
    """Return the field of an option of type `BatchNorm`."""
    return Field(
        default=default,
        description="Statistics the average is judged with: their average, a copy of those of the weights, or those of "
        "`trainstep.reestimate_batch_norm`, a copy until it is called.",
    )


def statistics_slots(batch_norm: BatchNorm) -> dict[str, Slot]:
    """Return the state that an average needs for its batch-norm statistics."""
    if batch_norm == "copy":
        return {}
    kept = {"statistics": Slot(per_statistic=True)}
    # The update they were estimated after: once training goes on they are no longer those of the average.
    return kept if batch_norm == "average" else {**kept, "estimated_at": Slot(initial=-1, dtype="int32")}


def average_for_evaluation(model: Any, state: Any) -> contextlib.AbstractContextManager[None]:
    """Return the context in which `model` has the average in `state`, and the statistics that go with it."""
    weights, averages = list(model.trainable_variables), list(state["average"])
    if "estimated_at" not in state or int(state["estimated_at"].numpy()) == int(state["updates"].numpy()):
        weights += _seam.statistics_of(model) if "statistics" in state else []
        averages += state.get("statistics", ())
    return exchanged(weights, averages)


def keep_estimated(strategy: str, state: Any, statistics: Sequence[tf.Tensor]) -> None:
    """Keep `statistics`, estimated for the average in `state`.

    Raises:
        ModelConflictError: it was not declared by the option `batch_norm`.
    """
    if "estimated_at" not in state:
        raise ModelConflictError(
            f"{strategy} keeps statistics estimated anew with batch_norm='reestimate' only. Apply it with that option."
        )
    for variable, value in zip(state["statistics"], statistics, strict=True):
        variable.assign(value)
    state["estimated_at"].assign(int(state["updates"].numpy()))


@contextlib.contextmanager
def exchanged(weights: Sequence[Any], averages: Sequence[Any]) -> Iterator[None]:
    """Give `weights` the values of `averages`, and afterwards their own again, to the bit. Outside of a step."""
    before = [tf.convert_to_tensor(weight) for weight in weights]
    for weight, average in zip(weights, averages, strict=True):
        weight.assign(tf.convert_to_tensor(average))
    try:
        yield
    finally:
        for weight, value in zip(weights, before, strict=True):
            weight.assign(value)
