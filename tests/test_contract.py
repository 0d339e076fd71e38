"""What holds of every strategy in the catalogue. No strategy is named here: what is special is in its declaration."""

import copy
import inspect
import json
import math
import pickle
import re
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from catalogue import (
    BY_STATE,
    COMPATIBLE,
    DEFAULT_IS_NEUTRAL,
    EVALUATING,
    NAMES,
    NEUTRAL,
    REPRESENTATIVES,
    VARIANTS,
    coarsest_dtype,
    constraints,
    declaration,
    has_slots,
    schema,
    spec_of,
    task_of,
    variant_id,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from nets import (
    BATCH,
    EXAMPLES,
    KINDS,
    NUMBERS,
    AddsLoss,
    Subclassed,
    Task,
    WithoutTrainingArgument,
    Workload,
    X,
    Y,
    dense,
    functional,
    kinds,
    masked,
    outputs,
    sgd,
    tokens,
    workload_for,
)
from runs import (
    Run,
    assert_same,
    briefly,
    comparable,
    differs,
    fitted,
    is_finite,
    known,
    optimizer_variables,
    prepared,
    run,
    stepped,
    variables_of,
)

import trainstep
from trainstep import _seam, definition, errors
from trainstep._seam import KERAS_3
from trainstep.step import Strategy

pytestmark = pytest.mark.filterwarnings(
    # A float16 variant says on a CPU that it is slow there; its own test asserts that it does.
    "ignore:mixed_precision computes in float16:UserWarning"
)

QUESTIONS = {"loss_scale"}  # Who answers one need not ask what is inside of it.
HOOKS = [name for name, value in vars(Strategy).items() if inspect.isfunction(value) and not name.startswith("_")]


def everything(task: Task = NUMBERS) -> Workload:
    """Dropout, batch norm, a regularizer, a short last batch."""
    return workload_for(functional, task)


def with_a_bad_batch(task: Task = NUMBERS, build=functional) -> Workload:
    x = task.x.copy()
    x[1] = np.nan
    return replace(workload_for(build, task), x=x)


def subclassed(task: Task = NUMBERS) -> Workload:
    return workload_for(WithoutTrainingArgument, task)


def simple(task: Task = NUMBERS) -> Workload:
    """Nothing random, nothing that mixes examples."""
    return workload_for(dense, task)


def even(task: Task = NUMBERS) -> Workload:
    """Return what `simple` does, with batches of one size."""
    x, y = tf.nest.map_structure(lambda values: values[:20], (task.x, task.y))
    return replace(simple(task), x=x, y=y)


def simple_for(name: str, **arguments) -> Workload:
    return workload_for(dense, task_of(name), **arguments)


def batches_of(workload: Workload, start: int = 0, stop: int = EXAMPLES, step: int = BATCH) -> list[tuple]:
    """Return the batches of `workload` that begin at these examples."""

    def part(values, first):
        return tf.nest.map_structure(lambda value: value[first : first + BATCH], values)

    return [(part(workload.x, first), part(workload.y, first)) for first in range(start, stop, step)]


# --- 1 and 2: neutral options are plain Keras, bit for bit ------------------------------------------------------------


class OwnLoss(Subclassed):
    """A user's model with a loss of its own."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, **kwargs):
        loss = super().compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, **kwargs)
        return loss + 0.1 * tf.reduce_mean(tf.abs(tf.nest.flatten(y_pred)[0]))


class OwnMetrics(Subclassed):
    """A user's model with a metric it updates itself."""

    def __init__(self, task=NUMBERS):
        super().__init__(task)
        self.largest = keras.metrics.Mean(name="largest")

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        self.largest.update_state(tf.reduce_max(y_pred))
        return super().compute_metrics(x, y, y_pred, sample_weight)


class OnlyOwnLoss(keras.Model):
    """A model without labels: what it minimizes is all from `add_loss`."""

    def __init__(self):
        super().__init__()
        self.out = keras.layers.Dense(2, name="hidden")
        self.penalty = AddsLoss()

    def call(self, x):
        return self.penalty(self.out(x))


def frozen(task: Task = NUMBERS) -> keras.Model:
    model = functional(task)
    model.get_layer("hidden").trainable = False
    return model


def with_metrics() -> dict:
    return {
        "optimizer": sgd(),
        "loss": "mse",
        "metrics": ["mae"],
        "weighted_metrics": [keras.metrics.MeanSquaredError()],
    }


def label_tokens(task: Task = NUMBERS) -> Workload:
    """Return labels of tokens in padded sequences."""
    losses = keras.losses
    cross_entropy = losses.CategoricalCrossentropy if task.classes else losses.SparseCategoricalCrossentropy
    labels = np.eye(3, dtype="float32")[TOKENS % 3] if task.classes else TOKENS % 3
    return Workload(
        masked,
        TOKENS,
        labels,
        lambda: {"optimizer": sgd(), "loss": cross_entropy(from_logits=True), "metrics": ["accuracy"]},
    )


def scheduled() -> keras.optimizers.Optimizer:
    return keras.optimizers.Adam(keras.optimizers.schedules.ExponentialDecay(0.05, 2, 0.5))


def dataset() -> tf.data.Dataset:
    return tf.data.Dataset.from_tensor_slices((X, Y, WEIGHTS)).batch(BATCH)


WEIGHTS = np.linspace(0, 2, EXAMPLES).astype("float32")
TOKENS = tokens(EXAMPLES)
RATES = [0.2, 0.02]


def situations(task: Task = NUMBERS) -> dict[str, Workload]:
    """Return what a strategy that trains for `task` is seen in, by name."""
    found = {
        "a compute_loss of the user": workload_for(OwnLoss, task),
        "steps_per_execution": workload_for(functional, task, steps_per_execution=2),
        "a frozen layer": workload_for(frozen, task),
        "a schedule, and Adam": workload_for(functional, task, optimizer=scheduled),
    }
    if not task.outputs:
        found["class_weight"] = workload_for(
            functional, replace(task, classes=True), {"class_weight": {0: 1.0, 1: 3.0, 2: 0.5}}, metrics=["accuracy"]
        )
    if not task.outputs and not task.images:
        found["a mask"] = label_tokens(task)
    if task == NUMBERS:
        unlabelled = tf.data.Dataset.from_tensor_slices(X).batch(BATCH)
        found["a model without labels"] = Workload(OnlyOwnLoss, unlabelled, None, lambda: {"optimizer": sgd()})
    return found


SITUATIONS = situations() | {
    "sample_weight": Workload(functional, X, Y, with_metrics, {"sample_weight": WEIGHTS}),
    "jit_compile": replace(workload_for(dense, jit_compile=True), x=X[:20], y=Y[:20]),
    "run_eagerly": workload_for(functional, run_eagerly=True),
    "tf.data": Workload(functional, dataset(), None, with_metrics),
    "metrics of the user": workload_for(OwnMetrics),
    "weight decay and an average": workload_for(
        functional, optimizer=lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1, use_ema=True)
    ),
    "validation": Workload(functional, X, Y, with_metrics, {"validation_split": 0.3}),
    "shuffling": workload_for(functional, fit={"shuffle": True}),
    "a callback that sets the learning rate": workload_for(
        functional, fit={"callbacks": keras.callbacks.LearningRateScheduler(lambda epoch: RATES[epoch])}
    ),
}


