"""Each error is provoked; its message says what was wrong, what was given, what is allowed, and what is nearest."""

import inspect
import pathlib
import re

import keras
import numpy as np
import pytest
from catalogue import NAMES, declaration, registered, spec_of, task_of
from nets import X, Y, dense, one_weight, sgd

import trainstep
from trainstep import errors
from trainstep._seam import KERAS_3
from trainstep.definition import OWNED_BY_THE_ROOT


def declared(name: str, **arguments) -> trainstep.Declaration:
    return trainstep.Declaration(name, trainstep.Stage.REPORT, "", "", **{"neutral": {}, **arguments})


def test_all_errors_are_value_errors_of_one_family():
    classes = [value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, Exception)]
    assert len(classes) >= 14
    for each in classes:
        assert issubclass(each, errors.TrainstepError)
        assert issubclass(each, ValueError)
        assert inspect.getdoc(each)


# --- Names and options ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function", [trainstep.plan, trainstep.describe, trainstep.get, lambda n: trainstep.apply(dense(), n)]
)
def test_an_unknown_strategy_is_named_with_the_nearest_and_all_there_are(function):
    with pytest.raises(errors.UnknownStrategyError) as caught:
        function("micro_bathces")
    assert str(caught.value) == (
        f"Unknown strategy 'micro_bathces'. Did you mean 'micro_batches'? Registered: {', '.join(NAMES)}."
    )


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("SAM", "Did you mean 'sam'"),
        ("sam:rho=0.1", "Options in a string are for the command line and for experiments"),
        ("sam:rho=0.1 + ema", "Options in a string are for the command line and for experiments"),
    ],
)
def test_a_name_written_in_another_way_is_told_how(name, hint):
    with pytest.raises(errors.UnknownStrategyError, match=hint):
        trainstep.plan(name)


def test_what_compile_refuses_leaves_the_model_as_it_was():
    model = trainstep.apply(dense(), ["gradient_clipping", "mixed_precision"])
    policies = [layer.dtype_policy.name for layer in model.layers]
    with pytest.raises(errors.OptimizerConflictError):
        model.compile(sgd(clipnorm=1.0), "mse")
    assert [layer.dtype_policy.name for layer in model.layers] == policies
    assert getattr(model, "optimizer", None) is None


def test_a_model_without_a_float32_layer_has_no_precision_to_mix():
    model = keras.Sequential([keras.layers.Input((6,)), keras.layers.Dense(1, dtype="bfloat16")])
    with pytest.raises(errors.ModelConflictError, match="No layer computes in float32"):
        trainstep.apply(model, "mixed_precision")


LOOK_AT_ENTRIES = [name for name in NAMES if "classes" in declaration(name).needs]


@pytest.mark.parametrize("name", LOOK_AT_ENTRIES)
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"ignore_class": 0}, r"ignore_class=0. Give the entries.*sample weight of 0"),
        pytest.param({"reduction": "mean_with_sample_weight"}, "divides by what they weigh",
                     marks=pytest.mark.skipif(not KERAS_3, reason="Keras 2 has no such reduction")),
    ],
    ids=["a class is ignored", "a mean over weights"],
)  # fmt: skip
def test_a_loss_that_counts_entries_in_a_way_of_its_own_is_refused(name, arguments, said):
    task = task_of(name)
    model = trainstep.apply(dense(task), spec_of(name))
    model.compile(sgd(), keras.losses.SparseCategoricalCrossentropy(**arguments))
    with pytest.raises(errors.ModelConflictError, match=f"{name} .*{said}"):
        model.train_on_batch(task.x, task.y.argmax(axis=-1))


def test_a_class_in_place_of_a_name_is_refused():
    with pytest.raises(errors.UnknownStrategyError, match=r"called by its name, not .* Write 'standard'"):
        trainstep.get(trainstep.strategies.Standard)


def test_a_train_step_of_ones_own_behind_model_class_is_named():
    with pytest.raises(errors.ModelConflictError, match="Net overrides `train_step`"):
        type("Net", (trainstep.model_class(keras.Model, "standard"),), {"train_step": lambda self, data: {}})


