"""Summaries worked out by hand; tables, Markdown and pages that show what was written, and nothing else."""

import math
import re

import pytest
import records
from records import cost, run

from trainstep.benchmarks import charts, report
from trainstep.benchmarks.columns import entries, summary_columns
from trainstep.benchmarks.comparison import Comparison
from trainstep.benchmarks.errors import InvalidComparisonError
from trainstep.benchmarks.records import Budget, Target
from trainstep.benchmarks.statistics import BETTER, SAME, TOO_FEW
from trainstep.benchmarks.summary import pareto, profiles

EVIL = "</script><script>alert(1)</script>[red]&"
FINALS = {"standard": (0.50, 0.75), EVIL: (0.75, 0.75)}


def compared(runs, costs=(), control="standard"):
    return Comparison(tuple(runs), tuple(costs), control)


def row_of(comparison, label, workload=0):
    return next(row for row in comparison.groups[workload].rows if row.label == label)


def two_seeds(**changes):
    runs = [run(label, seed, [0.5, value]) for label, values in FINALS.items() for seed, value in enumerate(values)]
    runs[-1] = runs[-1].model_copy(update=changes)
    return runs


@pytest.fixture(scope="module")
def suite():
    runs, costs = records.suite({"standard": 0, "up": 0.012, EVIL: 0.004, "down": -0.01})
    return Comparison(runs, costs, "standard")


# --- Rows ---------------------------------------------------------------------------------------------------------


def test_only_runs_that_ended_are_paired():
    comparison = compared(two_seeds(failure="ValueError: <i>no</i>"))
    control, other = comparison.rows
    assert list(control.metrics.values()) == [0.5, 0.75]
    assert control.difference is None
    assert (other.metrics, other.robust, other.calibration) == ({0: 0.75}, {0: 0.25}, {0: 0.125})
    assert (other.difference.pairs, other.difference.mean) == (1, 0.25)
    assert other.failures == {"ValueError: <i>no</i>": (1,)}


def test_the_value_is_that_after_the_last_epoch_and_not_the_best():
    [row] = compared([run("standard", 0, [0.5, 0.9, 0.75])]).rows
    assert row.metrics == {0: 0.75}


def test_a_metric_that_is_no_number_is_a_failure_with_a_reason():
    [row] = compared([run("standard", 0, [0.5, math.nan])]).rows
    assert row.metrics == {}
    assert row.failures == {"accuracy after the last epoch is nan": (0,)}


def test_runs_come_in_any_order():
    runs, costs = records.suite({"standard": 0, "up": 0.012, "down": -0.01})
    there, back = compared(runs, costs), compared(runs[::-1], costs)
    for row in there.rows:
        other = row_of(back, row.label)
        assert other.difference == row.difference
        assert other.updates_to_target == row.updates_to_target
    assert back.rows[0].label == "standard"


def test_a_run_that_misses_the_target_takes_infinitely_long_and_stays_in_the_median():
    # The target is 0.9. Ten updates and half a second an epoch: reached after 20, 10 and never; the median is 20.
    curves = {0: [0.8, 0.9, 0.1], 1: [0.95, 0.95], 2: [0.1, 0.2]}
    [row] = compared([run("standard", seed, curve) for seed, curve in curves.items()]).rows
    assert (row.reached, row.updates_to_target, row.seconds_to_target) == (2, 20, 1.0)
    # Of two runs one of which missed it, the median lies between a number and infinity.
    [row] = compared([run("standard", seed, curves[seed]) for seed in (1, 2)]).rows
    assert (row.reached, row.updates_to_target) == (1, math.inf)
    assert "∞ (1 of 2)" in str(compared([run("standard", seed, curves[seed]) for seed in (1, 2)]))


def test_a_run_that_reached_the_target_did_so_even_if_it_failed_later():
    [row] = compared([run("standard", 0, [0.95, 0.1], failure="DivergedError: inf")]).rows
    assert (row.reached, row.updates_to_target, row.metrics) == (1, 10, {})


def test_a_target_may_lie_below():
    given = records.settings(target=Target(metric="accuracy", value=0.2, higher_is_better=False))
    [row] = compared([run("standard", 0, [0.5, 0.2], given=given)]).rows
    assert row.updates_to_target == 20


