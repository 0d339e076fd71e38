"""What a step of every strategy costs, beside `standard` on the same net, and beside its own limit.

All strategies of the catalogue with their defaults, and those whose cost hangs on an option once more. As in
`step_cost`, whose nets and way of measuring these are.

    python -m trainstep.benchmarks.catalogue_cost [--rounds 20] [--output FOLDER] [--only NAME ...]
"""

import argparse
import json
import pathlib
import sys
import tempfile
from dataclasses import asdict, dataclass
from typing import Any

import keras
import tensorflow as tf

import trainstep
from trainstep.benchmarks.environment import environment
from trainstep.benchmarks.keeping import newest, path_of
from trainstep.benchmarks.step_cost import Row, Subject, cnn, measure, table

NAME = "catalogue_cost"
CLASSES, BATCH, STEPS = 10, 128, 8
WITHIN = 1.05
"""How far over the limit that is declared a step may be, where nothing else is said."""

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "adversarial": [{"attack": "pgd"}, {"random_start": True}],
    "sam": [{"interval": 5}, {"adaptive": True}],
    "trades": [{"steps": 2}],
    "free_adversarial": [{"replays": 2}],
    "progressive_resizing": [{"scale": 0.5}],
    "gradient_clipping": [{"clipnorm": 1.0}, {"clipvalue": 0.1}],
}
"""Options, besides the defaults, that make a difference to the cost."""

EXAMPLES = {"recompute": {"layers": ["*conv*"]}}
"""Options without a default that depend on the net, instead of those of the declaration's example."""

TARGETS = {
    "sam": 2.05,
    "sam interval=5": 1.22,
    "r_drop": 1.8,
    "dp_sgd": 5.0,
    "free_adversarial": 4.0,
    "free_adversarial replays=2": 2.0,
}
"""Limits of a step in plain ones, held as they are; of all others it is what a strategy declares, times `WITHIN`."""


def dropout_cnn() -> keras.Model:
    """Return the net of `step_cost` with half of its dense units dropped."""
    return trainstep.models.build("cnn", input_shape=(28, 28, 1), classes=CLASSES, dropout=0.5)


def dropped_input_cnn() -> keras.Model:
    """Return the net of `step_cost` with a tenth of its input dropped."""
    plain, inputs = cnn(), keras.Input((28, 28, 1))
    h = keras.layers.Dropout(0.1)(inputs)
    for layer in plain.layers[1:]:
        h = layer(h)
    return keras.Model(inputs, h)


def resnet() -> keras.Model:
    """Return a net in which a weight takes part in many products, and the first layer is a small part of a step."""
    return trainstep.models.build("resnet", input_shape=(28, 28, 1), classes=CLASSES)


def small_cnn() -> keras.Model:
    """Return a convolutional net that takes images of any size, which the one of `step_cost` does not."""
    inputs = keras.Input((28, 28, 1))
    h = keras.layers.Conv2D(32, 3, padding="same", activation="relu")(inputs)
    h = keras.layers.Conv2D(64, 3, padding="same", activation="relu")(h)
    return keras.Model(inputs, keras.layers.Dense(CLASSES, "softmax")(keras.layers.GlobalAveragePooling2D()(h)))


def two_outputs() -> keras.Model:
    """Return the net of `step_cost` with a number as a second output."""
    plain = cnn()
    last = keras.layers.Dense(1, name="number")(plain.layers[-2].output)
    return keras.Model(plain.input, {"kind": plain.output, "number": last})


def one_hot(data: tf.data.Dataset) -> tf.data.Dataset:
    """Return batches with one-hot labels, which every strategy takes."""
    return data.map(lambda x, y: (x, tf.one_hot(y, CLASSES))).cache().prefetch(2)


def of_two_outputs(data: tf.data.Dataset) -> tf.data.Dataset:
    """Return batches with the labels of `two_outputs`."""
    labels = one_hot(data).map(lambda x, y: (x, {"kind": y, "number": tf.reduce_mean(x, axis=(1, 2))}))
    return labels.cache().prefetch(2)


@dataclass(frozen=True)
class Net:
    """A net, and what it is trained on."""

    build: Any
    labelled: Any
    loss: Any


