"""What a step costs, as a ratio to the control, on a machine that may be busy with other things.

All strategies are in memory at once and train in short slices that take turns: what slows the
machine down for a while slows them all. The ratio is taken within each round and its median over
the rounds. Nothing else of the suite runs meanwhile.

Memory is what TensorFlow's allocator says that tensors took at most during some steps, over what they took before.
On a GPU it always knows; on a CPU the process must have been started with `COUNTED_MEMORY` in its environment.
"""

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from trainstep.benchmarks.records import Cost, key_of
from trainstep.benchmarks.runner import Bench, Trainer, quiet_tracing, workplace
from trainstep.errors import first_line

COUNTED_MEMORY = {"TF_CPU_ALLOCATOR_USE_BFC": "true", "TF_CPU_BFC_MEM_LIMIT_IN_MB": "1048576"}
"""Lets TensorFlow count the memory of tensors on a CPU. The limit is of addresses, far above what a machine has."""

_LONGEST_SLICE = 256
_WINDOW = 8
"""Steps in which memory is looked at, and of which slices are multiples: whole windows of the usual accumulation."""


def cost_job(workload: str, labels: Sequence[str], control: str, seed: int) -> list[Cost]:
    """Measure costs in the process of a worker; the control's is among them, the first."""
    place = workplace()
    # New ones: where runs happen in this process as well, tracing is to be on the clock of the first of them.
    trainers = {label: place.new_trainer(workload, label) for label in dict.fromkeys([control, *labels])}
    return measure_costs(trainers, control=control, seed=seed, where=place.environment)


def measure_costs(
    trainers: Mapping[str, Trainer],
    *,
    control: str,
    seed: int,
    where: Mapping[str, str],
    rounds: int = 13,
    slice_seconds: float = 0.05,
) -> list[Cost]:
    """Return the cost of a step by strategy; for one that cannot train, the reason.

    Tracing and compilation are off the clock. All steps train on one batch, so that reading data is as well.

    Args:
        trainers: strategies by label, all on one task.
        control: the label others are divided by.
        seed: of the models.
        where: versions and machine, see `environment`.
        rounds: how often each strategy has its turn.
        slice_seconds: about how long a turn of the control is.
    """
    bench = trainers[control].bench
    with quiet_tracing():
        slices, seconds, failures = _take_turns(trainers, bench, seed, rounds, slice_seconds)
        peaks = {label: each.peak_bytes() for label, each in slices.items() if label not in failures}
    examples = int(tf.shape(tf.nest.flatten(bench.first_batch)[0])[0])
    costs = []
    for label, trainer in trainers.items():
        if label in failures:
            measured: dict[str, Any] = {"failure": failures[label]}
        else:
            quartiles = _quartiles(seconds[label])
            measured = {
                "trace_seconds": slices[label].trace_seconds,
                "seconds": quartiles,
                "ratio": None if control in failures else _quartiles(np.divide(seconds[label], seconds[control])),
                "examples_per_second": examples / quartiles[1],
                "peak_bytes": peaks[label],
                "memory_ratio": _ratio(peaks[label], peaks.get(control)),
            }
        costs.append(
            Cost(
                key=key_of("cost", trainer.spec, bench.settings, where),
                label=label,
                spec=trainer.spec,
                settings=bench.settings,
                environment=dict(where),
                **measured,
            )
        )
    return costs


def _take_turns(
    trainers: Mapping[str, Trainer], bench: Bench, seed: int, rounds: int, slice_seconds: float
) -> tuple[dict[str, "_Slices"], dict[str, list[float]], dict[str, str]]:
    slices: dict[str, _Slices] = {}
    failures: dict[str, str] = {}
    for label, trainer in trainers.items():
        try:
            dataset = tf.data.Dataset.from_tensors(bench.first_batch).repeat()
            slices[label] = _Slices(trainer.ready(seed), dataset)
        except Exception as error:  # noqa: BLE001  Whatever a strategy raises is its result; the others go on.
            failures[label] = first_line(error)
    labels, seconds = list(slices), {label: [] for label in slices}
    if not labels:
        return {}, {}, failures
    fastest = min(each.seconds(4) for each in slices.values())
    steps = min(_LONGEST_SLICE, _WINDOW * max(1, round(slice_seconds / fastest / _WINDOW)))
    for turn in range(rounds):
        first = turn % len(labels)  # Who comes first may find caches cold: each in turn.
        for label in labels[first:] + labels[:first]:
            if label in failures:
                continue
            try:
                seconds[label].append(slices[label].seconds(steps))
            except Exception as error:  # noqa: BLE001  As above.
                failures[label] = first_line(error)
    return slices, seconds, failures


def _quartiles(values: Any) -> tuple[float, float, float]:
    low, middle, high = (float(value) for value in np.quantile(values, (0.25, 0.5, 0.75)))
    return low, middle, high


def _ratio(bytes_: int | None, control: int | None) -> float | None:
    return bytes_ / control if bytes_ is not None and control else None


class _Slices:
    """A model in training, some steps at a time. Making one raises whatever training raises."""

    def __init__(self, model: Any, dataset: tf.data.Dataset) -> None:
        self._model, self._iterator = model, iter(dataset)
        begin = time.perf_counter()
        # By `fit`, which makes the training function, and what else Keras makes at the first step.
        model.fit(dataset, steps_per_epoch=1, epochs=1, shuffle=False, verbose=0)
        self.trace_seconds = time.perf_counter() - begin
        self.seconds(2)

    def seconds(self, steps: int) -> float:
        """Train for `steps` steps and return seconds a step."""
        begin = time.perf_counter()
        logs = None
        for _ in range(steps):
            logs = self._model.train_function(self._iterator)
        tf.nest.map_structure(np.asarray, logs)  # Waits until the last step is done.
        return (time.perf_counter() - begin) / steps

    def peak_bytes(self) -> int | None:
        """Return what tensors took at most in some steps, over what they took before; None where nobody counts."""
        accelerators = tf.config.list_logical_devices("GPU")
        if not accelerators and any(os.environ.get(name) != value for name, value in COUNTED_MEMORY.items()):
            return None  # TensorFlow's usual allocator on a CPU answers too, and counts large pieces only.
        device = (accelerators or tf.config.list_logical_devices("CPU"))[0].name
        before = tf.config.experimental.get_memory_info(device)["current"]
        tf.config.experimental.reset_memory_stats(device)
        self.seconds(_WINDOW)
        return tf.config.experimental.get_memory_info(device)["peak"] - before