def test_seconds_to_target_are_those_of_steps_measured_alone_where_all_were():
    runs = [run(label, 0, [0.95]) for label in ("standard", "other")]
    both = compared(runs, [cost("standard", 1), cost("other", 3)])
    assert both.groups[0].seconds_alone
    # Ten updates of 2 ms, and of 6 ms.
    assert [row.seconds_to_target for row in both.rows] == pytest.approx([0.02, 0.06])
    one = compared(runs, [cost("standard", 1), cost("other", 3, seconds=None, failure="ValueError: no")])
    assert not one.groups[0].seconds_alone
    assert [row.seconds_to_target for row in one.rows] == [0.5, 0.5]
    assert "which are not costs" in str(one)


def test_runs_of_other_settings_or_versions_are_not_mixed():
    longer = records.settings(budget=Budget(epochs=9))
    newer = {**records.ENVIRONMENT, "keras": "3.16"}
    runs = [run("standard", 0, [0.5]), run("standard", 0, [0.6], given=longer)]
    runs.append(run("standard", 0, [0.7], environment=newer))
    comparison = compared(runs)
    assert [list(row.metrics.values()) for row in comparison.rows] == [[0.5], [0.6], [0.7]]
    assert [group.name for group in comparison.groups] == [
        "digits_cnn (budget epochs 3, keras 3.15.1)",
        "digits_cnn (budget epochs 9, keras 3.15.1)",
        "digits_cnn (budget epochs 3, keras 3.16)",
    ]


def test_one_label_for_two_compositions_is_two_rows():
    runs = [run("a", 0, [0.5], spec={"ema": {"decay": decay}}) for decay in (0.9, 0.99)]
    assert [row.label for row in compared(runs).rows] == ["a", "a (2)"]


def test_without_the_control_there_are_no_differences_and_it_is_said():
    comparison = compared([run("other", 0, [0.5]), run("other", 1, [0.5])])
    assert comparison.rows[0].difference is None
    assert "No differences: there is no run of the control, 'standard', that ended." in " ".join(
        str(comparison).split()
    )


def test_nothing_is_refused():
    with pytest.raises(InvalidComparisonError, match="nothing to compare"):
        str(compared([]))


def test_verdicts_are_corrected_over_the_strategies_of_one_workload_only(suite):
    assert row_of(suite, "up").difference.verdict == BETTER
    alone = compared([r for r in suite.runs if r.label in ("standard", "up")])
    difference = row_of(alone, "up").difference
    assert difference.corrected_p == difference.p < row_of(suite, "up").difference.corrected_p
    assert "correction for 3 comparisons" in " ".join(str(suite).split())


def test_fewer_than_five_seeds_are_too_few_and_the_table_says_how_many_would_do():
    comparison = compared([r for r in records.suite({"standard": 0, "up": 0.012})[0] if r.seed < 3])
    assert row_of(comparison, "up").difference.verdict == TOO_FEW
    assert re.search(r"too few seeds \(\d+ would do\)", report.text(comparison.groups, 240))


# --- Fronts and profiles ------------------------------------------------------------------------------------------


def test_the_front_is_what_nothing_beats_at_its_cost_or_below():
    points = [(1.0, 0.5), (2.0, 0.4), (2.0, 0.7), (3.0, 0.7), (4.0, 0.9)]
    assert pareto(points) == [0, 2, 4]
    assert pareto(points, higher_is_better=False) == [0, 1]
    assert pareto([]) == []


def test_ratios_to_the_fastest_by_workload_with_misses_infinite():
    # By updates. first: 10 and 20, so 1 and 2. second: missed and 10, so infinite and 1. third: both missed.
    runs = []
    for workload, curves in {
        "first": {"standard": [0.9, 0.9], "other": [0.1, 0.9]},
        "second": {"standard": [0.1, 0.1], "other": [0.9, 0.9]},
        "third": {"standard": [0.1, 0.1], "other": [0.1, 0.1]},
    }.items():
        given = records.settings(workload)
        runs += [run(label, 0, curve, given=given) for label, curve in curves.items()]
    comparison = compared(runs)
    ratios = profiles(comparison.groups, lambda row: row.updates_to_target)
    assert ratios == {"standard": [1, math.inf, math.inf], "other": [2, 1, math.inf]}
    # Two of three workloads have a target someone reached; at tau = 2 "other" has both, of three.
    other = next(trace for trace in comparison.figure("profile", view="updates").data if trace.name == "other")
    assert list(other.y)[-1] == pytest.approx(2 / 3)


# --- Tables -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [60, 80, 100, 140, 240])
def test_a_table_fits_the_terminal_and_breaks_no_number(suite, width):
    text = report.text(suite.groups, width)
    assert max(len(line) for line in text.splitlines()) <= width
    numbers = [f"{row.difference.mean:+.4f}" for row in suite.rows if row.difference]
    numbers += [f"[{row.difference.low:+.4f}, {row.difference.high:+.4f}]" for row in suite.rows if row.difference]
    assert all(number in text for number in numbers)
    assert "2.50" in text


