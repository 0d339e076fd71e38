"""What is asked for: checked before anything is read or built, and turned into tasks."""

import dataclasses
import sys

import cloudpickle
import keras
import numpy as np
import pytest
import tensorflow as tf

import trainstep
from trainstep import errors
from trainstep.benchmarks import errors as benchmark_errors
from trainstep.benchmarks import request, workload
from trainstep.benchmarks.attack import Attack
from trainstep.benchmarks.experiment import Experiment
from trainstep.benchmarks.records import Budget, Target
from trainstep.benchmarks.request import merged, suite_of

generator = np.random.default_rng(0)
X = generator.normal(size=(22, 4)).astype("float32")
Y = (X.sum(axis=1) > 0).astype("int64")
DATASET = tf.data.Dataset.from_tensor_slices((X, Y))


def build():
    return keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(2, "softmax")])


def never(*_):
    raise AssertionError("nothing may be built or read")


def own(**changes):
    """Return the suite of a user's own model."""
    given = {"strategies": ["standard"], "model": build, "train": (X, Y), "validation": (X[:10], Y[:10]), **changes}
    return suite_of(**given)


def task_of(**changes):
    [task] = own(**changes).tasks.values()
    return task


def blobs(**changes):
    suite = suite_of(**{"strategies": ["standard"], "workload": "blobs_mlp", **changes})
    [task] = suite.tasks.values()
    return task


def test_a_suite_of_a_workload_is_as_the_workload_has_it():
    suite = suite_of(strategies=["gradient_clipping"], workload="blobs_mlp")
    assert (list(suite.compositions), suite.control, suite.seeds) == (
        ["standard", "gradient_clipping"],
        "standard",
        (0, 1, 2, 3, 4),
    )
    settings = suite.settings["blobs_mlp"]
    assert settings == suite.tasks["blobs_mlp"].settings
    assert (settings.budget, settings.batch_size, settings.examples) == (Budget(epochs=8), 32, 512)
    assert (settings.optimizer["class"], settings.optimizer["learning_rate"]) == ("Adam", 0.005)
    assert settings.target == Target(metric="accuracy", value=0.85)
    assert (settings.metrics, settings.higher_is_better) == (("accuracy",), True)
    assert settings.attack == Attack(epsilon=0.5, norm="l2").model_dump(mode="json")


def test_the_settings_are_the_same_at_every_call():
    """They are part of the key of a run; and Keras numbers its optimizers."""
    assert blobs().settings == blobs().settings
    assert task_of().settings == task_of().settings


def test_several_workloads_and_noise():
    several = ["blobs_mlp", {"name": "blobs_mlp", "noise": 0.4}, workload.get("digits_mlp")]
    suite = suite_of(strategies=["standard"], workload=several)
    assert list(suite.tasks) == list(suite.settings) == ["blobs_mlp", "blobs_mlp noise=0.4", "digits_mlp"]
    assert suite.settings["blobs_mlp noise=0.4"].noise == 0.4
    assert suite.settings["blobs_mlp noise=0.4"].workload == "blobs_mlp"
    assert list(suite_of(strategies=["standard"], workload="blobs_mlp", noise=0.1).tasks) == ["blobs_mlp noise=0.1"]


@pytest.mark.parametrize(
    "spec",
    [
        "gradient_clipping + skip_nonfinite",
        ["skip_nonfinite", "gradient_clipping"],
        {"gradient_clipping": {}, "skip_nonfinite": {}},
    ],
)
def test_a_label_may_hold_a_combination(spec):
    names = [s.declaration.name for s in own(strategies={"both": spec}).compositions["both"]]
    assert sorted(names) == ["gradient_clipping", "skip_nonfinite"]


def test_a_grid_is_one_strategy_for_each_value():
    strategies = {"clipped": {"gradient_clipping": {"clipnorm": {"grid": [0.1, 1.0]}}}}
    assert list(own(strategies=strategies).compositions) == ["standard", "clipped clipnorm=0.1", "clipped clipnorm=1.0"]


