"""The charts of the report, as plain data for Plotly. Colours of text and grid are the page's, see its template."""

import html
from collections.abc import Sequence
from statistics import mean
from typing import Any

from trainstep.benchmarks.result import Cell
from trainstep.benchmarks.summary import Row, rows

# Okabe and Ito's colours, which colour-blind readers can tell apart; the control is grey, and dashed.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a68b3", "#8a8a00")
_CONTROL_COLOUR = "#808080"

Chart = dict[str, Any]
"""Of "title", "data" and "layout", the last two as `Plotly.newPlot` takes them."""


def learning_curves(cells: Sequence[Cell], control: str) -> Chart:
    """Return the validation metric by epoch: the mean over seeds, and a band from lowest to highest."""
    data: list[dict[str, Any]] = []
    for row, colour in _coloured(cells, control):
        curves = [cell.metrics for cell in row.cells if cell.failure is None and cell.metrics]
        if not curves:
            continue
        by_epoch = list(zip(*curves, strict=True))
        epochs = list(range(1, len(by_epoch) + 1))
        shared = {"legendgroup": row.label, "x": epochs}
        line = {"color": colour, "dash": "dash" if row.label == control else "solid", "width": 2}
        if len(curves) > 1:
            edge = {**shared, "mode": "lines", "line": {"width": 0}, "showlegend": False, "hoverinfo": "skip"}
            data.append({**edge, "y": [min(values) for values in by_epoch]})
            filled = {"fill": "tonexty", "fillcolor": _transparent(colour)}
            data.append({**edge, "y": [max(values) for values in by_epoch], **filled})
        name = html.escape(row.label)  # Plotly reads names as HTML of a kind.
        data.append({**shared, "y": [mean(v) for v in by_epoch], "mode": "lines+markers", "name": name, "line": line})
    metric = html.escape(cells[0].settings.metric)
    layout = {"xaxis": {"title": {"text": "epoch"}, "dtick": _tick(cells)}, "yaxis": {"title": {"text": metric}}}
    return {"title": "Learning curves: mean over seeds, band from lowest to highest", "data": data, "layout": layout}


def accuracy_against_cost(cells: Sequence[Cell], control: str) -> Chart:
    """Return the final metric, and robust accuracy where it was measured, by the cost of a step."""
    data: list[dict[str, Any]] = []
    for row, colour in _coloured(cells, control):
        if row.cost is None or row.cost.ratio is None:
            continue
        for values, symbol, kind in ((row.metrics, "circle", ""), (row.robust, "diamond-open", ", robust")):
            if values:
                data.append(
                    {
                        "x": [row.cost.ratio],
                        "y": [mean(values)],
                        "error_y": _bars(values),
                        "legendgroup": row.label,
                        "showlegend": symbol == "circle",
                        "mode": "markers",
                        "name": html.escape(row.label) + kind,
                        "marker": {
                            "color": colour,
                            "symbol": symbol,
                            "size": 11,
                            "line": {"width": 2, "color": colour},
                        },
                    }
                )
    metric = html.escape(cells[0].settings.metric)
    layout = {
        "xaxis": {"title": {"text": "cost of a step, control = 1"}, "rangemode": "tozero"},
        "yaxis": {"title": {"text": metric}},
    }
    robust = "; open: robust accuracy" if any(trace["marker"]["symbol"] != "circle" for trace in data) else ""
    title = f"{cells[0].settings.metric} against cost: bars from lowest to highest seed{robust}"
    return {"title": title, "data": data, "layout": layout}


def _coloured(cells: Sequence[Cell], control: str) -> list[tuple[Row, str]]:
    others = 0
    result = []
    for row in rows(cells, control):
        if row.label == control:
            result.append((row, _CONTROL_COLOUR))
        else:
            result.append((row, _COLOURS[others % len(_COLOURS)]))
            others += 1
    return result


def _bars(values: Sequence[float]) -> dict[str, Any]:
    middle = mean(values)
    above, below = max(values) - middle, middle - min(values)
    return {"type": "data", "symmetric": False, "array": [above], "arrayminus": [below]}


def _transparent(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, 0.15)"


def _tick(cells: Sequence[Cell]) -> int:
    return max(1, cells[0].settings.epochs // 10)