def test_the_table_shows_labels_and_reasons_as_they_are():
    text = report.text(compared(two_seeds(failure="ValueError: <i>no</i>")).groups, 240)
    assert EVIL in text.replace("\n", "")
    assert f"{EVIL}: 1 of 2 runs failed: ValueError: <i>no</i>." in text


def test_what_no_row_has_is_said_once():
    reason = "no attack was asked for"
    runs = [run(label, 0, [0.5], robust_accuracy=None, not_robust=reason) for label in ("standard", "other")]
    text = str(compared(runs))
    assert text.count(reason) == 1
    assert f"No robust accuracy: {reason}." in text
    some = str(compared([runs[0], run("other", 0, [0.5])]))
    assert f"standard: no robust accuracy: {reason}." in some


def test_markdown_shows_labels_as_they_are(suite, tmp_path):
    suite.write(tmp_path / "new")
    text = (tmp_path / "new" / "report.md").read_text(encoding="utf-8")
    assert (tmp_path / "new" / "report.html").exists()
    before, fenced, after = text.split("```", 2)[0], *text.split("```")[1:3]
    assert "<script" not in before + after
    assert "&lt;/script&gt;" in before
    assert EVIL in fenced
    rows = [line for line in before.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows[:6]}) == 1
    assert "| up | " in before


# --- Page ---------------------------------------------------------------------------------------------------------


def test_the_page_escapes_labels_and_reasons(tmp_path):
    failed = two_seeds(failure=f"ValueError: {EVIL}")
    compared(failed, [cost(label, 1) for label in FINALS]).to_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert EVIL not in page
    assert "alert(1)</script>" not in page
    assert "&lt;/script&gt;&lt;script&gt;alert(1)" in page
    assert "default-src 'none'" in page
    # Without Plotly, which is one script, the page is small and names no address.
    own = re.sub(r"<script>(?!\s*\"use strict\").*?</script>", "", page, flags=re.DOTALL)
    assert len(own) < 100_000 < len(page)
    assert "http:" not in own
    assert "https:" not in own


def test_the_page_says_what_the_numbers_are(suite, tmp_path):
    suite.to_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for words in (
        "5 seeds",
        "95 % bootstrap interval",
        "&#39;standard&#39;",
        "their own times are not costs",
        "linf epsilon 0.1",
        "trainstep compare experiment.yaml",
        "prefers-color-scheme: dark",
        "learning_rate: 0.001",
        "a processor",
    ):
        assert words in page, words


def test_a_notebook_gets_a_table(suite):
    shown = suite._repr_html_()
    assert "<script" not in shown
    assert "&lt;script&gt;" in shown
    assert shown.count("<tr>") == 5


# --- Comparison ---------------------------------------------------------------------------------------------------


def test_the_frame_has_a_row_for_each_run(suite):
    frame = suite.frame()
    assert len(frame) == 20
    assert frame["strategy"].nunique() == 4
    mean = frame[frame.strategy == "up"].accuracy.mean()
    assert mean == pytest.approx(sum(row_of(suite, "up").metrics.values()) / 5)
    assert {"workload", "seed", "robust_accuracy", "calibration_error", "updates_to_target", "failure"} <= set(frame)


def test_charts_are_figures(suite):
    assert len(suite.figure("curves").data) == 3 * 4  # Two edges of the band and the mean.
    assert suite.figure("cost", view="robust accuracy").layout.yaxis.title.text == "robust accuracy"
    assert len(suite.figure("pairs").data) == 2 * 3
    with pytest.raises(InvalidComparisonError, match="There are: curves, cost, pairs"):
        suite.figure("profile")
    with pytest.raises(InvalidComparisonError, match="There are: epochs, updates, seconds"):
        suite.figure(view="hours")
    with pytest.raises(InvalidComparisonError, match="There are: digits_cnn"):
        suite.figure(workload="digits")


def test_bands_are_quantiles_over_the_seeds():
    # Eleven seeds end at 0, 1, ..., 10: the 10 % quantile is 1, the 90 % quantile 9, the mean 5.
    runs = [run("standard", seed, [0.0, float(seed)]) for seed in range(11)]
    low, high, middle = compared(runs).figure("curves").data
    assert (low.y[-1], high.y[-1], middle.y[-1]) == (1, 9, 5)