NETS = {
    "cnn": Net(cnn, one_hot, "categorical_crossentropy"),
    "cnn with dropout": Net(dropout_cnn, one_hot, "categorical_crossentropy"),
    "cnn with dropout of its input": Net(dropped_input_cnn, one_hot, "categorical_crossentropy"),
    "resnet": Net(resnet, one_hot, "categorical_crossentropy"),
    "cnn of any size": Net(small_cnn, one_hot, "categorical_crossentropy"),
    "cnn of two outputs": Net(two_outputs, of_two_outputs, {"kind": "categorical_crossentropy", "number": "mse"}),
}


NETS_OF = {
    "r_drop": ["cnn with dropout", "cnn with dropout of its input"],
    **{name: ["cnn", "resnet"] for name in ("gradient_noise", "free_adversarial", "gradient_penalty")},
}
"""Nets of a strategy whose cost hangs on the net: on its dropout, or on what share its weights or its input have."""


def nets_of(name: str) -> list[str]:
    """Return the names of the nets that `name` is measured on: the first that has what it needs, if not said above."""
    needs = trainstep.get(name).declaration.needs
    if "outputs" in needs:
        return ["cnn of two outputs"]
    return NETS_OF.get(name, ["cnn of any size" if "images of any size" in needs else "cnn"])


def subjects(name: str, examples: dict[str, Any]) -> list[Subject]:
    """Return what is measured of the strategy `name`: `examples` hold options that have no default."""
    declaration, found = trainstep.get(name).declaration, []
    for options in ({}, *OPTIONS.get(name, [])):
        chosen = {**examples.get(name, {}), **options}
        limit = declaration.cost(declaration.options(**chosen)).time
        label = " ".join([name, *(f"{key}={value}" for key, value in options.items())])
        target = TARGETS.get(label, round(WITHIN * limit, 2))
        found.append(Subject(label, {name: chosen}, against="standard", target=target))
    return found


def rows_of(names: list[str], rounds: int) -> list[Row]:
    """Measure the strategies `names`, each on its net, beside `standard`."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        teacher = f"{folder}/teacher.keras"
        cnn().save(teacher)
        examples = {name: EXAMPLES.get(name, trainstep.get(name).declaration.example) for name in names}
        examples = {name: {**example, **({"teacher": teacher} if "teacher" in example else {})}
                    for name, example in examples.items()}  # fmt: skip
        for label, net in NETS.items():
            entries = [subject for name in names if label in nets_of(name) for subject in subjects(name, examples)]
            # A few at a time: all models of a group are in memory at once.
            for start in range(0, len(entries), 6):
                control = Subject("standard", "standard", against="standard")
                group = [control, *(entry for entry in entries[start : start + 6] if entry.label != "standard")]
                arguments = {"labelled": net.labelled, "loss": net.loss}
                found = measure(label, net.build, group, batch=BATCH, rounds=rounds, steps=STEPS, **arguments)
                rows += found if not any(row.net == label for row in rows) else found[1:]
    return rows


def kept(folder: pathlib.Path) -> tuple[pathlib.Path, list[dict[str, Any]]] | None:
    """Return the newest measurement in `folder` and its rows, or None where there is none."""
    path = newest(folder, NAME)
    return path and (path, json.loads(path.read_text(encoding="utf-8"))["rows"])


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table, and write it into the folder that `--output` names."""
    parser = argparse.ArgumentParser(description="Measure what a step of every strategy costs.")
    parser.add_argument("--rounds", type=int, default=20, help="epochs of each that count")
    parser.add_argument("--only", nargs="+", choices=trainstep.names(), help="some strategies instead of all")
    parser.add_argument("--output", type=pathlib.Path, help="write the rows and the environment as JSON and Markdown")
    options = parser.parse_args(arguments)
    rows, machine = rows_of(options.only or trainstep.names(), options.rounds), environment()
    text = f"{table(rows)}\n\n{', '.join(f'{name} {value}' for name, value in machine.items())}"
    print(text)
    if options.output:
        target = path_of(options.output, NAME, machine)
        options.output.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps({"environment": machine, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")
        target.with_suffix(".md").write_text(f"# What a step of each strategy costs\n\n{text}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
