"""Strategies together: in the order they declare, whatever the order they are listed in."""

import inspect
import itertools
import math
import re
from dataclasses import replace

import keras
import numpy as np
import pytest
import tensorflow as tf
from catalogue import (
    NAMES,
    TOGETHER,
    VARIANTS,
    conflict,
    conflicts,
    declaration,
    hooks,
    registered,
    schema,
    spec_of,
    task_of,
    variant_id,
)
from nets import BATCH, Subclassed, Workload, X, Y, dense, functional, kinds, one_weight, sgd, weight_of, workload_for
from runs import assert_same, briefly, comparable, differs, fitted, is_finite, prepared, run

import trainstep
from trainstep import composition, errors
from trainstep.declaration import NEEDS
from trainstep.definition import HOOKS, strategies_of
from trainstep.step import Strategy, Update

pytestmark = pytest.mark.filterwarnings("ignore:mixed_precision computes in float16:UserWarning")

PAIRS = list(itertools.combinations(NAMES, 2))
REAL = Workload(functional, X, Y)
TASK = task_of(*TOGETHER)
ALL = spec_of(*TOGETHER)


def real(*names: str, **arguments) -> Workload:
    """Return a net with everything that is easily lost, for what these strategies need."""
    return workload_for(functional, task_of(*names), **arguments)


def first_of(workload: Workload, count: int) -> Workload:
    """Return the first examples of `workload`, copied."""
    x, y = tf.nest.map_structure(lambda values: values[:count].copy(), (workload.x, workload.y))
    return replace(workload, x=x, y=y)


def options_of(name: str) -> trainstep.StrategyOptions:
    return declaration(name).options(**declaration(name).example)


def class_of(spec) -> type:
    return type(trainstep.apply(Subclassed(task_of(*spec)), spec))


# --- Order ------------------------------------------------------------------------------------------------------------


@pytest.mark.shows("pair")
@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_every_pair_trains_finite_and_the_order_of_listing_never_matters(pair, record_property):
    """In any order it is one and the same class, so that what it trains is the same bit for bit.

    For a few steps: in a graph where both act in one hook, and else eagerly, which takes a third of the time.
    """
    if why := conflict(*pair):
        for listed in (pair, pair[::-1]):
            with pytest.raises(errors.StrategyConflictError, match=re.escape(why)):
                composition.compose(spec_of(*listed))
        record_property("instead", why)
        return
    one, other = (composition._known_class(Subclassed, spec_of(*listed)) for listed in (pair, pair[::-1]))
    assert one is other
    together = bool(hooks(pair[0]) & hooks(pair[1]))
    model = prepared(real(*pair), list(pair), run_eagerly=not together)
    x, y = task_of(*pair).x, task_of(*pair).y
    for start in (0, BATCH):
        model.train_on_batch(*tf.nest.map_structure(lambda values: values[start : start + BATCH], (x, y)))  # noqa: B023  Called here.
    assert all(np.isfinite(variable.numpy()).all() for variable in model.variables)


def test_the_whole_catalogue_at_once_trains_finite_in_any_order_of_listing():
    listed = TOGETHER, TOGETHER[::-1], TOGETHER[2:] + TOGETHER[:2]
    assert len({class_of(spec_of(*names)) for names in listed}) == 1
    assert is_finite(briefly(real(*TOGETHER), TOGETHER))


@pytest.mark.parametrize("kind", kinds(TASK))
def test_the_whole_catalogue_trains_every_kind_of_model(kind):
    assert is_finite(briefly(kinds(TASK)[kind], TOGETHER))


def test_neutral_company_changes_nothing():
    """All strategies that have neutral options, at once under these, are plain Keras bit for bit."""
    spec = {name: dict(declaration(name).neutral) for name in TOGETHER if declaration(name).neutral is not None}
    assert len(spec) >= 4
    assert_same(run(REAL, spec), run(REAL))


