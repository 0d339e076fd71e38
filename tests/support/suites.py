"""A suite small enough for seconds, for tests to import, and to be run and killed as a script.

    python suites.py STORE WORKERS

Run so, its functions and its strategy are those of `__main__`, which no worker can import.
"""

import os
import signal
import sys
import time
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from trainstep import registry
from trainstep.benchmarks import engine
from trainstep.benchmarks.data import Split
from trainstep.benchmarks.metrics import Metrics, by_output
from trainstep.benchmarks.records import Budget, Settings
from trainstep.benchmarks.runner import Task
from trainstep.benchmarks.store import Store
from trainstep.composition import compose
from trainstep.declaration import Cost, Declaration, Stage, StrategyOptions
from trainstep.gradients import scale
from trainstep.step import Strategy


class HalvedOptions(StrategyOptions):
    """None."""


class Halved(Strategy):
    """A third party's: half the gradient."""

    declaration = Declaration(
        name="halved",
        stage=Stage.CLIPPING,
        summary="Half the gradient.",
        reference="none",
        options=HalvedOptions,
        neutral=None,
        why_not_neutral="it has no options",
        cost=lambda options: Cost(time=1.0, memory="none", batch_norm="as in plain training"),
    )

    def update_weights(self, update):
        super().update_weights(update._replace(gradients=scale(update.gradients, 0.5)))


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
    }
    return Settings(**{**values, **changes})


def task(build=build, load=load, make_optimizer=lambda: keras.optimizers.SGD(0.1), **changes: Any) -> Task:
    chosen = settings(**changes)
    return Task(
        build=build,
        load=load,
        make_optimizer=make_optimizer,
        loss="sparse_categorical_crossentropy",
        metrics=Metrics.of(by_output("accuracy")),
        settings=chosen,
    )


def suite(specs: Any = None, seeds: tuple[int, ...] = (0, 1), **changes: Any) -> Suite:
    one = task(**changes)
    compositions = {label: compose(spec) for label, spec in (specs or SPECS).items()}
    return Suite({"tiny": one}, compositions, "standard", seeds, {"tiny": one.settings})


FATES = {
    1: os.abort,
    2: lambda: time.sleep(1000),
    3: lambda: os.kill(os.getpid(), signal.SIGKILL),
    4: lambda: np.zeros(2**50),
}


def doomed(seed: int) -> keras.Model:
    """Return a model, unless the seed is one of `FATES`."""
    FATES.get(seed, lambda: None)()
    return build(seed)


def killable() -> Suite:
    """Return twelve runs."""
    return suite({**SPECS, "halved": "halved"}, seeds=(0, 1, 2, 3))


if __name__ == "__main__":
    registry.register(Halved)
    with Store(sys.argv[1]) as opened:
        engine.run(killable(), opened, engine.Options(workers=int(sys.argv[2]), cost=False))
