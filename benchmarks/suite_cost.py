"""What the suite itself takes: a whole comparison, its overhead over the `fit` calls in it, and a large store.

    python -m trainstep.benchmarks.suite_cost --output benchmarks/results

- *comparison*: seconds of `trainstep compare docs/experiment.yaml`, its start, costs and reports included.
- *overhead*: the runs of that experiment in one process, store and reports included, over nothing but the same `fit`
  calls, on models that are compiled once for each strategy, as the suite's are; and over the calls that a script makes,
  which compiles a new model for each run. Start and costs, and the attack, which no `fit` has, are left out. In turns,
  each in a fresh process, medians.
- *store*: seconds in which a store of 10,000 runs is opened, and its reports are written.
"""

import argparse
import functools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np

import trainstep
from trainstep.benchmarks import request
from trainstep.benchmarks.comparison import Comparison
from trainstep.benchmarks.data import train_batches
from trainstep.benchmarks.environment import environment
from trainstep.benchmarks.executors import LocalProcess
from trainstep.benchmarks.keeping import keep, path_of
from trainstep.benchmarks.records import Budget, Cost, Epoch, Run, Settings, Target, key_of
from trainstep.benchmarks.runner import Bench, Trainer, spec_of
from trainstep.benchmarks.store import Store

NAME = "suite_cost"
EXPERIMENT = Path(__file__).parents[1] / "docs" / "experiment.yaml"
TARGETS = {"comparison": 90.0, "overhead": 1.15, "store": 10.0}
"""Seconds, a ratio, and seconds."""