def test_strategies_are_sorted_by_stage_and_each_acts_once():
    chosen = composition.compose(ALL)
    composed = list(chosen)
    stages = [strategy.declaration.stage_with(options) for strategy, options in chosen.items()]
    assert stages == sorted(stages)
    assert len(composed) == len(TOGETHER)
    for order in itertools.islice(itertools.permutations(TOGETHER), 24):
        assert list(composition.compose(spec_of(*order))) == composed


def test_one_class_per_combination_however_it_is_written():
    written = [
        class_of(["gradient_clipping", "gradient_accumulation"]),
        class_of(("gradient_accumulation", "gradient_clipping")),
        class_of({"gradient_clipping": {"global_clipnorm": 1.0}, "gradient_accumulation": {"steps": 4}}),
    ]
    assert len(set(written)) == 1
    other = class_of({"gradient_clipping": {"global_clipnorm": 2.0}, "gradient_accumulation": {}})
    assert other is not written[0]


def test_an_options_object_does_for_a_mapping():
    options = declaration("gradient_clipping").options(clipvalue=0.5)
    assert trainstep.plan({"gradient_clipping": options}).strategies == {"gradient_clipping": options}


def test_the_class_of_a_composition_keeps_its_name():
    made = trainstep.model_class(Subclassed, ALL)
    assert (made.__name__, made.__qualname__) == ("Subclassed", "Subclassed")
    assert made.__doc__ == Subclassed.__doc__
    assert [s.declaration.name for s in strategies_of(made)] == [s.declaration.name for s in composition.compose(ALL)]


# --- Throw-away strategies --------------------------------------------------------------------------------------------


def throw_away(name: str, stage=trainstep.Stage.CLIPPING, hooks=None, **declared) -> type[Strategy]:
    declaration = trainstep.Declaration(name, stage, f"{name}.", "none", **{"neutral": {}, **declared})
    return type(name.title(), (Strategy,), {"declaration": declaration, **(hooks or {})})


@pytest.mark.parametrize("listed", [["one", "two"], ["two", "one"]])
@pytest.mark.parametrize("who_says_so", ["one", "two"])
def test_a_conflict_raises_before_any_data_is_read_whoever_declares_it(listed, who_says_so):
    other = {"one": "two", "two": "one"}[who_says_so]
    made = [throw_away(n, conflicts={other: "both want it."} if n == who_says_so else {}) for n in ("one", "two")]
    with registered(*made):
        for function in (
            trainstep.plan,
            lambda s: trainstep.apply(dense(), s),
            lambda s: trainstep.model_class(Subclassed, s),
        ):
            with pytest.raises(errors.StrategyConflictError, match="both want it"):
                function(listed)
        assert trainstep.plan(["one", "standard"]).strategies.keys() == {"one", "standard"}


class WhereOptions(trainstep.StrategyOptions):
    outside: bool = False


def of_options(name: str) -> type[Strategy]:
    stages, reason = trainstep.Stage, "not from the outside."
    return throw_away(
        name,
        lambda options: stages.BATCH if options.outside else stages.AVERAGING,
        options=WhereOptions,
        conflicts=lambda options: {"standard": reason} if options.outside else {},
    )


def test_the_place_may_be_a_matter_of_options():
    with registered(of_options("moving"), throw_away("staying")):
        for outside, expected in ((True, ["moving", "staying"]), (False, ["staying", "moving"])):
            moving, staying = {"moving": {"outside": outside}}, {"staying": {}}
            for spec in (moving | staying, staying | moving):
                assert list(trainstep.plan(spec).strategies) == expected
        one, other = (class_of({"moving": {"outside": outside}, "staying": {}}) for outside in (True, False))
        assert [s.declaration.name for s in strategies_of(one)] == ["moving", "staying"]
        assert [s.declaration.name for s in strategies_of(other)] == ["staying", "moving"]


def test_a_class_by_hand_is_in_the_order_of_its_options():
    moving, staying = of_options("moving"), throw_away("staying")
    with registered(moving, staying):

        class Net(moving, staying, Subclassed):
            strategy_options = {"moving": {"outside": True}}  # noqa: RUF012

        with pytest.raises(errors.StrategyDefinitionError, match=r"must be \(Staying, Moving, \.\.\."):

            class Other(moving, staying, Subclassed):
                pass


