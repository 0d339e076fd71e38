"""Is the difference real? Paired differences over a few seeds: interval, test, correction, and a word.

Each seed gives one pair: a strategy and the control from the same weights, on the same data in the same order. What is
judged is the mean of the differences, strategy - control.

Test: Student's t on the pairs, two-sided. A test by flipping signs (exact permutation, Wilcoxon) assumes less, but its
p-value is at least 2 / 2**n: 1/16 with five seeds, so it could never find anything there. With few runs the t-test
holds its promise on such data and the bootstrap does not (Colas et al. 2019, who advise against bootstrap tests below
50 runs); heavy tails make it find less, not more. Where all differences are the same number, as on a small validation
set, there is no spread to take a t from, and the sign-flip p-value 2 / 2**n stands in for it.

Correction: Holm's, over all strategies compared with the control on one workload and metric (Demsar 2006). It keeps the
chance of one false word or more among them at 5 %, whatever the correlation, and they are correlated: they share the
control's runs.

Interval: 95 % bootstrap of the mean, percentile, expanded after Hesterberg (2015). The plain percentile
interval is too narrow by the factor sqrt((n - 1) / n) * z / t, 0.63 with five seeds; BCa does not mend that, and has
nothing to take its acceleration from where values repeat. The interval is for one difference by itself, without Holm's
correction: it may leave out 0 where the word is "no significant difference".

Seeds that would do: so many that the t-test, at the level Holm starts with, finds a difference as large as the one
observed, with the spread observed, in 80 % of suites. From few seeds that is a rough guess.

Holm, Scandinavian Journal of Statistics 6, 1979. Demsar, JMLR 7, 2006, https://jmlr.org/papers/v7/demsar06a.html
Colas et al., "A Hitchhiker's Guide to Statistical Comparisons of Reinforcement Learning Algorithms", 2019,
https://arxiv.org/abs/1904.06979
Hesterberg, "What Teachers Should Know About the Bootstrap", The American Statistician 69, 2015,
https://arxiv.org/abs/1411.5279
Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice", NeurIPS 2021,
https://arxiv.org/abs/2108.13264
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LEVEL = 0.05
"""Chance of a false "better" or "worse" among the strategies of one workload and metric, at most."""
POWER = 0.8
MIN_SEEDS = 5
"""With fewer pairs there is never a "better" or "worse"."""
MAX_SEEDS = 100
"""Where more would be needed, the number is not given."""

BETTER, WORSE = "better", "worse"
SAME = "no significant difference"
TOO_FEW = "too few seeds"

_RESAMPLES = 4999
_AT_ONCE = 4_000_000
"""Numbers that the bootstrap holds at a time: 32 MB."""


@dataclass(frozen=True)
class Difference:
    """Strategy minus control over the seeds that have both."""

    pairs: int
    mean: float
    low: float | None
    """Of the interval; None for a single pair."""
    high: float | None
    p: float | None
    """Of the test by itself; None for a single pair."""
    corrected_p: float | None
    """After Holm."""
    verdict: str
    """`BETTER`, `WORSE`, `SAME` or `TOO_FEW`."""
    seeds_needed: int | None
    """How many would tell a difference like this one; `MAX_SEEDS` + 1 for more than that, None where none would."""

    @property
    def word(self) -> str:
        """The verdict, with how many seeds would do where there are too few."""
        if self.verdict != TOO_FEW:
            return self.verdict
        return f"{TOO_FEW} ({in_words(self.seeds_needed)} would do)"


def in_words(seeds: int | None) -> str:
    """Return a number of seeds as text."""
    if seeds is None:
        return f"{MIN_SEEDS} or more"
    return f"more than {MAX_SEEDS}" if seeds > MAX_SEEDS else str(seeds)


def judge(differences: Mapping[str, Sequence[float]], *, higher_is_better: bool = True) -> dict[str, Difference]:
    """Return the judgement of each strategy; those without a pair are left out.

    Args:
        differences: strategy - control of each seed that has both, finite, by label: all that one control is compared
            with on one workload and metric, since Holm's correction is over them.
        higher_is_better: of the metric.
    """
    arrays = {label: np.asarray(values, dtype=float) for label, values in differences.items() if len(values)}
    intervals = _intervals(arrays)
    tested = {label: p_value(values) for label, values in arrays.items() if len(values) > 1}
    corrected = dict(zip(tested, holm(list(tested.values())), strict=True))
    return {
        label: _difference(
            values,
            intervals.get(label),
            tested.get(label),
            corrected.get(label),
            compared=len(tested),
            higher_is_better=higher_is_better,
        )
        for label, values in arrays.items()
    }


def _difference(
    values: np.ndarray,
    interval: tuple[float, float] | None,
    p: float | None,
    corrected: float | None,
    *,
    compared: int,
    higher_is_better: bool,
) -> Difference:
    mean = float(values.mean())
    if len(values) < MIN_SEEDS or corrected is None:
        verdict = TOO_FEW
    elif corrected > LEVEL:
        verdict = SAME
    else:
        verdict = BETTER if (mean > 0) == higher_is_better else WORSE
    low, high = interval if interval is not None else (None, None)
    needed = None if p is None else seeds_needed(values, LEVEL / compared)
    return Difference(len(values), mean, low, high, p, corrected, verdict, needed)


def p_value(values: np.ndarray) -> float:
    """Return the two-sided p-value of the paired differences `values`, (pairs,), of which there are two or more."""
    from scipy.stats import ttest_1samp  # noqa: PLC0415  Takes a second, and no other part of a suite needs it.

    if not np.any(values):
        return 1.0
    if _constant(values):
        return 2.0 / 2.0 ** len(values)
    p: Any = ttest_1samp(values, 0.0)[1]
    return float(p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number, in the same order: step-down, so never above Bonferroni's."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(stepped, 1.0)
    return corrected.tolist()


def seeds_needed(values: np.ndarray, level: float) -> int | None:
    """Return how many pairs find a mean like that of `values`, (pairs,), in `POWER` of suites; see `Difference`.

    Args:
        values: paired differences, two or more.
        level: of the two-sided test.
    """
    from scipy.stats import nct, t  # noqa: PLC0415

    mean = float(values.mean())
    if mean == 0:
        return None
    if _constant(values):  # Then the p-value is 2 / 2**n.
        return max(MIN_SEEDS, math.ceil(1 - math.log2(level)))
    counts = np.arange(MIN_SEEDS, MAX_SEEDS + 1)
    effect = np.sqrt(counts) * abs(mean) / values.std(ddof=1)
    threshold = t.ppf(1 - level / 2, counts - 1)
    # By the side of the effect; that of the other is next to nothing. Beyond 37 it is 1, and SciPy may say NaN.
    power = np.where(effect > 37 + threshold, 1.0, nct.sf(threshold, counts - 1, np.minimum(effect, 37.0)))
    enough = counts[power >= POWER]
    return int(enough[0]) if len(enough) else MAX_SEEDS + 1


def _constant(values: np.ndarray) -> bool:
    # Equal but for rounding: 0.9 - 0.8 and 0.7 - 0.6 are the same difference of two shares.
    return bool(np.ptp(values) <= 1e-9 * np.max(np.abs(values)))


def _intervals(arrays: Mapping[str, np.ndarray]) -> dict[str, tuple[float, float]]:
    """Return the interval of the mean by label, of those with two pairs or more; one call for all of one length."""
    by_length: dict[int, list[str]] = {}
    for label, values in arrays.items():
        if len(values) > 1:
            by_length.setdefault(len(values), []).append(label)
    found: dict[str, tuple[float, float]] = {}
    for labels in by_length.values():
        lows, highs = bootstrap(np.stack([arrays[label] for label in labels]))
        found.update({label: (float(low), float(high)) for label, low, high in zip(labels, lows, highs, strict=True)})
    return found


def bootstrap(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both ends, (rows,), of the expanded percentile interval of the mean of each row of `values`.

    Resampled with a fixed seed: the same records give the same page.

    Args:
        values: (rows, n), n at least 2.
    """
    from scipy.stats import bootstrap as resample  # noqa: PLC0415
    from scipy.stats import norm, t  # noqa: PLC0415

    rows, n = values.shape
    tail = float(norm.cdf(-math.sqrt(n / (n - 1)) * t.ppf(1 - LEVEL / 2, n - 1)))
    interval = resample(
        (values,),
        np.mean,
        axis=-1,
        vectorized=True,
        n_resamples=_RESAMPLES,
        batch=max(1, _AT_ONCE // (rows * n)),
        confidence_level=1 - 2 * tail,
        method="percentile",
        random_state=np.random.default_rng(0),  # pyright: ignore[reportCallIssue]  SciPy 1.15 has another name too.
    ).confidence_interval
    # A mean of equal numbers may be off by rounding.
    low, high = np.asarray(interval.low), np.asarray(interval.high)
    mean = values.mean(axis=-1)
    return np.minimum(low, mean), np.maximum(high, mean)