def trained(kind: str, spec: Any = None, options: Any = None) -> Run:
    """Return a run of one kind of model: of one of them in a graph, of the others step by step."""
    return (run if kind == "functional" else briefly)(KINDS[kind], spec, options)


@pytest.fixture(scope="module")
def plain():
    """Return the run of plain Keras in a situation, made once."""
    made: dict[str, Run] = {}

    def of(situation: str) -> Run:
        if situation not in made:
            made[situation] = run(SITUATIONS[situation]) if situation in SITUATIONS else trained(situation)
        return made[situation]

    return of


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (kind, name)
        for kind in KINDS
        for name in NEUTRAL
        if kind == "functional" or name in [*EVALUATING, *DEFAULT_IS_NEUTRAL]
    ],
)
def test_neutral_options_are_plain_keras_bit_for_bit(kind, name, plain):
    """In a graph one kind of model; the others step by step."""
    assert_same(trained(kind, name, dict(declaration(name).neutral)), plain(kind))


ALL_NEUTRAL = [name for name in NEUTRAL if name in COMPATIBLE]


@pytest.mark.parametrize("names", [DEFAULT_IS_NEUTRAL, ALL_NEUTRAL], ids=["the control", "all at once"])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_neutral_options_are_plain_keras_bit_for_bit_in_every_situation(situation, names, plain):
    # But for those who are refused beside an optimizer that does the same.
    done = _seam.optimizer_settings(SITUATIONS[situation].compile()["optimizer"])
    spec = {name: dict(declaration(name).neutral) for name in names if not {*done} & {*declaration(name).replaces}}
    assert_same(run(SITUATIONS[situation], spec), plain(situation))


def test_the_control_has_no_options_and_is_plain_keras():
    """The catalogue has exactly one strategy that changes nothing, so what is said of neutral options is said of it."""
    assert [name for name in DEFAULT_IS_NEUTRAL if not schema(name).get("properties")] == ["standard"]


@pytest.mark.parametrize("name", [name for name in NEUTRAL if name in [*REPRESENTATIVES, *DEFAULT_IS_NEUTRAL]])
def test_neutral_options_are_plain_keras_in_train_on_batch(name):
    def losses(spec, options):
        model = prepared(everything(), spec, options)
        values = [model.train_on_batch(*batch) for batch in batches_of(everything())]
        return [np.array(value).tolist() for value in values], [variable.numpy() for variable in model.variables]

    (losses_here, variables), (expected_losses, expected) = (
        losses(name, dict(declaration(name).neutral)),
        losses(None, None),
    )
    assert losses_here == expected_losses
    tf.nest.map_structure(np.testing.assert_array_equal, variables, expected)