def test_a_conflict_may_be_a_matter_of_options():
    with registered(of_options("moving")):
        with pytest.raises(errors.StrategyConflictError, match=r"'moving' and 'standard' .* not from the outside"):
            trainstep.plan({"moving": {"outside": True}, "standard": {}})
        assert list(trainstep.plan(["moving", "standard"]).strategies) == ["moving", "standard"]
        assert trainstep.describe("moving").conflicts == {}


def test_a_stage_that_options_lead_to_must_be_one():
    with pytest.raises(errors.StrategyDefinitionError, match=r"The stage of 'nowhere' is 35, .*none of"):
        throw_away("nowhere", lambda options: 35)


def test_within_one_stage_the_name_decides():
    with registered(throw_away("b"), throw_away("a"), throw_away("c")):
        for order in itertools.permutations(["a", "b", "c"]):
            assert list(trainstep.plan(list(order)).strategies) == ["a", "b", "c"]


def test_state_of_a_throw_away_strategy_lives_in_the_optimizer():
    def update_weights(self, update):
        slots = self.strategy_state["counting"]
        slots["updates"].assign_add(1)
        for total, gradient in zip(slots["total"], update.gradients, strict=True):
            total.assign_add(gradient)
        super(Counting, self).update_weights(update)

    slots = {
        "updates": trainstep.Slot(dtype="int32"),
        "start": trainstep.Slot(initial=2.5),
        "total": trainstep.Slot(per_weight=True),
    }
    Counting = throw_away("counting", hooks={"update_weights": update_weights}, state=lambda options: slots)  # noqa: N806
    with registered(Counting):
        model = trainstep.apply(one_weight(), ["counting", "gradient_accumulation"])
        model.compile(sgd(0.0), "mse")
        model.fit(np.ones((8, 1)), np.zeros((8, 1)), batch_size=1, verbose=0)
        state = model.strategy_state["counting"]
        # Two windows of four; g = 2 (w x - y) x = 2 in each.
        assert state["updates"].numpy() == 2
        assert state["start"].numpy() == 2.5
        assert [total.numpy() for total in state["total"]] == [4.0]
        assert len(model.get_weights()) == 1


# --- Who sees what ----------------------------------------------------------------------------------------------------


def weights_by_update(spec, updates: int = 6):
    """Return a model that has made some updates with SGD and momentum, and its weights before and after each."""
    workload = workload_for(dense, optimizer=lambda: sgd(0.1, momentum=0.9))
    model = prepared(workload, spec)
    found = [model.get_weights()]
    for start in range(updates):
        model.train_on_batch(X[start : start + BATCH], Y[start : start + BATCH])
        found.append(model.get_weights())
    return model, found


MOVERS = {
    "layerwise_learning_rates": {"decay": 0.5},
    "layer_freezing": {"frozen": {"hidden": (1, 4)}},
    "lookahead": {"k": 2, "alpha": 0.25},
}
"""Strategies that act after the optimizer, and change what it made of the weights."""


@pytest.mark.parametrize("mover", MOVERS)
def test_an_average_is_of_the_weights_that_the_model_has(mover, assert_close):
    exponential, seen = weights_by_update({mover: MOVERS[mover], "ema": {"decay": 0.5, "warmup": False}})
    expected = seen[0]
    for weights in seen[1:]:
        expected = [0.5 * average + 0.5 * weight for average, weight in zip(expected, weights, strict=True)]
    with exponential.evaluation_weights():
        assert_close(exponential.get_weights(), expected)
    stochastic, seen = weights_by_update({mover: MOVERS[mover], "swa": {"start": 2, "period": 2}})
    with stochastic.evaluation_weights():
        assert_close(stochastic.get_weights(), [np.mean(each, axis=0) for each in zip(*seen[2::2], strict=True)])


def test_learning_rates_by_layer_are_of_the_fast_weights_that_lookahead_goes_a_part_of_the_way_to():
    model, seen = weights_by_update({name: MOVERS[name] for name in ("layerwise_learning_rates", "lookahead")})
    tf.nest.map_structure(
        np.testing.assert_array_equal, seen[-1], [slow.numpy() for slow in model.strategy_state["lookahead"]["slow"]]
    )


