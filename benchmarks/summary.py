"""From runs and costs to one row for each workload and strategy: what came out over the seeds, and at what cost.

Values are those after the last epoch, never the best of several. A run that did not get there has none, and is said to
have failed; a run that misses the target takes infinitely long, and stays in the median.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from trainstep.benchmarks.records import VERSIONS, Cost, Run, Settings, Target
from trainstep.benchmarks.statistics import Difference, judge


@dataclass(frozen=True)
class Row:
    """One strategy on one workload, over all its seeds."""

    label: str
    spec: dict[str, dict[str, Any]]
    runs: tuple[Run, ...]
    """By seed."""
    metrics: dict[int, float]
    """The first metric by seed, of runs that ended."""
    robust: dict[int, float]
    """Robust accuracy by seed."""
    calibration: dict[int, float]
    """Expected calibration error by seed."""
    difference: Difference | None
    """Of the metric; None for the control, and where no seed has both."""
    robust_difference: Difference | None
    reached: int
    """Runs that got to the target."""
    updates_to_target: float | None
    """Median over all runs, infinite for those that missed it; None without a target or a run."""
    seconds_to_target: float | None
    """Likewise; see `Group.seconds_alone`."""
    cost: Cost | None
    """None where it was not measured, or failed."""
    failures: dict[str, tuple[int, ...]]
    """Seeds by reason."""
    not_robust: tuple[str, ...]
    """Why there is no robust accuracy, each reason once."""
    not_calibrated: tuple[str, ...]
    not_costed: str | None

    def also(self, metric: str) -> dict[int, float]:
        """Return another metric by seed, of runs that ended and have it."""
        ended = [run for run in self.runs if run.metric is not None]
        return {run.seed: run.epochs[-1].metrics[metric] for run in ended if metric in run.epochs[-1].metrics}

    @property
    def failed(self) -> int:
        """How many runs failed."""
        return sum(len(seeds) for seeds in self.failures.values())


@dataclass(frozen=True)
class Group:
    """One workload with all that is compared on it: same settings, same versions."""

    name: str
    settings: Settings
    environment: dict[str, str]
    """Of its last run."""
    control: str
    rows: tuple[Row, ...]
    """The control first, the others in the order in which they came."""
    seconds_alone: bool
    """Whether seconds to the target are updates times the seconds of a step measured alone; else they are from the
    clock of runs that shared the machine. All rows alike."""

    @property
    def seeds(self) -> tuple[int, ...]:
        """All seeds, in order."""
        return tuple(sorted({run.seed for row in self.rows for run in row.runs}))


def groups(runs: Iterable[Run], costs: Iterable[Cost], control: str) -> list[Group]:
    """Return the workloads in the order in which they first appear."""
    records: dict[tuple[str, ...], tuple[list[Run], list[Cost]]] = {}
    cached = _Settings()
    for run in runs:
        records.setdefault(cached.group_of(run), ([], []))[0].append(run)
    for cost in costs:
        records.setdefault(cached.group_of(cost), ([], []))[1].append(cost)
    names = _names([(each[0] or each[1])[0] for each in records.values()])
    return [_group(name, *each, control) for name, each in zip(names, records.values(), strict=True)]


def paired(mine: Mapping[int, float], control: Mapping[int, float]) -> list[float]:
    """Return value - control of each seed that has both."""
    return [value - control[seed] for seed, value in mine.items() if seed in control]


def to_target(run: Run, target: Target) -> tuple[float, float]:
    """Return updates and seconds at the end of the first epoch that reached `target`; infinite where none did."""
    for epoch in run.epochs:
        value = epoch.metrics.get(target.metric, math.nan)
        if value >= target.value if target.higher_is_better else value <= target.value:
            return epoch.updates, epoch.seconds
    return math.inf, math.inf


def pareto(points: Sequence[tuple[float, float]], *, higher_is_better: bool = True) -> list[int]:
    """Return which of the `points` (cost, quality) no other beats: none is as good for less, or better for as much."""
    sign = 1.0 if higher_is_better else -1.0
    front, best = [], -math.inf
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -sign * points[i][1])):
        if sign * points[index][1] > best:
            best = sign * points[index][1]
            front.append(index)
    return front


def profiles(workloads: Sequence[Group], value: Callable[[Row], float | None]) -> dict[str, list[float]]:
    """Return, by label, how many times as long as the fastest it took to the target, on each workload that has one.

    Infinite where the target was missed, and where the strategy was not run. What AlgoPerf draws is the share of these
    ratios that are at most tau: its performance profile (Dahl et al. 2023, https://arxiv.org/abs/2306.07179).

    Args:
        workloads: several.
        value: time or updates to target of a row.
    """
    labels = list(dict.fromkeys(row.label for group in workloads for row in group.rows))
    ratios: dict[str, list[float]] = {label: [] for label in labels}
    for group in workloads:
        if group.settings.target is None:
            continue
        taken = {row.label: found for row in group.rows if (found := value(row)) is not None}
        fastest = min(taken.values(), default=math.inf)
        for label in labels:
            mine = taken.get(label, math.inf)
            ratios[label].append(mine / fastest if math.isfinite(mine) else math.inf)
    return ratios


# --- One workload -------------------------------------------------------------------------------------------------


def _group(name: str, runs: list[Run], costs: list[Cost], control: str) -> Group:
    labels = _labelled([*runs, *costs])
    by_label: dict[str, dict[int, Run]] = {label: {} for label in labels.values()}
    for run in runs:
        by_label[labels[run.label, _text(run.spec)]][run.seed] = run  # Of two records of one run the later one.
    measured = {labels[cost.label, _text(cost.spec)]: cost for cost in costs}
    ordered = sorted(by_label, key=lambda label: label != control)
    clocks = {label: _step_seconds(measured.get(label)) for label in ordered}
    alone = all(clocks[label] is not None for label in ordered if by_label[label])
    finals = {label: _by_seed(by_label[label], _final) for label in ordered}
    robusts = {label: _by_seed(by_label[label], _robust) for label in ordered}
    settings = (runs or costs)[0].settings
    judged = _judged(finals, control, higher_is_better=settings.higher_is_better)
    robust_judged = _judged(robusts, control, higher_is_better=True)
    rows = []
    for label in ordered:
        mine = tuple(by_label[label][seed] for seed in sorted(by_label[label]))
        reached, updates, seconds = _target(mine, settings.target, clocks[label] if alone else None)
        cost = measured.get(label)
        rows.append(
            Row(
                label=label,
                spec=(mine[0] if mine else measured[label]).spec,
                runs=mine,
                metrics=finals[label],
                robust=robusts[label],
                calibration=_by_seed(by_label[label], _calibration),
                difference=judged.get(label),
                robust_difference=robust_judged.get(label),
                reached=reached,
                updates_to_target=updates,
                seconds_to_target=seconds,
                cost=cost if cost is not None and cost.failure is None and cost.seconds is not None else None,
                failures=_failures(mine),
                not_robust=_unique(run.not_robust for run in mine),
                not_calibrated=_unique(run.not_calibrated for run in mine),
                not_costed=None if cost is None else cost.failure,
            )
        )
    where = (runs or costs)[-1].environment
    return Group(name, settings, where, control, tuple(rows), alone)


def _judged(
    values: Mapping[str, Mapping[int, float]], control: str, *, higher_is_better: bool
) -> dict[str, Difference]:
    against = values.get(control, {})
    others = {label: paired(mine, against) for label, mine in values.items() if label != control}
    return judge(others, higher_is_better=higher_is_better)


def _target(runs: Sequence[Run], target: Target | None, step: float | None) -> tuple[int, float | None, float | None]:
    if target is None or not runs:
        return 0, None, None
    taken = [to_target(run, target) for run in runs]
    reached = sum(math.isfinite(updates) for updates, _ in taken)
    updates = float(median(updates for updates, _ in taken))
    seconds = float(median(seconds for _, seconds in taken)) if step is None else updates * step
    return reached, updates, seconds


def _step_seconds(cost: Cost | None) -> float | None:
    return None if cost is None or cost.failure is not None or cost.seconds is None else cost.seconds[1]


def _by_seed(runs: Mapping[int, Run], value: Callable[[Run], float | None]) -> dict[int, float]:
    found = {seed: value(run) for seed, run in sorted(runs.items())}
    return {seed: known for seed, known in found.items() if known is not None and math.isfinite(known)}


def _final(run: Run) -> float | None:
    return run.metric


def _robust(run: Run) -> float | None:
    return None if run.failure is not None else run.robust_accuracy


def _calibration(run: Run) -> float | None:
    return None if run.failure is not None else run.calibration_error


def _failures(runs: Sequence[Run]) -> dict[str, tuple[int, ...]]:
    reasons: dict[str, tuple[int, ...]] = {}
    for run in runs:
        if reason := _failure(run):
            reasons[reason] = (*reasons.get(reason, ()), run.seed)
    return reasons


def _failure(run: Run) -> str | None:
    if run.failure is not None:
        return run.failure
    if run.metric is None:
        return "the run ended before its first epoch did"
    if not math.isfinite(run.metric):
        return f"{run.settings.metrics[0]} after the last epoch is {run.metric}"
    return None


def _unique(texts: Iterable[str | None]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text for text in texts if text))


# --- Telling records apart ----------------------------------------------------------------------------------------


class _Settings:
    """The text of settings, made once for each object: records of one suite share theirs."""

    def __init__(self) -> None:
        self._texts: dict[int, tuple[Settings, str]] = {}

    def group_of(self, record: Run | Cost) -> tuple[str, ...]:
        """Return what records that may be compared have in common."""
        settings = record.settings
        if id(settings) not in self._texts:
            self._texts[id(settings)] = settings, settings.model_dump_json()
        return self._texts[id(settings)][1], *(record.environment.get(name, "") for name in VERSIONS)


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _labelled(records: Sequence[Run | Cost]) -> dict[tuple[str, str], str]:
    """Return a label for each label and specification: two suites in a store may mean different things by one name."""
    specs: dict[str, list[str]] = {}
    for record in records:
        known, text = specs.setdefault(record.label, []), _text(record.spec)
        if text not in known:
            known.append(text)
    return {
        (label, text): label if number == 1 else f"{label} ({number})"
        for label, known in specs.items()
        for number, text in enumerate(known, start=1)
    }


def _names(firsts: Sequence[Run | Cost]) -> list[str]:
    """Return a name for each workload; where several have one name, with what tells them apart."""
    facts = [_facts(record) for record in firsts]
    names = []
    for record, mine in zip(firsts, facts, strict=True):
        alike = [other for each, other in zip(firsts, facts, strict=True) if each.settings.workload == mine["workload"]]
        apart = [f"{key} {value}" for key, value in mine.items() if any(other.get(key) != value for other in alike)]
        names.append(record.settings.workload + (f" ({', '.join(apart)})" if apart else ""))
    return names


def _facts(record: Run | Cost) -> dict[str, str]:
    facts: dict[str, str] = {}
    for key, value in record.settings.model_dump(mode="json").items():
        if isinstance(value, Mapping):
            facts.update({f"{key} {name}": str(each) for name, each in value.items() if each is not None})
        elif value is not None:
            facts[key] = str(value)
    return {**facts, **{name: record.environment.get(name, "") for name in VERSIONS}}
