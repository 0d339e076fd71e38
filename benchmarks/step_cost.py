"""What a step costs: each strategy beside plain Keras `fit`, and beside the peer that does the same.

All subjects of one net live in one process and take turns, an epoch each, so that a machine whose
speed drifts slows all of them alike: a ratio is the median of those of the turns. Models are made anew
several times, since where their tensors lie in memory is worth a percent. Processor time is measured
beside the time on the clock: what other programs do on the machine counts less in it.

    python -m trainstep.benchmarks.step_cost [--only PART] [--rounds 50] [--output FOLDER]
"""

import argparse
import gc
import importlib
import importlib.util
import inspect
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

import trainstep
from trainstep.benchmarks.environment import environment
from trainstep.benchmarks.keeping import path_of

FRESH = 5  # Times the models are made anew.
PARTS = ("cnn", "mlp", "wide", "tracing")
SPARSE = "sparse_categorical_crossentropy"
FOOTNOTE = """A plain step never differentiates the first layer with respect to its input; an attack does.
Where the first layer is most of the net, as in `mlp`, the limit of FGSM is therefore 2 plain steps, not 5/3."""


@dataclass(frozen=True)
class Subject:
    """One way to train a net: a strategy, or a peer."""

    label: str
    spec: Any = None
    optimizer: dict[str, Any] | None = None
    wrap: Callable[[keras.Model], keras.Model] | None = None
    against: str = "Keras fit"
    target: float | None = None


class Seconds(NamedTuple):
    """Time on the clock, and time processors worked for this process."""

    clock: float
    processor: float


@dataclass(frozen=True)
class Row:
    """What was measured of one subject."""

    net: str
    label: str
    against: str
    milliseconds: float
    quartiles: tuple[float, float]
    ratio: float
    processor_ratio: float
    target: float | None

    @property
    def reached(self) -> bool | None:
        """Whether the ratio is within its target; None where there is none."""
        return None if self.target is None else round(self.ratio, 3) <= self.target


def cnn() -> keras.Model:
    """Return the convolutional net: conv 32, pool, conv 64, pool, dense 128, dense 10."""
    return trainstep.models.build("cnn", input_shape=(28, 28, 1), classes=10)


def mlp() -> keras.Model:
    """Return a small dense net."""
    return trainstep.models.build("mlp", input_shape=(784,), classes=10)


def wide() -> keras.Model:
    """Return a net of four dense layers, 2048 wide."""
    return trainstep.models.build("mlp", input_shape=(784,), classes=10, units=(2048,) * 4)


def subjects() -> list[Subject]:
    """Return what is measured on `cnn` and `mlp`."""
    clipping = {"gradient_clipping": {"global_clipnorm": 1.0}}
    accumulation = {"gradient_accumulation": {"steps": 4}}
    rows = [
        Subject("Keras fit"),
        Subject("standard", "standard", target=1.02),
        Subject("Keras global_clipnorm", optimizer={"global_clipnorm": 1.0}),
        Subject("gradient_clipping", clipping, against="Keras global_clipnorm", target=1.02),
    ]
    if "gradient_accumulation_steps" in inspect.signature(keras.optimizers.Adam).parameters:
        rows += [
            Subject("Keras gradient_accumulation_steps=4", optimizer={"gradient_accumulation_steps": 4}),
            Subject("gradient_accumulation", accumulation, against="Keras gradient_accumulation_steps=4", target=1.00),
        ]
    elif importlib.util.find_spec("gradient_accumulator"):
        rows += [
            Subject("GradientAccumulateModel(4)", wrap=gradient_accumulate_model),
            Subject("gradient_accumulation", accumulation, against="GradientAccumulateModel(4)"),
        ]
    else:
        rows.append(Subject("gradient_accumulation", accumulation))
    return [
        *rows,
        Subject("adversarial fgsm", "adversarial", against="standard", target=1.70),
        Subject("adversarial pgd-7", {"adversarial": {"attack": "pgd"}}, against="standard", target=5.9),
    ]


