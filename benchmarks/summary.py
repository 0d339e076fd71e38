"""From cells to one row per strategy: means over seeds, and what sets it apart from the control."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from trainstep.benchmarks.result import Cell, StepCost

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """Mean of the paired differences to the control, with its interval where there are two seeds or more."""

    mean: float
    low: float | None = None
    high: float | None = None

    @property
    def significant(self) -> bool | None:
        """Whether the interval leaves out 0; None where there is no interval."""
        if self.low is None or self.high is None:
            return None
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Row:
    """One strategy over all its seeds. Values are those after the last epoch, never the best of several."""

    label: str
    cells: tuple[Cell, ...]
    metrics: tuple[float, ...]
    robust: tuple[float, ...]
    difference: Difference | None
    """Of the metric; None for the control, and where no seed has both."""
    cost: StepCost | None
    failures: tuple[str, ...]
    """Reasons, each once."""
    not_robust: tuple[str, ...]
    """Why there is no robust accuracy, each reason once."""
    not_costed: str | None
    """Why there is no cost."""


def rows(cells: Sequence[Cell], control: str) -> list[Row]:
    """Return one row for each label, in the order in which they first appear."""
    by_label: dict[str, list[Cell]] = {}
    for cell in cells:
        by_label.setdefault(cell.label, []).append(cell)
    controls = {cell.seed: _final(cell) for cell in by_label.get(control, [])}
    return [_row(label, group, controls, is_control=label == control) for label, group in by_label.items()]


def paired_difference(values: Sequence[tuple[float, float]]) -> Difference | None:
    """Return the mean of `value - control` over pairs (value, control) with its 95 % interval by Student's t."""
    differences = [value - control for value, control in values]
    if not differences:
        return None
    middle = mean(differences)
    if len(differences) < 2:
        return Difference(middle)
    from scipy.stats import t  # noqa: PLC0415  Takes a second, and a single seed does without.

    quantile = float(t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1))
    half = quantile * stdev(differences) / math.sqrt(len(differences))
    return Difference(middle, middle - half, middle + half)


def _row(label: str, cells: list[Cell], controls: dict[int, float | None], *, is_control: bool) -> Row:
    finals = [(cell, final) for cell in cells if (final := _final(cell)) is not None]
    pairs = [(final, other) for cell, final in finals if (other := controls.get(cell.seed)) is not None]
    return Row(
        label=label,
        cells=tuple(cells),
        metrics=tuple(final for _, final in finals),
        robust=tuple(cell.robust_accuracy for cell in cells if cell.robust_accuracy is not None),
        difference=None if is_control else paired_difference(pairs),
        cost=next((cell.cost for cell in cells if cell.cost), None),
        failures=_unique(cell.failure for cell in cells),
        not_robust=_unique(cell.not_robust for cell in cells),
        not_costed=next((cell.not_costed for cell in cells if cell.not_costed), None),
    )


def _unique(texts: Iterable[str | None]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text for text in texts if text))


def _final(cell: Cell) -> float | None:
    """Return the metric after the last epoch, or None for a run that did not get there."""
    return cell.metrics[-1] if cell.metrics and cell.failure is None else None