def test_long_runs_are_thinned():
    curve = [epoch / 5000 for epoch in range(5000)]
    [line] = compared([run("standard", 0, curve)]).figure("curves").data
    assert len(line.x) == 200
    assert (line.x[0], line.x[-1], line.y[-1]) == (1, 5000, curve[-1])


def test_of_many_strategies_the_control_and_the_best_are_drawn():
    runs = [run("standard", 0, [0.0])] + [run(f"s{i}", 0, [i / 100]) for i in range(40)]
    names = [trace.name for trace in compared(runs).figure("curves").data]
    assert names == ["standard", *(f"s{i}" for i in range(31, 40))]
    assert len(names) == charts.MOST


# --- Has anything changed? ----------------------------------------------------------------------------------------

NEWER = {**records.ENVIRONMENT, "keras": "3.16", "time": "2026-12-01T00:00:00+00:00"}


def again(runs, change=lambda run: {}):
    """Return runs of newer versions, as slow as they like."""
    return [
        r.model_copy(
            update={
                "environment": NEWER,
                "key": f"{r.key}'",
                "epochs": tuple(e.model_copy(update={"seconds": 2 * e.seconds}) for e in r.epochs),
                **change(r),
            }
        )
        for r in runs
    ]


def moved(by):
    """Return a change of all metrics of the strategy "up"."""

    def change(run):
        if run.label != "up":
            return {}
        shift = {"accuracy": by(run.seed)}
        epochs = [
            e.model_copy(update={"metrics": {name: value + shift[name] for name, value in e.metrics.items()}})
            for e in run.epochs
        ]
        return {"epochs": tuple(epochs)}

    return change


def test_metrics_after_the_first_have_a_column_without_a_verdict():
    given = records.settings(metrics=("accuracy", "left:accuracy"))

    def measured(seed):
        run = records.run("standard", seed, [0.5], given=given)
        metrics = {**run.epochs[-1].metrics, "left:accuracy": 0.25 * (1 + seed)}
        return run.model_copy(update={"epochs": (run.epochs[-1].model_copy(update={"metrics": metrics}),)})

    comparison = Comparison((measured(0), measured(1)), (), "standard")
    found = {column.title: column.values[0] for column in summary_columns(entries(comparison.groups))}
    assert found["accuracy"].sort == 0.5
    # Of 1/4 and 1/2: the deviation is 1/4 / sqrt(2) = 0.177.
    assert found["left:accuracy"].sort == 0.375
    assert found["left:accuracy"].detail.startswith("± 0.17")


def test_the_same_results_by_other_versions_are_no_change(suite):
    new = compared(again(suite.runs), suite.costs)
    assert not new.changed(suite)
    text = new.against(suite)
    assert text.startswith("Nothing has changed.")
    assert text.count("bit-identical, 5 seeds") == 4
    assert text.endswith("Environment: keras 3.15.1 -> 3.16.")


def test_noise_is_no_change_and_a_step_down_is(suite):
    noise = compared(again(suite.runs, moved(lambda seed: 0.001 * (-1) ** seed)))
    assert not noise.changed(suite)
    assert f"up: {SAME}" in noise.against(suite)
    worse = compared(again(suite.runs, moved(lambda seed: -0.01 - 0.001 * (-1) ** seed)))
    assert worse.changed(suite)
    assert "up: worse than before: -0.0102" in worse.against(suite)
    assert worse.against(suite).startswith("1 of 4 changed")


def test_too_few_seeds_cannot_vouch_for_no_change(suite):
    few = compared([r for r in suite.runs if r.seed < 3])
    new = compared(again(few.runs, moved(lambda seed: 0.001 * (-1) ** seed)))
    assert new.changed(few)
    assert "up: too few seeds" in new.against(few)


def test_what_is_missing_new_or_other_is_named(suite):
    without = compared([r for r in suite.runs if r.label != "up"])
    assert "up: missing now" in without.against(suite)
    assert "up: new" in suite.against(without)
    other = compared(again(suite.runs, lambda r: {"spec": {"other": {}}} if r.label == "up" else {}))
    assert "up: other options" in other.against(suite)
    batch = records.settings(batch_size=8, budget=Budget(epochs=8))
    settings = compared(again(suite.runs, lambda r: {"settings": batch}))
    assert "up: other settings (batch_size): not comparable" in settings.against(suite)
    fails = compared(again(suite.runs, lambda r: {"failure": "ValueError: no"} if r.label == "up" else {}))
    assert "up: seed 0 fails now: ValueError: no" in fails.against(suite)
    assert all(each.changed(suite) for each in (without, other, settings, fails))
