"""Robust accuracy by an attack that is not ours: models trained here, attacked by foolbox too.

    python -m trainstep.benchmarks.foreign_attack [--seeds 5] [--epochs 1] [--examples 1000] [--output FOLDER]

Trains `fashion_cnn` plainly and on PGD examples, and measures accuracy as it is, under our PGD and under foolbox's, of
the same budget on the same examples. Foolbox climbs the cross-entropy of the logits; ours climbs the loss the model
was compiled with.

Rauber et al., "Foolbox Native", JOSS 2020, https://doi.org/10.21105/joss.02607
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Mapping
from statistics import mean
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import trainstep
from trainstep.benchmarks import workload as workloads
from trainstep.benchmarks.attack import Attack, compiled_attack, robust_accuracy
from trainstep.benchmarks.data import train_batches
from trainstep.benchmarks.environment import environment

EPSILON = 0.1
SPECS: Mapping[str, Any] = {
    "standard": "standard",
    "adversarial pgd": {"adversarial": {"attack": "pgd", "epsilon": EPSILON, "clip_range": (0, 1)}},
}
COLUMNS = ("accuracy", "robust_accuracy", "foolbox_robust_accuracy")


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
        attack: of which epsilon, steps and clip_range count; a step is 2.5 epsilon / steps long, as ours.
    """
    import foolbox  # noqa: PLC0415  Installed for this measurement only.

    attacked = foolbox.TensorFlowModel(logits_of(model), bounds=attack.clip_range)
    pgd = foolbox.attacks.LinfPGD(rel_stepsize=2.5 / attack.steps, steps=attack.steps, random_start=True)
    tf.random.set_seed(attack.seed)
    _, _, success = pgd(attacked, tf.constant(x), tf.constant(y), epsilons=attack.epsilon)
    return 1.0 - float(np.mean(success.numpy()))


def measure(seeds: int, epochs: int, examples: int, train_examples: int | None) -> list[dict[str, Any]]:
    """Return a row for each strategy and seed."""
    workload = workloads.get("fashion_cnn")
    (x, y), (x_validation, y_validation) = workload.read()
    x, y, x_test, y_test = x[:train_examples], y[:train_examples], x_validation[:examples], y_validation[:examples]
    attack = Attack(epsilon=EPSILON, steps=40, clip_range=(0.0, 1.0), examples=examples)
    test = tf.data.Dataset.from_tensor_slices((x_test, y_test)).batch(250)
    rows = []
    for seed in range(seeds):
        for label, spec in SPECS.items():
            keras.utils.set_random_seed(seed)
            model = trainstep.apply(workload.build(seed), spec)
            model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
            batches = train_batches((x, y), seed=seed, epochs=epochs, batch_size=workload.batch_size)
            model.fit(batches.dataset, steps_per_epoch=batches.steps_per_epoch, epochs=epochs, shuffle=False, verbose=0)
            values = (
                float(model.evaluate(test, verbose=0, return_dict=True)["accuracy"]),
                robust_accuracy(compiled_attack(model, attack), test, attack),
                foolbox_robust_accuracy(model, x_test, y_test, attack),
            )
            rows.append({"strategy": label, "seed": seed, **dict(zip(COLUMNS, values, strict=True))})
            print(rows[-1], flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return means over the seeds, with the lowest and the highest, as a Markdown table."""
    titles = ("accuracy", "under our PGD-40", "under foolbox's PGD-40")
    lines = [f"| trained by | {' | '.join(titles)} |", "|---|---|---|---|"]
    for label in SPECS:
        mine = [row for row in rows if row["strategy"] == label]
        cells = []
        for column in COLUMNS:
            values = [row[column] for row in mine]
            cells.append(f"{mean(values):.4f} ({min(values):.4f} to {max(values):.4f})")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table, and write it into the folder that `--output` names."""
    parser = argparse.ArgumentParser(description="Robust accuracy by our attack and by foolbox's.")
    parser.add_argument("--seeds", type=int, default=5, help="models of each kind")
    parser.add_argument("--epochs", type=int, default=1, help="passes over the training data")
    parser.add_argument("--examples", type=int, default=1000, help="test examples that are attacked, from the first")
    parser.add_argument("--train-examples", type=int, help="training examples, from the first; all of them")
    parser.add_argument("--output", type=pathlib.Path, help="write the rows and the environment as JSON and Markdown")
    options = parser.parse_args(arguments)
    rows = measure(options.seeds, options.epochs, options.examples, options.train_examples)
    machine = environment()
    settings = {"epsilon": EPSILON, "norm": "linf", "steps": 40, **vars(options)}
    del settings["output"]
    says = (
        f"fashion_cnn, {options.epochs} epoch(s), {options.seeds} seeds: mean, lowest and highest. Attacks: L-infinity "
        f"of radius {EPSILON}, 40 steps, random start, inputs within [0, 1], first {options.examples} test examples."
    )
    text = f"{table(rows)}\n\n{says}\n\n" + ", ".join(f"{name} {value}" for name, value in machine.items())
    print(text)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        target = options.output / f"foreign_attack_keras-{keras.__version__}_{machine['time'][:10]}.json"
        content = {"environment": machine, "settings": settings, "rows": rows}
        target.write_text(json.dumps(content, indent=2) + "\n")
        target.with_suffix(".md").write_text(f"# Robust accuracy by an attack that is not ours\n\n{text}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
