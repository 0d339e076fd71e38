"""Writes what experiments have shown: the page `findings.md`, and of each strategy its part on its card: `make docs`.

From the newest results of each experiment in benchmarks/experiments.
"""

import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import trainstep
from trainstep.benchmarks import catalogue_cost
from trainstep.benchmarks.columns import budget
from trainstep.benchmarks.evidence import difference, spread
from trainstep.benchmarks.keeping import newest
from trainstep.benchmarks.records import Budget

FOLDER = pathlib.Path(__file__).parent
PAGE = FOLDER / "findings.md"
CARDS = FOLDER / "strategies"
EXPERIMENTS = FOLDER.parent / "benchmarks" / "experiments"
RESULTS = FOLDER.parent / "benchmarks" / "results"
BEGIN = "<!-- What was measured is written by `make docs`. -->\n"

HEAD = """# What experiments have shown

Each experiment of [benchmarks/experiments](../benchmarks/experiments) with its newest results: mean ± standard
deviation over seeds, and the difference to the control, paired by seed, with its 95 % interval and
[verdict](verdicts.md). Where a paper's gain does not show here, that is said too: these are small nets and data, and
minutes of training. Written by `make docs`.
"""

Content = dict[str, Any]
"""Of a file of results, or a part of it."""


def kept(folder: pathlib.Path = RESULTS) -> dict[str, tuple[pathlib.Path, Content]]:
    """Return the newest results of each experiment, by its name."""
    paths = {path.stem: newest(folder, path.stem) for path in sorted(EXPERIMENTS.glob("*.yaml"))}
    return {name: (path, json.loads(path.read_text(encoding="utf-8"))) for name, path in paths.items() if path}


def page(results: dict[str, tuple[pathlib.Path, Content]]) -> str:
    """Return the page: a table for each experiment."""
    parts = [HEAD]
    for name, (path, content) in results.items():
        parts.append(f"\n## {name.replace('_', ' ')}\n")
        parts.append(f"```yaml\n{_without_schema(content['experiment'])}```\n")
        for workload in content["workloads"]:
            robust = any(_values(row, "robust_accuracy") for row in workload["strategies"].values())
            titles = ["strategy", workload["settings"]["metrics"][0], "difference", *(["robust"] * robust)]
            titles += ["difference of that"] * robust + ["cost of a step"]
            parts.append(f"{_setting(workload, robust)}\n")
            parts.append(
                f"| {' | '.join(titles)} |\n" + "|---" * len(titles) + "|\n" + "".join(_rows(workload, robust))
            )
            parts.append(_outcome(workload, titles[1], "difference"))
            if robust:
                parts.append(_outcome(workload, "robust accuracy", "robust_difference"))
        parts.append(f"By seed, with all options and versions: [{path.name}](../benchmarks/results/{path.name}).\n")
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def _where(workload: Content) -> str:
    """Return on what, and for how long, a table or a line of it was trained."""
    settings = workload["settings"]
    noise = f", {settings['noise']:.0%} of labels wrong" if settings["noise"] else ""
    return f"{settings['workload']}{noise}, {budget(Budget(**settings['budget']))}, {len(workload['seeds'])} seeds"


def _setting(workload: Content, robust: bool) -> str:
    """Return the line above a table: what its numbers are of, and the machine they come from."""
    settings, machine = workload["settings"], workload["environment"]
    batches = f"batches of {settings['batch_size']}" if settings["batch_size"] else "batches of the dataset's own"
    examples = f" of {settings['examples']} examples" if settings["examples"] else ""
    attack = settings["attack"]
    attacked = f"; attack of {attack['steps']} steps, epsilon {attack['epsilon']}" if robust else ""
    return (
        f"{_where(workload)}; {batches}{examples}; {settings['optimizer'].get('class', '')}{attacked}; "
        f"Keras {machine['keras']}, {machine['processor']}, {machine['time'][:10]}."
    )


