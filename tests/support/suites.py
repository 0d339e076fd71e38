"""A suite small enough for seconds, in a module that workers can import."""

import os
import signal
import time
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from trainstep.benchmarks.data import Split
from trainstep.benchmarks.records import Budget, Settings
from trainstep.benchmarks.runner import Task
from trainstep.composition import compose

SPECS = {"standard": "standard", "clipped": {"gradient_clipping": {"global_clipnorm": 0.1}}}


@dataclass(frozen=True)
class Suite:
    """What `request.suite_of` returns."""

    tasks: dict[str, Task]
    compositions: dict[str, Any]
    control: str
    seeds: tuple[int, ...]
    settings: dict[str, Settings]


def build(seed: int) -> keras.Model:
    layers = keras.layers
    return keras.Sequential([layers.Input((4,)), layers.Dense(3, "tanh"), layers.Dense(2, "softmax")])


def load() -> Split:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(22, 4)).astype("float32")
    y = (x.sum(axis=1) > 0).astype("int64")
    return Split((x, y), (x[:10], y[:10]))


def settings(**changes: Any) -> Settings:
    values = {
        "workload": "tiny",
        "budget": Budget(epochs=2),
        "batch_size": 8,
        "optimizer": {"class": "SGD"},
        "loss": "sparse_categorical_crossentropy",
        "metrics": ("accuracy",),
        "attack": {"epsilon": 0.1},
    }
    return Settings(**{**values, **changes})


def task(build=build, load=load, make_optimizer=lambda: keras.optimizers.SGD(0.1), **changes: Any) -> Task:
    chosen = settings(**changes)
    return Task(
        build=build,
        load=load,
        make_optimizer=make_optimizer,
        loss="sparse_categorical_crossentropy",
        make_metrics=lambda: ["accuracy"],
        settings=chosen,
    )


def suite(specs: Any = None, seeds: tuple[int, ...] = (0, 1), **changes: Any) -> Suite:
    one = task(**changes)
    compositions = {label: compose(spec) for label, spec in (specs or SPECS).items()}
    return Suite({"tiny": one}, compositions, "standard", seeds, {"tiny": one.settings})
