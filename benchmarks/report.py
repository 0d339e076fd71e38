"""Results for people: a table on the terminal, and one page that needs nothing else."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from trainstep.benchmarks.attack import Attack
from trainstep.benchmarks.charts import accuracy_against_cost, learning_curves
from trainstep.benchmarks.columns import columns, remark, shared_remarks
from trainstep.benchmarks.result import Cell
from trainstep.benchmarks.summary import rows

_TEMPLATES = Path(__file__).parent

_WIDE = 110
"""Columns of a terminal that hold each row of the table in one line."""


def table(cells: Sequence[Cell], control: str, width: int) -> Group:
    """Return the comparison as a table for a terminal of `width` columns, with remarks and how to read it below."""
    summaries = rows(cells, control)
    shared = shared_remarks(summaries)
    remarks = [f"{row.label}: {text}." for row in summaries if (text := remark(row, shared))]
    # As `Text` throughout, so that a label in brackets is not taken for markup.
    caption = Text("\n".join([*remarks, *notes(cells, control)]))
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    shown = columns(summaries, cells[0].settings.metric)
    for column in shown:  # On a narrow terminal as narrow as can be without breaking a word.
        words = [word for text in (column.title, *column.texts) for word in text.split(" ")]
        longest = min(32, max(len(word) for word in words))
        justify = "left" if column.words else "right"
        result.add_column(
            Text(column.title), justify=justify, width=longest if width < _WIDE else None, overflow="fold"
        )
    for row in zip(*(column.texts for column in shown), strict=True):
        result.add_row(*(Text(text) for text in row))
    return Group(Text(title(cells), style="bold"), result, caption)


def text(cells: Sequence[Cell], control: str, width: int = 140) -> str:
    """Return the table as plain text of at most `width` columns."""
    written = io.StringIO()
    Console(file=written, width=width, color_system=None).print(table(cells, control, width))
    return written.getvalue().rstrip("\n")


def title(cells: Sequence[Cell]) -> str:
    """Return what was compared, in a line."""
    settings = cells[0].settings
    seeds = len({cell.seed for cell in cells})
    batch = "" if settings.batch_size is None else f", batches of {settings.batch_size}"
    return (
        f"{settings.workload}: {settings.epochs} epochs{batch}, {settings.optimizer['class']}, "
        f"{seeds} seed{'s' if seeds > 1 else ''}"
    )


def notes(cells: Sequence[Cell], control: str) -> list[str]:
    """Return the sentences without which the numbers cannot be read."""
    settings, several = cells[0].settings, len({cell.seed for cell in cells}) > 1
    spread = ", mean ± standard deviation" if several else ""
    sentences = [f"{settings.metric}: on the validation examples after the last epoch{spread}."]
    if several:
        sentences.append(
            f"Against control: mean difference to {control!r} with the same seed, 95 % interval (Student's t); "
            "n.s. where the interval holds 0: no significant difference."
        )
    missing = shared_remarks(rows(cells, control))
    if missing:
        sentences.append(f"No robust accuracy: {'; '.join(missing)}.")
    elif settings.attack is not None:
        sentences.append(f"Robust accuracy: {Attack.model_validate(settings.attack)}.")
    sentences.append(
        f"Cost: seconds a step over those of {control!r}, in slices of training that took turns. First step: with "
        "tracing and compilation."
    )
    return sentences


def html_table(cells: Sequence[Cell], control: str) -> str:
    """Return the table as HTML."""
    return _template("table.html.jinja").render(**_context(cells, control))


def write_html(cells: Sequence[Cell], control: str, path: Path) -> None:
    """Write the report: table, charts, strategies with all their options, settings and environment."""
    from plotly.offline import get_plotlyjs  # noqa: PLC0415  Reads 5 MB, and only the page needs it.

    path.write_text(
        _template("report.html.jinja").render(
            **_context(cells, control),
            charts=[learning_curves(cells, control), accuracy_against_cost(cells, control)],
            plotly=get_plotlyjs(),
            settings=cells[0].settings.model_dump(mode="json"),
            environment=cells[0].environment,
            specs={cell.label: cell.spec for cell in cells},
        ),
        encoding="utf-8",
    )


def _context(cells: Sequence[Cell], control: str) -> dict[str, Any]:
    summaries = rows(cells, control)
    shown, shared = columns(summaries, cells[0].settings.metric), shared_remarks(summaries)
    return {
        "title": title(cells),
        "columns": shown,
        "rows": [
            {"texts": texts, "control": row.label == control, "remark": remark(row, shared)}
            for row, *texts in zip(summaries, *(column.texts for column in shown), strict=True)
        ],
        "notes": notes(cells, control),
    }


def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["as_json"] = lambda value: json.dumps(value, indent=2)
    return environment.get_template(name)
