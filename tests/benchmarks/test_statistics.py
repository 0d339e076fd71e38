"""Verdicts that can be trusted: derived values, and simulated suites of which the truth is known."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from trainstep.benchmarks import statistics
from trainstep.benchmarks.statistics import BETTER, SAME, TOO_FEW, WORSE, judge

LABELS = ("a", "b", "c", "d")
finite = st.floats(-1, 1, allow_nan=False).map(lambda value: round(value, 4))


def words(differences, **options):
    return {label: difference.verdict for label, difference in judge(differences, **options).items()}


def test_the_p_value_is_students():
    # Differences 1 and 3: mean 2, standard deviation sqrt(2), of the mean 1, so t = 2. With one degree of freedom it is
    # Cauchy's distribution, of which beyond +-2 lies 1 - 2 / pi * atan(2).
    assert statistics.p_value(np.array([1.0, 3.0])) == pytest.approx(1 - 2 / math.pi * math.atan(2))


def test_holm_multiplies_the_smallest_by_all_the_next_by_one_less_and_never_turns_the_order():
    # Sorted 0.01, 0.02, 0.03, 0.5 times 4, 3, 2, 1: 0.04, 0.06, 0.06, 0.5.
    assert statistics.holm([0.03, 0.5, 0.01, 0.02]) == pytest.approx([0.06, 0.5, 0.04, 0.06])
    assert statistics.holm([0.02, 0.04]) == pytest.approx([0.04, 0.04])
    assert statistics.holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert statistics.holm([]) == []


def test_the_word_follows_the_direction_of_the_metric():
    up = [0.010, 0.012, 0.009, 0.011, 0.010]
    down = [-value for value in up]
    assert words({"up": up, "down": down}) == {"up": BETTER, "down": WORSE}
    assert words({"up": up, "down": down}, higher_is_better=False) == {"up": WORSE, "down": BETTER}


@pytest.mark.parametrize("seeds", [1, 2, 3, 4])
def test_fewer_than_five_seeds_never_tell_however_clear_it_looks(seeds):
    clear = [1.0 + 1e-6 * index for index in range(seeds)]
    [difference] = judge({"a": clear}).values()
    assert difference.verdict == TOO_FEW
    assert difference.word == f"too few seeds ({'5 or more' if seeds == 1 else 5} would do)"


def test_a_single_seed_has_a_difference_and_nothing_else():
    [difference] = judge({"a": [0.25]}).values()
    assert (difference.pairs, difference.mean) == (1, 0.25)
    assert (difference.low, difference.high, difference.p, difference.corrected_p) == (None,) * 4


def test_no_pair_no_judgement():
    assert judge({"a": []}) == {}
    assert judge({}) == {}


def test_equal_runs_do_not_differ():
    [difference] = judge({"a": [0.0] * 5}).values()
    assert (difference.mean, difference.low, difference.high, difference.p) == (0, 0, 0, 1)
    assert difference.verdict == SAME


def test_one_and_the_same_difference_is_judged_by_its_signs():
    """No spread would make t infinite; with five seeds all signs agree by chance in one suite of 16."""
    values = [0.9 - 0.8, 0.7 - 0.6, 0.1, 0.3 - 0.2, 0.1]  # Equal but for rounding.
    assert words({"a": values}) == {"a": SAME}
    [difference] = judge({"a": values}).values()
    assert difference.p == 2 / 2**5
    assert difference.seeds_needed == 6  # 2 / 2**6 is the first below 0.05.
    assert (difference.low, difference.high) == pytest.approx((0.1, 0.1))
    assert words({"a": [0.1] * 6}) == {"a": BETTER}


def test_without_the_correction_this_one_would_pass():
    # t = mean / (s / sqrt(5)) of 1..5 is 3 / (1.5811 / 2.2361) = 4.243: p = 0.0132, times four 0.053.
    values = [1.0, 2.0, 3.0, 4.0, 5.0]
    others = {label: [1.0, -1.0, 2.0, -2.0, 0.5] for label in "bcd"}
    assert words({"a": values}) == {"a": BETTER}
    assert words({"a": values, **others})["a"] == SAME


@pytest.mark.parametrize(
    "draw",
    [
        pytest.param(lambda generator, size: generator.normal(size=size), id="normal"),
        pytest.param(lambda generator, size: generator.standard_t(2, size=size), id="heavy tails"),
        pytest.param(lambda generator, size: generator.uniform(size=size), id="uniform"),
        pytest.param(lambda generator, size: generator.binomial(360, 0.97, size=size) / 360, id="shares of 360"),
        pytest.param(lambda generator, size: generator.binomial(20, 0.9, size=size) / 20, id="shares of 20"),
        pytest.param(lambda generator, size: np.where(generator.random(size) < 0.1, 0.1, 0.9), id="some collapse"),
    ],
)
@pytest.mark.parametrize("seeds", [5, 10])
def test_where_nothing_differs_one_suite_in_twenty_says_so_at_most(draw, seeds):
    """Four strategies that are the control in disguise; a suite with one false word or more counts."""
    generator, suites = np.random.default_rng(0), 400
    runs = draw(generator, (suites, 1 + len(LABELS), seeds))
    differences = runs[:, 1:] - runs[:, :1]
    p = np.array([[statistics.p_value(values) for values in suite] for suite in differences])
    false = sum(min(statistics.holm(suite)) <= statistics.LEVEL for suite in p) / suites
    # Three standard errors of a share of 0.05 in 400.
    assert false <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / suites)


def test_a_difference_of_three_standard_deviations_is_found_by_five_seeds():
    generator = np.random.default_rng(0)
    words_found = [
        words({"real": generator.normal(3, 1, 5), **{label: generator.normal(0, 1, 5) for label in "bcd"}})["real"]
        for _ in range(60)
    ]
    # Power at the level 0.05 / 4, by the noncentral t: 0.87; three standard errors of 60 below.
    power = stats.nct.sf(stats.t.ppf(1 - 0.05 / 8, 4), 4, 3 * math.sqrt(5))
    assert words_found.count(BETTER) / 60 >= power - 3 * math.sqrt(power * (1 - power) / 60)
    assert WORSE not in words_found


def test_as_many_seeds_as_named_find_the_difference_in_four_suites_of_five():
    values = np.array([0.2, 1.0, 1.8, 0.6, 1.4])  # Mean 1, standard deviation 0.632.
    needed = statistics.seeds_needed(values, 0.05 / 4)
    generator = np.random.default_rng(0)
    simulated = generator.normal(1, values.std(ddof=1), (4000, needed))
    found = np.mean(stats.ttest_1samp(simulated, 0, axis=1).pvalue <= 0.05 / 4)
    one_less = np.mean(stats.ttest_1samp(simulated[:, :-1], 0, axis=1).pvalue <= 0.05 / 4)
    assert needed > 5
    assert found >= 0.8 - 3 * math.sqrt(0.16 / 4000)
    assert one_less < 0.8 + 3 * math.sqrt(0.16 / 4000)


def test_a_difference_lost_in_the_spread_takes_more_seeds_than_anyone_has():
    assert statistics.seeds_needed(np.array([1.0, -1.0, 1.01]), 0.05) <= 101
    [difference] = judge({"a": [1.0, -1.0, 0.01]}).values()
    assert difference.word == "too few seeds (more than 100 would do)"
    assert statistics.seeds_needed(np.array([1.0, -1.0]), 0.05) is None


def test_the_interval_holds_the_mean_in_nineteen_suites_of_twenty():
    """The plain percentile interval of five seeds holds it in 83 % of them."""
    generator, suites = np.random.default_rng(1), 2000
    low, high = statistics.bootstrap(generator.normal(size=(suites, 5)))
    held = np.mean((low <= 0) & (high >= 0))
    # No bootstrap mean lies outside of the data, and all five are on one side in 1 of 16: 0.9375 at most.
    assert 0.9375 - 3 * math.sqrt(0.06 / suites) - 0.005 <= held <= 0.96


def test_many_seeds_have_students_interval():
    values = np.random.default_rng(0).normal(0.3, 1, (1, 200))
    low, high = statistics.bootstrap(values)
    half = stats.t.ppf(0.975, 199) * values.std(ddof=1) / math.sqrt(200)
    # Ends of 5,000 resamples scatter by some hundredths of the width.
    assert (low[0], high[0]) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(finite, min_size=1, max_size=8), min_size=1, max_size=4), st.randoms())
def test_neither_the_order_of_strategies_nor_that_of_seeds_matters(values, random):
    differences = dict(zip("abcd", values, strict=False))
    shuffled = {label: random.sample(each, len(each)) for label, each in differences.items()}
    items = random.sample(list(shuffled.items()), len(shuffled))
    one, other = judge(differences), judge(dict(items))
    assert {label: one[label].verdict for label in one} == {label: other[label].verdict for label in one}
    for label in one:
        assert one[label].corrected_p == pytest.approx(other[label].corrected_p)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(finite, min_size=2, max_size=8), min_size=1, max_size=4))
def test_turned_around_the_word_is_the_opposite(values):
    opposite = {BETTER: WORSE, WORSE: BETTER, SAME: SAME, TOO_FEW: TOO_FEW}
    differences = dict(zip("abcd", values, strict=False))
    turned = judge({label: [-value for value in each] for label, each in differences.items()})
    for label, difference in judge(differences).items():
        assert turned[label].verdict == opposite[difference.verdict]
        assert turned[label].corrected_p == pytest.approx(difference.corrected_p)
        assert difference.low <= difference.mean <= difference.high
