"""What a step costs, as a ratio to the control, on a machine that may be busy with other things.

All strategies are in memory at once and train in short slices that take turns: what slows the
machine down for a while slows them all. The ratio is taken within each round and its median over
the rounds.
"""

import time
from collections.abc import Mapping
from statistics import median
from typing import Any

import numpy as np
import tensorflow as tf

from trainstep.benchmarks.data import first_batch
from trainstep.benchmarks.result import StepCost
from trainstep.benchmarks.runner import Clock, Trainer, first_line, quiet_tracing

_LONGEST_SLICE = 256


def measure_costs(
    trainers: Mapping[str, Trainer],
    *,
    control: str,
    seed: int,
    rounds: int = 13,
    slice_seconds: float = 0.05,
) -> tuple[dict[str, StepCost], dict[str, str]]:
    """Return the cost of a step by label, and for strategies that cannot train the reason by label.

    Tracing and compilation are off the clock. All steps train on one batch, so that reading data is as well.

    Args:
        trainers: strategies by label, all on one task.
        control: the label others are divided by.
        seed: of the models.
        rounds: how often each strategy has its turn.
        slice_seconds: about how long a turn of the control is.
    """
    with quiet_tracing():
        task = trainers[control].task
        dataset = tf.data.Dataset.from_tensors(first_batch(task.train, task.batch_size)).repeat()
        slices, failures = _ready(trainers, dataset, seed)
        if not slices:
            return {}, failures
        fastest = min(each.seconds(4) for each in slices.values())
        # A multiple of 8, so that slices hold whole windows of the usual gradient accumulation.
        steps = min(_LONGEST_SLICE, 8 * max(1, round(slice_seconds / fastest / 8)))
        labels, seconds = list(slices), {label: [] for label in slices}
        for turn in range(rounds):
            first = turn % len(labels)  # Who comes first may find caches cold: each in turn.
            for label in labels[first:] + labels[:first]:
                if label in failures:
                    continue
                try:
                    seconds[label].append(slices[label].seconds(steps))
                except Exception as error:  # noqa: BLE001  As in `_ready`: it is that strategy's result.
                    failures[label] = first_line(error)
    costs = {
        label: _cost(slices[label].trace_seconds, values, None if control in failures else seconds.get(control))
        for label, values in seconds.items()
        if label not in failures
    }
    return costs, failures


def _cost(trace_seconds: float, seconds: list[float], control: list[float] | None) -> StepCost:
    if control is None:
        return StepCost(trace_seconds=trace_seconds, seconds=median(seconds), ratio=None, low=None, high=None)
    low, middle, high = (float(value) for value in np.quantile(np.divide(seconds, control), (0.25, 0.5, 0.75)))
    return StepCost(trace_seconds=trace_seconds, seconds=median(seconds), ratio=middle, low=low, high=high)


class _Slices:
    """A model in training, some steps at a time. Making one raises whatever training raises."""

    def __init__(self, model: Any, dataset: tf.data.Dataset) -> None:
        clock = Clock()
        model.fit(dataset, steps_per_epoch=2, epochs=1, shuffle=False, callbacks=[clock], verbose=0)
        self.trace_seconds = clock.durations[0]
        self._model, self._iterator = model, iter(dataset)
        self.seconds(2)

    def seconds(self, steps: int) -> float:
        """Train for `steps` steps and return seconds a step."""
        begin = time.perf_counter()
        logs = None
        for _ in range(steps):
            logs = self._model.train_function(self._iterator)
        tf.nest.map_structure(np.asarray, logs)  # Waits until the last step is done.
        return (time.perf_counter() - begin) / steps


def _ready(
    trainers: Mapping[str, Trainer], dataset: tf.data.Dataset, seed: int
) -> tuple[dict[str, _Slices], dict[str, str]]:
    ready, failures = {}, {}
    for label, trainer in trainers.items():
        try:
            ready[label] = _Slices(trainer.ready(seed), dataset)
        except Exception as error:  # noqa: BLE001  Whatever a strategy raises is its result; the others go on.
            failures[label] = first_line(error)
    return ready, failures