def test_what_is_frozen_stays_under_lookahead():
    _, seen = weights_by_update({name: MOVERS[name] for name in ("layer_freezing", "lookahead")})
    for before, after in itertools.pairwise(seen[1:5]):
        np.testing.assert_array_equal(before[0], after[0])
        assert not np.array_equal(before[2], after[2])


def distilled(alpha: float, **others):
    spec = {"distillation": {"teacher": "teacher.keras", "alpha": alpha}, **others}
    return run(real("distillation"), spec)


def test_a_teacher_weighs_the_labels_less_and_nothing_else(assert_close):
    """Without labels R-Drop pulls as it does with them; and to smooth labels that do not count changes nothing."""
    alone = distilled(1.0)
    assert differs(distilled(1.0, r_drop={"alpha": 5.0}), distilled(1.0, r_drop={"alpha": 0.0}))
    assert_close(distilled(1.0, label_smoothing={"smoothing": 0.5}).variables, alone.variables)
    assert differs(distilled(0.5, label_smoothing={"smoothing": 0.5}), distilled(0.5))


@pytest.mark.parametrize("ascent", ["gsam", "look_sam", "adversarial_weight_perturbation"])
def test_free_examples_move_along_the_gradient_at_the_weights_whoever_cuts_the_batch(ascent, assert_close):
    options = {"adversarial_weight_perturbation": {"gamma": 0.5}}.get(ascent, {"rho": 0.5})
    spec = {"free_adversarial": {"epsilon": 0.5, "replays": 3}, ascent: options}
    workload = first_of(workload_for(dense, task_of(ascent)), 20)
    whole, parts = (run(workload, {**spec, **cut}) for cut in ({}, {"micro_batches": {"count": 2}}))
    assert_close(parts.variables, whole.variables)


# --- The whole stack, by hand -----------------------------------------------------------------------------------------


def column(*values: float) -> np.ndarray:
    return np.array(values, "float32")[:, None]


def two_layers() -> keras.Model:
    """Return y = w * x whose weight computes in 16 bits under mixed precision, for it is not in the last layer."""
    x = keras.Input((1,))
    return keras.Model(x, keras.layers.Activation("linear")(one_weight(1.0).layers[-1](x)))


START = 2.0**10  # Gradients are float16 with the scale on them: at the default of 2**15 already 2 would be too large.


def stack(rate: float = 0.125, **options) -> keras.Model:
    spec = {
        "gradient_accumulation": {"steps": 2},
        "mixed_precision": {"dtype": "float16", "initial_scale": START},
        "gradient_clipping": {"global_clipnorm": 3.0},
    }
    for name, choice in options.items():
        spec[name] = choice
    model = trainstep.apply(two_layers(), spec)
    model.compile(sgd(rate), "mse")
    return model


def scale_of(model: keras.Model) -> tuple[float, int, int]:
    slots = model.strategy_state["mixed_precision"]
    return tuple(slots[name].numpy().item() for name in ("scale", "finite_steps", "skips"))


# w = 1, g = 2 (w x - y) x. (x, y) = (1, 0): 2; (2, 0): 8; (2, 3): -4; (2, 4): -8.


def test_what_is_clipped_is_the_accumulated_unscaled_gradient():
    model = stack()
    model.train_on_batch(column(2), column(0))
    model.train_on_batch(column(2), column(3))
    # G = (8 - 4) / 2 = 2 < 3: not clipped. Clipped one by one it would be (3 - 3) / 2 = 0; scaled, 3 / 2**10.
    assert weight_of(model) == 1 - 0.125 * 2
    model = stack()
    model.train_on_batch(column(2), column(0))
    model.train_on_batch(column(2), column(0))
    # G = 8, clipped to 3.
    assert weight_of(model) == 1 - 0.125 * 3


def test_the_gradient_is_checked_once_per_window():
    model = stack()
    model.train_on_batch(column(1), column(0))
    assert scale_of(model) == (START, 0, 0)
    model.train_on_batch(column(1), column(0))
    assert scale_of(model) == (START, 1, 0)


