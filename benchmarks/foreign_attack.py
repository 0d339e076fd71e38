"""Robust accuracy by an attack that is not ours: models trained here, attacked by foolbox too.

    python -m trainstep.benchmarks.foreign_attack --output benchmarks/results

Trains `fashion_cnn` plainly and on PGD examples, and measures accuracy as it is, under our PGD and under foolbox's, of
the same budget on the same examples. Foolbox climbs the cross-entropy of the logits; ours climbs the loss the model
was compiled with. Both count examples that are classified rightly as they are and where the attack ends.

Rauber et al., "Foolbox Native", JOSS 2020, https://doi.org/10.21105/joss.02607
"""

import argparse
import functools
import importlib.metadata
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from joblib.externals.loky import ProcessPoolExecutor

import trainstep
from trainstep.benchmarks import workload as workloads
from trainstep.benchmarks.attack import Attack, compiled_attack, robust_accuracy
from trainstep.benchmarks.data import train_batches
from trainstep.benchmarks.environment import environment
from trainstep.benchmarks.executors import ONE_THREAD
from trainstep.benchmarks.keeping import keep, path_of
from trainstep.benchmarks.spec import parse_spec

NAME = "foreign_attack"
WORKLOAD = "fashion_cnn"
EPSILON, STEPS = 0.1, 40
SPECS: Mapping[str, str] = {
    "adversarial pgd": f"adversarial:attack=pgd,epsilon={EPSILON},clip_range=[0,1]",  # The longest first.
    "standard": "standard",
}
COLUMNS = ("accuracy", "robust_accuracy", "foolbox_robust_accuracy")
_BATCH = 250
"""Examples attacked at once."""


class Plan(NamedTuple):
    """How the models are trained and attacked."""

    epochs: int
    train_examples: int | None
    """From the first; None: all."""
    attack: Attack


def logits_of(model: keras.Model) -> Any:
    """Return the function from inputs to what the softmax of the last, dense layer of `model` is taken of."""
    features = keras.Model(model.inputs, model.layers[-1].input)
    kernel, bias = (tf.convert_to_tensor(weight) for weight in model.layers[-1].weights)
    return tf.function(lambda x: tf.matmul(features(x, training=False), kernel) + bias)


def foolbox_robust_accuracy(model: keras.Model, x: np.ndarray, y: np.ndarray, attack: Attack) -> float:
    """Return the robust accuracy under foolbox's PGD in the L-infinity ball, of the same budget as `attack`.

    Args:
        model: ends in a dense layer with a softmax.
        x: float32 (examples, ...), within `attack.clip_range`.
        y: int64 class ids (examples,).
        attack: of which epsilon, steps, clip_range and seed count; a step is 2.5 epsilon / steps long, as ours.
    """
    import foolbox  # noqa: PLC0415  # pyright: ignore[reportMissingImports]  In the environment of tensorflow-addons.

    logits = logits_of(model)
    attacked = foolbox.TensorFlowModel(logits, bounds=attack.clip_range)
    pgd = foolbox.attacks.LinfPGD(rel_stepsize=2.5 / attack.steps, steps=attack.steps, random_start=True)
    tf.random.set_seed(attack.seed)
    hits = []
    for first in range(0, len(x), _BATCH):
        inputs, labels = tf.constant(x[first : first + _BATCH]), tf.constant(y[first : first + _BATCH])
        _, _, success = pgd(attacked, inputs, labels, epsilons=attack.epsilon)
        hits.append((tf.argmax(logits(inputs), axis=1) == labels) & ~success)
    return float(np.mean(np.concatenate(hits)))


def measure_model(label: str, seed: int, plan: Plan) -> dict[str, Any]:
    """Return a row: strategy, seed, and accuracy by the names in `COLUMNS`."""
    workload = workloads.get(WORKLOAD)
    split = workload.read()
    train = tuple(array[: plan.train_examples] for array in split.train)
    x, y = (array[: plan.attack.examples] for array in split.validation)
    keras.utils.set_random_seed(seed)
    model: Any = trainstep.apply(workload.build(seed), parse_spec(SPECS[label]))
    model.compile("adam", workload.loss, metrics=["accuracy"])
    batches = train_batches(train, seed=seed, epochs=plan.epochs, batch_size=workload.batch_size)
    model.fit(batches.dataset, steps_per_epoch=batches.steps_per_epoch, epochs=plan.epochs, shuffle=False, verbose=0)
    test = tf.data.Dataset.from_tensor_slices((x, y)).batch(_BATCH)
    values = (
        float(model.evaluate(test, verbose=0, return_dict=True)["accuracy"]),
        robust_accuracy(compiled_attack(model, plan.attack), test, plan.attack),
        foolbox_robust_accuracy(model, x, y, plan.attack),
    )
    return {"strategy": label, "seed": seed, **dict(zip(COLUMNS, values, strict=True))}


def measure(seeds: int, plan: Plan, workers: int) -> list[dict[str, Any]]:
    """Return a row for each strategy and seed, from models that are trained in as many processes at once as `workers`.

    Each has one thread: two models side by side are sooner done than one after the other with two threads.
    """
    labels, numbers = zip(*((label, seed) for label in SPECS for seed in range(seeds)), strict=True)
    rows = []
    with ProcessPoolExecutor(max_workers=workers, env=ONE_THREAD) as pool:
        for row in pool.map(functools.partial(measure_model, plan=plan), labels, numbers):
            rows.append(row)
            print(row, flush=True)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Measure, print means, and keep the rows where `--output` says."""
    parser = argparse.ArgumentParser(description="Robust accuracy by our attack and by foolbox's.")
    parser.add_argument("--seeds", type=int, default=5, help="models of each kind")
    parser.add_argument("--epochs", type=int, default=1, help="passes over the training data")
    parser.add_argument("--examples", type=int, default=1000, help="test examples that are attacked, from the first")
    parser.add_argument("--train-examples", type=int, help="training examples, from the first; all of them")
    parser.add_argument("--workers", type=int, default=2, help="processes at once")
    parser.add_argument("--output", type=Path, required=True, help="the folder for the results")
    options = parser.parse_args(arguments)
    machine = environment() | {"foolbox": importlib.metadata.version("foolbox")}
    path = path_of(options.output, NAME, machine)
    if path.exists():
        parser.error(f"{path} is there. Results are never edited.")
    attack = Attack(epsilon=EPSILON, steps=STEPS, clip_range=(0.0, 1.0), examples=options.examples)
    plan = Plan(options.epochs, options.train_examples, attack)
    rows = measure(options.seeds, plan, options.workers)
    for label in SPECS:
        means = {column: fmean(row[column] for row in rows if row["strategy"] == label) for column in COLUMNS}
        print(label, *(f"{column} {value:.4f}" for column, value in means.items()), sep=", ")
    settings = {
        "workload": WORKLOAD,
        "strategies": dict(SPECS),
        "epochs": options.epochs,
        "train_examples": options.train_examples,
        "attack": attack.model_dump(mode="json"),
    }
    keep(path, {"settings": settings, "environment": machine, "rows": rows})
    print(path)
    return 0


if __name__ == "__main__":
    # Under its own name: workers import what they are to call.
    from trainstep.benchmarks import foreign_attack

    sys.exit(foreign_attack.main())