def test_the_control_may_have_another_label():
    suite = own(strategies={"clipped": "gradient_clipping", "plain": "standard"})
    assert (suite.control, list(suite.compositions)) == ("plain", ["clipped", "plain"])


@pytest.mark.parametrize(
    ("given", "budget"),
    [
        ({}, {"epochs": 10}),
        ({"epochs": 3}, {"epochs": 3}),
        ({"updates": 7}, {"updates": 7}),
        ({"seconds": 0.5}, {"seconds": 0.5}),
    ],
)
def test_there_is_one_budget(given, budget):
    assert task_of(**given).settings.budget == Budget(**budget)


def test_own_data_are_read_when_they_are_needed():
    task = task_of(train=never, validation=None)
    with pytest.raises(benchmark_errors.InvalidDataError, match="nothing may be"):
        task.load()
    train, validation = task_of(train=lambda: ((X, Y), (X[:3], Y[:3])), validation=None).load()
    assert (len(train[0]), len(validation[0])) == (22, 3)


@pytest.mark.parametrize("returned", [(X, Y), [(X, Y), (X, Y)], X, ((X, Y), X)])
def test_a_function_of_data_that_returns_something_else_is_told_so(returned):
    with pytest.raises(benchmark_errors.InvalidDataError):
        task_of(train=lambda: returned, validation=None).load()


def test_a_dataset_has_its_own_batches_and_no_examples():
    settings = task_of(train=DATASET.batch(8), validation=DATASET.batch(8)).settings
    assert (settings.batch_size, settings.examples) == (None, None)


def test_noise_on_own_arrays_is_on_training_labels_only():
    task = task_of(noise=0.5)
    train, validation = task.load()
    assert (train[1] != Y).sum() == 11  # Half of 22, and with two classes each is the other one.
    np.testing.assert_array_equal(validation[1], Y[:10])
    assert task.settings.noise == 0.5


def test_a_task_of_a_workload_goes_to_another_process():
    task = cloudpickle.loads(cloudpickle.dumps(blobs(noise=0.2)))
    np.testing.assert_array_equal(task.load().train[1], workload.get("blobs_mlp", 0.2).read().train[1])
    assert len(task.build(0).get_weights()) == 4
    assert type(task.make_optimizer()).__name__ == "Adam"
    assert task.metrics.made(task.build(0), never).compiled == ["accuracy"]


def test_metrics_and_optimizers_are_new_each_time():
    task = task_of(
        metrics=["accuracy", keras.metrics.MeanSquaredError(name="mse")], optimizer=keras.optimizers.SGD(0.5)
    )
    assert task.settings.metrics == ("accuracy", "mse")
    assert task.metrics.example("mse") is not task.metrics.example("mse")
    assert task.make_optimizer() is not task.make_optimizer()
    assert task.settings.optimizer["learning_rate"] == 0.5


@pytest.mark.parametrize(
    ("metric", "higher"),
    [
        ("accuracy", True),
        ("mse", False),
        ("sparse_categorical_crossentropy", False),
        (lambda: keras.metrics.AUC(name="area"), True),
        (keras.metrics.FalseNegatives(name="missed"), False),
    ],
)
def test_whether_more_is_better_is_known_of_the_metrics_of_keras(metric, higher):
    assert task_of(metric=metric).settings.higher_is_better is higher


def test_of_others_it_must_be_said():
    def closeness(y, y_pred):
        return y_pred

    def metric():
        return keras.metrics.MeanMetricWrapper(closeness, name="closeness")

    with pytest.raises(benchmark_errors.InvalidComparisonError, match=r"'closeness' does not say.*higher_is_better"):
        task_of(metric=metric)
    assert task_of(metric=metric, higher_is_better=False).settings.higher_is_better is False


