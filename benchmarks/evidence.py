"""Results that are kept in the repository: experiments that were run, and what came out by seed.

    python -m trainstep.benchmarks.evidence benchmarks/experiments/digits.yaml --output benchmarks/results

writes `digits_keras-<version>_<date>.json`: the experiment as it was written, versions and processor, and for each
strategy its options, values by seed, verdicts and cost. `make docs` makes the table in the README from the newest.
"""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import trainstep
from trainstep.benchmarks.comparison import Comparison
from trainstep.benchmarks.environment import environment
from trainstep.benchmarks.keeping import keep, path_of
from trainstep.benchmarks.statistics import Difference
from trainstep.benchmarks.summary import Group, Row, to_target


def content_of(comparison: Comparison, experiment: str) -> dict[str, Any]:
    """Return what is kept of `comparison`, as plain values.

    Args:
        comparison: what came out.
        experiment: the text of the file that asked for it.
    """
    return {"experiment": experiment, "workloads": [_workload(group) for group in comparison.groups]}


def _workload(group: Group) -> dict[str, Any]:
    return {
        "name": group.name,
        "control": group.control,
        "settings": group.settings.model_dump(mode="json"),
        "environment": group.environment,
        "seeds": list(group.seeds),
        "strategies": {row.label: _strategy(group, row) for row in group.rows},
    }


def _strategy(group: Group, row: Row) -> dict[str, Any]:
    settings = group.settings
    values: dict[str, Mapping[int, float]] = {
        settings.metrics[0]: row.metrics,
        "robust_accuracy": row.robust,
        "calibration_error": row.calibration,
    }
    if settings.target is not None:  # A run that missed it has no number.
        taken = {run.seed: to_target(run, settings.target)[0] for run in row.runs}
        values["updates_to_target"] = {seed: updates for seed, updates in taken.items() if math.isfinite(updates)}
    return {
        "options": row.spec,
        "by_seed": {name: [by_seed.get(seed) for seed in group.seeds] for name, by_seed in values.items()},
        "difference": _difference(row.difference),
        "robust_difference": _difference(row.robust_difference),
        "cost": row.cost and row.cost.model_dump(exclude={"key", "label", "spec", "settings", "environment"}),
        "failures": row.failures,
    }


def _difference(difference: Difference | None) -> dict[str, Any] | None:
    return None if difference is None else asdict(difference)


def spread(values: Sequence[float]) -> str:
    """Return mean and standard deviation; nothing of no values."""
    if len(values) < 2:
        return "".join(f"{value:.4f}" for value in values)
    return f"{fmean(values):.4f} ± {stdev(values):.4f}"


def difference(found: Mapping[str, Any] | None) -> str:
    """Return the difference to the control, its interval and the verdict on it."""
    if found is None:
        return ""
    interval = "" if found["low"] is None else f" [{found['low']:+.4f}, {found['high']:+.4f}]"
    return f"{found['mean']:+.4f}{interval}, {found['verdict']}"


def main(arguments: list[str] | None = None) -> int:
    """Run the experiments that are named, and keep what came out; 1 where a run failed."""
    parser = argparse.ArgumentParser(description="Run experiments and keep their results.")
    parser.add_argument("experiments", nargs="+", type=Path, help="files as `trainstep compare` takes them")
    parser.add_argument("--output", type=Path, required=True, help="the folder for the results")
    parser.add_argument("--store", type=Path, help="a store, from which the same command goes on where it was stopped")
    options = parser.parse_args(arguments)
    machine, failed = environment(), 0
    for experiment in options.experiments:
        path = path_of(options.output, experiment.stem, machine)
        if path.exists():
            print(f"{path} is there. Results are never edited: not run again.", flush=True)
            continue
        comparison = trainstep.compare(experiment=experiment, store=options.store)
        print(comparison, flush=True)
        keep(path, content_of(comparison, experiment.read_text(encoding="utf-8")))
        print(path, flush=True)
        failed += sum(row.failed for row in comparison.rows)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
