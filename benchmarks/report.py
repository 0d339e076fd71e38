"""Results for people: tables on the terminal and in Markdown, and one page that needs nothing else."""

import io
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from trainstep.benchmarks import charts
from trainstep.benchmarks.columns import (
    Column,
    Value,
    cost_columns,
    entries,
    notes,
    remark,
    summary_columns,
    title,
)
from trainstep.benchmarks.summary import Group

COMMAND = "trainstep compare experiment.yaml"
_TEMPLATES = Path(__file__).parent
_GAPS = {False: 3, True: 2}
"""Blanks between two columns of a terminal, by whether intervals are under their values."""
_LONGEST_LABEL, _LONGEST_WORDS = 28, 18
"""Letters of a label, and of other words, before they go on on the next line."""


# --- Terminal -----------------------------------------------------------------------------------------------------


class Tables:
    """A comparison for a terminal of any width: `rich` prints it.

    Where a table is too wide, intervals go under their values; where it still is, columns go to a second table below.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        self._groups = groups

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        del console
        for number, group in enumerate(self._groups):
            if number:
                yield Text()
            yield Text(title(group), style="bold")
            rows = entries([group])
            for table in _tables(summary_columns(rows), options.max_width):
                yield Text()
                yield table
            yield Text()
            # As `Text` throughout, so that a label in brackets is not taken for markup.
            remarks = [f"{row.label}: {reason}." for _, row in rows if (reason := remark(group, row))]
            yield Text("\n".join([*remarks, *notes(group)]))


def text(groups: Sequence[Group], width: int = 140) -> str:
    """Return the tables as plain text of at most `width` columns."""
    written = io.StringIO()
    Console(file=written, width=width, color_system=None).print(Tables(groups))
    return "\n".join(line.rstrip() for line in written.getvalue().rstrip("\n").split("\n"))


def _tables(columns: Sequence[Column], width: int) -> list[Table]:
    for stacked in (False, True):
        widths = [_width(column, stacked=stacked) for column in columns]
        if sum(widths) + _GAPS[stacked] * (len(widths) - 1) <= width:
            return [_table(columns, widths, stacked=stacked)]
    tables, block = [], [0]
    for index in range(1, len(columns)):
        if sum(widths[i] + _GAPS[True] for i in block) + widths[index] > width and len(block) > 1:
            tables.append(block)
            block = [0]
        block.append(index)
    tables.append(block)
    return [_table([columns[i] for i in each], [widths[i] for i in each], stacked=True) for each in tables]


def _table(columns: Sequence[Column], widths: Sequence[int], *, stacked: bool) -> Table:
    # One blank is the separator's.
    padding = (0, 1, 0, _GAPS[stacked] - 2)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=padding)
    for column, width in zip(columns, widths, strict=True):
        justify = "left" if column.words else "right"
        table.add_column(Text(column.title), justify=justify, width=width, overflow="fold")
    for values in zip(*(column.values for column in columns), strict=True):
        table.add_row(*(Text(_one(value, stacked=stacked), style=_STYLES.get(value.kind, "")) for value in values))
    return table


_STYLES = {"better": "green", "worse": "red"}


def _one(value: Value, *, stacked: bool) -> str:
    lines = f"{value.text}\n{value.detail}".rstrip()
    return lines if stacked else lines.replace("\n", " ")


def _width(column: Column, *, stacked: bool) -> int:
    lines = [line for value in column.values for line in _one(value, stacked=stacked).split("\n")]
    longest = max(len(line) for line in lines)
    heading = max(len(word) for word in column.title.split(" ")) if stacked else len(column.title)
    most = _LONGEST_LABEL if column.title == "strategy" else _LONGEST_WORDS if stacked else longest
    return max(heading, min(longest, most) if column.words else longest)


# --- Markdown -----------------------------------------------------------------------------------------------------


def markdown(groups: Sequence[Group], specification: str) -> str:
    """Return the comparison as Markdown: a table and its notes by workload, failures, and how to run it again."""
    parts = [f"# {_markdown(heading(groups))}"]
    for group in groups:
        rows = entries([group])
        parts += [f"## {_markdown(title(group))}"] if len(groups) > 1 else []
        parts += [_markdown_table(summary_columns(rows))]
        remarks = [f"{row.label}: {reason}." for _, row in rows if (reason := remark(group, row))]
        parts.append("\n".join(f"- {_markdown(sentence)}" for sentence in [*remarks, *notes(group)]))
        if costs := cost_columns(rows):
            parts += ["### What a step costs", _markdown_table(costs)]
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", specification))])
    parts += ["## To run it again", f"Save this as `experiment.yaml`, then: `{COMMAND}`"]
    parts += [f"{fence}yaml\n{specification.rstrip()}\n{fence}"]
    parts += ["\n".join(f"- {name}: {_markdown(value)}" for name, value in groups[-1].environment.items())]
    return "\n\n".join(parts) + "\n"


def _markdown_table(columns: Sequence[Column]) -> str:
    lines = [[_markdown(column.title) for column in columns], ["---" if c.words else "---:" for c in columns]]
    lines += [
        [_markdown(_one(v, stacked=False)) for v in row] for row in zip(*(c.values for c in columns), strict=True)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _markdown(words: str) -> str:
    """Return text that Markdown shows as it stands."""
    escaped = words.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # Underscores within a word are left alone by readers of today, and names are full of them.
    return re.sub(r"([\\`*|~$\[\]]|(?<!\w)_|_(?!\w)|^[#>+-](?= )|^\d+(?=[.)] ))", r"\\\1", " ".join(escaped.split()))


# --- Page ---------------------------------------------------------------------------------------------------------


def heading(groups: Sequence[Group]) -> str:
    """Return what the whole comparison is, in a line."""
    if len(groups) == 1:
        return title(groups[0])
    labels = {row.label for group in groups for row in group.rows}
    return f"{len(labels)} strategies on {len(groups)} workloads"


def html_table(groups: Sequence[Group]) -> str:
    """Return the summary as HTML, for a notebook."""
    return _template("notebook.html.jinja").render(**_Page(groups).summary)


def write_html(groups: Sequence[Group], specification: str, path: Path) -> None:
    """Write the page: summary, charts, failures, costs, and what it takes to run it again."""
    from plotly.offline import get_plotlyjs  # noqa: PLC0415  Reads 5 MB, and only the page needs it.

    page = _Page(groups)
    path.write_text(
        _template("report.html.jinja").render(
            **page.summary,
            costs=_table_context(cost_columns(entries(groups)), []),
            names=[group.name for group in groups],
            charts=page.charts,
            profile=page.profile,
            failures=page.failures,
            specs=page.specs,
            settings={group.name: group.settings.model_dump(mode="json") for group in groups},
            environments=page.environments,
            specification=specification,
            command=COMMAND,
            plotly=get_plotlyjs(),
        ),
        encoding="utf-8",
    )


class _Page:
    """What the templates are given."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self._groups = groups
        self._colours = charts.colours_of(groups)

    @cached_property
    def summary(self) -> dict[str, Any]:
        rows = entries(self._groups)
        marks = [{"control": row.label == group.control, "remark": remark(group, row)} for group, row in rows]
        sentences = {group.name: notes(group) for group in self._groups}
        if len(sentences) > 1 and len({tuple(each) for each in sentences.values()}) == 1:
            sentences = {"": next(iter(sentences.values()))}
        return {
            "title": heading(self._groups),
            "table": _table_context(summary_columns(rows), marks),
            "notes": sentences,
        }

    @cached_property
    def charts(self) -> list[list[dict[str, Any]]]:
        return [[_plain(chart) for chart in charts.charts_of(group, self._colours)] for group in self._groups]

    @cached_property
    def profile(self) -> dict[str, Any] | None:
        chart = charts.performance_profile(self._groups, self._colours)
        return None if chart is None else _plain(chart)

    @cached_property
    def failures(self) -> list[dict[str, str]]:
        return [
            {"workload": group.name, "label": row.label, "seeds": ", ".join(map(str, seeds)), "reason": reason}
            for group, row in entries(self._groups)
            for reason, seeds in row.failures.items()
        ]

    @cached_property
    def specs(self) -> dict[str, dict[str, Any]]:
        return {row.label: row.spec for _, row in entries(self._groups)}

    @cached_property
    def environments(self) -> dict[str, dict[str, str]]:
        """Each environment once, by the workloads measured in it; the time of day does not make it another."""
        found: dict[str, tuple[list[str], dict[str, str]]] = {}
        for group in self._groups:
            facts = {name: value for name, value in group.environment.items() if name != "time"}
            found.setdefault(json.dumps(facts), ([], group.environment))[0].append(group.name)
        return {"" if len(found) == 1 else ", ".join(names): facts for names, facts in found.values()}


def _plain(chart: charts.Chart) -> dict[str, Any]:
    # Not `dataclasses.asdict`, which copies every number.
    return {**vars(chart), "views": [vars(view) for view in chart.views]}


def _table_context(columns: Sequence[Column], marks: Iterable[dict[str, Any]]) -> dict[str, Any]:
    rows = list(zip(*(column.values for column in columns), strict=True))
    marked = list(marks) or [{"control": False, "remark": ""}] * len(rows)
    return {
        "columns": [{"title": c.title, "words": c.words, "hint": c.hint} for c in columns],
        "rows": [{"values": values, **mark} for values, mark in zip(rows, marked, strict=True)],
    }


def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters["as_json"] = lambda value: json.dumps(value, indent=2)
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}  # And not sorted: the order of labels is meant.
    return environment.get_template(name)