def test_strategies_among_the_bases_are_not_removed_but_added_to():
    class Net(trainstep.model_class(keras.Model, "standard")):
        pass

    with pytest.raises(errors.AlreadyAppliedError, match="Net has strategies among its bases already: standard"):
        trainstep.apply(Net(), "adversarial")


def test_an_empty_list_of_inputs_is_refused():
    with pytest.raises(errors.InvalidOptionsError, match="adversarial: inputs"):
        trainstep.plan("adversarial", inputs=[])


def test_where_nothing_is_near_nothing_is_suggested():
    with pytest.raises(errors.UnknownStrategyError) as caught:
        trainstep.get("qqq")
    assert "Did you mean" not in str(caught.value)


def test_an_unknown_option_is_named_with_the_nearest_and_all_there_are():
    with pytest.raises(errors.InvalidOptionsError) as caught:
        trainstep.plan("gradient_accumulation", step=4)
    assert str(caught.value) == (
        "gradient_accumulation: unknown option 'step'. Did you mean 'steps'? "
        "Options: steps, weighting, reduction, last_window."
    )


def test_a_wrong_value_is_named_with_what_is_allowed_and_what_was_given():
    with pytest.raises(errors.InvalidOptionsError) as caught:
        trainstep.plan("gradient_accumulation", steps=0)
    assert str(caught.value) == (
        "gradient_accumulation: steps: Input should be greater than or equal to 1. Given: 0. "
        "Allowed: an integer at least 1. (steps: Micro-batches per update; 1 accumulates nothing.)"
    )


def test_all_that_is_wrong_with_options_is_said_at_once():
    with pytest.raises(
        errors.InvalidOptionsError, match=r"steps: .* weighting: .*'samples' or 'batches'.* unknown option 'x'"
    ):
        trainstep.plan("gradient_accumulation", steps=0, weighting="tokens", x=1)


def test_a_bool_is_not_a_number():
    for value in (True, False):
        with pytest.raises(errors.InvalidOptionsError, match="steps: "):
            trainstep.plan("gradient_accumulation", steps=value)


@pytest.mark.parametrize("options", [4, "steps", [("steps", 4)]])
def test_options_that_are_no_mapping(options):
    with pytest.raises(
        errors.InvalidOptionsError, match="Options of 'gradient_accumulation' must be a mapping"
    ) as caught:
        trainstep.plan({"gradient_accumulation": options})
    assert repr(options) in str(caught.value)


def test_none_stands_for_the_defaults():
    assert trainstep.plan({"gradient_accumulation": None}) == trainstep.plan("gradient_accumulation")


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        (
            "recompute",
            {},
            "layers: it has no default, for example layers=('hidden*',). Allowed: a list [a string, ...].",
        ),
        ("recompute", {"layers": "conv"}, "Given: 'conv'. Allowed: a list [a string, ...]."),
        ("trades", {"clip_range": 3}, "Allowed: a pair (a number, a number), or None."),
        ("trades", {"inputs": ()}, "Allowed: a list [a string, ...] that is not empty, or None."),
        ("ema", {"decay": 2.0}, "Given: 2.0. Allowed: a number at least 0 and below 1, or None."),
        (
            "sam",
            {"rho": -1.0},
            "Allowed: a number at least 0, or a schedule {'start': ..., 'end': ..., 'updates': ...}.",
        ),
        ("sam", {"rho": {"start": 1.0, "end": 0.0}}, "rho.updates: it has no default. Allowed: an integer at least 1"),
        (
            "sam",
            {"rho": {"begin": 1.0}},
            "Options of rho: start, end, updates, first, curve.",
        ),
        ("sam", {"adaptive": 1}, "Given: 1. Allowed: True or False."),
        ("sam", {"per": "step"}, "Allowed: 'batch' or 'window'."),
        ("layer_freezing", {"frozen": {"a": 3}}, "Given: 3. Allowed: a pair (an integer, an integer or None)."),
        ("layer_freezing", {"frozen": 3}, "Allowed: a mapping {name: a pair (an integer, an integer or None)}."),
    ],
)
def test_what_an_option_allows_is_said_in_words(name, options, words):
    with pytest.raises(errors.InvalidOptionsError, match=re.escape(words)):
        trainstep.plan(name, **options)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("pgd", "It is a choice of adversarial: write {'adversarial': {'attack': 'pgd'}}."),
        ("FGSM", "It is a choice of adversarial: write {'adversarial': {'attack': 'fgsm'}}."),
        ("SAM", "Did you mean 'sam'?"),
        ("ASAM", "Did you mean 'sam'?"),
        ("AutoClip", "Did you mean 'percentile_clipping'?"),
        ("VAT", "Did you mean 'virtual_adversarial'?"),
        ("agc", "Did you mean 'adaptive_gradient_clipping'?"),
    ],
)
def test_a_name_people_know_a_method_by_leads_to_the_strategy(name, hint):
    with pytest.raises(errors.UnknownStrategyError, match=re.escape(hint)):
        trainstep.plan(name)


