"""What came out of a comparison: tables, charts, a page, and whether anything has changed since another one.

comparison = Comparison.from_store("results/results.sqlite")
print(comparison)
comparison.to_html("report.html")
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from trainstep.benchmarks import against, charts, report
from trainstep.benchmarks.errors import InvalidComparisonError
from trainstep.benchmarks.keeping import made_folder
from trainstep.benchmarks.records import Cost, Run
from trainstep.benchmarks.specification import specification
from trainstep.benchmarks.summary import Group, Row, groups, to_target


@dataclass(frozen=True)
class Comparison:
    """Runs and costs, and how to look at them. Prints as a table; a notebook shows it as one."""

    runs: tuple[Run, ...]
    """One for each workload, strategy and seed."""
    costs: tuple[Cost, ...]
    """One for each workload and strategy, as far as measured."""
    control: str
    """Label of the strategy the others are compared with."""
    output: Path | None = None
    """The folder with the store and the reports; None where nothing was written."""
    experiment: str | None = None
    """The experiment as YAML text; None: what the records say of it is put together."""

    @classmethod
    def from_store(cls, path: str | Path) -> "Comparison":
        """Return all that is in the store at `path`, under the labels of the latest suite that asked for it.

        Raises:
            StoreError: there is none, or it cannot be read.
            InvalidComparisonError: it is empty.
        """
        from trainstep.benchmarks.store import Store  # noqa: PLC0415  Only who reads a store needs one.

        with Store(path, create=False) as store:
            runs, costs, suites = store.runs(), store.costs(), store.suites()
        if not runs and not costs:
            raise InvalidComparisonError(f"The store {str(path)!r} is empty: no run has ended yet.")
        control = suites[-1].control if suites else "standard"
        labels: dict[str, list[str]] = {}
        for suite in suites:
            # Controls are all the plain training step, whatever each suite calls it.
            named = {suite.control: control}
            labels.update({key: [named.get(name, name) for name in names] for key, names in suite.labels.items()})
        order = {label: index for index, label in enumerate(dict.fromkeys(n for each in labels.values() for n in each))}
        return cls(
            tuple(sorted(_relabelled(runs, labels), key=lambda run: order.get(run.label, len(order)))),
            tuple(_relabelled(costs, labels)),
            control,
        )

    @cached_property
    def groups(self) -> list[Group]:
        """One for each workload; runs of other settings or versions are never mixed."""
        if not self.runs and not self.costs:
            raise InvalidComparisonError("There is nothing to compare: no run and no cost.")
        return groups(self.runs, self.costs, self.control)

    @property
    def rows(self) -> list[Row]:
        """One row for each workload and strategy: values over the seeds, and the difference to the control."""
        return [row for group in self.groups for row in group.rows]

    @property
    def specification(self) -> str:
        """What it takes to run it again, as YAML text."""
        return self.experiment or specification(self.groups)

    def frame(self) -> Any:
        """Return a `pandas.DataFrame` with one row for each run; values after the last epoch."""
        import pandas  # noqa: PLC0415  Takes a second, and only this needs it.

        return pandas.DataFrame(
            [_flat(group, row, run) for group in self.groups for row in group.rows for run in row.runs]
        )

    def table(self) -> report.Tables:
        """Return the tables, which `rich` prints at the width of the terminal."""
        return report.Tables(self.groups)

    def figure(self, kind: str = "curves", *, workload: str | None = None, view: str | None = None) -> Any:
        """Return a chart of the report as a `plotly.graph_objects.Figure`.

        Args:
            kind: "curves", "cost", "pairs", or "profile", which is over all workloads.
            workload: name of one of `groups`; None: the first.
            view: as its buttons on the page are called, such as "seconds"; None: the first.

        Raises:
            InvalidComparisonError: there is no such chart; the message says which there are.
        """
        from plotly.graph_objects import Figure  # noqa: PLC0415  Takes a second, and only this needs it.

        chosen = _chosen(f"no view {view!r}", view, {each.name: each for each in self._chart(kind, workload).views})
        figure = Figure(data=chosen.data, layout=chosen.layout)
        return figure.update_layout(title=self._chart(kind, workload).title)

    def _chart(self, kind: str, workload: str | None) -> charts.Chart:
        colours = charts.colours_of(self.groups)
        by_name = {group.name: group for group in self.groups}
        group = _chosen(f"no workload {workload!r}", workload, by_name)
        found = {chart.kind: chart for chart in charts.charts_of(group, colours)}
        profile = charts.performance_profile(self.groups, colours)
        if profile is not None:
            found[profile.kind] = profile
        return _chosen(f"no chart {kind!r} of these records", kind, found)

    def to_html(self, path: str | Path) -> None:
        """Write the report, one page that needs nothing else, to the file `path`."""
        report.write_html(self.groups, self.specification, Path(path))

    def to_markdown(self, path: str | Path) -> None:
        """Write the report as Markdown to the file `path`."""
        Path(path).write_text(report.markdown(self.groups, self.specification), encoding="utf-8")

    def write(self, folder: str | Path) -> None:
        """Write report.html and report.md into `folder`, which is made where it is missing."""
        folder = made_folder(folder)
        self.to_html(folder / "report.html")
        self.to_markdown(folder / "report.md")

    def against(self, other: "Comparison") -> str:
        """Return what changed since `other`, in lines: by workload and strategy, costs, versions."""
        found = against.changes(self.runs, other.runs)
        changed = sum(change.changed for change in found)
        head = "Nothing has changed." if not changed else f"{changed} of {len(found)} changed, or cannot be judged."
        environment = against.versions(self.runs, other.runs)
        lines = [head, *against.summary_lines(found), *against.cost_lines(self.costs, other.costs)]
        return "\n".join([*lines, f"Environment: {environment or 'the same'}."])

    def changed(self, other: "Comparison") -> bool:
        """Return whether anything changed since `other`, or cannot be judged; costs, which scatter, do not count.

        Nothing has changed where each strategy is there in both, with the same options and settings, and its runs are
        bit-identical or without a significant difference. Fewer than 5 seeds that differ cannot be judged.
        """
        return any(change.changed for change in against.changes(self.runs, other.runs))

    def __str__(self) -> str:
        return report.text(self.groups)

    def _repr_html_(self) -> str:
        return report.html_table(self.groups)


def _chosen(problem: str, name: str | None, choices: dict[str, Any]) -> Any:
    if name is None and choices:
        return next(iter(choices.values()))
    if name not in choices:
        raise InvalidComparisonError(f"There is {problem}. There are: {', '.join(choices) or 'none'}.")
    return choices[name]


def _relabelled(records: Any, labels: dict[str, list[str]]) -> list[Any]:
    return [
        record if label == record.label else record.model_copy(update={"label": label})
        for record in records
        for label in labels.get(record.key, [record.label])
    ]


def _flat(group: Group, row: Row, run: Run) -> dict[str, Any]:
    last = run.epochs[-1] if run.epochs else None
    ended = last is not None and run.failure is None
    values: dict[str, Any] = {"workload": group.name, "strategy": row.label, "seed": run.seed}
    values.update({name: last.metrics.get(name) if ended and last else None for name in run.settings.metrics})
    values |= {
        "loss": last.loss if ended and last else None,
        "robust_accuracy": run.robust_accuracy,
        "calibration_error": run.calibration_error,
        "epochs": len(run.epochs),
        "updates": last.updates if last else 0,
        "seconds": last.seconds if last else 0.0,
    }
    if run.settings.target is not None:
        values["updates_to_target"], values["seconds_to_target"] = to_target(run, run.settings.target)
    return {**values, "failure": run.failure, "key": run.key}