@pytest.mark.parametrize("name", NAMES)
def test_who_has_no_neutral_options_says_why(name):
    assert declaration(name).neutral is not None or len(declaration(name).why_not_neutral) > 20


# --- 3: it does something ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in NAMES if name not in DEFAULT_IS_NEUTRAL])
def test_default_options_differ_from_plain_keras(name):
    """In how they train, in what a bad batch does to them, in what is logged, or in what they are judged by.

    What trains the same in less memory has to show that in tests of its own.
    """
    if declaration(name).cost(declaration(name).options(**declaration(name).example)).memory.startswith("less"):
        return
    if differs(known(simple, name), known(simple, like=name)):
        return
    model = prepared(simple_for(name), name)
    fitted(model, simple_for(name))
    with model.evaluation_weights():
        judged_by = model.get_weights()
    if any(not np.array_equal(a, b) for a, b in zip(model.get_weights(), judged_by, strict=True)):
        return
    pairs = [(known(workload, name), known(workload, like=name)) for workload in (everything, with_a_bad_batch)]
    assert any(differs(ours, plain) or ours.history.keys() != plain.history.keys() for ours, plain in pairs)


# --- 4: options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_option_is_refused(name):
    with pytest.raises(errors.InvalidOptionsError, match=f"{name}: unknown option 'no_such_option'"):
        trainstep.model_class(keras.Model, name, **spec_of(name)[name], no_such_option=1)


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=variant_id)
def test_options_survive_json(name, options):
    made = declaration(name).options(**options)
    assert type(made).model_validate_json(made.model_dump_json()) == made
    assert type(made).model_validate(json.loads(made.model_dump_json()), strict=False) == made


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_options_survive_json(name):
    made = declaration(name).options(**declaration(name).neutral)
    assert type(made).model_validate_json(made.model_dump_json()) == made


@pytest.mark.parametrize("name", NAMES)
def test_options_are_immutable_and_strictly_typed(name):
    made = declaration(name).options(**declaration(name).example)
    for option, field in schema(name).get("properties", {}).items():
        with pytest.raises(ValueError, match="frozen"):
            setattr(made, option, getattr(made, option))
        if constraints(field).get("type") in ("number", "integer"):
            with pytest.raises(errors.InvalidOptionsError, match=f"{name}: {option}: .*Given: '1'"):
                trainstep.model_class(keras.Model, {name: spec_of(name)[name] | {option: "1"}})


@pytest.mark.parametrize("name", NAMES)
def test_each_option_has_a_bound_and_a_sentence(name):
    for option, field in schema(name).get("properties", {}).items():
        assert field.get("description", "").endswith("."), option
        demands = constraints(field)
        if demands.get("type") in ("number", "integer"):
            assert demands.keys() & {"minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"}, option


OPTIONS = [(name, option) for name in NAMES for option in schema(name).get("properties", {})]
NUMERIC = [
    (name, option)
    for name, option in OPTIONS
    if constraints(schema(name)["properties"][option]).get("type") in ("number", "integer")
]


ENUMERATIONS = [(name, option) for name, option in OPTIONS if "enum" in constraints(schema(name)["properties"][option])]


def out_of_bounds(demands: dict) -> st.SearchStrategy:
    """Return values of the right type that the JSON schema forbids."""
    finite = {"allow_nan": False, "allow_infinity": False}
    found = []
    if demands["type"] == "integer":
        below = demands.get("minimum", demands.get("exclusiveMinimum", -math.inf) + 1)
        above = demands.get("maximum", demands.get("exclusiveMaximum", math.inf) - 1)
        found += [st.integers(max_value=int(below) - 1)] if math.isfinite(below) else []
        found += [st.integers(min_value=int(above) + 1)] if math.isfinite(above) else []
        return st.one_of(found)
    if "minimum" in demands:
        found.append(st.floats(max_value=float(demands["minimum"]), exclude_max=True, **finite))
    if "exclusiveMinimum" in demands:
        found.append(st.floats(max_value=float(demands["exclusiveMinimum"]), **finite))
    if "maximum" in demands:
        found.append(st.floats(min_value=float(demands["maximum"]), exclude_min=True, **finite))
    if "exclusiveMaximum" in demands:
        found.append(st.floats(min_value=float(demands["exclusiveMaximum"]), **finite))
    return st.one_of(found)


@pytest.mark.parametrize(("name", "option"), NUMERIC)
@settings(max_examples=25, deadline=None, database=None)
@given(data=st.data())
def test_every_bound_of_the_schema_is_enforced(name, option, data):
    value = data.draw(out_of_bounds(constraints(schema(name)["properties"][option])))
    with pytest.raises(errors.InvalidOptionsError) as caught:
        trainstep.model_class(keras.Model, {name: spec_of(name)[name] | {option: value}})
    assert f"{name}: {option}: " in str(caught.value)
    assert f"Given: {value!r}" in str(caught.value)