def named() -> keras.Model:
    return keras.Sequential([keras.Input((6,)), keras.layers.Dense(3, name="hidden")])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("adaptive_gradient_clipping", {"exclude": ("hiden",)}),
        ("gradnorm", {"shared": "hiden"}),
        ("layer_freezing", {"frozen": {"hiden": (0, None)}}),
        ("layerwise_learning_rates", {"multipliers": {"hiden": 2.0}}),
        ("recompute", {"layers": ("hiden",)}),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused_before_any_data_is_read(name, options):
    """By `apply` where the model has its weights, and else in the first step."""
    with pytest.raises(errors.ModelConflictError, match=f"{name}: no .*'hiden'.* Did you mean 'hidden'"):
        trainstep.apply(named(), name, **options)


@pytest.mark.parametrize("name", [name for name in NAMES if "classes" in declaration(name).needs])
def test_a_loss_that_is_of_no_classes_is_refused_before_any_data_is_read(name):
    """By `compile`, and by `apply` where the model is compiled; not where the strategy does nothing."""
    message = f"{name} needs an output of classes.*trained by mean_squared_error"
    model = trainstep.apply(named(), spec_of(name))
    with pytest.raises(errors.ModelConflictError, match=message):
        model.compile("sgd", "mse")
    compiled = named()
    compiled.compile("sgd", "mse")
    with pytest.raises(errors.ModelConflictError, match=message):
        trainstep.apply(compiled, spec_of(name))
    if declaration(name).neutral is not None:
        trainstep.apply(named(), {name: dict(declaration(name).neutral)}).compile("sgd", "mse")


@pytest.mark.parametrize("name", [name for name in NAMES if "one-hot labels" in declaration(name).needs])
def test_a_loss_of_class_numbers_is_refused_where_labels_are_mixed(name):
    model = trainstep.apply(named(), name)
    with pytest.raises(errors.ModelConflictError, match=f"{name} mixes labels, which class numbers cannot be"):
        model.compile("sgd", "sparse_categorical_crossentropy")


def test_options_of_another_strategy():
    other = declaration("gradient_clipping").options()
    with pytest.raises(
        errors.InvalidOptionsError, match="mapping or GradientAccumulationOptions, not GradientClippingOptions"
    ):
        trainstep.plan({"gradient_accumulation": other})


# --- The spec ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [3, None, ["standard", 3], {"standard"}, 2.5], ids=repr)
def test_a_spec_that_is_none(spec):
    with pytest.raises(
        errors.InvalidSpecError, match="a name, a list of names, or a mapping from names to options, not"
    ):
        trainstep.plan(spec)


@pytest.mark.parametrize("spec", [[], {}, ()])
def test_an_empty_spec_points_to_the_control(spec):
    with pytest.raises(errors.InvalidSpecError, match='"standard"'):
        trainstep.plan(spec)


def test_keywords_with_several_strategies():
    with pytest.raises(errors.InvalidSpecError, match=r"\(steps\) go with a single name"):
        trainstep.plan(["gradient_accumulation", "standard"], steps=4)


