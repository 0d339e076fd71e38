"""The charts of the report, as plain data for Plotly. Colours of text and grid are the page's, see its template.

What is drawn is thinned: bands are quantiles over the seeds, not the curves themselves, long runs keep 200 points, and
of many strategies the control and the best are drawn.
"""

import html
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from trainstep.benchmarks.columns import number
from trainstep.benchmarks.summary import Group, Row, pareto, profiles

KINDS = ("curves", "cost", "pairs", "profile")
MOST = 10
"""Strategies in a chart that has a line or a row for each."""

# Okabe and Ito's colours, which colour-blind readers can tell apart; the control is grey, and dashed.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a68b3", "#8a8a00")
_CONTROL_COLOUR = "#808080"
_POINTS = 200
_SEEDS = 20
_LONGEST = 24
"""Letters of a label in a chart."""

Trace = dict[str, Any]


@dataclass(frozen=True)
class View:
    """One way to look at a chart."""

    name: str
    data: list[Trace]
    layout: dict[str, Any]


@dataclass(frozen=True)
class Chart:
    """What stands below a title: one view, or several to switch between."""

    kind: str
    title: str
    note: str
    views: list[View]


def charts_of(group: Group, colours: dict[str, str]) -> list[Chart]:
    """Return the charts of one workload for which there is anything to draw."""
    drawn = [learning_curves(group, colours), quality_against_cost(group, colours), pairs(group, colours)]
    return [Chart(c.kind, c.title, c.note, views) for c in drawn if (views := [v for v in c.views if v.data])]


def colours_of(workloads: Iterable[Group]) -> dict[str, str]:
    """Return a colour for each strategy, the same on all workloads."""
    groups = list(workloads)
    controls = {group.control for group in groups}
    others = [label for label in dict.fromkeys(r.label for g in groups for r in g.rows) if label not in controls]
    coloured = {label: _COLOURS[index % len(_COLOURS)] for index, label in enumerate(others)}
    return {**coloured, **dict.fromkeys(controls, _CONTROL_COLOUR)}


def learning_curves(group: Group, colours: dict[str, str]) -> Chart:
    """Return the validation metric by epoch, by updates and by seconds: mean over seeds, and a band."""
    data: dict[str, list[Trace]] = {"epochs": [], "updates": [], "seconds": []}
    metric, rows = group.settings.metrics[0], _best(group)
    for row in rows:
        runs = [run for run in row.runs if run.failure is None and run.epochs]
        if not runs:
            continue
        length = min(len(run.epochs) for run in runs)  # Budgets of seconds end some runs earlier than others.
        chosen = np.unique(np.linspace(0, length - 1, min(length, _POINTS)).round().astype(int))
        values = np.array([[run.epochs[i].metrics[metric] for i in chosen] for run in runs], dtype=float)
        values[~np.isfinite(values)] = np.nan  # A gap.
        seconds = np.median([[run.epochs[i].seconds for i in chosen] for run in runs], axis=0)
        axes = {"epochs": chosen + 1, "updates": [runs[0].epochs[i].updates for i in chosen], "seconds": seconds}
        for name, x in axes.items():
            data[name] += _curve(row.label, _numbers(x), values, colours[row.label], dashed=row.label == group.control)
    quality = {"title": {"text": html.escape(metric)}}
    titles = {"epochs": "epoch", "updates": "updates", "seconds": "seconds of training"}
    views = [View(name, data[name], {"xaxis": {"title": {"text": titles[name]}}, "yaxis": quality}) for name in data]
    seeds = len(group.seeds)
    band = "" if seeds == 1 else " Line: mean over the seeds; band: from their 10 % to their 90 % quantile."
    shared = " Seconds: median over the seeds, of runs that share the machine; they are not costs."
    note = f"{metric} on the validation examples, {_seeds(seeds)}.{band}{shared}{_left_out(group, rows)}"
    return Chart("curves", "Learning curves", note, views)


def quality_against_cost(group: Group, colours: dict[str, str]) -> Chart:
    """Return the final metric, and robust accuracy where there is any, by the cost of a step; the front is marked."""
    metric, settings = group.settings.metrics[0], group.settings
    kinds: list[tuple[str, Callable[[Row], dict[int, float]], bool]] = [
        (metric, lambda row: row.metrics, settings.higher_is_better),
        ("robust accuracy", lambda row: row.robust, True),
    ]
    views = []
    for name, values, higher_is_better in kinds:
        shown = [row for row in group.rows if row.cost and row.cost.ratio and values(row)]
        points = [(row.cost.ratio[1], fmean(values(row).values())) for row in shown if row.cost and row.cost.ratio]
        front = pareto(points, higher_is_better=higher_is_better)
        data = [_front([points[i] for i in front])] if len(front) > 1 else []
        for index, (row, point) in enumerate(zip(shown, points, strict=True)):
            data.append(_point(row, point, list(values(row).values()), colours[row.label], front=index in front))
        x = {"title": {"text": "cost of a step, control = 1"}, "rangemode": "tozero"}
        legend = {"showlegend": len(shown) <= MOST}  # Of more, the dots say what they are when pointed at.
        views.append(View(name, data, {"xaxis": x, "yaxis": {"title": {"text": html.escape(name)}}, **legend}))
    note = (
        "Mean over the seeds; bars from the lowest to the highest. Filled, on the dotted line: the Pareto front, where "
        "nothing is as good for less. Open: something is."
    )
    return Chart("cost", "Quality against cost", note, views)