@pytest.mark.parametrize(("name", "option"), NUMERIC)
def test_not_a_number_is_refused(name, option):
    with pytest.raises(errors.InvalidOptionsError, match=f"{name}: {option}"):
        trainstep.model_class(keras.Model, {name: spec_of(name)[name] | {option: math.nan}})


@pytest.mark.parametrize(("name", "option"), ENUMERATIONS)
@settings(max_examples=25, deadline=None, database=None)
@given(text=st.text())
def test_an_enumeration_is_closed(name, option, text):
    assume(text not in constraints(schema(name)["properties"][option])["enum"])
    with pytest.raises(errors.InvalidOptionsError, match=f"{name}: {option}"):
        trainstep.model_class(keras.Model, {name: spec_of(name)[name] | {option: text}})


# --- 5: the shape of a strategy ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_strategy_overrides_hooks_and_nothing_of_keras(name):
    own = {key for key, value in vars(trainstep.get(name)).items() if inspect.isfunction(value)}
    assert not own & {
        "train_step",
        "test_step",
        "predict_step",
        "fit",
        "compile",
        "train_on_batch",
        "__init__",
        "__new__",
    }


@pytest.mark.parametrize("name", NAMES)
def test_each_overridden_hook_calls_super(name):
    overridden = {hook: value for hook, value in vars(trainstep.get(name)).items() if hook in HOOKS}
    for hook, function in overridden.items():
        if hook not in QUESTIONS:
            assert f"super().{hook}" in inspect.getsource(function), hook


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=variant_id)
def test_each_hook_reaches_what_is_inside_of_it(name, options):
    """A class behind the strategy sees every hook of the step called, whatever the strategy overrides."""
    seen = set()

    def spy(hook):
        def call(self, *args):
            seen.add(hook)
            return getattr(super(Inside, self), hook)(*args)

        return call

    step_hooks = list(definition.HOOKS)
    inside = trainstep.Declaration("zzz_inside_of_all", trainstep.Stage.REPORT, "", "", neutral={})
    Inside = type(Strategy)("Inside", (Strategy,), {"declaration": inside, **{hook: spy(hook) for hook in step_hooks}})  # noqa: N806
    base = trainstep.get(name)

    class Net(base, Inside, Subclassed):
        strategy_options = {name: options}  # noqa: RUF012

    task = task_of(name)
    model = Net(task)
    x, y = batches_of(everything(task))[0]
    model(x)  # Built within the first step, it would be traced twice.
    model.compile(sgd(), task.loss)  # In a graph, where both branches are traced.
    model.train_on_batch(x, y)
    assert seen == set(step_hooks)


# --- 6 and 7: dtypes, tracing, eager, XLA -----------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=variant_id)
def test_weights_and_statistics_are_float32(name, options):
    result = known(everything, name, options, how=briefly)
    assert {value.dtype for value in result.variables if value.dtype.kind == "f"} == {np.dtype("float32")}
    assert is_finite(result)


@pytest.mark.parametrize(("name", "options"), [variant for variant in VARIANTS if variant[0] in REPRESENTATIVES])
def test_predictions_are_float32(name, options):
    workload = everything(task_of(name))
    model = prepared(workload, name, options)
    assert all(values.dtype == np.float32 for values in tf.nest.flatten(model.predict(workload.x, verbose=0)))


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=variant_id)
def test_eager_equals_graph(name, options, assert_close):
    model = prepared(simple_for(name), name, options, run_eagerly=True)
    eager, graph = comparable(fitted(model, simple_for(name))), comparable(known(simple, name, options))
    assert_close(list(eager), list(graph), coarsest_dtype(model))


@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_eager_equals_graph_in_train_on_batch(name, assert_close):
    eager, graph = prepared(simple_for(name), name, run_eagerly=True), prepared(simple_for(name), name)
    for model in (eager, graph):
        for _ in range(4):
            model.train_on_batch(*batches_of(simple_for(name))[0])
    assert_close(eager.get_weights(), graph.get_weights(), coarsest_dtype(graph))


@pytest.mark.shows("XLA")
@pytest.mark.parametrize(("name", "options"), spec_of(*NAMES).items(), ids=variant_id)
def test_xla_agrees(name, options, assert_close, record_property):
    """Under XLA the step runs and agrees, or is refused for a reason that the strategy gives.

    Where it draws random numbers they are others, the same at every run.
    """
    if why := declaration(name).without_xla(declaration(name).options(**options)):
        with pytest.raises(errors.ModelConflictError, match=re.escape(why)):
            prepared(simple_for(name), name, options, jit_compile=True)
        record_property("instead", why)
        return
    workload = even(task_of(name))
    model = prepared(workload, name, options, jit_compile=True)
    variables = [*model.variables, *variables_of(model.optimizer)]
    initial = [variable.numpy() for variable in variables]
    compiled, graph = fitted(model, workload), known(even, name, options)
    if "seed" in schema(name).get("properties", {}) and differs(known(even, name, {**options, "seed": 1}), graph):
        for variable, value in zip(variables, initial, strict=True):
            variable.assign(value)
        assert_same(fitted(model, workload), compiled)  # Compiled anew it would take twice as long.
        assert differs(compiled, known(even, like=name))
    else:
        assert_close(list(compiled), list(graph), coarsest_dtype(model))