def gradient_accumulate_model(model: keras.Model) -> keras.Model:
    """Return the model as GradientAccumulator, the peer on Keras 2, trains it."""
    peer = importlib.import_module("gradient_accumulator")
    return peer.GradientAccumulateModel(accum_steps=4, inputs=model.inputs, outputs=model.outputs)


def compiled(subject: Subject, build: Callable[[], keras.Model], loss: Any = SPARSE) -> keras.Model:
    """Return a fresh model that trains as `subject` says, with Adam."""
    model = build()
    if subject.wrap is not None:
        model = subject.wrap(model)
    if subject.spec is not None:
        trainstep.apply(model, subject.spec)
    model.compile(keras.optimizers.Adam(**(subject.optimizer or {})), loss)
    return model


def batches(shape: tuple[int, ...], size: int, steps: int) -> tf.data.Dataset:
    """Return `steps` batches of noise, in memory: the cost of a step does not depend on what is in them."""
    rng = np.random.default_rng(0)
    x = rng.random((size * steps, *shape), dtype="float32")
    y = rng.integers(0, 10, size * steps)
    # Its autotuning sleeps 10, 20, 40 ... ms between looks, and the end of an epoch may wait for it to wake up.
    options = tf.data.Options()
    options.autotune.enabled = False
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(size).cache().prefetch(2).with_options(options)


