"""Metrics: each under its name, whatever Keras calls it and in whatever order it logs; of several outputs by name."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from numpy.testing import assert_allclose

import trainstep
from trainstep.benchmarks import records, request
from trainstep.benchmarks.errors import InvalidComparisonError, InvalidDataError, InvalidModelError
from trainstep.benchmarks.metrics import Metrics, by_output

layers = keras.layers
VERSIONS = dict.fromkeys(records.VERSIONS, "1")
CROSS = "sparse_categorical_crossentropy"
generator = np.random.default_rng(0)
X = generator.normal(size=(24, 4)).astype("float32")
Y = {"left": (X[:, 0] > 0).astype("int64"), "right": (X[:, 1:3].sum(axis=1) > 0).astype("int64")}

MIXED = {"left": Y["left"], "right": np.eye(2, dtype="float32")[Y["right"]]}


def build(seed=0):
    return trainstep.models.build("mlp", input_shape=(4,), classes={"left": 2, "right": 2}, units=(5,), seed=seed)


def in_a_list():
    x = layers.Input((4,))
    return keras.Model(x, [layers.Dense(2, "softmax", name=name)(x) for name in ("right", "left")])


def with_keys():
    """Return a model whose outputs have keys that are not the names of their layers, and another order than these."""
    x = layers.Input((4,))
    return keras.Model(
        x, {"left": layers.Dense(2, "softmax", name="z")(x), "right": layers.Dense(2, "softmax", name="a")(x)}
    )


def logistic():
    return keras.Sequential([layers.Input((4,)), layers.Dense(1, "sigmoid", kernel_initializer="ones")])


class Own(keras.Model):
    """Subclassed: what its outputs are called is known when it is called."""

    def __init__(self):
        super().__init__()
        self.left, self.right = layers.Dense(2, "softmax"), layers.Dense(2, "softmax")

    def call(self, x):
        return {"left": self.left(x), "right": self.right(x)}


class OwnList(Own):
    def call(self, x):
        return [self.left(x), self.right(x)]


def mixed():
    x = layers.Input((4,))
    number = layers.Dense(1, kernel_initializer=keras.initializers.Constant(-9.0), name="right")(layers.ReLU()(x))
    return keras.Model(x, {"left": layers.Dense(2, "softmax", name="left")(x), "right": number})


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


@pytest.mark.parametrize("model", [build, in_a_list, with_keys])
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


@pytest.mark.parametrize("kind", [list, tuple])
def test_labels_may_be_in_the_order_of_the_outputs(kind):
    data = (X, kind([Y["right"], Y["left"]]))
    by_name = compared(model=lambda: seeded(in_a_list), metrics="right:accuracy")
    in_order = compared(model=lambda: seeded(in_a_list), train=data, validation=data, metrics="right:accuracy")
    assert in_order.epochs[-1].metrics == by_name.epochs[-1].metrics


def seeded(make):
    keras.utils.set_random_seed(0)
    return make()


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
        ({"metrics": [":accuracy"]}, InvalidComparisonError, "is OUTPUT:METRIC, not ':accuracy'"),
        ({"loss": {}}, InvalidComparisonError, "`loss` by output is empty"),
        ({"loss": {"left": ["mse", "mae"]}}, InvalidComparisonError, r"`loss` is a name, .*, not \['mse', 'mae'\]"),
        (
            {"loss": {"lfet": "mse", "right": "mse"}},
            InvalidComparisonError,
            "There is no output 'lfet' for the loss. Did you mean 'left'.*Outputs: left, right",
        ),
        (
            {"loss": {"right": CROSS}},
            InvalidComparisonError,
            "The output 'left' has no loss; given is that of right. Give None",
        ),
        ({"metrics": ["left:acuracy"]}, InvalidComparisonError, "Unknown metric 'acuracy'. Did you mean 'accuracy'"),
        ({"metrics": ["left:mae", "left:mae"]}, InvalidComparisonError, "Two metrics have one name: left:mae, left"),
        (
            {"validation": (X, {**Y, "right": Y["right"] + 1})},
            InvalidDataError,
            "labels of `validation`, output 'right' are 1, 2, and the model's last axis has 2 scores",
        ),
        (
            {"model": OwnList, "train": (X, (Y["left"], Y["right"])), "metrics": ["accuracy", "left:accuracy"]},
            InvalidComparisonError,
            "What the outputs of the model .* are called cannot be told: it is to return them in a dict",
        ),
        (
            {"train": (X, {"left": Y["left"], "rihgt": Y["right"]})},
            InvalidComparisonError,
            "no output 'rihgt' for the labels of `train`. Did you mean 'right'",
        ),
        (
            {"train": (X, {"left": Y["left"]})},
            InvalidComparisonError,
            "The output 'right' has no labels of `train`; given is that of left",
        ),
        ({"train": (X, Y["left"])}, InvalidComparisonError, "`train` are one array, and the model has 2 outputs"),
        (
            {"train": (X, Y, {"lfet": np.ones(24)})},
            InvalidComparisonError,
            "no output 'lfet' for the sample weights of `train`. Did you mean 'left'",
        ),
        ({"loss": [CROSS]}, InvalidComparisonError, "has 2 outputs, and the loss in their order 1 parts"),
        ({"loss": {"left": None, "right": None}}, InvalidComparisonError, "No output has a loss"),
        (
            {"model": mixed, "train": (X, MIXED), "validation": (X, MIXED)},
            InvalidModelError,
            "takes probabilities, and of `train`, output 'right' the model returns scores as low as",
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


def test_a_subclassed_model_has_the_names_it_returns_its_outputs_by():
    values = compared(model=Own, metrics=["accuracy", "right:accuracy", "left:accuracy"]).epochs[-1].metrics
    assert_allclose(values["accuracy"], (values["right:accuracy"] + values["left:accuracy"]) / 2, rtol=1e-12)


def test_a_loss_of_the_models_own_may_take_other_labels():
    class Hinted(keras.Model):
        """Trained on labels of which one is of no output."""

        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, **more):
            labels = {side: y[side] for side in y_pred}
            hint = tf.reduce_mean(tf.square(y["hint"] - y_pred["left"]))
            return hint + super().compute_loss(x, labels, y_pred, sample_weight, **more)

        def compute_metrics(self, x, y, y_pred, sample_weight=None):
            return super().compute_metrics(x, {side: y[side] for side in y_pred}, y_pred, sample_weight)

    def hinted():
        plain = build()
        return Hinted(plain.input, plain.output)

    data = (X, {**Y, "hint": np.eye(2, dtype="float32")[Y["left"]]})
    assert compared(model=hinted, train=data, validation=data).epochs[-1].loss > 0


def test_what_is_no_name_counts_by_its_options_or_its_code():
    def key(**changes):
        suite = request.suite_of(model=build, train=(X, Y), validation=(X, Y), strategies=["standard"], **changes)
        [settings] = suite.settings.values()
        return settings.objects, records.key_of("run", {}, settings, VERSIONS)

    def scaled(factor):
        return lambda y, y_pred: factor * keras.losses.mean_squared_error(y, y_pred)

    assert key(loss="huber")[0] == key(metric="AUC")[0] == {}
    for one, other in (
        ({"loss": keras.losses.Huber(0.1)}, {"loss": keras.losses.Huber(0.2)}),
        ({"loss": scaled(1.0)}, {"loss": scaled(2.0)}),
        ({"loss": {"left": "mse", "right": scaled(1.0)}}, {"loss": {"left": "mse", "right": scaled(2.0)}}),
        ({"metric": keras.metrics.AUC(curve="ROC", name="auc")}, {"metric": keras.metrics.AUC(curve="PR", name="auc")}),
    ):
        assert key(**one)[1] == key(**one)[1] != key(**other)[1]
    assert key(loss=scaled(1.0))[1] == key(loss=scaled(1.0))[1]  # At another place in memory it is the same.


def test_functions_make_a_metric_for_each_output():
    """Which Keras counts, auc_1 and so on; what they are called here has no number, however many there were."""
    metrics = Metrics.of(by_output([keras.metrics.AUC, "mse"]))
    assert metrics.names == Metrics.of(by_output([keras.metrics.AUC, "mse"])).names == ("auc", "mse")
    made = Metrics.of(by_output(keras.metrics.AUC)).made(build(), lambda: X)
    assert [len(metrics) for metrics in made.compiled.values()] == [1, 1]
    one, other = (metrics[0] for metrics in made.compiled.values())
    assert one is not other
    (logged,) = made.logged.values()
    assert logged == (f"left_{one.name}", f"right_{other.name}")
    assert made.values({logged[0]: 0.5, logged[1]: 1.0}) == {"auc": 0.75}


def test_two_metrics_of_one_output_are_one_where_they_are_alike_and_refused_where_not():
    accuracy, loss = (f"SparseCategorical{kind}" for kind in ("Accuracy", "Crossentropy"))

    def made(*names):
        of_all, of_left = (getattr(keras.metrics, name)(name="score") for name in names)
        return Metrics.of([(None, of_all), ("left", of_left)]).made(build(), lambda: X)

    assert [len(metrics) for metrics in made(accuracy, accuracy).compiled.values()] == [1, 1]
    with pytest.raises(InvalidComparisonError, match=r"log two things as 'left_score'.* 'score' of the output 'left'"):
        made(accuracy, loss)


def test_what_keras_would_log_under_one_name_is_refused():
    x = layers.Input((4,))
    model = keras.Model(x, {name: layers.Dense(2, "softmax", name=name)(x) for name in ("a", "a_b")})
    one, other = (keras.metrics.SparseCategoricalAccuracy(name=name) for name in ("b_score", "score"))
    with pytest.raises(InvalidComparisonError, match="log two things as 'a_b_score'"):
        Metrics.of([("a", one), ("a_b", other)]).made(model, lambda: X)
    with pytest.raises(InvalidComparisonError, match="log two things as 'left_loss', of which one is"):
        Metrics.of([("left", keras.metrics.Mean(name="loss"))]).made(build(), lambda: X)


def test_what_keras_did_not_log_is_said():
    made = Metrics.of(by_output(["accuracy", "mse"])).made(build(), lambda: X)
    with pytest.raises(InvalidComparisonError, match="logs no left_mse, right_mse, but left_accuracy, right_accuracy"):
        made.values({"left_accuracy": 1.0, "right_accuracy": 1.0})


@pytest.mark.parametrize("name", ["Accuracy", "accuracy"])
def test_accuracy_is_chosen_by_shape_however_it_is_written(name):
    run = compared(
        model=logistic, train=(X, Y["left"]), validation=(X, Y["left"]), loss="binary_crossentropy", metric=name
    )
    assert 0 < run.epochs[-1].metrics[name] < 1  # Of equal scores and labels there would be none.
