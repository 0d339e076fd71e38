"""Metrics: each under its name, whatever Keras calls it and in whatever order it logs; of several outputs by name."""

import keras
import numpy as np
import pytest
from numpy.testing import assert_allclose

import trainstep
from trainstep.benchmarks.errors import InvalidComparisonError, InvalidDataError, InvalidModelError
from trainstep.benchmarks.metrics import Metrics, by_output

layers = keras.layers
generator = np.random.default_rng(0)
X = generator.normal(size=(24, 4)).astype("float32")
Y = {"left": (X[:, 0] > 0).astype("int64"), "right": (X[:, 1:3].sum(axis=1) > 0).astype("int64")}

MIXED = {"left": Y["left"], "right": np.eye(2, dtype="float32")[Y["right"]]}


def build(seed=0):
    return trainstep.models.build("mlp", input_shape=(4,), classes={"left": 2, "right": 2}, units=(5,), seed=seed)


def in_a_list():
    x = layers.Input((4,))
    return keras.Model(x, [layers.Dense(2, "softmax", name=name)(x) for name in ("right", "left")])


class Own(keras.Model):
    """Subclassed: what its outputs are called is known when it is called."""

    def __init__(self):
        super().__init__()
        self.left, self.right = layers.Dense(2, "softmax"), layers.Dense(2, "softmax")

    def call(self, x):
        return {"left": self.left(x), "right": self.right(x)}


def compared(**changes):
    given = {
        "model": build,
        "train": (X, Y),
        "validation": (X, Y),
        "strategies": ["standard"],
        "seeds": 1,
        "epochs": 1,
        "workers": 1,
        "cost": False,
        "progress": False,
    }
    runs = trainstep.compare(**{**given, **changes}).runs
    assert [run.failure for run in runs] == [None] * len(runs)
    return runs[-1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("accuracy", [(None, "accuracy")]),
        (["accuracy", "left:mse"], [(None, "accuracy"), ("left", "mse")]),
        ({"left": "mse", "right": ["mse", "mae"]}, [("left", "mse"), ("right", "mse"), ("right", "mae")]),
        ("own>score", [(None, "own>score")]),
    ],
)
def test_a_metric_is_of_all_outputs_or_of_one(text, expected):
    assert by_output(text) == expected


def test_metrics_of_one_output_are_found_by_their_names():
    """Keras 3 logs in the order of the alphabet, Keras 2 in that of `compile`, and both have names of their own."""
    metrics = ["sparse_top_k_categorical_accuracy", "SparseCategoricalAccuracy", "accuracy"]
    y = Y["left"] + 2 * Y["right"]
    run = compared(
        model=lambda: trainstep.models.build("mlp", input_shape=(4,), classes=6, units=(), seed=0),
        train=(X, y),
        validation=(X, y),
        metrics=metrics,
    )
    values = run.epochs[-1].metrics
    assert list(values) == list(run.settings.metrics) == metrics
    # One of five of six classes is nearly always right, and the only one less often.
    assert values["accuracy"] == values["SparseCategoricalAccuracy"] < values["sparse_top_k_categorical_accuracy"]


@pytest.mark.parametrize("model", [build, in_a_list])
def test_of_several_outputs_a_metric_is_the_mean_and_one_by_its_name(model):
    run = compared(model=model, metrics=["accuracy", "right:accuracy", "left:accuracy"], strategies=["pcgrad"])
    values = run.epochs[-1].metrics
    assert list(values) == ["accuracy", "right:accuracy", "left:accuracy"]
    assert values["right:accuracy"] != values["left:accuracy"]  # Or which is which could not be told.
    assert_allclose(values["accuracy"], (values["right:accuracy"] + values["left:accuracy"]) / 2, rtol=1e-12)
    assert run.not_calibrated == "calibration needs one score for each class as the only output"