@pytest.mark.parametrize(
    "text", ["standard,gradient_clipping", "standard gradient_clipping", "standard+gradient_clipping"]
)
def test_several_names_in_one_text(text):
    with pytest.raises(
        errors.UnknownStrategyError, match=r"are a list: \['standard', 'gradient_clipping'\]; on the command"
    ):
        trainstep.plan(text)


def test_an_option_in_place_of_a_strategy():
    with pytest.raises(
        errors.UnknownStrategyError,
        match=r"'clipnorm'\. It is an option of gradient_clipping: write \{'gradient_clipping': \{'clipnorm': ",
    ):
        trainstep.plan({"clipnorm": 1.0})


def test_numbers_of_numpy_are_numbers():
    assert trainstep.plan("gradient_accumulation", steps=np.int64(2)).strategies["gradient_accumulation"].steps == 2
    with pytest.raises(
        errors.InvalidOptionsError, match=r"steps: .*valid integer. Given: 2\.5\..*Micro-batches per update"
    ):
        trainstep.plan("gradient_accumulation", steps=np.float64(2.5))


def test_a_strategy_twice():
    with pytest.raises(errors.RepeatedStrategyError, match="'standard' is listed more than once"):
        trainstep.plan(["standard", "gradient_clipping", "standard"])


def test_a_name_that_is_no_text():
    with pytest.raises(errors.TrainstepError):
        trainstep.plan({3: {}})


# --- The model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["number", "text", "class", "layer", "nothing"])
def test_what_is_no_model(what):
    model = {"number": 3, "text": "model", "class": keras.Model, "layer": keras.layers.Dense(1), "nothing": None}[what]
    with pytest.raises(errors.NotAModelError, match=r"keras.Model") as caught:
        trainstep.apply(model, "standard")
    assert isinstance(caught.value, TypeError)


def test_an_instance_where_a_class_is_asked_for():
    with pytest.raises(errors.NotAModelError, match=r"takes keras.Model or a subclass"):
        trainstep.model_class(dense(), "standard")


def test_a_second_apply_says_what_is_there_and_what_to_do():
    model = trainstep.apply(dense(), "gradient_clipping")
    with pytest.raises(errors.AlreadyAppliedError, match=r"gradient_clipping\. .*trainstep.remove\(model\)"):
        trainstep.apply(model, "standard")
    assert list(trainstep.applied(model)) == ["gradient_clipping"]


def test_nothing_to_remove():
    with pytest.raises(errors.NotAppliedError, match="no strategies to remove from 'plain'"):
        trainstep.remove(keras.Sequential([keras.layers.Dense(1)], name="plain"))
    with pytest.raises(errors.NotAppliedError):
        trainstep.remove(3)


def test_what_a_class_was_defined_with_cannot_be_removed():
    class Net(trainstep.strategies.Standard, keras.Model):
        pass

    with pytest.raises(errors.NotAppliedError, match="Net has its strategies among its bases"):
        trainstep.remove(Net())


@pytest.mark.parametrize("define", [True, False])
def test_a_train_step_of_the_users_own_would_never_run(define):
    class Net(keras.Model):
        def train_step(self, data):
            return {}

    def define_it():
        return type("Both", (trainstep.strategies.Standard, Net), {})

    def apply_it():
        return trainstep.apply(Net(), "standard")

    with pytest.raises(errors.ModelConflictError, match=r"Net overrides `train_step`.*compute_loss"):
        (define_it if define else apply_it)()


@pytest.mark.parametrize("hook", ["update_weights", "transform_batch", "loss_scale", "finish_epoch", "strategy_state"])
def test_a_method_of_the_users_with_the_name_of_a_hook(hook):
    Net = type("Net", (keras.Model,), {hook: lambda self: None})  # noqa: N806
    with pytest.raises(errors.ModelConflictError, match=f"Net defines `{hook}`"):
        trainstep.apply(Net(), "standard")


def test_after_a_refusal_the_model_is_what_it_was():
    model = dense()
    model.compile(sgd(clipnorm=1.0), "mse")
    with pytest.raises(errors.OptimizerConflictError):
        trainstep.apply(model, "gradient_clipping")
    assert type(model) is keras.Sequential
    assert np.isfinite(model.fit(X, Y, verbose=0).history["loss"]).all()