@pytest.mark.parametrize(
    ("given", "target"),
    [
        (None, None),
        (0.9, Target(metric="accuracy", value=0.9)),
        ({"accuracy": 0.9}, Target(metric="accuracy", value=0.9)),
        ("mse=0.1", Target(metric="mse", value=0.1, higher_is_better=False)),
        (Target(metric="mse", value=0.1), Target(metric="mse", value=0.1)),
    ],
)
def test_a_target_is_on_one_of_the_metrics(given, target):
    assert task_of(metrics=["accuracy", "mse"], target=given).settings.target == target


def test_the_target_of_a_workload_goes_with_its_metric():
    assert blobs(metrics=["mse"]).settings.target is None
    assert blobs(metrics=["mse", "accuracy"]).settings.target is not None


def test_an_attack_can_be_left_out():
    assert blobs(attack=False).settings.attack is None
    assert blobs(attack={"epsilon": 0.2}).settings.attack["epsilon"] == 0.2


def test_a_model_is_used_again_where_that_is_safe():
    assert blobs().reusable
    assert blobs(optimizer="sgd").reusable
    assert not blobs(optimizer=keras.optimizers.SGD).reusable
    assert not task_of().reusable


WRONG = [
    (errors.UnknownStrategyError, {"strategies": ["standrad"]}),
    (errors.InvalidOptionsError, {"strategies": {"a": {"gradient_clipping": {"norm": 1}}}}),
    (errors.InvalidSpecError, {"strategies": "standard"}),
    (errors.InvalidSpecError, {"strategies": {"gradient_clipping": {"clipvalue": 1.0}}}),
    (errors.InvalidSpecError, {"strategies": {"standard": "gradient_clipping"}}),
    (errors.InvalidSpecError, {"strategies": {"a": "gradient_clipping +"}}),
    (benchmark_errors.InvalidComparisonError, {"strategies": None}),
    (errors.InvalidOptionsError, {"attack": {"epsilon": -1.0}}),
    (errors.InvalidOptionsError, {"attack": {"epsilon": 0.1, "clip_range": [1.0, 0.0]}}),
    (errors.NotAModelError, {"model": 3}),
    (errors.NotAModelError, {"model": build()}),
    (benchmark_errors.InvalidComparisonError, {"seeds": 0}),
    (benchmark_errors.InvalidComparisonError, {"seeds": [1, 1]}),
    (benchmark_errors.InvalidComparisonError, {"seeds": True}),
    (benchmark_errors.InvalidComparisonError, {"epochs": 0}),
    (benchmark_errors.InvalidComparisonError, {"updates": 1.5}),
    (benchmark_errors.InvalidComparisonError, {"seconds": float("inf")}),
    (benchmark_errors.InvalidComparisonError, {"epochs": 1, "updates": 1}),
    (benchmark_errors.InvalidComparisonError, {"batch_size": 0}),
    (benchmark_errors.InvalidComparisonError, {"noise": 1.5}),
    (benchmark_errors.InvalidComparisonError, {"metric": "accuracy", "metrics": ["accuracy"]}),
    (benchmark_errors.InvalidComparisonError, {"metrics": []}),
    (benchmark_errors.InvalidComparisonError, {"metrics": ["accuracy", "accuracy"]}),
    (benchmark_errors.InvalidComparisonError, {"target": {"auc": 0.5}}),
    (benchmark_errors.InvalidComparisonError, {"optimizer": "adamm"}),
    (benchmark_errors.InvalidComparisonError, {"optimizer": {"name": "sgd", "momentun": 1}}),
    (benchmark_errors.InvalidComparisonError, {"optimizer": lambda: None, "learning_rate": 0.1}),
    (benchmark_errors.InvalidComparisonError, {"workload": "digits_cnn"}),
    (benchmark_errors.InvalidComparisonError, {"model": None}),
    (benchmark_errors.InvalidDataError, {"train": X}),
    (benchmark_errors.InvalidDataError, {"train": (X, Y[:3])}),
    (benchmark_errors.InvalidDataError, {"train": DATASET}),
    (benchmark_errors.InvalidDataError, {"train": DATASET.batch(4).repeat()}),
    (benchmark_errors.InvalidComparisonError, {"train": DATASET.batch(4), "noise": 0.1}),
    (benchmark_errors.UnknownWorkloadError, {"workload": "digts", "model": None, "train": None, "validation": None}),
]


