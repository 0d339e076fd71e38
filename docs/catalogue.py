"""Writes what is said of strategies elsewhere from what they say of themselves: `make docs`.

The table in the README, and the JSON schema of experiment files.
"""

import json
import pathlib

import trainstep
from trainstep.benchmarks import catalogue_cost
from trainstep.benchmarks.schema import json_schema

README = pathlib.Path(__file__).parents[1] / "README.md"
RESULTS = README.parent / "benchmarks" / "results"
SCHEMA = pathlib.Path(__file__).parent / "experiment.schema.json"
BEGIN = "<!-- The table is written by `make docs`. -->\n"


def table() -> str:
    """Return the catalogue as a Markdown table, with the cost of a step where it was measured."""
    measured = costs()
    rows = [
        f"| [`{name}`](docs/strategies/{name}.md) | {trainstep.get(name).declaration.summary} | {_limit(name)} "
        f"| {measured.get(name, '')} |\n"
        for name in sorted(trainstep.names(), key=lambda name: (name != "standard", name))
    ]
    head = "| name | what it does | time of a step, at the limit | measured |\n|---|---|---:|---:|\n"
    return head + "".join(rows)


def costs() -> dict[str, str]:
    """Return what a step of each strategy with its defaults took, in plain ones, by the newest measurement.

    On one net, or from the net on which it took least to that on which it took most.
    """
    _, rows = catalogue_cost.kept(RESULTS) or (None, [])
    found: dict[str, list[str]] = {}
    for row in sorted(rows, key=lambda row: row["ratio"]):
        found.setdefault(row["label"], []).append(f"{row['ratio']:.2f}")
    return {label: " to ".join(dict.fromkeys([each[0], each[-1]])) for label, each in found.items()}


def _limit(name: str) -> str:
    cost = trainstep.describe(name).cost
    return f"{cost.time:.2f}"


def with_table(text: str) -> str:
    """Return the README with its table as it should be."""
    before, after = text.split(BEGIN)
    lines = after.splitlines(keepends=True)
    end = next(number for number, line in enumerate(lines) if not line.startswith("|"))
    return before + BEGIN + table() + "".join(lines[end:])


def schema() -> str:
    """Return the JSON schema of experiment files, as text."""
    return json.dumps(json_schema(), indent=1) + "\n"


if __name__ == "__main__":
    SCHEMA.write_text(schema())
    README.write_text(with_table(README.read_text()))
