"""What a strategy takes of memory: the peak of resident memory, each subject in fresh processes.

A process builds and compiles its net, trains on a few examples, and notes its resident memory: idle.
Then it trains on whole batches; the peak above idle is what the activations of a step take. Where the
memory that stays is asked for (an accumulator), idle is noted before the strategy is applied, and the
batch is small. Medians of several processes, which take turns.

    python -m trainstep.benchmarks.memory [--rounds 3] [--output FOLDER]
"""

import argparse
import json
import math
import pathlib
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import keras

import trainstep
from trainstep.benchmarks.environment import environment
from trainstep.benchmarks.keeping import path_of
from trainstep.benchmarks.step_cost import batches, cnn

MEBIBYTE = 2**20


@dataclass(frozen=True)
class Subject:
    """One way to train a net, compared with the first subject of that net."""

    net: str
    label: str
    spec: Any = field(default=None, hash=False)
    target_memory: float | None = None
    target_time: float | None = None


@dataclass(frozen=True)
class Measured:
    """What one process measured: mebibytes above idle at the peak, seconds a step, mebibytes of trainable weights."""

    peak: float
    seconds: float
    weights: float


@dataclass(frozen=True)
class Net:
    """A net, its batches, and whether what is trained first counts."""

    build: Any
    batch: int
    steps: int
    warm: bool


def wider() -> keras.Model:
    """Return a net of four dense layers, 4096 wide: its weights outweigh what tracing a step takes."""
    return trainstep.models.build("mlp", input_shape=(784,), classes=10, units=(4096,) * 4)


def blocks() -> keras.Model:
    """Return a net of six blocks, each a model of five dense layers with as many that normalize."""
    inputs: Any = keras.Input((784,))
    x = inputs
    for index in range(6):
        layers = [keras.Input(x.shape[1:])]
        for _ in range(5):
            layers += [keras.layers.Dense(256, "gelu"), keras.layers.LayerNormalization()]
        x = keras.Sequential(layers, name=f"block_{index}")(x)
    return keras.Model(inputs, keras.layers.Dense(10, "softmax")(x))


NETS = {
    "cnn, batch 2048": Net(cnn, 2048, 12, warm=True),
    "dense 4 x 4096, batch 8, SGD": Net(wider, 8, 8, warm=False),
    "6 blocks, batch 4096": Net(blocks, 4096, 6, warm=True),
}
SUBJECTS = [
    Subject("cnn, batch 2048", "Keras fit"),
    Subject("cnn, batch 2048", "micro_batches, 16 parts", {"micro_batches": {"count": 16}}, 0.35, 1.1),
    Subject("dense 4 x 4096, batch 8, SGD", "Keras fit"),
    Subject("dense 4 x 4096, batch 8, SGD", "gradient_accumulation", {"gradient_accumulation": {"steps": 4}}),
    Subject("6 blocks, batch 4096", "Keras fit"),
    Subject("6 blocks, batch 4096", "recompute, each block", {"recompute": {"layers": ("block_*",)}}, 0.5, 4 / 3),
]


def resident(field: str) -> float:
    """Return the resident memory of this process, now (`"VmRSS"`) or at its peak (`"VmHWM"`), in mebibytes."""
    status = pathlib.Path("/proc/self/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith(f"{field}:")]
    return int(line.split()[1]) / 1024


def forget_peak() -> None:
    """Let the peak start anew from what is resident now."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")


class _Clock(keras.callbacks.Callback):
    """Keeps the seconds of each step."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        del batch, logs
        self._start = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        del batch, logs
        self.seconds.append(time.perf_counter() - self._start)


def measure_here(subject: Subject, net: Net) -> Measured:
    """Measure `subject` in this process, which has measured nothing before."""
    model, clock = net.build(), _Clock()
    data = batches(model.input_shape[1:], net.batch, net.steps)
    forget_peak()
    idle = resident("VmRSS")
    if subject.spec is not None:
        trainstep.apply(model, subject.spec)
    # Without slots of its own, and without XLA, which plans memory in its own way.
    model.compile(keras.optimizers.SGD(0.01), "sparse_categorical_crossentropy", jit_compile=False)
    if net.warm:
        model.fit(batches(model.input_shape[1:], 32, 1), shuffle=False, verbose=0)
        forget_peak()
        idle = resident("VmRSS")
    model.fit(data, shuffle=False, verbose=0, callbacks=[clock])
    weights = sum(weight.numpy().nbytes for weight in model.trainable_variables)
    return Measured(resident("VmHWM") - idle, statistics.median(clock.seconds), weights / MEBIBYTE)


def measure(subject: Subject) -> Measured:
    """Measure `subject` in a process of its own."""
    command = [sys.executable, "-m", "trainstep.benchmarks.memory", "--only", str(SUBJECTS.index(subject))]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def rows_of(measured: dict[Subject, list[Measured]]) -> list[dict[str, Any]]:
    """Return medians, and ratios to the first subject of the same net."""
    rows, controls = [], {}
    for subject, runs in measured.items():
        peak, seconds = (statistics.median(getattr(run, key) for run in runs) for key in ("peak", "seconds"))
        control = controls.setdefault(subject.net, (peak, seconds))
        rows.append(
            {
                **asdict(subject),
                "peak_mebibytes": peak,
                "seconds": seconds,
                "memory_ratio": peak / control[0] if control[0] else math.nan,  # A net too small to show.
                "time_ratio": seconds / control[1],
                "copies_of_the_weights": (peak - control[0]) / runs[0].weights,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return `rows` as a Markdown table."""

    def verdict(value: float, target: float | None) -> str:
        judged = "" if target is None else f" ({target:.2f} {'reached' if value <= target else 'MISSED'})"
        return f"{value:.2f}{judged}"

    lines = [
        "| net | subject | MiB above idle | ratio | time ratio | more, in copies of the weights |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        memory = verdict(row["memory_ratio"], row["target_memory"])
        seconds = verdict(row["time_ratio"], row["target_time"])
        copies = f"{row['copies_of_the_weights']:.2f}" if row["copies_of_the_weights"] >= 0 else "less"
        lines.append(
            f"| {row['net']} | {row['label']} | {row['peak_mebibytes']:.0f} | {memory} | {seconds} | {copies} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table, and write it into the folder that `--output` names."""
    parser = argparse.ArgumentParser(description="Measure what a strategy takes of memory. Linux only.")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each subject")
    parser.add_argument("--output", type=pathlib.Path, help="write the rows and the environment as JSON and Markdown")
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.only is not None:
        subject = SUBJECTS[options.only]
        print(json.dumps(asdict(measure_here(subject, NETS[subject.net]))))
        return 0
    measured: dict[Subject, list[Measured]] = {}
    turns = [(subject, measure(subject)) for _ in range(options.rounds) for subject in SUBJECTS]
    for subject, run in turns:
        measured.setdefault(subject, []).append(run)
    rows, machine = rows_of(measured), environment()
    text = table(rows) + "\n\n" + ", ".join(f"{name} {value}" for name, value in machine.items())
    print(text)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        target = path_of(options.output, "memory", machine)
        target.write_text(json.dumps({"environment": machine, "rows": rows}, indent=2) + "\n")
        target.with_suffix(".md").write_text(f"# What a strategy takes of memory\n\n{text}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