def test_each_output_has_the_metric_that_keras_computes_of_it():
    metrics = {"right": "accuracy", "left": ["sparse_categorical_crossentropy", "accuracy"]}
    run = compared(metrics=metrics, higher_is_better=True)
    assert run.settings.metrics == ("right:accuracy", "left:sparse_categorical_crossentropy", "left:accuracy")
    model = build(0)
    model.compile("adam", "sparse_categorical_crossentropy", metrics=metrics)
    # One batch is the whole of the data: the order is of no matter but for rounding.
    model.fit(X, Y, batch_size=24, verbose=0)
    expected = model.evaluate(X, Y, verbose=0, return_dict=True)
    for name, value in run.epochs[-1].metrics.items():
        assert_allclose(value, expected[name.replace(":", "_")], rtol=1e-5)


def test_a_target_and_a_loss_may_be_of_an_output():
    run = compared(
        metrics="left:accuracy",
        target={"left:accuracy": 0.01},
        train=(X, MIXED),
        validation=(X, MIXED),
        loss={"left": "sparse_categorical_crossentropy", "right": keras.losses.CategoricalCrossentropy(name="soft")},
    )
    assert run.settings.target.metric == "left:accuracy"
    assert run.settings.loss == {"left": "sparse_categorical_crossentropy", "right": "soft"}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"metrics": {"lfet": "accuracy"}}, InvalidComparisonError, r"output 'lfet'.*Did you mean 'left'.*left, right"),
        ({"metrics": ["left:acuracy"]}, InvalidComparisonError, "Unknown metric 'acuracy'. Did you mean 'accuracy'"),
        ({"metrics": ["left:mae", "left:mae"]}, InvalidComparisonError, "Two metrics have one name: left:mae, left"),
        (
            {"validation": (X, {**Y, "right": Y["right"] + 1})},
            InvalidDataError,
            "labels of `validation`, output 'right', are 1, 2, and the model's last axis has 2 scores",
        ),
        (
            {"model": Own, "metrics": ["accuracy", "left:accuracy"]},
            InvalidComparisonError,
            "What the outputs of the model .* are called cannot be told. Say of each metric",
        ),
        (
            {"train": (X, {"left": Y["left"], "rihgt": Y["right"]})},
            InvalidModelError,
            "do not fit: for a batch of `train` the model returns",
        ),
        (
            {"metrics": [lambda: keras.metrics.Mean(name="score"), keras.metrics.MeanSquaredError(name="score")]},
            InvalidComparisonError,
            "Two metrics have one name: score, score",
        ),
    ],
)
def test_what_does_not_go_with_the_outputs_is_refused(changes, error, message):
    with pytest.raises(error, match=message):
        compared(**changes)


def test_of_a_subclassed_model_each_metric_says_its_output():
    run = compared(model=Own, metrics={"right": "accuracy", "left": "accuracy"})
    assert list(run.epochs[-1].metrics) == ["right:accuracy", "left:accuracy"]


def test_functions_make_a_metric_for_each_output():
    """Which Keras counts, so that the second is called area_1 or so."""
    made = Metrics.of(by_output(keras.metrics.AUC)).made(build())
    assert [len(metrics) for metrics in made.compiled.values()] == [1, 1]
    one, other = (metrics[0] for metrics in made.compiled.values())
    assert one is not other
    (logged,) = made.logged.values()
    assert logged == (f"left_{one.name}", f"right_{other.name}")
    assert made.values({f"val_{logged[0]}": 0.5, f"val_{logged[1]}": 1.0}) == {next(iter(made.logged)): 0.75}


def test_two_metrics_of_one_output_are_one_where_they_are_alike_and_refused_where_not():
    accuracy, loss = (f"SparseCategorical{kind}" for kind in ("Accuracy", "Crossentropy"))

    def made(*names):
        of_all, of_left = (getattr(keras.metrics, name)(name="score") for name in names)
        return Metrics.of([(None, of_all), ("left", of_left)]).made(build())

    assert [len(metrics) for metrics in made(accuracy, accuracy).compiled.values()] == [1, 1]
    with pytest.raises(InvalidComparisonError, match="Two metrics of the output 'left' have one name: score"):
        made(accuracy, loss)


def test_what_keras_did_not_log_is_said():
    made = Metrics.of(by_output(["accuracy", "mse"])).made(build())
    with pytest.raises(InvalidComparisonError, match="was to log val_left_mse, val_right_mse, and logged val_left_acc"):
        made.values({"val_left_accuracy": 1.0, "val_right_accuracy": 1.0})
