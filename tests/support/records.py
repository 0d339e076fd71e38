"""Runs and costs as a suite would leave them, made up: each value is chosen, none is measured."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trainstep.benchmarks.records import Budget, Cost, Epoch, Run, Settings, Target, key_of

ENVIRONMENT = {
    "trainstep": "0.1.0",
    "keras": "3.15.1",
    "tensorflow": "2.21.0",
    "python": "3.11.7",
    "platform": "Linux",
    "processor": "a processor",
    "processors": "2",
    "accelerators": "none",
    "time": "2026-11-25T00:00:00+00:00",
}


def settings(workload: str = "digits_cnn", **changes: Any) -> Settings:
    values: dict[str, Any] = {
        "budget": Budget(epochs=3),
        "batch_size": 64,
        "optimizer": {"class": "Adam", "learning_rate": 0.001},
        "loss": "sparse_categorical_crossentropy",
        "metrics": ("accuracy",),
        "attack": {"epsilon": 0.1, "clip_range": [0.0, 1.0]},
        "target": Target(metric="accuracy", value=0.9),
        "examples": 1437,
    }
    return Settings(workload=workload, **{**values, **changes})


def run(label: str, seed: int, metrics: Sequence[float], *, given: Settings | None = None, **changes: Any) -> Run:
    """Return a run with `metrics` after each epoch; an epoch takes 10 updates and half a second."""
    given = given or settings()
    spec = changes.pop("spec", {label: {}})
    environment = changes.pop("environment", ENVIRONMENT)
    epochs = tuple(
        Epoch(updates=10 * index, seconds=0.5 * index, loss=1 / index, metrics={given.metrics[0]: value})
        for index, value in enumerate(metrics, start=1)
    )
    values = {"robust_accuracy": 0.25, "calibration_error": 0.125, **changes}
    key = key_of("run", spec, given, environment, seed)
    return Run(
        key=key,
        label=label,
        spec=spec,
        seed=seed,
        settings=given,
        environment=environment,
        epochs=epochs,
        **values,
    )


def cost(label: str, ratio: float, *, given: Settings | None = None, **changes: Any) -> Cost:
    """Return a cost; a step of the control takes 2 ms, and 1 MiB."""
    given = given or settings()
    spec = changes.pop("spec", {label: {}})
    quartiles = tuple(0.002 * ratio * share for share in (0.95, 1.0, 1.05))
    values = {
        "trace_seconds": 1.5,
        "seconds": quartiles,
        "ratio": (0.95 * ratio, ratio, 1.05 * ratio),
        "examples_per_second": 32_000 / ratio,
        "peak_bytes": int(2**20 * ratio),
        "memory_ratio": ratio,
        **changes,
    }
    key = key_of("cost", spec, given, ENVIRONMENT)
    return Cost(key=key, label=label, spec=spec, settings=given, environment=ENVIRONMENT, **values)


def suite(
    labels: Mapping[str, float], *, workloads: Sequence[str] = ("digits_cnn",), seeds: int = 5, epochs: int = 8
) -> tuple[tuple[Run, ...], tuple[Cost, ...]]:
    """Return a whole suite: learning curves towards 0.9 and, by label, what is added to it, with noise by seed.

    Robust accuracy grows with the cost: strategies cost 1, 1.5, 2 and so on.
    """
    generator = np.random.default_rng(0)
    runs, costs = [], []
    for workload in workloads:
        given = settings(workload, budget=Budget(epochs=epochs))
        luck = generator.normal(scale=0.01, size=seeds)
        for number, (label, gain) in enumerate(labels.items()):
            costs.append(cost(label, 1 + 0.5 * number, given=given))
            for seed in range(seeds):
                final = 0.9 + gain + luck[seed] + generator.normal(scale=0.003)
                curve = [final - 0.5 * 0.5**epoch for epoch in range(epochs - 1)] + [final]
                robust = 0.3 + 0.1 * number + generator.normal(scale=0.01)
                error = abs(0.03 + generator.normal(scale=0.005))
                runs.append(run(label, seed, curve, given=given, robust_accuracy=robust, calibration_error=error))
    return tuple(runs), tuple(costs)