def test_a_gradient_that_is_not_finite_drops_its_window_and_the_next_is_clean():
    model = stack()
    model.train_on_batch(column(np.nan), column(0))
    assert scale_of(model) == (START, 0, 0)
    model.train_on_batch(column(1), column(0))
    assert weight_of(model) == 1.0
    assert scale_of(model) == (START / 2, 0, 1)
    for _ in range(2):
        model.train_on_batch(column(1), column(0))
    assert weight_of(model) == 1 - 0.125 * 2
    assert scale_of(model) == (START / 2, 1, 0)


def test_the_last_window_goes_through_the_same_stops():
    model = stack(gradient_accumulation={"steps": 8})
    model.fit(column(2, 2), column(0, 0), batch_size=1, verbose=0)
    # G = 8, clipped to 3, checked once.
    assert weight_of(model) == 1 - 0.125 * 3
    assert scale_of(model) == (START, 1, 0)
    model.fit(column(np.nan, 2), column(0, 0), batch_size=1, verbose=0)
    assert weight_of(model) == 1 - 0.125 * 3
    assert scale_of(model) == (START / 2, 0, 1)


def test_too_many_dropped_windows_stop_training_at_the_end_of_the_epoch_too():
    model = stack(gradient_accumulation={"steps": 8}, mixed_precision={"dtype": "float16", "max_consecutive_skips": 1})
    with pytest.raises(errors.NonFiniteGradientError, match="not finite 1 updates in a row"):
        model.fit(column(np.nan, 1), column(0, 0), batch_size=1, verbose=0)
    assert weight_of(model) == 1.0


def test_the_attack_comes_first_and_its_gradient_is_neither_clipped_nor_accumulated():
    model = stack(adversarial={"epsilon": 0.5}, gradient_clipping={"global_clipnorm": 100.0})
    model.train_on_batch(column(2), column(1))
    model.train_on_batch(column(2), column(1))
    # dL/dx = 2 (w x - y) w = 2 > 0: x' = 2.5, g = 2 * 1.5 * 2.5 = 7.5 in both.
    assert weight_of(model) == 1 - 0.125 * 7.5


def test_the_l2_attack_is_free_of_the_loss_scale():
    model = stack(
        adversarial={"epsilon": 0.5, "norm": "l2", "attack": "pgd", "random_start": False},
        gradient_clipping={"clipvalue": 100.0},
    )
    model.train_on_batch(column(2), column(1))
    model.train_on_batch(column(2), column(1))
    assert weight_of(model) == pytest.approx(1 - 0.125 * 7.5, rel=2**-9)


@pytest.mark.parametrize(
    "compiled",
    [
        pytest.param({"steps_per_execution": 3}, marks=pytest.mark.shows("steps_per_execution", of="all together")),
        pytest.param({"jit_compile": True}, marks=pytest.mark.shows("XLA", of="all together")),
    ],
    ids=str,
)
def test_the_whole_stack_is_the_same_however_the_step_runs(compiled, assert_close):
    """As eagerly, which is a fifth of the work.

    With a loss scale far from overflow: what overflows in float16 depends on how operations are fused. Under XLA
    without those that draw random numbers, which are others there, and without those it cannot compile.
    """
    names = [
        name
        for name in TOGETHER
        if "jit_compile" not in compiled
        or ("seed" not in schema(name).get("properties", {}) and not declaration(name).without_xla(options_of(name)))
    ]
    spec = spec_of(*names) | {"mixed_precision": {"dtype": "float16", "initial_scale": 2.0**8}}
    workload = first_of(workload_for(dense, TASK), 20)
    found, eager = (run(workload, spec, fit={"epochs": 1}, **how) for how in (compiled, {"run_eagerly": True}))
    # Of single outputs the losses are logged otherwise eagerly, see `comparable`.
    assert_close(list(comparable(found)), list(comparable(eager)), "float16")