# --- The optimizer ----------------------------------------------------------------------------------------------------


def refused(spec, optimizer, message):
    """Assert that the optimizer is refused by `compile`, and by `apply` where the model is compiled already."""
    model = trainstep.apply(dense(), spec)
    with pytest.raises(errors.OptimizerConflictError, match=message):
        model.compile(optimizer(), "mse")
    model = dense()
    model.compile(optimizer(), "mse")
    with pytest.raises(errors.OptimizerConflictError, match=message):
        trainstep.apply(model, spec)


@pytest.mark.parametrize("flag", ["global_clipnorm", "clipnorm", "clipvalue"])
def test_an_optimizer_that_clips_beside_the_strategy(flag):
    refused(
        "gradient_clipping",
        lambda: sgd(**{flag: 0.5}),
        rf"{flag}=0.5 and .*'gradient_clipping'.* done twice\. Keep the strategy",
    )


@pytest.mark.skipif(
    "gradient_accumulation_steps" not in inspect.signature(keras.optimizers.SGD).parameters,
    reason="The optimizers of this Keras do not accumulate.",
)
def test_an_optimizer_that_accumulates_beside_the_strategy():
    refused(
        "gradient_accumulation",
        lambda: sgd(gradient_accumulation_steps=2),
        "gradient_accumulation_steps=2 and .*'gradient_accumulation'",
    )


@pytest.mark.skipif(
    "loss_scale_factor" not in inspect.signature(keras.optimizers.SGD).parameters,
    reason="The optimizers of this Keras have no fixed loss scale.",
)
def test_an_optimizer_with_a_loss_scale_beside_the_strategy():
    refused("mixed_precision", lambda: sgd(loss_scale_factor=8.0), "loss_scale_factor=8.0 and .*'mixed_precision'")


@pytest.mark.parametrize("name", ["ema", "swa"])
def test_an_optimizer_that_averages_beside_the_strategy(name):
    refused(
        name, lambda: sgd(use_ema=True), f"use_ema=True and .*'{name}'.* done twice.* take the place of the weights"
    )


def loss_scaled(**arguments):
    module = keras.optimizers if hasattr(keras.optimizers, "LossScaleOptimizer") else keras.mixed_precision
    return module.LossScaleOptimizer(sgd(**arguments))


def test_a_loss_scale_optimizer_beside_the_strategy():
    refused("mixed_precision", loss_scaled, "LossScaleOptimizer='SGD' and .*'mixed_precision'")


def test_a_clipping_optimizer_inside_a_loss_scale_optimizer():
    refused("gradient_clipping", lambda: loss_scaled(clipnorm=0.5), "clipnorm=0.5 and .*'gradient_clipping'")


def test_the_control_and_neutral_company_take_any_optimizer():
    for optimizer in (sgd(clipnorm=0.5), loss_scaled()):
        model = trainstep.apply(dense(), "standard")
        model.compile(optimizer, "mse")
        assert np.isfinite(model.fit(X, Y, verbose=0).history["loss"]).all()


# --- Definitions ------------------------------------------------------------------------------------------------------


def test_a_strategy_without_a_declaration():
    with pytest.raises(errors.StrategyDefinitionError, match="Bare must have a class attribute `declaration"):

        class Bare(trainstep.Strategy):
            pass


@pytest.mark.parametrize("owned", OWNED_BY_THE_ROOT)
def test_a_strategy_that_takes_what_belongs_to_the_root(owned):
    with pytest.raises(errors.StrategyDefinitionError, match=f"Greedy defines '{owned}'.*transform_batch, train_batch"):
        type("Greedy", (trainstep.Strategy,), {"declaration": declared("greedy"), owned: lambda self: None})


def test_a_misspelt_hook_is_no_hook():
    with pytest.raises(
        errors.StrategyDefinitionError,
        match=r"Slip defines `update_weight`.*no such hook\. Did you mean 'update_weights'",
    ):
        type(
            "Slip", (trainstep.Strategy,), {"declaration": declared("slip"), "update_weight": lambda self, update: None}
        )