def _outcome(workload: Content, metric: str, kind: str) -> str:
    """Return in words who was better or worse than the control by `metric`, and of whom these seeds do not tell."""
    by_verdict: dict[str, list[str]] = {}
    for label, row in workload["strategies"].items():
        if row[kind] is not None:
            by_verdict.setdefault(row[kind]["verdict"], []).append(label)
    said = "; ".join(f"{verdict}: {', '.join(labels)}" for verdict, labels in sorted(by_verdict.items()))
    return f"By {metric}, beside {workload['control']}: {said or 'nothing to compare'}.\n"


def _rows(workload: Content, robust: bool) -> Iterator[str]:
    metric = workload["settings"]["metrics"][0]
    for label, row in workload["strategies"].items():
        cells = [label, spread(_values(row, metric)), difference(row["difference"])]
        if robust:
            cells += [spread(_values(row, "robust_accuracy")), difference(row["robust_difference"])]
        ratio = row["cost"] and row["cost"]["ratio"]
        yield f"| {' | '.join([*cells, f'{ratio[1]:.2f}' if ratio else ''])} |\n"


def of_strategy(name: str, results: dict[str, tuple[pathlib.Path, Content]]) -> str:
    """Return what the card of `name` says of experiments: a line for each row it is in."""
    lines, controls = [], []
    for experiment, (_, content) in results.items():
        link = f"[{experiment}](../findings.md#{experiment.replace('_', '-')})"
        for workload in content["workloads"]:
            metric, where = workload["settings"]["metrics"][0], _where(workload)
            for label, row in workload["strategies"].items():
                if name not in row["options"]:
                    continue
                if label == workload["control"]:
                    controls.append(f"{link}, {where}: {metric} {spread(_values(row, metric))}")
                    continue
                robust = _values(row, "robust_accuracy")
                text = f"{metric} {spread(_values(row, metric))} ({difference(row['difference'])})"
                if robust:
                    text += f", robust {spread(robust)} ({difference(row['robust_difference'])})"
                lines.append(f"- {link}, {label}; {where}: {text}.")
    if not lines and controls:
        lines = ["- The control, beside which all others are measured.", *(f"- {each}." for each in controls)]
    return "\n".join([*(lines or ["- No experiment here has it yet."]), *_costs(name)])


def _costs(name: str) -> Iterator[str]:
    """Return lines of what a step of `name` took, with its defaults and with options that make a difference."""
    path, rows = catalogue_cost.kept(RESULTS) or (RESULTS, [])
    for row in rows:
        if row["label"].split()[0] == name and row["target"]:
            missed = row["ratio"] > row["target"]
            digits = 3 if missed and round(row["ratio"], 2) <= row["target"] else 2  # Or it would not be seen by what.
            limit = f"{row['target']:.2f}{', missed' if missed else ''}"
            yield (
                f"- [A step](../../benchmarks/results/{path.with_suffix('.md').name}), {row['label']}; {row['net']}, "
                f"batches of {catalogue_cost.BATCH}: {row['ratio']:.{digits}f} of a plain one (limit {limit})."
            )


def card_with(text: str, name: str, results: dict[str, tuple[pathlib.Path, Content]]) -> str:
    """Return the card `text` of `name` with what experiments have shown at its end."""
    return f"{text.split(BEGIN, maxsplit=1)[0].rstrip()}\n\n{BEGIN}**Evidence.**\n\n{of_strategy(name, results)}\n"


def _values(row: Content, metric: str) -> list[float]:
    return [value for value in row["by_seed"].get(metric) or [] if value is not None]


def _without_schema(text: str) -> str:
    return re.sub(r"^# yaml-language-server:.*\n", "", text)


if __name__ == "__main__":
    found = kept()
    PAGE.write_text(page(found))
    for strategy in trainstep.names():
        card = CARDS / f"{strategy}.md"
        card.write_text(card_with(card.read_text(), strategy, found))