def measure(
    net: str,
    build: Callable[[], keras.Model],
    entries: list[Subject],
    *,
    batch: int,
    rounds: int,
    steps: int,
    labelled: Callable[[tf.data.Dataset], tf.data.Dataset] = lambda data: data,
    loss: Any = SPARSE,
) -> list[Row]:
    """Train all `entries` in turn, an epoch of `steps` steps each, `rounds` times in all.

    Args:
        net: its name, for the rows.
        build: makes it.
        entries: what it is trained by.
        batch: examples at a time.
        rounds: epochs of each that count.
        steps: of an epoch.
        labelled: gives the batches of images and class ids other labels.
        loss: as `compile` takes it.
    """
    data = labelled(batches(build().input_shape[1:], batch, steps))
    times: dict[str, list[Seconds]] = {entry.label: [] for entry in entries}
    for begin in range(0, rounds, -(-rounds // FRESH)):
        models: dict[str, Any] = {entry.label: compiled(entry, build, loss) for entry in entries}
        for model in models.values():
            model.fit(data, shuffle=False, verbose=0)  # Traces; it does not count.
        for turn in range(begin, min(begin + -(-rounds // FRESH), rounds)):
            # Every other turn backwards, so that no subject always follows the same one.
            for label, model in list(models.items())[:: 1 if turn % 2 else -1]:
                seconds = _timed(lambda model=model: model.fit(data, shuffle=False, verbose=0))
                times[label].append(Seconds(seconds.clock / steps, seconds.processor / steps))
        del models
        gc.collect()
    return [_row(net, entry, times) for entry in entries]


def _timed(function: Callable[[], Any]) -> Seconds:
    clock, processor = time.perf_counter(), time.process_time()
    function()
    return Seconds(time.perf_counter() - clock, time.process_time() - processor)


def _row(net: str, entry: Subject, times: dict[str, list[Seconds]]) -> Row:
    against = "Keras fit" if entry.against not in times else entry.against
    mine, other = times[entry.label], times[against]
    low, middle, high = (1000 * seconds for seconds in statistics.quantiles([each.clock for each in mine], n=4))
    pairs = list(zip(mine, other, strict=True))
    ratio = statistics.median(a.clock / b.clock for a, b in pairs)
    processor_ratio = statistics.median(a.processor / b.processor for a, b in pairs)
    return Row(net, entry.label, against, middle, (low, high), ratio, processor_ratio, entry.target)


def measure_tracing(build: Callable[[], keras.Model], entries: list[Subject], rounds: int) -> list[Row]:
    """Time the first step, which traces the graph, of fresh models; all `entries` in turn."""
    [(x, y)] = batches(build().input_shape[1:], 8, 1)
    times: dict[str, list[Seconds]] = {entry.label: [] for entry in entries}
    for _ in range(rounds):
        for entry in entries:
            model: Any = compiled(entry, build)
            times[entry.label].append(_timed(lambda model=model: model.train_on_batch(x, y)))
            del model
            gc.collect()
    return [_row("cnn, first step", entry, times) for entry in entries]


def measure_apply(build: Callable[[], keras.Model]) -> float:
    """Return the median time of `apply` on a built model, in milliseconds; each time with options not seen before."""
    times = []
    for turn in range(9):
        model = build()
        unseen = {"adversarial": {"epsilon": 0.1 + turn / 100}}
        spec = {"gradient_clipping": {}, "gradient_accumulation": {}, "mixed_precision": {}, **unseen}
        times.append(1000 * _timed(lambda model=model, spec=spec: trainstep.apply(model, spec)).clock)
    return statistics.median(times)


def table(rows: list[Row]) -> str:
    """Return `rows` as a Markdown table."""
    lines = [
        "| net | subject | ms a step (quartiles) | ratio | ratio of processor time | to | target |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        verdict = "" if row.target is None else f"{row.target:.2f} {'reached' if row.reached else 'MISSED'}"
        milliseconds = f"{row.milliseconds:.1f} ({row.quartiles[0]:.1f} to {row.quartiles[1]:.1f})"
        ratios = f"{row.ratio:.3f} | {row.processor_ratio:.3f}"
        lines.append(f"| {row.net} | {row.label} | {milliseconds} | {ratios} | {row.against} | {verdict} |")
    return "\n".join(lines)


def rows_of(part: str, rounds: int) -> list[Row]:
    """Measure one of `PARTS`."""
    if part == "cnn":
        return measure("cnn", cnn, subjects(), batch=128, rounds=rounds, steps=8)
    if part == "mlp":  # Its steps are short: with many in an epoch, what `fit` does once an epoch does not count.
        return measure("mlp", mlp, subjects(), batch=128, rounds=rounds, steps=128)
    bfloat16 = Subject("mixed_precision bfloat16", {"mixed_precision": {"dtype": "bfloat16"}})
    if part == "wide":
        entries = [Subject("Keras fit"), replace(bfloat16, target=0.75)]
        return measure("dense 4 x 2048", wide, entries, batch=256, rounds=rounds, steps=4)
    entries = [
        replace(entry, against="Keras fit", target=1.3 if entry.spec else None) for entry in (*subjects(), bfloat16)
    ]
    without_attacks = [entry for entry in entries if "adversarial" not in entry.label]
    return measure_tracing(cnn, without_attacks, min(rounds, 9))


def _rounds(text: str) -> int:
    if int(text) < 2:
        raise argparse.ArgumentTypeError(f"a spread takes at least 2 epochs, not {text}")
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table, and write it into the folder that `--output` names."""
    parser = argparse.ArgumentParser(description="Measure what a step of each strategy costs.")
    parser.add_argument("--rounds", type=_rounds, default=50, help="epochs of each subject that count")
    parser.add_argument("--only", choices=PARTS, help="measure one part, and keep the others of the day")
    parser.add_argument("--output", type=pathlib.Path, help="write the rows and the environment as JSON and Markdown")
    options = parser.parse_args(arguments)
    rows = [row for part in ([options.only] if options.only else PARTS) for row in rows_of(part, options.rounds)]
    applying, machine = measure_apply(cnn), environment()
    target = path_of(options.output or pathlib.Path(), "step_cost", machine)
    if options.output and options.only and target.exists():  # The other parts stay as they were measured that day.
        measured = {row.net for row in rows}
        kept = [Row(**row) for row in json.loads(target.read_text())["rows"]]
        rows = [row for row in kept if row.net not in measured] + rows
    text = "\n\n".join(
        (
            table(rows),
            FOOTNOTE,
            f"`apply` of four strategies on a built cnn: {applying:.1f} ms (target: 50).",
            ", ".join(f"{name} {value}" for name, value in machine.items()),
        )
    )
    print(text)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        report = {"environment": machine, "apply_milliseconds": applying, "rows": [asdict(row) for row in rows]}
        target.write_text(json.dumps(report, indent=2) + "\n")
        target.with_suffix(".md").write_text(f"# What a step costs\n\n{text}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