def test_a_declaration_that_does_not_hold_is_refused():
    with pytest.raises(errors.StrategyDefinitionError, match=r"in lower case.* not 'bad two\+'"):
        declared("bad two+")
    with pytest.raises(errors.StrategyDefinitionError, match=r"The stage of 'late' is 5, .*Stage: SEL"):
        trainstep.Declaration("late", 5, "", "", neutral={})
    with pytest.raises(errors.InvalidOptionsError, match="odd: unknown option 'nope'"):
        declared("odd", neutral={"nope": 1})


def test_a_misspelt_declaration_is_refused():
    def made(hook, **given):
        members = {"declaration": declared("slip", **given), "update_weights": hook}
        type("Model", (type("Slip", (trainstep.Strategy,), members), keras.Model), {})

    def hook(self, update):
        pass

    with pytest.raises(errors.StrategyDefinitionError, match=r"no such hook\. Did you mean 'update_weights'"):
        made(hook, passes_through=lambda options: ("update_weight",))
    with pytest.raises(errors.StrategyDefinitionError, match=r"which no optimizer has\. Did you mean 'clipnorm'"):
        made(hook, replaces={"clip_norm": "drop it"})


def test_a_report_is_over_something_known():
    with pytest.raises(errors.StrategyDefinitionError, match="'mean', 'sum' or 'last', not 'median'"):
        trainstep.Report(over="median")


def test_a_slot_of_each_weight_starts_at_zeros():
    with pytest.raises(errors.StrategyDefinitionError, match=r"starts at zeros, not at 1\.0"):
        trainstep.Slot(initial=1.0, per_weight=True)


@pytest.mark.parametrize("name", ["micro_batches", "gradient_accumulation"])
def test_a_loss_that_is_a_sum_is_no_mean_over_parts(name):
    model = trainstep.apply(dense(), name)
    model.compile("sgd", keras.losses.MeanSquaredError(reduction="sum"))
    with pytest.raises(errors.ModelConflictError, match=f"{name} takes the mean .* and the loss is a sum"):
        model.fit(X, Y, verbose=0)


def test_a_strategy_silent_about_neutral_options():
    with pytest.raises(errors.StrategyDefinitionError, match="Silent declares no `neutral` options"):
        type("Silent", (trainstep.Strategy,), {"declaration": declared("silent", neutral=None)})


def test_only_strategies_are_registered():
    for wrong in (3, keras.Model, trainstep.Strategy, trainstep.strategies.Standard.declaration):
        with pytest.raises(errors.StrategyDefinitionError, match=r"Only a subclass of trainstep.Strategy"):
            trainstep.register(wrong)


def test_a_name_that_is_taken():
    Other = type("Other", (trainstep.Strategy,), {"declaration": declared("standard")})  # noqa: N806
    with pytest.raises(
        errors.DuplicateStrategyError, match=r"'standard' of .*Other is taken by trainstep.strategies.standard.Standard"
    ):
        trainstep.register(Other)
    assert trainstep.get("standard") is trainstep.strategies.Standard


def test_bases_in_the_wrong_order():
    with pytest.raises(
        errors.StrategyDefinitionError, match=r"must be \(GradientAccumulation, GradientClipping, \.\.\., keras.Model\)"
    ):

        class Net(trainstep.strategies.GradientClipping, trainstep.strategies.GradientAccumulation, keras.Model):
            pass


def test_the_model_before_its_strategies():
    with pytest.raises(errors.StrategyDefinitionError, match=r"must be \(Standard, \.\.\., keras.Model\)"):

        class Net(keras.Model, trainstep.strategies.Standard):
            pass


def test_options_for_a_strategy_not_among_the_bases():
    with pytest.raises(
        errors.StrategyDefinitionError, match=r"names \['gradient_clipping'\], not among its bases: \['standard'\]"
    ):

        class Net(trainstep.strategies.Standard, keras.Model):
            strategy_options = {"gradient_clipping": {}}  # noqa: RUF012


def test_wrong_options_on_a_class():
    with pytest.raises(errors.InvalidOptionsError, match="gradient_clipping: clipnorm: "):

        class Net(trainstep.strategies.GradientClipping, keras.Model):
            strategy_options = {"gradient_clipping": {"clipnorm": -1.0}}  # noqa: RUF012


