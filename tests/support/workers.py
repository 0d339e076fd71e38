"""What one of several processes trains; without TF_CONFIG, and imported, what one process alone trains.

python workers.py FOLDER first|again
"""

import functools
import json
import os
import pathlib
import runpy
import sys
from collections.abc import Callable, Sequence
from typing import Any

import backups
import keras
import numpy as np
import tensorflow as tf
from catalogue import NAMES, companies, spec_of, task_of
from economy import economize
from nets import X, Y, dense, sgd

import trainstep

BATCH, EPOCHS, EXAMPLES = 4, 2, 20
RATE = 0.02  # At five times that, three strategies together blow up rounding to differences.
FULL = {
    "adversarial": {"epsilon": 0.1, "random_start": True},
    "gradient_accumulation": {"steps": 2},
    "gradient_clipping": {"global_clipnorm": 0.5},
    # At the usual scale four examples overflow together where two do not.
    "mixed_precision": {"dtype": "float16", "initial_scale": 2.0**8},
    "skip_nonfinite": {},
}


def deferred() -> keras.Model:
    """Return a net that is built at its first batch, without randomness and without statistics per replica."""
    return keras.Sequential([keras.layers.Dense(5, "tanh"), keras.layers.Dense(1)])


def normalized() -> keras.Model:
    """Return a net that is built at its first batch, with statistics of the whole batch."""
    layers = keras.layers
    return keras.Sequential([layers.Dense(5, "tanh"), layers.BatchNormalization(synchronized=True), layers.Dense(1)])


class Subclassed(keras.Model):
    """Is built at its first batch, too, and evaluates in a way of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = keras.layers.Dense(5, "tanh"), keras.layers.Dense(1)

    def call(self, x: Any) -> Any:
        return self.out(self.hidden(x))

    def test_step(self, data: Any) -> dict[str, Any]:
        x, *rest = keras.utils.unpack_x_y_sample_weight(data)
        return super().test_step((x + 1, *rest))


def is_judged(name: str) -> bool:
    """Tell whether a scenario is evaluated, too: a company and most strategies are judged as the nets below are."""
    if name not in NAMES:
        return "+" not in name
    return "evaluation_weights" in vars(trainstep.get(name))


# A long ascent: after a short one the two gradients are so nearly parallel that rounding decides where they differ.
OWN = {"look_sam": {"look_sam": {"rho": 0.5}}}
"""Strategies that are to be trained with these options."""
COMPANIES = {
    "+".join(spec): spec
    for spec in companies(spec_of(*(n for n in NAMES if not is_judged(n) and n not in OWN)).items())
}
SCENARIO_OF = {name: scenario for scenario, spec in COMPANIES.items() for name in spec}
"""The scenario in which a strategy is trained, where it has none of its own name."""
SCENARIOS: dict[str, tuple[Callable[[], keras.Model], Any]] = {
    **{scenario: (functools.partial(dense, task_of(*spec)), spec) for scenario, spec in COMPANIES.items()},
    **{name: (functools.partial(dense, task_of(name)), spec_of(name)) for name in NAMES if name not in SCENARIO_OF},
    **{name: (dense, spec) for name, spec in OWN.items()},
    "full stack": (dense, FULL),
    "deferred build": (deferred, {**FULL, "mixed_precision": {"dtype": "bfloat16"}}),
    "subclassed": (Subclassed, FULL),
}


def train(name: str, distribution: Any, callbacks: Sequence[keras.callbacks.Callback] = ()) -> dict[str, Any]:
    """Fit, evaluate and predict; return all there is to compare."""
    build, spec = SCENARIOS[name]
    task = task_of(*spec)
    metrics = {"metrics": ["mae"]} if is_judged(name) and not task.outputs else {}
    x, y = tf.nest.map_structure(lambda values: values[:EXAMPLES], (task.x, task.y))
    validation = tf.nest.map_structure(lambda values: values[:8], (x + 1, y)) if is_judged(name) else None
    keras.utils.set_random_seed(0)
    with distribution.scope():
        model = trainstep.apply(build(), spec)
        model.compile(sgd(RATE, momentum=0.9), task.loss, **metrics)
    schedule = keras.callbacks.LearningRateScheduler(lambda epoch: RATE / (epoch + 1))
    history = model.fit(
        x,
        y,
        batch_size=BATCH,
        epochs=EPOCHS,
        shuffle=False,
        verbose=0,
        validation_data=validation,
        callbacks=[schedule, *callbacks],
    )
    logs = {key: list(map(float, values)) for key, values in history.history.items()}
    logs.pop("lr", None)  # Each Keras has a name of its own for it.
    left = {"logs": logs, "weights": [weight.tolist() for weight in model.get_weights()]}
    if not is_judged(name):
        return left
    return {
        **left,
        "evaluate": model.evaluate(x, y, batch_size=BATCH, verbose=0, return_dict=True),
        "predict": [values.tolist() for values in tf.nest.flatten(model.predict(x, batch_size=BATCH, verbose=0))],
    }


def with_backup(folder: pathlib.Path, distribution: Any, *callbacks: keras.callbacks.Callback) -> dict[str, Any]:
    """Train a net of deferred build with a backup after each epoch; return logs and everything a backup must hold."""
    keras.utils.set_random_seed(0)
    with distribution.scope():
        model = trainstep.apply(normalized(), backups.FULL)
        model.compile(keras.optimizers.Adam(0.01), "mse")
    callbacks = (backups.backing_up(str(folder)), *callbacks)
    history = model.fit(
        X[:EXAMPLES], Y[:EXAMPLES], batch_size=BATCH, epochs=3, shuffle=False, verbose=0, callbacks=list(callbacks)
    )
    run = backups.state_of(model, history)
    variables = [variable.tolist() for variable in [*run.variables, *run.optimizer, *(run.state or [])]]
    return {"logs": run.history, "variables": variables}


def main(folder: pathlib.Path, part: str) -> None:
    economize()
    index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
    results: dict[str, Any] = {}
    if part == "first":
        # The recipe makes the distribution; there can be one in a process.
        os.chdir(folder)
        recipe = runpy.run_path("recipe.py", run_name="__main__")
        distribution = recipe["distribution"]
        results["recipe"] = [weight.tolist() for weight in recipe["model"].get_weights()]
        for name in SCENARIOS:
            print(name, flush=True)
            callbacks: list[keras.callbacks.Callback] = []
            if name == "deferred build":
                callbacks = [keras.callbacks.ModelCheckpoint(str(folder / "checkpoint.keras"))]
                if index == 0:
                    callbacks += [
                        keras.callbacks.CSVLogger(str(folder / "log.csv")),
                        keras.callbacks.TensorBoard(str(folder / "board")),
                    ]
            results[name] = train(name, distribution, callbacks)
        results["never stopped"] = with_backup(folder / "never", distribution)
    else:
        distribution = tf.distribute.MultiWorkerMirroredStrategy()
        results["resumed"] = with_backup(folder / "backup", distribution)
    path = folder / f"{part}-{index}.json"
    path.write_text(json.dumps(results, default=lambda value: np.asarray(value).tolist()))
    if part == "first":  # And one process is killed.
        with_backup(folder / "backup", distribution, *([backups.Stop(3, backups.kill)] if index == 1 else []))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), sys.argv[2])