@pytest.mark.shows("steps_per_execution")
@pytest.mark.parametrize(("name", "options"), spec_of(*NAMES).items(), ids=variant_id)
def test_several_steps_per_execution_are_the_same_steps(name, options, assert_close):
    model = prepared(simple_for(name), name, options, steps_per_execution=2)
    assert_close(list(fitted(model, simple_for(name))), list(known(simple, name, options)), coarsest_dtype(model))


@pytest.mark.shows("a bad batch")
@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=variant_id)
def test_a_bad_batch_costs_its_updates_and_no_more(name, options):
    """One, but for who makes several. Beside `skip_nonfinite`, which is there for that; `action="raise"` stops."""
    spec = {"skip_nonfinite": {}} | {name: options}
    # Without batch norm: what overflows in float16 depends on it, which is not what is told here.
    workload = with_a_bad_batch(task_of(name), dense)
    model = prepared(workload, spec)
    if options == {"action": "raise"}:
        with pytest.raises(errors.NonFiniteGradientError):
            fitted(model, workload, epochs=1)
        return
    fitted(model, workload)
    updates = declaration(name).updates(declaration(name).options(**options))
    of_good_ones = int(known(simple, name, options).optimizer[0])
    assert int(model.optimizer.iterations.numpy()) == of_good_ones - 2 * updates  # The batch comes once an epoch.
    assert all(np.isfinite(variable.numpy()).all() for variable in model.variables)


@pytest.mark.parametrize("name", NAMES)
def test_a_bad_batch_leaves_statistics_as_they_are(name):
    result = briefly(with_a_bad_batch(task_of(name)), {"skip_nonfinite": {}, name: {}})
    assert all(np.isfinite(values).all() for values in result.variables)


# --- 9 and 10: data and models ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (kind, name)
        for kind in KINDS
        for name in (NAMES if kind == "dicts of inputs and outputs" else EVALUATING)
        if kind in kinds(task_of(name))
    ],
)
def test_every_kind_of_model_trains(kind, name):
    result = briefly(kinds(task_of(name))[kind], name)
    assert is_finite(result)
    assert result.history["loss"][0] != result.history["loss"][1]


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_weights(name):
    assert_same(briefly(everything(task_of(name)), name), known(everything, name, how=briefly))


def weights_of(name: str, weights: np.ndarray) -> Any:
    """Return `weights` for each output of the task of `name`."""
    return tf.nest.map_structure(lambda labels: weights, task_of(name).y)


@pytest.mark.parametrize("name", EVALUATING)
def test_sample_weights_matter_and_ones_do_not(name):
    def weighted(weights):
        return briefly(workload_for(functional, task_of(name), fit={"sample_weight": weights_of(name, weights)}), name)

    without = known(everything, name, how=briefly)
    assert differs(weighted(WEIGHTS), without)
    assert not differs(weighted(np.ones_like(WEIGHTS)), without)


@pytest.mark.parametrize("name", EVALUATING)
def test_an_example_of_weight_zero_counts_for_nothing(name):
    """Where batch norm does not mix examples, what a weightless example holds changes no weight."""
    weights = np.ones(EXAMPLES, "float32")
    weights[::3] = 0
    one = simple_for(name, fit={"sample_weight": weights_of(name, weights)})

    def changed(labels):
        other = labels.copy()
        other[::3] = np.roll(labels[::3], 1, axis=-1) if labels.shape[-1] > 1 else 1000
        return other

    other = replace(one, y=tf.nest.map_structure(changed, one.y))
    assert_same(briefly(one, name), briefly(other, name))


@pytest.mark.parametrize(
    ("situation", "name"),
    [
        (situation, name)
        for name in NAMES
        for situation in situations(task_of(name))
        if situation != "steps_per_execution"  # That is shown for all, above.
        and (name in EVALUATING or situation in ("a frozen layer", "a schedule, and Adam"))
    ],
)
def test_default_options_train_finite_in_every_situation(situation, name):
    workload = situations(task_of(name))[situation]
    try:
        result = briefly(workload, name)
    except errors.UnsupportedInputError:
        # Integer inputs cannot be moved by small amounts; the strategy has to say so, and has.
        assert not np.issubdtype(np.asarray(workload.x).dtype, np.floating)
        return
    except errors.ModelConflictError:
        assert "compiled loss" in declaration(name).needs
        assert "loss" not in workload.compile()
        return
    assert is_finite(result)
    assert result.history["loss"][0] != result.history["loss"][1]


# --- Weights without a gradient, sparse gradients, nothing to train ---------------------------------------------------