def pairs(group: Group, colours: dict[str, str]) -> Chart:
    """Return the difference of each seed to the control's, and the values themselves, joined by seed."""
    metric, rows = group.settings.metrics[0], _best(group)
    control = next((row for row in rows if row.label == group.control), None)
    judged = [row for row in rows if row.difference is not None]
    if control is None or not judged:
        return Chart("pairs", "Seed by seed", "", [])
    names = _distinct([row.label for row in judged])
    data = [
        trace
        for name, row in zip(names, judged, strict=True)
        for trace in _differences(name, row, control, colours[row.label])
    ]
    layout = {
        "xaxis": {"title": {"text": html.escape(f"difference in {metric}")}, "zeroline": True},
        "yaxis": {"autorange": "reversed", "type": "category", "categoryarray": names},
        "showlegend": False,
        "shapes": [{"type": "line", "x0": 0, "x1": 0, "yref": "paper", "y0": 0, "y1": 1, "layer": "below"}],
    }
    values = {
        "xaxis": {"type": "category"},
        "yaxis": {"title": {"text": html.escape(metric)}},
        "showlegend": False,
    }
    seeds = group.seeds[:_SEEDS]
    views = [View("differences", data, layout), View("values", _joined([control, *judged], seeds, colours), values)]
    first = "" if len(group.seeds) <= _SEEDS else f" Values: the first {_SEEDS} seeds."
    note = (
        f"A dot is one seed, {_seeds(len(group.seeds))}. Differences: the diamond is their mean, its bar the 95 % "
        f"interval. Values: a line joins what one seed gave.{first}{_left_out(group, rows)}"
    )
    return Chart("pairs", "Seed by seed", note, views)


def performance_profile(workloads: Sequence[Group], colours: dict[str, str]) -> Chart | None:
    """Return the share of workloads on which each strategy is within tau of the fastest; None where there are few."""
    with_target = [group for group in workloads if group.settings.target is not None]
    if len(with_target) < 2:
        return None
    views = []
    kinds: dict[str, Callable[[Row], float | None]] = {
        "seconds": lambda row: row.seconds_to_target,
        "updates": lambda row: row.updates_to_target,
    }
    for name, value in kinds.items():
        ratios = profiles(with_target, value)
        reached = [ratio for each in ratios.values() for ratio in each if math.isfinite(ratio)]
        end = 1.05 * max(2.0, *reached, 1.0)
        data = [_steps(label, each, end, colours[label]) for label, each in ratios.items()]
        layout = {
            "xaxis": {"title": {"text": f"tau: {name} to target, fastest = 1"}, "type": "log"},
            "yaxis": {"title": {"text": "share of workloads within tau"}, "range": [-0.03, 1.03]},
            "showlegend": len(ratios) <= MOST,
        }
        views.append(View(name, data, layout))
    note = (
        f"Of {len(with_target)} workloads with a target: the share on which a strategy needs at most tau times as much "
        "as the fastest. A target that was missed counts as infinitely long."
    )
    return Chart("profile", "Performance profile", note, views)


# --- Traces -------------------------------------------------------------------------------------------------------


def _curve(label: str, x: Sequence[float | None], values: np.ndarray, colour: str, *, dashed: bool) -> list[Trace]:
    traces: list[Trace] = []
    shared = {"legendgroup": label, "x": x, "type": "scatter"}
    if len(values) > 1:
        low, high = np.quantile(values, (0.1, 0.9), axis=0)
        edge = {**shared, "mode": "lines", "line": {"width": 0}, "showlegend": False, "hoverinfo": "skip"}
        traces.append({**edge, "y": _numbers(low)})
        traces.append({**edge, "y": _numbers(high), "fill": "tonexty", "fillcolor": _transparent(colour)})
    line = {"color": colour, "dash": "dash" if dashed else "solid", "width": 2}
    mode = "lines+markers" if len(x) <= 30 else "lines"
    middle = {"y": _numbers(values.mean(axis=0)), "mode": mode, "name": _short(label), "line": line}
    return [*traces, {**shared, **middle}]


def _point(row: Row, point: tuple[float, float], values: Sequence[float], colour: str, *, front: bool) -> Trace:
    x, y = point
    bars = {"array": [max(values) - y], "arrayminus": [y - min(values)], "thickness": 1.5, "width": 4, "color": colour}
    marker = {"color": colour, "symbol": "circle" if front else "circle-open", "size": 12, "line": {"width": 2}}
    return {
        "type": "scatter",
        "x": [x],
        "y": [y],
        "error_y": {"type": "data", "symmetric": False, **bars},
        "mode": "markers",
        "name": _short(row.label),
        "marker": marker,
    }


