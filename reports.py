"""Numbers that strategies report of their updates: declared as `Report`s, kept only where a strategy collects them.

A number is kept in variables of its own, away from the model, so that weights and files are those of a model
without. It is updated on every replica alike, inside of whatever decides whether there is an update.
"""

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from trainstep.declaration import Report
from trainstep.replicas import as_one, assign, assign_add

_TALLIES: "weakref.WeakKeyDictionary[Any, dict[str, Tally]]" = weakref.WeakKeyDictionary()
_TRAINING: "weakref.WeakSet[Any]" = weakref.WeakSet()
_LEFT_OUT: "weakref.WeakSet[Any]" = weakref.WeakSet()
"""Models that are evaluated now, which is no part of their training."""


class Tally:
    """One reported number over an epoch; it answers what Keras asks of a metric. To be made outside of replicas."""

    def __init__(self, name: str, report: Report) -> None:
        self.name, self.report = name, report
        aggregation = tf.VariableAggregation.ONLY_FIRST_REPLICA
        self._total, self._count = [
            tf.Variable(tf.zeros(()), trainable=False, name=f"{name}_{part}", aggregation=aggregation)
            for part in ("total", "count")
        ]

    @property
    def variables(self) -> list[tf.Variable]:
        """The sum of the numbers, or the last one, and how many there were: float32 scalars."""
        return [self._total, self._count]

    def add(self, value: tf.Tensor) -> None:
        """Take in one more number, the same on every replica."""
        value = tf.cast(value, tf.float32)
        if self.report.over == "last":
            assign([(self._total, value)])
        else:
            assign_add([(self._total, value), (self._count, 1.0)])

    def result(self) -> tf.Tensor:
        """Return the number of the epoch so far, a float32 scalar; 0 where nothing was reported, as Keras's metrics."""
        total = tf.convert_to_tensor(self._total)
        if self.report.over == "mean":
            return tf.math.divide_no_nan(total, tf.convert_to_tensor(self._count))
        return total

    def reset_state(self) -> None:
        """Begin anew, as Keras does at the start of an epoch."""
        for variable in self.variables:
            variable.assign(0.0)


def prepare(model: Any) -> None:
    """Make what the reports of `model` are kept in, where a strategy collects them. Outside of a step."""
    if not type(model).collects_reports:
        return
    present = _TALLIES.setdefault(model, {})
    with tf.init_scope(), model.distribute_strategy.scope():
        for name, report in type(model).declared_reports.items():
            if name not in present or present[name].report != report:
                present[name] = Tally(name, report)


def tallies(model: Any) -> list[Tally]:
    """Return what is kept of the reports of `model`; nothing where no strategy collects them."""
    if not type(model).collects_reports:
        return []
    present = _TALLIES.get(model, {})
    return [present[name] for name in type(model).declared_reports if name in present]


def shown(model: Any) -> list[Tally]:
    """Return what is among the metrics of `model` now: its reports, while it is trained."""
    return tallies(model) if model in _TRAINING else []


def results(model: Any) -> dict[str, tf.Tensor]:
    """Return the reported numbers by name, each of the epoch so far."""
    return {tally.name: as_one(tally.result()) for tally in tallies(model)}


@contextlib.contextmanager
def training(model: Any, active: bool = True) -> Iterator[None]:
    """Count the reports of `model` among its metrics, as long as this lasts; or, not `active`, leave them out."""
    before = model in _TRAINING, model in _LEFT_OUT
    _put(model, active, not active)
    try:
        yield
    finally:
        _put(model, *before)


def _put(model: Any, trains: bool, left_out: bool) -> None:
    (_TRAINING.add if trains else _TRAINING.discard)(model)
    (_LEFT_OUT.add if left_out else _LEFT_OUT.discard)(model)


def reset(model: Any) -> None:
    """Forget what was reported so far, unless the reports are left out now: an evaluation is no new epoch."""
    if model not in _LEFT_OUT:
        for tally in tallies(model):
            tally.reset_state()