class Unused(Subclassed):
    """Has a layer with trainable weights the output does not depend on."""

    def __init__(self, task=NUMBERS):
        super().__init__(task)
        self.unused = keras.layers.Dense(2)

    def call(self, x, training=None):
        self.unused(x)
        return super().call(x, training=training)


@pytest.mark.filterwarnings(
    "ignore:Gradients do not exist for variables", "ignore:The model does not have any trainable"
)
@pytest.mark.parametrize("name", NAMES)
def test_a_weight_without_a_gradient_stays_and_the_others_learn(name):
    partly = workload_for(Unused, task_of(name), run_eagerly=True)
    model = prepared(partly, name)
    model.predict(partly.x[:1], verbose=0)
    before = [w.copy() for w in model.unused.get_weights()]
    used = model.first[0].get_weights()[0].copy()
    result = stepped(model, partly)
    tf.nest.map_structure(np.testing.assert_array_equal, model.unused.get_weights(), before)
    assert not np.array_equal(model.first[0].get_weights()[0], used)
    assert is_finite(result)


def listed(task: Task) -> keras.Model:
    """Return a net whose outputs are a list, not in the order of their names."""
    x = h = keras.Input(task.shape)
    for layer in task.first_layers():
        h = layer(h)
    return keras.Model(x, [layer(h) for _, layer in sorted(task.last_layers().items(), reverse=True)])


@pytest.mark.skipif(KERAS_3, reason="Keras 3 takes names for a dict of outputs alone")
@pytest.mark.parametrize("name", EVALUATING)
def test_labels_and_weights_by_name_are_those_in_the_order_of_the_outputs(name):
    task = replace(task_of(name), outputs=True)
    workload = workload_for(listed, task, run_eagerly=True)
    weights = {"kind": WEIGHTS, "value": WEIGHTS[::-1].copy()}
    by_name = replace(workload, fit={"sample_weight": weights})
    by_place = replace(workload, y=[task.y["value"], task.y["kind"]],
                       fit={"sample_weight": [weights["value"], weights["kind"]]})  # fmt: skip
    one, other = (briefly(each, name) for each in (by_name, by_place))
    assert_same(one, other)


def embedded(task: Task = NUMBERS) -> keras.Model:
    ids, values = keras.Input((3,), dtype="int32", name="ids"), keras.Input(task.shape, name="values")
    h = values
    for layer in task.first_layers():
        h = layer(h)
    table = keras.layers.Flatten()(keras.layers.Embedding(7, 2, name="table")(ids))
    h = keras.layers.Concatenate()([table, h])
    return keras.Model({"ids": ids, "values": values}, outputs(task.last_layers(), h))


def with_tokens(tokens: np.ndarray, task: Task = NUMBERS) -> Workload:
    return replace(workload_for(embedded, task), x={"ids": tokens, "values": task.x})


@pytest.mark.parametrize("name", NAMES)
def test_the_sparse_gradient_of_an_embedding_is_used(name):
    sparse = with_tokens(tokens(EXAMPLES, 3), task_of(name))
    model = prepared(sparse, name, run_eagerly=True)
    before = model.get_layer("table").get_weights()[0]
    assert is_finite(stepped(model, sparse))
    after = model.get_layer("table").get_weights()[0]
    assert not np.array_equal(after[1], before[1])


def test_the_sparse_gradient_of_an_embedding_may_repeat_rows():
    """Token 3 twice in a batch: its row moves by the sum, whatever the strategy makes of the gradient."""
    repeated = with_tokens(np.full((EXAMPLES, 3), 3))
    plain = briefly(repeated)
    for name in NEUTRAL:
        assert_same(briefly(repeated, name, dict(declaration(name).neutral)), plain)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_without_trainable_weights_only_reports(name):
    model = prepared(simple_for(name), name)
    model.trainable = False
    model.compile(**simple_for(name).compile(), run_eagerly=True)
    before = model.get_weights()
    with pytest.warns(UserWarning, match="does not have any trainable weights"):
        result = stepped(model, simple_for(name))
    tf.nest.map_structure(np.testing.assert_array_equal, model.get_weights(), before)
    assert result.history["loss"][0] > 0


# --- apply and remove -------------------------------------------------------------------------------------------------


def seen_from_outside(model: keras.Model) -> tuple:
    lines: list[str] = []
    model.summary(print_fn=lambda line, **kwargs: lines.append(line))
    return (
        lines,
        model.count_params(),
        model.name,
        [w.shape for w in model.get_weights()],
        [layer.name for layer in model.layers],
    )