@pytest.mark.shows("a bad batch", of="all together")
def test_a_bad_batch_in_the_middle_costs_its_window_only():
    spec = ALL | {
        "gradient_accumulation": {"steps": 2},
        "mixed_precision": {"dtype": "float16", "initial_scale": 2.0**8},  # So that nothing overflows but what is bad.
    }
    workload = first_of(workload_for(dense, TASK), 16)
    workload.x[5] = np.inf
    model = prepared(workload, spec, run_eagerly=True)
    before = model.get_weights()
    fitted(model, workload, epochs=1)
    assert all(np.isfinite(w).all() for w in model.get_weights())
    assert not np.array_equal(model.get_weights()[0], before[0])
    assert int(model.optimizer.iterations.numpy()) == 1  # Two windows of two batches of four; the first is dropped.


# --- plan and describe ------------------------------------------------------------------------------------------------


def test_the_plan_lays_out_the_stops_from_the_outside_in():
    spec = {
        "gradient_clipping": {"clipnorm": 2.0},
        "mixed_precision": {"dtype": "float16"},  # bfloat16 hands its updates on as they are.
        "gradient_accumulation": {"steps": 3},
        "adversarial": {},
    }
    plan = trainstep.plan(spec)
    assert list(plan.strategies) == ["adversarial", "gradient_accumulation", "mixed_precision", "gradient_clipping"]
    update = [(stop.what.split("(")[0], stop.depth) for stop in plan.stops if stop.hook == "update_weights"]
    assert update == [
        ("sum over replicas", 0),
        ("gradient_accumulation", 0),
        ("mixed_precision", 1),
        ("gradient_clipping", 2),
        ("optimizer.apply_gradients", 3),
    ]
    text = str(plan)
    assert "gradient_clipping(clipnorm=2.0)" in text
    assert "steps=3" in text
    positions = [
        text.index(word) for word in ("transform_batch", "compute_objective", "compute_gradients", "update_weights")
    ]
    assert positions == sorted(positions)
    assert f"{plan.least_time:.2f} to {plan.time:.2f} of a plain one" in text or plan.least_time == plan.time
    for note in plan.notes:
        assert note in text


def test_notes_are_of_strategies_present_only():
    assert trainstep.plan("gradient_clipping").notes == ()
    [note] = trainstep.plan(["gradient_clipping", "gradient_accumulation"]).notes
    assert note.startswith("gradient_clipping with gradient_accumulation: ")


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=variant_id)
def test_the_plan_of_one_strategy_shows_each_hook_in_which_it_acts(name, options):
    """These are the hooks it overrides, less those it says it only passes through; or none, and then it says so."""
    plan = trainstep.plan(name, **options)
    shown = {stop.hook for stop in plan.stops if stop.what.startswith(f"{name}(")}
    hooks = set(HOOKS)
    passed = declaration(name).passes_through(declaration(name).options(**options))
    assert shown == ((hooks & set(vars(trainstep.get(name)))) - set(passed) or {"the model"})
    assert plan.time == plan.costs[name].time
    assert plan.costs[name].time >= 1 or plan.costs[name].saves


@pytest.mark.parametrize("name", NAMES)
def test_a_hook_is_passed_through_by_who_overrides_it_only(name):
    for choice in (declaration(name).example, declaration(name).neutral or declaration(name).example):
        options = declaration(name).options(**choice)
        assert set(declaration(name).passes_through(options)) <= set(vars(trainstep.get(name)))


def test_the_time_of_a_plan_is_between_what_each_adds_and_what_each_multiplies():
    # SAM evaluates twice, and R-Drop doubles what it evaluates: 4. PGD with two steps, 1 + 2 * 2/3, is made once: 10/3.
    both = trainstep.plan(["sam", "r_drop"])
    assert (both.least_time, both.time) == (3.0, 4.0)
    attack = trainstep.plan({"sam": {}, "adversarial": {"attack": "pgd", "steps": 2}})
    assert attack.least_time == pytest.approx(10 / 3)
    assert "3.33 to 4.67 of a plain one" in str(attack)
    assert "time of a step, at the limit: 2.00 of a plain one" in str(trainstep.plan(["sam", "gradient_clipping"]))