def test_strategies_that_exclude_each_other():
    One = type("One", (trainstep.Strategy,), {"declaration": declared("one", conflicts={"two": "both want the same."})})  # noqa: N806
    Two = type("Two", (trainstep.Strategy,), {"declaration": declared("two")})  # noqa: N806
    with registered(One, Two):
        with pytest.raises(
            errors.StrategyConflictError, match=r"'one' and 'two' cannot be combined: both want the same."
        ):
            trainstep.plan(["two", "one"])
        with pytest.raises(errors.StrategyConflictError):

            class Net(One, Two, keras.Model):
                pass


# --- While training ---------------------------------------------------------------------------------------------------


def test_a_model_without_a_loss():
    model = trainstep.apply(one_weight(), "standard")
    model.compile(sgd())
    with pytest.raises(ValueError, match="loss"):
        model.fit(X[:, :1], Y, verbose=0)


def test_fit_before_compile():
    model = trainstep.apply(one_weight(), "gradient_accumulation")
    with pytest.raises((RuntimeError, ValueError), match="compile"):
        model.fit(X[:, :1], Y, verbose=0)


def test_the_seam_knows_which_keras_this_is():
    assert ("gradient_accumulation_steps" in inspect.signature(keras.optimizers.SGD).parameters) == KERAS_3


@pytest.mark.parametrize("path", ["model", "model.h5", "model.weights.h5", pathlib.Path("model.hdf5")])
def test_a_format_that_loses_strategies_is_refused(path, tmp_path):
    model = trainstep.apply(dense(), "gradient_clipping")
    with pytest.raises(errors.SavingError, match=r"ends in '\.keras', not to .*model"):
        model.save(tmp_path / path)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(KERAS_3, reason="Keras 3 refuses it when the callback is made")
def test_a_checkpoint_in_such_a_format_is_refused_before_any_training(tmp_path):
    model = trainstep.apply(dense(), "standard")
    model.compile(sgd(), "mse")
    weights = model.get_weights()
    checkpoint = keras.callbacks.ModelCheckpoint(str(tmp_path / "folder"))
    with pytest.raises(errors.SavingError, match="folder"):
        model.fit(X, Y, callbacks=[checkpoint], verbose=0)
    np.testing.assert_array_equal(model.get_weights()[0], weights[0])
    model.fit(
        X, Y, callbacks=[keras.callbacks.ModelCheckpoint(tmp_path / "weights", save_weights_only=True)], verbose=0
    )


@pytest.mark.parametrize("attribute", ["loss_scale", "update_weights", "strategy_options"])
def test_an_attribute_that_hides_a_hook_is_refused(attribute):
    model = dense()
    setattr(model, attribute, 0.5)
    with pytest.raises(errors.ModelConflictError, match=f"attribute `{attribute}`.* Rename it"):
        trainstep.apply(model, "standard")
    assert trainstep.applied(model) == {}
    model = trainstep.apply(dense(), "standard")
    model.finish_epoch = 0.5
    with pytest.raises(errors.ModelConflictError, match="attribute `finish_epoch`"):
        model.compile(sgd(), "mse")


def test_a_train_step_put_on_the_model_itself_is_refused():
    model = dense()
    model.train_step = lambda data: {}
    with pytest.raises(errors.ModelConflictError, match=r"An attribute of the model .* overrides `train_step`"):
        trainstep.apply(model, "standard")


def test_an_optimizer_given_as_a_config_is_checked_before_the_model_is_compiled():
    model = trainstep.apply(dense(), "gradient_clipping")
    with pytest.raises(errors.OptimizerConflictError, match=r"clipnorm=1\.0"):
        model.compile(keras.optimizers.serialize(sgd(clipnorm=1.0)), "mse")
    assert getattr(model, "optimizer", None) is None
    if KERAS_3:  # Keras 2 takes a dict for a structure of optimizers, and refuses it.
        model.compile(keras.optimizers.serialize(sgd()), "mse")
        assert np.isfinite(model.fit(X, Y, verbose=0).history["loss"]).all()
