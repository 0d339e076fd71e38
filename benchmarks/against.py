"""Has anything changed since? Two comparisons of the same things, by other versions or on another machine.

Runs are paired by workload, strategy and seed, and judged like differences to a control: new - old.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from trainstep.benchmarks.records import Cost, Run
from trainstep.benchmarks.statistics import SAME, TOO_FEW, Difference, judge

_Key = tuple[str, str]
"""Workload and label."""


@dataclass(frozen=True)
class Change:
    """What became of one strategy on one workload."""

    workload: str
    label: str
    changed: bool
    """Whether it did, or cannot be said not to have: what cannot be judged is not vouched for."""
    text: str


def changes(new_runs: Iterable[Run], old_runs: Iterable[Run]) -> list[Change]:
    """Return what became of each strategy on each workload, of those in either."""
    new, old = _by_key(new_runs), _by_key(old_runs)
    found: dict[_Key, Change] = {}
    differences: dict[str, dict[str, list[float]]] = {}
    for key in dict.fromkeys([*old, *new]):
        change = _at_sight(key, new.get(key, {}), old.get(key, {}))
        if change is not None:
            found[key] = change
        else:
            differences.setdefault(key[0], {})[key[1]] = _differences(new[key], old[key])
    for workload, by_label in differences.items():
        higher = next(run for label in by_label for run in new[workload, label].values()).settings.higher_is_better
        for label, difference in judge(by_label, higher_is_better=higher).items():
            found[workload, label] = _judged(workload, label, difference)
    return [found[key] for key in dict.fromkeys([*old, *new])]


def cost_lines(new: Iterable[Cost], old: Iterable[Cost]) -> list[str]:
    """Return how the cost of a step, over the control's, went for each strategy measured in both."""
    before = {(cost.settings.workload, cost.label): cost for cost in old}
    lines = []
    for cost in new:
        earlier = before.get((cost.settings.workload, cost.label))
        if earlier is not None and earlier.ratio is not None and cost.ratio is not None:
            ratios = f"{earlier.ratio[1]:.2f} -> {cost.ratio[1]:.2f}"
            lines.append(f"{cost.settings.workload}, {cost.label}: cost {ratios} times the control's step")
    return lines


def versions(new: Sequence[Run], old: Sequence[Run]) -> str:
    """Return what of the environments differs, but for the time."""
    if not new or not old:
        return ""
    here, there = new[-1].environment, old[-1].environment
    names = [name for name in {**there, **here} if name != "time" and here.get(name) != there.get(name)]
    return ", ".join(f"{name} {there.get(name, '?')} -> {here.get(name, '?')}" for name in names)


def _by_key(runs: Iterable[Run]) -> dict[_Key, dict[int, Run]]:
    found: dict[_Key, dict[int, Run]] = {}
    for run in runs:
        found.setdefault((run.settings.workload, run.label), {})[run.seed] = run
    return found


def _at_sight(key: _Key, new: dict[int, Run], old: dict[int, Run]) -> Change | None:
    """Return what needs no statistics."""
    workload, label = key
    shared = [seed for seed in new if seed in old]
    if not new:
        return Change(workload, label, True, "missing now")
    if not old:
        return Change(workload, label, True, "new")
    if not shared:
        return Change(workload, label, True, "no seed in common")
    one, other = new[shared[0]], old[shared[0]]
    if one.spec != other.spec:
        return Change(workload, label, True, "other options: not the same strategy")
    if one.settings != other.settings:
        mine, theirs = one.settings.model_dump(), other.settings.model_dump()
        fields = ", ".join(name for name in mine if mine[name] != theirs[name])
        return Change(workload, label, True, f"other settings ({fields}): not comparable")
    failed = [seed for seed in shared if (new[seed].metric is None) != (old[seed].metric is None)]
    if failed:
        now = [seed for seed in failed if new[seed].metric is None]
        text = f"seed {now[0]} fails now: {new[now[0]].failure}" if now else f"seed {failed[0]} failed, and ends now"
        return Change(workload, label, True, text)
    seeds = f"{len(shared)} seed{'' if len(shared) == 1 else 's'}"
    if all(_outcome(new[seed]) == _outcome(old[seed]) for seed in shared):
        return Change(workload, label, False, f"bit-identical, {seeds}")
    if not _differences(new, old):  # All failed, then as now.
        return Change(workload, label, True, f"no run ends, and their losses differ, {seeds}")
    return None


def _judged(workload: str, label: str, difference: Difference) -> Change:
    interval = ""
    if difference.low is not None and difference.high is not None:
        interval = f" [{difference.low:+.4f}, {difference.high:+.4f}]"
    verdict = difference.word if difference.verdict in (SAME, TOO_FEW) else f"{difference.word} than before"
    text = f"{verdict}: {difference.mean:+.4f}{interval}, {difference.pairs} seeds"
    return Change(workload, label, difference.verdict != SAME, text)


def _differences(new: dict[int, Run], old: dict[int, Run]) -> list[float]:
    metrics = [(run.metric, old[seed].metric) for seed, run in new.items() if seed in old]
    return [here - there for here, there in metrics if here is not None and there is not None]


def _outcome(run: Run) -> list[Any]:
    """Return all of a run but its times and what it ran on; as text, in which not-a-number equals itself."""
    epochs = [(epoch.updates, repr(epoch.loss), repr(sorted(epoch.metrics.items()))) for epoch in run.epochs]
    return [epochs, repr(run.robust_accuracy), repr(run.calibration_error), run.failure]


def summary_lines(found: Sequence[Change]) -> list[str]:
    """Return a line for each change, what changed first."""
    several = len({change.workload for change in found}) > 1
    ordered = sorted(found, key=lambda change: not change.changed)
    return [f"{f'{c.workload}, ' if several else ''}{c.label}: {c.text}" for c in ordered]
