"""Summaries derived by hand, and a page that needs nothing from the network."""

import math
import re

import pytest

from trainstep.benchmarks import report, summary
from trainstep.benchmarks.result import Cell, Settings

EVIL = "<script>alert(1)</script>[red]&"
SETTINGS = Settings(
    workload="w",
    epochs=2,
    batch_size=4,
    optimizer={"class": "SGD"},
    loss="mse",
    metric="accuracy",
    attack={"epsilon": 0.5, "clip_range": [0, 1]},
)
COST = {"trace_seconds": 1.0, "seconds": 0.002, "ratio": 2.0, "low": 1.9, "high": 2.1}


def cell(label, seed, metric, **changes):
    values = {"metrics": (0.5, metric), "losses": (2.0, 1.0), "robust_accuracy": 0.25, "cost": COST, **changes}
    return Cell(label=label, seed=seed, spec={label: {}}, settings=SETTINGS, environment={"python": "3"}, **values)


CELLS = [
    cell("standard", 0, 0.5),
    cell("standard", 1, 0.75),
    cell(EVIL, 0, 0.75),
    cell(EVIL, 1, 0.75, failure="ValueError: <i>no</i>"),
]


def test_only_runs_that_ended_are_paired():
    [control, other] = summary.rows(CELLS, "standard")
    assert control.metrics == (0.5, 0.75)
    assert control.difference is None
    assert other.metrics == (0.75,)
    assert other.difference == summary.Difference(0.75 - 0.5)


def test_the_interval_is_students():
    # Differences 1 and 3: mean 2, standard deviation sqrt(2), of the mean 1. Student's t with one degree of freedom is
    # Cauchy's distribution, whose quantile at 0.975 is tan(pi * 0.475).
    difference = summary.paired_difference([(1.0, 0.0), (3.0, 0.0)])
    half = math.tan(math.pi * (0.975 - 0.5))
    assert difference.mean == 2
    assert (difference.low, difference.high) == pytest.approx((2 - half, 2 + half))
    assert not difference.significant
    assert summary.paired_difference([]) is None


def test_the_page_loads_nothing_and_escapes_labels(tmp_path):
    report.write_html(CELLS, "standard", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    own = re.sub(r"<script>.*?</script>", "", page, count=1, flags=re.DOTALL)  # All but Plotly itself.
    assert len(own) < 100_000 < len(page)
    assert "http:" not in own
    assert "https:" not in own
    assert not re.search(
        r"<(script|img|iframe|link)[^>]+(src|href)=(?!\"data:)",
        page.replace(page[page.find("<script>") : page.rfind("<script>")], ""),
    )
    assert EVIL not in page
    assert "<i>no" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;[red]&amp;" in page
    assert "prefers-color-scheme: dark" in page
    assert "epsilon 0.5" in page


def test_the_table_shows_labels_as_they_are():
    text = report.text(CELLS, "standard", width=200)
    assert EVIL in text
    assert "1 of 2 runs failed: ValueError: <i>no</i>" in text
    assert "2.00" in text
    assert max(len(line) for line in report.text(CELLS[:2], "standard", width=80).splitlines()) <= 80