def test_html_is_escaped():
    nasty = "<script>alert('x')</script>&"
    made = throw_away(
        "nasty", notes={"standard": nasty}, cost=lambda options: trainstep.Cost(memory=nasty, batch_norm=nasty)
    )
    with registered(made):
        html = trainstep.plan(["nasty", "standard"])._repr_html_()
    assert "<script>" not in html
    assert html.count("&lt;script&gt;") == 3
    assert html.count("<table>") == html.count("</table>") == 2


def test_html_of_the_catalogue_names_every_strategy():
    html = trainstep.plan(ALL)._repr_html_()
    for name in TOGETHER:
        assert name in html


@pytest.mark.parametrize("name", NAMES)
def test_describe_says_all_there_is_to_know(name):
    description = trainstep.describe(name)
    assert description.name == name
    assert description.summary.endswith(".")
    assert len(description.text) > 100
    assert description.text == inspect.getdoc(inspect.getmodule(trainstep.get(name))).strip()
    assert description.options == declaration(name).options.model_json_schema()
    assert description.reference
    text = str(description)
    for option in description.options.get("properties", {}):
        assert f"  {option} ({'required' if option in declaration(name).example else 'default: '}" in text
    for other in description.notes:
        assert f"With {other}: " in text
    for need in declaration(name).needs:
        assert f"Needs {NEEDS[need]}" in text
    assert f"Cost: {description.cost.time:.2f}" in text


@pytest.mark.parametrize("name", NAMES)
def test_notes_and_conflicts_name_strategies_that_exist(name):
    assert set(declaration(name).notes) <= set(NAMES) - {name}
    assert set(conflicts(name)) <= set(NAMES) - {name}


def test_applied_tells_what_is_on_a_model():
    model = trainstep.apply(dense(), {"gradient_clipping": {"clipnorm": 2.0}, "gradient_accumulation": {}})
    assert trainstep.applied(model) == {
        "gradient_accumulation": declaration("gradient_accumulation").options(),
        "gradient_clipping": declaration("gradient_clipping").options(clipnorm=2.0),
    }
    assert list(trainstep.applied(model)) == ["gradient_accumulation", "gradient_clipping"]
    assert trainstep.applied(dense()) == {}


def test_update_carries_the_number_of_loss_terms():
    seen = []

    def update_weights(self, update: Update) -> None:
        seen.append(update.terms)
        super(Looking, self).update_weights(update)

    Looking = throw_away("looking", hooks={"update_weights": update_weights})  # noqa: N806
    with registered(Looking):
        model = trainstep.apply(one_weight(), ["looking", "gradient_accumulation"])
        model.compile(sgd(0.0), "mse", run_eagerly=True)
        model.fit(np.ones((9, 1)), np.zeros((9, 1)), batch_size=2, verbose=0)
    # Four batches of two make a window of 8 examples; the last batch, of one, is a window of its own.
    assert [float(samples) for samples in seen if tf.executing_eagerly()] == [8.0, 1.0]
    assert not math.isnan(weight_of(model))
    assert BATCH == 4


@pytest.mark.filterwarnings("ignore:mixed_precision computes in float16:UserWarning")
@pytest.mark.parametrize("attack", [{}, {"norm": "l2"}, {"attack": "pgd"}, {"clean_weight": 0.5}], ids=str)
def test_an_overflow_of_the_loss_scale_in_an_attack_leaves_batch_norm_finite(attack):
    x = keras.Input((6,))
    h = keras.layers.BatchNormalization()(keras.layers.Dense(5, "tanh")(x))
    model = keras.Model(x, keras.layers.Dense(1)(keras.layers.Dense(4, "tanh")(h)))
    spec = {"mixed_precision": {"dtype": "float16"}, "adversarial": attack}
    trainstep.apply(model, spec).compile(sgd(0.001), "mse")
    model.fit(X, 100 * Y, batch_size=BATCH, epochs=2, verbose=0)
    assert float(model.strategy_state["mixed_precision"]["scale"].numpy()) < 2.0**15  # It did overflow.
    assert all(np.isfinite(weight).all() for weight in model.get_weights())