def _front(points: Sequence[tuple[float, float]]) -> Trace:
    xs, ys = zip(*points, strict=True)
    line = {"color": _CONTROL_COLOUR, "dash": "dot", "width": 1.5, "shape": "hv"}
    look = {"mode": "lines", "name": "Pareto front", "line": line, "hoverinfo": "skip"}
    return {"type": "scatter", "x": list(xs), "y": list(ys), **look}


def _differences(name: str, row: Row, control: Row, colour: str) -> list[Trace]:
    difference = row.difference
    assert difference is not None
    seeds = [seed for seed in row.metrics if seed in control.metrics][: 5 * _SEEDS]
    hover = [f"seed {s}: {number(row.metrics[s])}, control {number(control.metrics[s])}" for s in seeds]
    dots = {
        "type": "scatter",
        "x": [row.metrics[seed] - control.metrics[seed] for seed in seeds],
        "y": [name] * len(seeds),
        "text": hover,
        "hoverinfo": "text",
        "mode": "markers",
        "marker": {"color": colour, "size": 7, "opacity": 0.5},
    }
    middle: Trace = {
        "type": "scatter",
        "x": [difference.mean],
        "y": [name],
        "mode": "markers",
        "marker": {"color": colour, "symbol": "diamond", "size": 12},
        "hovertemplate": f"mean {difference.mean:+.4g}<extra></extra>",
    }
    if difference.low is not None and difference.high is not None:
        bars = {"array": [difference.high - difference.mean], "arrayminus": [difference.mean - difference.low]}
        middle["error_x"] = {"type": "data", "symmetric": False, "thickness": 2, "width": 6, "color": colour, **bars}
    return [dots, middle]


def _joined(rows: Sequence[Row], seeds: Sequence[int], colours: dict[str, str]) -> list[Trace]:
    names = _distinct([row.label for row in rows])
    lines: Trace = {"type": "scatter", "x": [], "y": [], "mode": "lines", "hoverinfo": "skip"}
    lines["line"] = {"color": _CONTROL_COLOUR, "width": 1}
    for seed in seeds:
        for name, row in zip(names, rows, strict=True):
            lines["x"].append(name)
            lines["y"].append(row.metrics.get(seed))  # A gap where the run failed.
        lines["x"].append(None)
        lines["y"].append(None)
    dots = [
        {
            "type": "scatter",
            "x": [name] * len(shown),
            "y": [row.metrics[seed] for seed in shown],
            "text": [f"seed {seed}: {number(row.metrics[seed])}" for seed in shown],
            "hoverinfo": "text",
            "mode": "markers",
            "marker": {"color": colours[row.label], "size": 8},
        }
        for name, row in zip(names, rows, strict=True)
        if (shown := [seed for seed in seeds if seed in row.metrics])
    ]
    return [lines, *dots]


def _steps(label: str, ratios: Sequence[float], end: float, colour: str) -> Trace:
    taus = sorted(ratio for ratio in ratios if math.isfinite(ratio))
    x = [1.0, *taus, end]
    y = [sum(tau <= at for tau in taus) / len(ratios) for at in x]
    line = {"color": colour, "width": 2, "shape": "hv", "dash": "dash" if colour == _CONTROL_COLOUR else "solid"}
    return {"type": "scatter", "x": x, "y": y, "mode": "lines", "name": _short(label), "line": line}


# --- Helpers ------------------------------------------------------------------------------------------------------


def _best(group: Group) -> list[Row]:
    """Return the rows that have values: all, or the control and the best."""
    rows = [row for row in group.rows if row.metrics]
    if len(rows) <= MOST:
        return rows
    sign = -1 if group.settings.higher_is_better else 1
    others = sorted((row for row in rows if row.label != group.control), key=lambda r: sign * fmean(r.metrics.values()))
    kept = {row.label for row in others[: MOST - 1]} | {group.control}
    return [row for row in rows if row.label in kept]


def _left_out(group: Group, rows: Sequence[Row]) -> str:
    every = sum(bool(row.metrics) for row in group.rows)
    return "" if len(rows) == every else f" The control and the best of {every} strategies are drawn."


def _seeds(count: int) -> str:
    return f"{count} seed{'' if count == 1 else 's'}"


def _numbers(values: Any) -> list[float | None]:
    """Return plain numbers; JSON has no word for what is not finite."""
    return [round(float(value), 6) if math.isfinite(value) else None for value in values]


def _short(label: str) -> str:
    """Return a label for a chart, in which Plotly reads HTML of a kind."""
    return html.escape(label if len(label) <= _LONGEST else label[: _LONGEST - 1] + "…", quote=False)


def _distinct(labels: Sequence[str]) -> list[str]:
    """Return short labels, still different where only their ends were."""
    short = [_short(label) for label in labels]
    return [f"{name} ({index})" if short.count(name) > 1 else name for index, name in enumerate(short, start=1)]


def _transparent(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, 0.15)"