@pytest.mark.parametrize(("error", "changes"), WRONG)
def test_a_wrong_request_is_refused_before_anything_is_built(error, changes):
    with pytest.raises(error):
        own(**{"model": never, **changes})


def test_a_conflict_of_two_strategies_is_told_before_anything_is_built(monkeypatch):
    declaration = trainstep.get("gradient_clipping").declaration
    monkeypatch.setattr(
        trainstep.get("gradient_clipping"),
        "declaration",
        dataclasses.replace(declaration, conflicts={"skip_nonfinite": "both want it."}),
    )
    with pytest.raises(errors.StrategyConflictError, match="both want it"):
        own(model=never, strategies={"a": "gradient_clipping + skip_nonfinite"})


def test_a_builder_that_returns_one_model_again_is_told_so():
    model = trainstep.apply(build(), "standard")
    with pytest.raises(errors.NotAModelError, match="a new, plain model for each run"):
        task_of(model=lambda: model).build(0)
    with pytest.raises(errors.NotAModelError, match=r"must return a keras\.Model, not int"):
        task_of(model=lambda: 3).build(0)


def test_a_builder_with_a_seed_gets_it():
    seen = []
    task = task_of(model=lambda seed: (seen.append(seed), build())[1])
    task.build(4)
    assert seen == [4]


# --- Experiments, and what overrides them ---------------------------------------------------------


def experiment(**changes):
    return Experiment(**{"workload": "blobs_mlp", "strategies": ["standard"], "epochs": 3, "workers": 2, **changes})


def test_an_experiment_says_what_and_how():
    wanted, running = merged(experiment(), {"seeds": None})
    assert running == {"workers": 2}
    assert (wanted["epochs"], wanted["strategies"]) == (3, {"standard": {"standard": {}}})
    assert suite_of(**wanted).settings["blobs_mlp"].budget == Budget(epochs=3)


def test_what_is_given_overrides_the_experiment():
    wanted, running = merged(experiment(), {"updates": 5, "workers": 1, "strategies": ["gradient_clipping"]})
    assert (wanted["updates"], "epochs" in wanted, running["workers"]) == (5, False, 1)
    assert wanted["strategies"] == ["gradient_clipping"]
    wanted, _ = merged(experiment(), {"model": build, "train": (X, Y), "validation": (X, Y)})
    assert list(suite_of(**wanted).tasks) == [request.OWN]
    assert suite_of(experiment=experiment(), seeds=2).seeds == (0, 1)


def test_an_experiment_names_functions_of_the_current_folder(tmp_path, monkeypatch):
    code = """
import numpy as np

def build(): raise RuntimeError
def load(): return (np.ones((4, 2)), np.arange(4)), (np.ones((4, 2)), np.arange(4))
"""
    (tmp_path / "my_own_model.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    wanted, _ = merged({"strategies": ["standard"], "model": "my_own_model:build", "data": "my_own_model:load"}, {})
    task = suite_of(**wanted).tasks[request.OWN]
    assert task.load().train[0].shape == (4, 2)
    for text, message in (
        ("my_own_model", "package.module:function"),
        ("nosuch_module:f", "cannot be imported: No module named"),
        ("my_own_model:biuld", "no function 'biuld' in my_own_model. Did you mean 'build'\\? Functions: build, load"),
    ):
        with pytest.raises(benchmark_errors.InvalidComparisonError, match=message):
            merged({"strategies": ["standard"], "model": text}, {})
