"""Writes what was measured into the README, from the newest results in benchmarks/results: `make docs`."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from trainstep.benchmarks import foreign_attack, suite_cost
from trainstep.benchmarks.columns import budget
from trainstep.benchmarks.evidence import difference, spread
from trainstep.benchmarks.keeping import newest
from trainstep.benchmarks.records import Budget

README = pathlib.Path(__file__).parents[1] / "README.md"
RESULTS = README.parent / "benchmarks" / "results"
BEGIN = "<!-- What was measured is written by `make docs`. -->\n"
END = "<!-- So far. -->\n"
EXPERIMENTS = ("digits", "fashion")
"""Of benchmarks/experiments: those in the table, each with one workload."""

Content = dict[str, Any]
"""Of a file of results."""


def with_evidence(text: str, folder: pathlib.Path = RESULTS) -> str:
    """Return the README with what was measured as it should be: nothing where there are no results in `folder`."""
    before, after = text.split(BEGIN)
    parts = paragraphs(folder)
    return before + BEGIN + "".join(f"\n{part}\n" for part in parts) + "\n" * bool(parts) + END + after.split(END)[1]


def paragraphs(folder: pathlib.Path) -> list[str]:
    """Return tables and what is to be said of them."""
    names = (*EXPERIMENTS, foreign_attack.NAME, suite_cost.NAME)
    files = {name: path for name in names if (path := newest(folder, name))}
    contents = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in files.items()}
    attack, cost = contents.pop(foreign_attack.NAME, None), contents.pop(suite_cost.NAME, None)
    parts = ["What came out here (`make evidence`, `make foreign-attack`, `make suite-cost`):"] if files else []
    if contents:
        parts += compared([content["workloads"][0] for content in contents.values()])
    if attack:
        parts += attacked(attack)
    if cost:
        parts.append(f"The suite itself took {'; '.join(suite_cost.lines(cost))}.")
    if files:
        links = ", ".join(f"[{path.name}](benchmarks/results/{path.name})" for path in files.values())
        parts.append(f"By seed, with all options and versions: {links}.")
    return parts


def compared(workloads: Sequence[Content]) -> list[str]:
    """Return a table with a row for each strategy: metric, difference and cost on each of the `workloads`."""
    titles = [f"{each['name']}: {_metric(each)} | difference | cost" for each in workloads]
    lines = [f"| strategy | {' | '.join(titles)} |", "|---|" + "---:|---|---:|" * len(workloads)]
    for label in dict.fromkeys(label for each in workloads for label in each["strategies"]):
        cells = " | ".join(_cells(each, each["strategies"].get(label)) for each in workloads)
        lines.append(f"| {label} | {cells} |")
    runs = "; ".join(
        f"{each['name']}: {budget(Budget(**each['settings']['budget']))}, {_where(each, len(each['seeds']))}"
        for each in workloads
    )
    how = (
        "Mean ± standard deviation; difference to the control, paired by seed, with its 95 % interval and "
        "[verdict](docs/verdicts.md); cost of a step over the control's."
    )
    return ["\n".join(lines), f"{how} {runs}."]


def attacked(content: Content) -> list[str]:
    """Return a table with a row for each way of training: accuracy as it is, under our attack, and under foolbox's."""
    settings, rows = content["settings"], content["rows"]
    attack, examples = settings["attack"], settings["train_examples"]
    pgd = f"PGD-{attack['steps']}"
    lines = [f"| {settings['workload']}, trained by | accuracy | under our {pgd} | under foolbox's {pgd} |"]
    lines.append("|---|---:|---:|---:|")
    for label in sorted(settings["strategies"], key=lambda label: label != "standard"):
        mine = [row for row in rows if row["strategy"] == label]
        cells = " | ".join(spread([row[name] for row in mine]) for name in foreign_attack.COLUMNS)
        lines.append(f"| {label} | {cells} |")
    return [
        "\n".join(lines),
        f"{budget(Budget(epochs=settings['epochs']))}{f' of {examples} examples' if examples else ''}; "
        f"L-infinity ball of radius {attack['epsilon']}, random start, first {attack['examples']} test examples; "
        f"{_where(content, len({row['seed'] for row in rows}))}, foolbox {content['environment']['foolbox']}.",
    ]


def _metric(workload: Content) -> str:
    return workload["settings"]["metrics"][0]


def _cells(workload: Content, strategy: Content | None) -> str:
    if strategy is None:
        return " |  | "
    by_seed = strategy["by_seed"][_metric(workload)]
    values = [value for value in by_seed if value is not None]
    missing = f" ({len(by_seed) - len(values)} failed)" if len(values) < len(by_seed) else ""
    ratio = strategy["cost"] and strategy["cost"]["ratio"]
    return f"{spread(values)}{missing} | {difference(strategy['difference'])} | {f'{ratio[1]:.2f}' if ratio else ''}"


def _where(content: Content, seeds: int) -> str:
    machine = content["environment"]
    return f"{seeds} seeds, Keras {machine['keras']}, {machine['processor']}, {machine['time'][:10]}"


if __name__ == "__main__":
    README.write_text(with_evidence(README.read_text()))