@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_apply_changes_nothing_that_is_seen_from_outside_and_remove_gives_it_all_back(name):
    workload = everything(task_of(name))
    model = workload.build()
    plain_class, outside = type(model), seen_from_outside(model)
    weights, policies = model.get_weights(), [layer.dtype_policy for layer in model.layers]
    model.compile(**workload.compile())
    assert trainstep.apply(model, spec_of(name)) is model
    assert isinstance(model, plain_class)
    assert isinstance(model, trainstep.get(name))
    assert list(trainstep.applied(model)) == [name]
    assert seen_from_outside(model) == outside
    tf.nest.map_structure(np.testing.assert_array_equal, model.get_weights(), weights)
    model.compile(**workload.compile())
    fitted(model, workload, epochs=1)
    assert seen_from_outside(model)[1:] == outside[1:]
    trained = model.get_weights()
    assert trainstep.remove(model) is model
    assert type(model) is plain_class
    assert trainstep.applied(model) == {}
    tf.nest.map_structure(np.testing.assert_array_equal, model.get_weights(), trained)
    assert [layer.dtype_policy.name for layer in model.layers] == [policy.name for policy in policies]


@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_a_model_removed_from_trains_on_as_plain_keras(name):
    workload = simple_for(name)
    model, twin = prepared(workload, name), prepared(workload)
    fitted(model, workload, epochs=1)
    trainstep.remove(model)
    twin.set_weights(model.get_weights())
    model.compile(**workload.compile())
    assert_same(fitted(model, workload), fitted(twin, workload))


@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_apply_after_compile_is_apply_before(name):
    model = prepared(simple_for(name))
    trainstep.apply(model, spec_of(name))
    assert_same(fitted(model, simple_for(name)), known(simple, name))


@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_recompiling_starts_anew(name):
    """The same weights and a new optimizer train as they did before, whatever state the first training left."""
    workload = simple_for(name)
    model = prepared(workload, name)
    start = model.get_weights()
    fitted(model, workload, epochs=1)
    model.set_weights(start)
    model.compile(**workload.compile())
    assert_same(fitted(model, workload), known(simple, name))


@pytest.mark.parametrize(("name", "options"), BY_STATE, ids=variant_id)
def test_fitting_twice_for_an_epoch_is_fitting_for_two_and_the_second_traces_nothing(name, options, monkeypatch):
    model = prepared(simple_for(name), name, options)
    step, traces = type(model).train_step, []
    monkeypatch.setattr(type(model), "train_step", lambda self, data: traces.append(1) or step(self, data))
    first = fitted(model, simple_for(name), epochs=1)
    traced = len(traces)
    second = fitted(model, simple_for(name), epochs=1)
    assert len(traces) == traced > 0
    history = {key: first.history[key] + second.history[key] for key in first.history}
    assert_same(Run(second.variables, second.optimizer, history, second.state), known(simple, name, options))


@pytest.mark.parametrize("made_by", ["model_class", "inheriting from it", "hand"])
@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_a_base_class_and_a_mixin_by_hand_are_apply(name, made_by):
    spec = spec_of(name)
    if made_by == "model_class":
        made = trainstep.model_class(WithoutTrainingArgument, spec)
    elif made_by == "hand":
        made = type("ByHand", (trainstep.get(name), WithoutTrainingArgument), {"strategy_options": spec})
    else:
        made = type("ByBase", (trainstep.model_class(WithoutTrainingArgument, spec),), {})
    assert_same(briefly(workload_for(made, task_of(name))), known(subclassed, name, how=briefly))


def functional_of(name: str, task: Task) -> keras.Model:
    x = h = keras.Input(task.shape)
    for layer in task.first_layers():
        h = layer(h)
    return trainstep.model_class(keras.Model, spec_of(name))(x, outputs(task.last_layers(), h))


@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_model_class_of_keras_model_makes_functional_models(name):
    made = workload_for(partial(functional_of, name), task_of(name))
    assert is_finite(run(made, fit={"epochs": 1}))
    assert list(trainstep.applied(made.build())) == [name]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_base_class_stays_one_whenever_a_functional_model_is_made_of_it(when):
    """Keras exchanges the bases of a class that is called with inputs and outputs, for good."""
    name = "gradient_clipping"
    if when == "before":
        functional_of(name, NUMBERS)

    class Net(trainstep.model_class(keras.Model, name)):
        def __init__(self):
            super().__init__()
            self.out = keras.layers.Dense(1)

        def call(self, x):
            return self.out(x)

    if when == "after":
        functional_of(name, NUMBERS)
    assert is_finite(run(Workload(Net, X, Y), fit={"epochs": 1}))


@keras.saving.register_keras_serializable("trainstep_tests")
class CompilesItself(WithoutTrainingArgument):
    """Has an optimizer and a loss of its own."""

    def __init__(self, task=NUMBERS):
        super().__init__(task)
        self.task = task

    def get_config(self):
        return {"task": asdict(self.task)}

    @classmethod
    def from_config(cls, config):
        return cls(Task(**config["task"]))

    def compile(self, rate):
        super().compile(optimizer=sgd(rate), loss=self.task.loss)
        self.rate = rate

    def get_compile_config(self):
        return {"rate": self.rate}

    def compile_from_config(self, config):
        self.compile(**config)


