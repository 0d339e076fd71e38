"""What a step costs: each strategy beside plain Keras `fit`, and beside the peer that does the same.

All subjects of one net live in one process and take turns, an epoch each, so that a machine whose
speed drifts slows all of them alike. What counts is the median over rounds of the ratio within a round.

    python -m trainstep.benchmarks.step_cost [--rounds 15] [--output FILE.json]
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
from dataclasses import asdict, dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import trainstep
from trainstep.benchmarks.environment import environment

STEPS = 32


@dataclass(frozen=True)
class Subject:
    """One way to train a net: a strategy, or a peer."""

    label: str
    spec: Any = None
    optimizer: dict[str, Any] | None = None
    wrap: Callable[[keras.Model], keras.Model] | None = None
    against: str = "Keras fit"
    target: float | None = None


@dataclass(frozen=True)
class Row:
    """What was measured of one subject."""

    net: str
    label: str
    against: str
    milliseconds: float
    ratio: float
    quartiles: tuple[float, float]
    target: float | None

    @property
    def reached(self) -> bool | None:
        """Whether the ratio is within its target; None where there is none."""
        return None if self.target is None else round(self.ratio, 2) <= self.target


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


def compiled(subject: Subject, build: Callable[[], keras.Model]) -> keras.Model:
    """Return a fresh model that trains as `subject` says, with Adam."""
    model = build()
    if subject.wrap is not None:
        model = subject.wrap(model)
    if subject.spec is not None:
        trainstep.apply(model, subject.spec)
    model.compile(keras.optimizers.Adam(**(subject.optimizer or {})), "sparse_categorical_crossentropy")
    return model


def batches(shape: tuple[int, ...], size: int, steps: int) -> tf.data.Dataset:
    """Return `steps` batches of noise, in memory: the cost of a step does not depend on what is in them."""
    rng = np.random.default_rng(0)
    x = rng.random((size * steps, *shape), dtype="float32")
    y = rng.integers(0, 10, size * steps)
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(size).cache().prefetch(2)


def measure(
    net: str, build: Callable[[], keras.Model], entries: list[Subject], *, batch: int, rounds: int, steps: int = STEPS
) -> list[Row]:
    """Train all `entries` in turn, an epoch of `steps` steps each, `rounds` times after one that does not count."""
    models: dict[str, Any] = {entry.label: compiled(entry, build) for entry in entries}
    data = batches(build().input_shape[1:], batch, steps)
    times: dict[str, list[float]] = {entry.label: [] for entry in entries}
    for turn in range(rounds + 1):
        # Every other round backwards, so that no subject always follows the same one.
        for label, model in list(models.items())[:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            model.fit(data, verbose=0)
            if turn:
                times[label].append((time.perf_counter() - start) / steps)
    return [_row(net, entry, times) for entry in entries]


def _row(net: str, entry: Subject, times: dict[str, list[float]]) -> Row:
    against = "Keras fit" if entry.against not in times else entry.against
    ratios = [mine / other for mine, other in zip(times[entry.label], times[against], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    milliseconds = 1000 * statistics.median(times[entry.label])
    return Row(net, entry.label, against, milliseconds, middle, (low, high), entry.target)


def measure_tracing(build: Callable[[], keras.Model], entries: list[Subject], rounds: int) -> list[Row]:
    """Time the first step, which traces the graph, of fresh models; all `entries` in turn."""
    data = batches(build().input_shape[1:], 8, 1)
    times: dict[str, list[float]] = {entry.label: [] for entry in entries}
    for _ in range(rounds):
        for entry in entries:
            model: Any = compiled(entry, build)
            start = time.perf_counter()
            model.fit(data, verbose=0)
            times[entry.label].append(time.perf_counter() - start)
            del model
            gc.collect()
    return [_row("cnn, first step", entry, times) for entry in entries]


def measure_apply(build: Callable[[], keras.Model]) -> float:
    """Return the median time of `apply` on a built model, in milliseconds."""
    spec = ["gradient_clipping", "gradient_accumulation", "mixed_precision", "adversarial"]
    times = []
    for _ in range(5):
        model = build()
        start = time.perf_counter()
        trainstep.apply(model, spec)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def table(rows: list[Row]) -> str:
    """Return `rows` as a Markdown table."""
    lines = ["| net | subject | ms a step | ratio (quartiles) | to | target |", "|---|---|---|---|---|---|"]
    for row in rows:
        verdict = "" if row.target is None else f"{row.target:.2f} {'reached' if row.reached else 'MISSED'}"
        ratio = f"{row.ratio:.3f} ({row.quartiles[0]:.3f} to {row.quartiles[1]:.3f})"
        lines.append(f"| {row.net} | {row.label} | {row.milliseconds:.1f} | {ratio} | {row.against} | {verdict} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table, and write it where `--output` says."""
    parser = argparse.ArgumentParser(description="Measure what a step of each strategy costs.")
    parser.add_argument("--rounds", type=int, default=15, help="epochs of each subject that count")
    parser.add_argument("--only", default="", help="measure the subjects and nets whose name contains this")
    parser.add_argument("--output", type=pathlib.Path, help="write the rows and the environment as JSON")
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    for net, build in (("cnn", cnn), ("mlp", mlp)):
        if options.only in net or options.only not in ("cnn", "mlp", "wide", "trace"):
            rows += measure(net, build, subjects(), batch=128, rounds=options.rounds)
    if options.only in ("", "wide"):
        bfloat16 = Subject("mixed_precision bfloat16", {"mixed_precision": {"dtype": "bfloat16"}}, target=0.75)
        rows += measure("dense 4 x 2048", wide, [Subject("Keras fit"), bfloat16], batch=256, rounds=5, steps=8)
    if options.only in ("", "trace"):
        tracing = [
            Subject(entry.label, entry.spec, entry.optimizer, entry.wrap, target=1.3)
            for entry in (*subjects(), Subject("mixed_precision", {"mixed_precision": {"dtype": "bfloat16"}}))
            if "adversarial" not in entry.label
        ]
        rows += measure_tracing(cnn, tracing, rounds=5)
    applying = measure_apply(cnn)
    print(table(rows))
    print(f"\napply on a built cnn: {applying:.1f} ms (target: 50)")
    print(" ".join(f"{name}={value}" for name, value in environment().items()))
    if options.output:
        report = {"environment": environment(), "apply_milliseconds": applying, "rows": [asdict(row) for row in rows]}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
