"""The table of a comparison as plain text, for the terminal and the page alike."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from trainstep.benchmarks.summary import Difference, Row

ABSENT = "-"
"""Stands for a value that is not there."""


@dataclass(frozen=True)
class Column:
    """One column: its title, whether it holds words rather than numbers, and its text by row."""

    title: str
    words: bool
    texts: tuple[str, ...]


def columns(rows: Sequence[Row], metric: str) -> list[Column]:
    """Return the columns of the table; those in which no row has anything are left out."""

    def column(title: str, text: Callable[[Row], str], *, words: bool = False) -> Column:
        return Column(title, words, tuple(text(row) for row in rows))

    chosen = [
        column("strategy", lambda row: row.label, words=True),
        column(metric, lambda row: spread(row.metrics)),
        column("against control", lambda row: _difference(row.difference)),
        column("robust accuracy", lambda row: spread(row.robust)),
        column("cost", lambda row: f"{row.cost.ratio:.2f}" if row.cost and row.cost.ratio is not None else ABSENT),
        column("ms a step", lambda row: f"{1000 * row.cost.seconds:.1f}" if row.cost else ABSENT),
        column("first s", lambda row: f"{row.cost.trace_seconds:.2f}" if row.cost else ABSENT),
    ]
    return [each for each in chosen if any(text != ABSENT for text in each.texts)]


def remark(row: Row, shared: Sequence[str]) -> str:
    """Return what kept `row` from having all values, without what is `shared` by all rows."""
    failed = sum(cell.failure is not None for cell in row.cells)
    reasons = [f"{failed} of {len(row.cells)} runs failed: {failure}" for failure in row.failures]
    if row.not_costed and row.not_costed not in row.failures:
        reasons.append(f"no cost: {row.not_costed}")
    reasons += [f"no robust accuracy: {reason}" for reason in row.not_robust if reason not in shared]
    return "; ".join(reasons)


def shared_remarks(rows: Sequence[Row]) -> tuple[str, ...]:
    """Return the reasons for which no row at all has a robust accuracy."""
    if any(row.robust for row in rows):
        return ()
    return tuple(dict.fromkeys(reason for row in rows for reason in row.not_robust))


def spread(values: Sequence[float]) -> str:
    """Return mean and standard deviation of `values`."""
    if not values:
        return ABSENT
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def _difference(difference: Difference | None) -> str:
    if difference is None:
        return ABSENT
    text = f"{difference.mean:+.4f}"
    if difference.low is None or difference.high is None:
        return text
    verdict = "" if difference.significant else " n.s."
    return f"{text} [{difference.low:+.4f}, {difference.high:+.4f}]{verdict}"