def comparison_seconds(experiment: Path) -> float:
    """Return how long the command takes, from its start to its end."""
    command = "import sys, trainstep_cli; sys.argv[0] = 'trainstep'; trainstep_cli.main()"
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        subprocess.run(
            [sys.executable, "-c", command, "compare", experiment, "--output", folder],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        return time.perf_counter() - begin


# --- Overhead -------------------------------------------------------------------------------------


class Fits(NamedTuple):
    """Seconds in `fit`, and those of the loop that made the models as well."""

    inside: float
    whole: float


def suite_seconds(experiment: Path, seeds: int) -> float:
    """Return how long the runs take in the suite, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        trainstep.compare(
            experiment=experiment, seeds=seeds, attack=False, cost=False, workers=1, progress=False, output=folder
        )
        return time.perf_counter() - begin


def fit_seconds(experiment: Path, seeds: int, *, reused: bool) -> Fits:
    """Return how long the same calls of `fit` take by themselves.

    Args:
        experiment: whose runs they are.
        seeds: how many runs of each strategy.
        reused: whether a strategy trains one model over and over, or a new one for each seed.
    """
    suite = request.suite_of(experiment=experiment, seeds=seeds, attack=False)
    inside, begin = 0.0, time.perf_counter()
    for task in suite.tasks.values():
        bench = Bench(task)
        epochs = bench.settings.budget.epochs
        for composition in suite.compositions.values():
            trainer = Trainer(bench, composition)
            for seed in suite.seeds:
                model = trainer.ready(seed) if reused else _new_model(bench, composition, seed)
                batches = train_batches(bench.split.train, seed=seed, epochs=epochs or 1, batch_size=bench.batch_size)
                before = time.perf_counter()
                model.fit(
                    batches.dataset,
                    steps_per_epoch=batches.steps_per_epoch,
                    epochs=epochs,
                    validation_data=bench.validation,
                    shuffle=False,
                    verbose=0,
                )
                inside += time.perf_counter() - before
    return Fits(inside, time.perf_counter() - begin)


def _new_model(bench: Bench, composition: Any, seed: int) -> Any:
    model = trainstep.apply(bench.new_model(seed), spec_of(composition))
    metrics = bench.task.metrics.made(model, bench.first_inputs).compiled
    model.compile(bench.task.make_optimizer(), bench.task.loss, metrics=metrics)
    return model


def overhead(experiment: Path, seeds: int, rounds: int) -> dict[str, Any]:
    """Return medians of seconds, and the ratio of the suite to each of the others."""
    ways: Mapping[str, Callable[[], Any]] = {
        "suite": functools.partial(suite_seconds, experiment, seeds),
        "compiled once": functools.partial(fit_seconds, experiment, seeds, reused=True),
        "compiled for each run": functools.partial(fit_seconds, experiment, seeds, reused=False),
    }
    found: dict[str, list[Any]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            found[name].append(_in_fresh_process(way))
            print(name, found[name][-1], flush=True)
    suite = statistics.median(found["suite"])
    once = statistics.median(fits.inside for fits in found["compiled once"])
    each = statistics.median(fits.whole for fits in found["compiled for each run"])
    return {
        "suite_seconds": suite,
        "fit_seconds": once,
        "script_seconds": each,
        "over_fit": suite / once,
        "over_script": suite / each,
    }


def _in_fresh_process(function: Callable[[], Any]) -> Any:
    worker = LocalProcess({}, _warm_up)
    try:
        return worker.call(function)
    finally:
        worker.stop()


def _warm_up() -> None:
    """Train something small: the first `fit` of a process loads much, whoever calls it."""
    model: Any = keras.Sequential([keras.layers.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    model.fit(np.ones((1, 1)), np.ones((1, 1)), verbose=0)


# --- Store ----------------------------------------------------------------------------------------


def fill(path: Path, workloads: int, strategies: int, seeds: int) -> int:
    """Write runs that nobody has trained into a new store, and return how many."""
    where, runs, costs = environment(), [], []
    for workload in range(workloads):
        settings = Settings(
            workload=f"workload {workload}",
            budget=Budget(epochs=8),
            batch_size=64,
            optimizer={"class": "Adam"},
            loss="sparse_categorical_crossentropy",
            metrics=("accuracy",),
            target=Target(metric="accuracy", value=0.5),
        )
        for strategy in range(strategies):
            label = f"strategy {strategy}" if strategy else "standard"
            shared: dict[str, Any] = {"label": label, "spec": {label: {}}, "settings": settings, "environment": where}
            for seed in range(seeds):
                level = 0.5 + 0.3 * strategy / strategies + 0.05 * (seed % 5)
                epochs = tuple(
                    Epoch(updates=23 * n, seconds=n / 10, loss=1 / n, metrics={"accuracy": level * n / 9})
                    for n in range(1, 9)
                )
                key = key_of("run", shared["spec"], settings, where, seed)
                runs.append(Run(key=key, seed=seed, epochs=epochs, calibration_error=level / 10, **shared))
            key = key_of("cost", shared["spec"], settings, where)
            seconds = (0.0009, 0.001, 0.0012)
            costs.append(Cost(key=key, trace_seconds=1.0, seconds=seconds, ratio=(0.9, 1.0, 1.1), **shared))
    with Store(path) as store:
        for run in runs:
            store.add_run(run)
        for cost in costs:
            store.add_cost(cost)
        store.add_suite("standard", {record.key: [record.label] for record in (*runs, *costs)})
    return len(runs)


def store_seconds(workloads: int, strategies: int, seeds: int) -> dict[str, Any]:
    """Return how long it takes to open a store of so many runs, and to write its reports."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.sqlite"
        runs = fill(path, workloads, strategies, seeds)
        begin = time.perf_counter()
        comparison = Comparison.from_store(path)
        opened = time.perf_counter() - begin
        comparison.write(folder)
        whole = time.perf_counter() - begin
    return {"runs": runs, "workloads": workloads, "opened_seconds": opened, "seconds": whole}


# --- Command --------------------------------------------------------------------------------------


def lines(content: Mapping[str, Any]) -> list[str]:
    """Return what was measured beside its targets, in words."""
    over, stores = content["overhead"], content["stores"]
    measured = {
        "comparison": (content["comparison_seconds"], "{:.1f} s for the whole comparison"),
        "overhead": (over["over_fit"], "{:.3f} times the seconds of its calls of fit"),
        "store": (
            max(store["seconds"] for store in stores),
            f"{{:.1f}} s for a store of {stores[0]['runs']:,} runs and its reports",
        ),
    }
    text = [
        f"{form.format(value)} (at most {TARGETS[name]:g}: {'reached' if value <= TARGETS[name] else 'MISSED'})"
        for name, (value, form) in measured.items()
    ]
    return [*text, f"{over['over_script']:.3f} times the seconds of a script that compiles a model for each run"]


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and keep what was measured where `--output` says."""
    parser = argparse.ArgumentParser(description="Measure what the suite itself takes.")
    parser.add_argument("--rounds", type=int, default=3, help="processes for each way to train")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each strategy")
    parser.add_argument("--experiment", type=Path, default=EXPERIMENT, help="the comparison")
    parser.add_argument("--runs", type=int, default=10_000, help="in the store")
    parser.add_argument("--output", type=Path, required=True, help="the folder for the results")
    options = parser.parse_args(arguments)
    machine = environment()
    path = path_of(options.output, NAME, machine)
    if path.exists():
        parser.error(f"{path} is there. Results are never edited.")
    content = {
        "experiment": options.experiment.read_text(encoding="utf-8"),
        "environment": machine,
        "comparison_seconds": comparison_seconds(options.experiment),
        "overhead": overhead(options.experiment, options.seeds, options.rounds),
        "stores": [store_seconds(20, 10, options.runs // 200), store_seconds(1, 100, options.runs // 100)],
    }
    print(*lines(content), sep="\n")
    keep(path, content)
    print(path)
    return 0


if __name__ == "__main__":
    # Under its own name: processes import what they are to call.
    from trainstep.benchmarks import suite_cost

    sys.exit(suite_cost.main())