@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_a_model_that_compiles_itself_is_loaded_compiled_by_itself(name, tmp_path):
    task = task_of(name)
    model = trainstep.apply(CompilesItself(task), spec_of(name))
    model.compile(0.05)
    model.fit(task.x, task.y, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.rate == 0.05
    assert np.isfinite(loaded.fit(task.x, task.y, verbose=0).history["loss"]).all()


@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_evaluate_and_predict_are_those_of_keras(name, assert_close):
    workload = everything(task_of(name))
    x, y = workload.x, workload.y
    model = prepared(workload, name)
    mine = [model.evaluate(x, y, verbose=0), model.predict(x, verbose=0)]
    dtype = coarsest_dtype(model)
    trainstep.remove(model)
    model.compile(**workload.compile())
    assert_close(mine, [model.evaluate(x, y, verbose=0), model.predict(x, verbose=0)], dtype)


@pytest.mark.parametrize("name", [name for name in NAMES if has_slots(name)])
def test_state_is_in_the_optimizer_and_not_in_the_weights(name):
    workload = everything(task_of(name))
    plain_model, model = (prepared(workload, spec, run_eagerly=True) for spec in (None, name))
    for each in (plain_model, model):
        stepped(each, workload)
    assert len(model.weights) == len(plain_model.weights)
    assert len(model.variables) == len(plain_model.variables)
    options = declaration(name).options(**declaration(name).example)
    slots = declaration(name).state(options)
    count = len(tf.nest.flatten(model.strategy_state[name])) if slots else 0
    assert all(slot.per_statistic or len(tf.nest.flatten(model.strategy_state[name][key])) == (
        len(model.trainable_variables) if slot.per_weight else 1) for key, slot in slots.items())  # fmt: skip
    assert len(optimizer_variables(model.optimizer)) == len(optimizer_variables(plain_model.optimizer)) + count


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_may_be_frozen_between_fits_and_the_optimizer_stay(name):
    """The optimizer's slots and the strategy's state belong to weights, not to their places in a list."""
    optimizer = keras.optimizers.Adam(0.01)
    workload = simple_for(name)
    model = prepared(workload, name, optimizer=optimizer, run_eagerly=True)
    stepped(model, workload)
    first = next(layer for layer in model.layers if layer.trainable_variables)
    first.trainable = False
    frozen_weights = first.get_weights()
    others = model.layers[-1].get_weights()
    model.compile(**{**workload.compile(), "optimizer": optimizer, "run_eagerly": True})
    assert is_finite(stepped(model, workload))
    tf.nest.map_structure(np.testing.assert_array_equal, first.get_weights(), frozen_weights)
    assert not np.array_equal(model.layers[-1].get_weights()[0], others[0])


@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_strategies_may_be_exchanged_without_compiling_anew(name):
    """What is applied in place of others starts with its own state, at its initial values."""
    options = spec_of(name)[name]
    model = prepared(simple_for(name), ["standard"])
    for spec in ({name: options}, {"standard": {}}, {name: options}):
        trainstep.remove(model)
        trainstep.apply(model, spec)
        model.train_on_batch(*batches_of(simple_for(name))[0])
        start = [slot.initial + 1 for slot in declaration(name).state(declaration(name).options(**options)).values()
                 if slot.dtype == "int32"]  # fmt: skip
        counts = [v for v in model.strategy_state.get(name, {}).values() if not isinstance(v, (list, tuple))]
        if name in spec:
            assert all(int(v.numpy()) <= max(start) for v in counts if "int32" in str(v.dtype))
        assert np.isfinite(model.get_weights()[0]).all()


class WrapsFit(WithoutTrainingArgument):
    def fit(self, *args, **kwargs):
        return super().fit(*args, **kwargs)


@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_a_fit_of_the_users_own_may_wrap_that_of_keras(name):
    assert_same(run(workload_for(WrapsFit, task_of(name)), name), known(subclassed, name))


# --- 8: copied; `test_saving.py` is of files, `test_resume.py` of backups ---------------------------------------------


def trained_by_batch(model: keras.Model, workload: Workload, start: int, stop: int) -> None:
    for batch in batches_of(workload, start, stop, step=2):
        model.train_on_batch(*batch)


@pytest.mark.parametrize("name", REPRESENTATIVES)
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_a_copy_keeps_strategies_and_state(copied, name):
    workload = simple_for(name)
    model = prepared(workload, name, run_eagerly=True)
    trained_by_batch(model, workload, 0, 10)
    second = copied(model)
    assert trainstep.applied(second) == trainstep.applied(model)
    for each in (model, second):
        trained_by_batch(each, workload, 10, 20)
    tf.nest.map_structure(np.testing.assert_array_equal, second.get_weights(), model.get_weights())


@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_json_holds_the_architecture_and_the_strategies(name):
    model = prepared(simple_for(name), name)
    second = keras.models.model_from_json(model.to_json(indent=2))
    assert trainstep.applied(second) == trainstep.applied(model)
    second.set_weights(model.get_weights())
    x = simple_for(name).x
    tf.nest.map_structure(np.testing.assert_array_equal, second.predict(x, verbose=0), model.predict(x, verbose=0))
