"""Results that are kept in the repository: experiments that were run, as records anybody can read again.

    python -m trainstep.benchmarks.evidence benchmarks/experiments/digits.yaml --output benchmarks/results

writes `<name>_keras-<version>_<date>.jsonl`, a record a line, and the report as Markdown beside it. Files are never
edited afterwards; who runs an experiment anew adds a file.
"""

import argparse
import json
import pathlib
import sys

import trainstep
from trainstep.benchmarks.comparison import Comparison
from trainstep.benchmarks.records import Cost, Run


def write(comparison: Comparison, folder: pathlib.Path, name: str) -> pathlib.Path:
    """Write the records of `comparison`, and its report, under `name` into `folder`; return the path of the records."""
    machine = comparison.runs[0].environment
    path = folder / f"{name}_keras-{machine['keras']}_{machine['time'][:10]}.jsonl"
    head = {"control": comparison.control, "experiment": comparison.experiment}
    lines = [json.dumps(head)]
    lines += [f'{{"run": {run.model_dump_json()}}}' for run in comparison.runs]
    lines += [f'{{"cost": {cost.model_dump_json()}}}' for cost in comparison.costs]
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    comparison.to_markdown(path.with_suffix(".md"))
    return path


def read(path: pathlib.Path) -> Comparison:
    """Return the comparison whose records `write` wrote."""
    head, *lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    runs = tuple(Run.model_validate(line["run"]) for line in lines if "run" in line)
    costs = tuple(Cost.model_validate(line["cost"]) for line in lines if "cost" in line)
    return Comparison(runs, costs, head["control"], experiment=head["experiment"])


def newest(folder: pathlib.Path) -> list[pathlib.Path]:
    """Return the latest records of each experiment in `folder`."""
    by_name: dict[str, pathlib.Path] = {}
    for path in sorted(folder.glob("*.jsonl"), key=lambda path: path.stem.rsplit("_", 1)[-1]):
        by_name[path.name.split("_keras-")[0]] = path
    return [by_name[name] for name in sorted(by_name)]


def main(arguments: list[str] | None = None) -> int:
    """Run the experiments that are named, and keep what came out."""
    parser = argparse.ArgumentParser(description="Run experiments and keep their results.")
    parser.add_argument("experiments", nargs="+", type=pathlib.Path, help="files as `trainstep compare` takes them")
    parser.add_argument("--output", type=pathlib.Path, required=True, help="the folder for the records")
    parser.add_argument("--store", type=pathlib.Path, help="a store to go on with, where a run was stopped")
    options = parser.parse_args(arguments)
    for experiment in options.experiments:
        comparison = trainstep.compare(experiment=experiment, store=options.store)
        print(comparison)
        print(write(comparison, options.output, experiment.stem))
    return 0


if __name__ == "__main__":
    sys.exit(main())
