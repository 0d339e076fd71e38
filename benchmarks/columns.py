"""The tables of a comparison as plain text, for the terminal, for Markdown and for the page alike."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev

from trainstep.benchmarks.attack import Attack
from trainstep.benchmarks.records import Budget
from trainstep.benchmarks.statistics import BETTER, SAME, TOO_FEW, WORSE, Difference, in_words
from trainstep.benchmarks.summary import Group, Row

ABSENT = "-"
"""Stands for a value that is not there."""

Entry = tuple[Group, Row]
_RANKS = {BETTER: 3.0, SAME: 2.0, TOO_FEW: 1.0, WORSE: 0.0}


@dataclass(frozen=True)
class Value:
    """What stands in one place of a table."""

    text: str = ABSENT
    detail: str = ""
    """Its interval, or what else belongs to it; may stand on lines of its own."""
    sort: float | str | None = None
    """What it is sorted by; None, which is a value that is not there, comes last."""
    kind: str = ""
    """Of a verdict, for its colour: "better", "worse" or ""."""


@dataclass(frozen=True)
class Column:
    """One column: its title, whether it holds words rather than numbers, and its values by row."""

    title: str
    words: bool
    values: tuple[Value, ...]
    hint: str = ""
    """What the title means, in a sentence."""


def entries(workloads: Iterable[Group]) -> list[Entry]:
    """Return all rows, each with its workload."""
    return [(group, row) for group in workloads for row in group.rows]


def summary_columns(rows: Sequence[Entry]) -> list[Column]:
    """Return the columns of the summary; those in which no row has anything are left out."""
    groups = {group.name: group for group, _ in rows}
    metrics = {group.settings.metrics[0] for group in groups.values()}
    metric = metrics.pop() if len(metrics) == 1 else "metric"
    clocks = {group.seconds_alone for group in groups.values()}

    def column(title: str, value: Callable[[Group, Row], Value], hint: str = "", *, words: bool = False) -> Column:
        return Column(title, words, tuple(value(group, row) for group, row in rows), hint)

    chosen = [
        column("strategy", _name, words=True),
        column(metric, lambda _, row: _spread(row.metrics.values()), "On validation examples, after the last epoch."),
        column("difference", lambda _, row: _difference(row.difference), "To the control, paired by seed."),
        column("verdict", lambda _, row: _verdict(row), "On the difference.", words=True),
        *(
            column(
                other, lambda _, row, other=other: _spread(row.also(other).values()), "Likewise; no verdict is on it."
            )
            for other in dict.fromkeys(name for group in groups.values() for name in group.settings.metrics[1:])
        ),
        column("robust accuracy", lambda _, row: _spread(row.robust.values()), "Under the attack named below."),
        column("robust verdict", lambda _, row: _robust_verdict(row), "On the difference in it.", words=True),
        column("calibration error", lambda _, row: _spread(row.calibration.values()), "Expected calibration error."),
        column("updates to target", lambda _, row: _updates_to_target(row), "Median over the seeds."),
        column(
            "s to target",
            lambda _, row: _to_target(row.seconds_to_target),
            "Updates times the seconds of a step measured alone." if clocks == {True} else "By the runs' own clocks.",
        ),
        column("cost", lambda _, row: _ratio(row), "Seconds a step over the control's."),
        column("memory", lambda _, row: _memory_ratio(row), "Peak memory of a step over the control's."),
    ]
    if len(groups) > 1:
        workload = column("workload", lambda group, _: Value(group.name, sort=group.name), words=True)
        chosen.insert(0, workload)
    return _filled(chosen)


def cost_columns(rows: Sequence[Entry]) -> list[Column]:
    """Return the columns of what a step costs; empty where nothing was measured."""
    measured = [(group, row) for group, row in rows if row.cost is not None]

    def column(title: str, value: Callable[[Row], Value], *, words: bool = False) -> Column:
        return Column(title, words, tuple(value(row) for _, row in measured))

    chosen = [
        column("strategy", lambda row: Value(row.label, sort=row.label), words=True),
        column("ms a step", _milliseconds),
        column("cost", _ratio),
        column("examples a second", lambda row: _number(row.cost and row.cost.examples_per_second, "{:,.0f}")),
        column("first step, s", lambda row: _number(row.cost and row.cost.trace_seconds, "{:.2f}")),
        column(
            "peak, MiB",
            lambda row: _number(mebibytes := _mebibytes(row), "{:,.1f}" if (mebibytes or 0) >= 1 else "{:.2g}"),
        ),
        column("memory", _memory_ratio),
    ]
    if len({group.name for group, _ in measured}) > 1:
        names = tuple(Value(group.name, sort=group.name) for group, _ in measured)
        chosen.insert(0, Column("workload", True, names))
    return _filled(chosen) if measured else []


def remark(group: Group, row: Row) -> str:
    """Return what kept `row` from having all values, without what all rows of `group` share."""
    runs = len(row.runs)
    reasons = [f"{len(seeds)} of {runs} runs failed: {reason}" for reason, seeds in row.failures.items()]
    if row.not_costed and row.not_costed not in row.failures:
        reasons.append(f"no cost: {row.not_costed}")
    shared = shared_remarks(group)
    reasons += [f"no robust accuracy: {reason}" for reason in row.not_robust if reason not in shared]
    reasons += [f"no calibration error: {reason}" for reason in row.not_calibrated if reason not in shared]
    return "; ".join(reasons)


def shared_remarks(group: Group) -> dict[str, str]:
    """Return what no row at all has, by the reason for it."""
    shared: dict[str, str] = {}
    if not any(row.robust for row in group.rows):
        shared.update(dict.fromkeys((reason for row in group.rows for reason in row.not_robust), "robust accuracy"))
    if not any(row.calibration for row in group.rows):
        reasons = (reason for row in group.rows for reason in row.not_calibrated)
        shared.update(dict.fromkeys(reasons, "calibration error"))
    return shared


def title(group: Group) -> str:
    """Return what was compared, in a line."""
    settings, seeds = group.settings, len(group.seeds)
    batch = "" if settings.batch_size is None else f", batches of {settings.batch_size}"
    optimizer = settings.optimizer.get("class", "")
    noise = f", noise {settings.noise:g}" if settings.noise and "noise" not in group.name else ""
    return (
        f"{group.name}{noise}: {budget(settings.budget)}{batch}{', ' if optimizer else ''}{optimizer}, "
        f"{seeds} seed{'' if seeds == 1 else 's'}"
    )


def budget(given: Budget) -> str:
    """Return when a run ends, in words."""
    amount, unit = next(
        ((value, name) for name, value in given.model_dump().items() if value is not None), (None, "no budget")
    )
    if amount is None:
        return unit
    return f"{amount:g} {unit[:-1] if amount == 1 else unit}"


def notes(group: Group) -> list[str]:
    """Return the sentences without which the numbers of one workload cannot be read."""
    settings, rows, control = group.settings, group.rows, group.control
    metric, seeds = settings.metrics[0], len(group.seeds)
    better = "higher" if settings.higher_is_better else "lower"
    spread = ", mean ± standard deviation over the seeds" if any(len(row.metrics) > 1 for row in rows) else ""
    sentences = [f"{metric}: on the validation examples after the last epoch{spread}; {better} is better."]
    if any(row.difference for row in rows):
        differences = [row.difference for row in rows if row.difference is not None]
        sentences.append(_on_differences(control, seeds, differences))
    elif not any(row.label == control and row.metrics for row in rows):
        sentences.append(f"No differences: there is no run of the control, {control!r}, that ended.")
    missing: dict[str, list[str]] = {}
    for reason, what in shared_remarks(group).items():
        missing.setdefault(what, []).append(reason)
    sentences += [f"No {what}: {'; '.join(reasons)}." for what, reasons in missing.items()]
    if settings.attack is not None and any(row.robust for row in rows):
        sentences.append(f"Robust accuracy: {attack(settings.attack)}.")
    if any(row.calibration for row in rows):
        sentences.append("Calibration error: expected, from 0 to 1; lower is better.")
    if settings.target is not None:
        sentences.append(_on_target(group))
    if any(row.cost for row in rows):
        sentences.append(
            f"Cost and memory: of a step, over those of {control!r}; median of rounds in which all strategies took "
            "turns, alone on the machine. Runs share it with each other: their own times are not costs."
        )
    return sentences


def attack(given: dict[str, object]) -> str:
    """Return the budget of an attack in words."""
    return str(Attack.model_validate(given))


def _on_differences(control: str, seeds: int, differences: Sequence[Difference]) -> str:
    seed = f"{seeds} seed{'' if seeds == 1 else 's'}"
    interval = any(difference.low is not None for difference in differences)
    seed += ", [95 % bootstrap interval]" if interval else ", of which one pair at most ended: no interval, no test"
    compared = f"{len(differences)} comparison{'' if len(differences) == 1 else 's'}"
    return (
        f"Difference: mean of strategy - {control!r}, paired by seed, {seed}. "
        f"Verdict: t-test on the pairs at 5 %, after Holm's correction for {compared}; "
        "the interval is without it. Fewer than 5 seeds never tell."
    )


def _on_target(group: Group) -> str:
    target = group.settings.target
    assert target is not None
    least = "at least" if target.higher_is_better else "at most"
    clock = (
        "seconds are updates times the median step measured alone"
        if group.seconds_alone
        else "seconds are by the clocks of runs that shared the machine, which are not costs"
    )
    return (
        f"Target: {target.metric} of {least} {target.value:g} after an epoch; median over the seeds, in which a run "
        f"that missed it counts as infinitely long (∞); in brackets how many got there, where not all did; {clock}."
    )


# --- Values -------------------------------------------------------------------------------------------------------


def _filled(columns: Sequence[Column]) -> list[Column]:
    return [each for each in columns if any(value.text != ABSENT for value in each.values)]


def number(value: float) -> str:
    """Return a metric in four digits after the point, or in four digits where it is large."""
    return f"{value:.4f}" if abs(value) < 100 else f"{value:.4g}"


def _signed(value: float) -> str:
    return f"{value:+.4f}" if abs(value) < 100 else f"{value:+.4g}"


def _spread(values: Iterable[float]) -> Value:
    known = list(values)
    if not known:
        return Value()
    return Value(number(fmean(known)), f"± {number(stdev(known))}" if len(known) > 1 else "", fmean(known))


def _difference(difference: Difference | None) -> Value:
    if difference is None:
        return Value()
    if difference.low is None or difference.high is None:
        return Value(_signed(difference.mean), sort=difference.mean)
    interval = f"[{_signed(difference.low)}, {_signed(difference.high)}]"
    return Value(_signed(difference.mean), interval, difference.mean)


def _name(group: Group, row: Row) -> Value:
    return Value(row.label, "(control)" if row.label == group.control else "", row.label)


def _verdict(row: Row) -> Value:
    if row.difference is None:
        return Value()
    text, details = _word(row.difference)
    if row.failed:
        details.append(f"{row.failed} of {len(row.runs)} runs failed")
    detail = f"({'; '.join(details)})" if details else ""
    return Value(text, detail, _RANKS[row.difference.verdict], _kind(row.difference))


def _robust_verdict(row: Row) -> Value:
    if row.robust_difference is None:
        return Value()
    text, details = _word(row.robust_difference)
    difference = _difference(row.robust_difference)
    lines = [difference.text, difference.detail, *(f"({each})" for each in details)]
    detail = "\n".join(line for line in lines if line)
    return Value(text, detail, _RANKS[row.robust_difference.verdict], _kind(row.robust_difference))


def _word(difference: Difference) -> tuple[str, list[str]]:
    if difference.verdict != TOO_FEW:
        return difference.verdict, []
    return TOO_FEW, [f"{in_words(difference.seeds_needed)} would do"]


def _kind(difference: Difference) -> str:
    return difference.verdict if difference.verdict in (BETTER, WORSE) else ""


def _updates_to_target(row: Row) -> Value:
    value = _to_target(row.updates_to_target)
    if value.text == ABSENT or row.reached == len(row.runs):
        return value
    return replace(value, detail=f"({row.reached} of {len(row.runs)})")


def _to_target(value: float | None) -> Value:
    if value is None:
        return Value()
    if not math.isfinite(value):
        return Value("∞", sort=math.inf)
    return Value(f"{value:,.0f}" if value >= 100 else f"{value:.3g}", sort=value)


def _ratio(row: Row) -> Value:
    if row.cost is None or row.cost.ratio is None:
        return Value()
    low, middle, high = row.cost.ratio
    return Value(f"{middle:.2f}", f"[{low:.2f}, {high:.2f}]", middle)


def _memory_ratio(row: Row) -> Value:
    return _number(row.cost and row.cost.memory_ratio, "{:.2f}")


def _milliseconds(row: Row) -> Value:
    if row.cost is None or row.cost.seconds is None:
        return Value()
    low, middle, high = (1000 * seconds for seconds in row.cost.seconds)
    return Value(f"{middle:.2f}", f"[{low:.2f}, {high:.2f}]", middle)


def _mebibytes(row: Row) -> float | None:
    return None if row.cost is None or row.cost.peak_bytes is None else row.cost.peak_bytes / 2**20


def _number(value: float | None, form: str) -> Value:
    return Value() if value is None else Value(form.format(value), sort=value)
