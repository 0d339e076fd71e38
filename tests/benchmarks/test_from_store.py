"""A comparison out of a store: its labels, its control, and many runs."""

import pytest
import records
from records import run

from trainstep.benchmarks.comparison import Comparison
from trainstep.benchmarks.errors import InvalidComparisonError, StoreError
from trainstep.benchmarks.store import Store


def filled(path, runs, costs=(), control="standard"):
    with Store(path) as store:
        for each in runs:
            store.add_run(each)
        for each in costs:
            store.add_cost(each)
        store.add_suite(control, {each.key: [each.label] for each in (*runs, *costs)})
    return path


def test_it_is_what_was_kept(tmp_path):
    runs, costs = records.suite({"standard": 0, "up": 0.012, "down": -0.01})
    kept = Comparison(runs, costs, "standard")
    # Runs end in any order.
    read = Comparison.from_store(filled(tmp_path / "results.sqlite", runs[::-1], costs))
    assert read.control == "standard"
    assert {row.label: row.difference for row in read.rows} == {row.label: row.difference for row in kept.rows}
    assert not read.changed(kept)


def test_labels_are_those_of_the_latest_suite(tmp_path):
    plain, sam = {"standard": {}}, {"sam": {"rho": 0.05}}
    old = [run("plain", 0, [0.5], spec=plain), run("old name", 0, [0.6], spec=sam)]
    path = filled(tmp_path / "results.sqlite", old, control="plain")
    with Store(path) as store:
        store.add_suite("standard", {old[0].key: ["standard"], old[1].key: ["one", "other"]})
    comparison = Comparison.from_store(path)
    assert [row.label for row in comparison.rows] == ["standard", "one", "other"]
    assert comparison.rows[1].difference.mean == pytest.approx(0.1)


def test_controls_of_all_suites_are_one(tmp_path):
    plain, sam = {"standard": {}}, {"sam": {"rho": 0.05}}
    first = records.settings("first")
    path = filled(
        tmp_path / "results.sqlite",
        [run("plain", 0, [0.5], spec=plain, given=first), run("sam", 0, [0.6], spec=sam, given=first)],
        control="plain",
    )
    filled(path, [run("standard", 0, [0.5], spec=plain), run("sam", 0, [0.6], spec=sam)])
    comparison = Comparison.from_store(path)
    assert [row.label for row in comparison.rows] == ["standard", "sam", "standard", "sam"]
    assert all(group.rows[1].difference for group in comparison.groups)


def test_an_empty_store_and_none_are_refused(tmp_path):
    filled(tmp_path / "results.sqlite", [])
    with pytest.raises(InvalidComparisonError, match="is empty: no run has ended yet"):
        Comparison.from_store(tmp_path / "results.sqlite")
    with pytest.raises(StoreError, match="no store"):
        Comparison.from_store(tmp_path / "other.sqlite")
    assert not (tmp_path / "other.sqlite").exists()


@pytest.mark.parametrize(
    ("workloads", "labels", "seeds"), [pytest.param(10, 10, 10, id="broad"), pytest.param(1, 50, 20, id="deep")]
)
def test_a_thousand_runs_are_read_and_reported(workloads, labels, seeds, tmp_path):
    """How long ten thousand take, `benchmarks/suite_cost.py` measures."""
    gains = {"standard": 0.0, **{f"s{index}": 0.001 * index for index in range(1, labels)}}
    runs, costs = records.suite(gains, workloads=[f"w{index}" for index in range(workloads)], seeds=seeds)
    assert len(runs) == 1000
    comparison = Comparison.from_store(filled(tmp_path / "results.sqlite", runs, costs))
    comparison.write(tmp_path)
    assert len(comparison.frame()) == 1000
    assert "better" in str(comparison)
    # Plotly is 5 MB of it.
    assert (tmp_path / "report.html").stat().st_size < 9_000_000
