"""Label smoothing trains a classifier for labels that leave some probability to every class."""

from dataclasses import replace

import keras
import numpy as np
import pytest
import tensorflow as tf
from nets import (
    BATCH,
    MULTI,
    ONE_HOT,
    Task,
    Workload,
    dense,
    functional,
    masked,
    one_weight,
    sgd,
    tokens,
    weight_of,
    workload_for,
)
from runs import assert_same, prepared, run

import trainstep
from trainstep import errors
from trainstep.strategies.label_smoothing import smoothed

CLASSES = Task(classes=True)
WEIGHTS = np.linspace(0, 2, len(CLASSES.x)).astype("float32")
losses = keras.losses


def sigmoid(z: float) -> float:
    return 1 / (1 + np.exp(-z))


def test_a_smoothed_label_by_hand():
    # K = 3, smoothing = 0.3: 0.7 * 1 + 0.1 for the class itself, 0.1 for the others.
    np.testing.assert_allclose(smoothed(tf.constant([0.0, 1.0, 0.0]), 0.3, 3), [0.1, 0.8, 0.1], rtol=1e-6)


def test_one_weight_by_hand():
    # p = s(w x), two classes: y = 1 becomes y' = 0.8 + 0.2 / 2 = 0.9; dL/dw = (p - y') x with w = 1, x = 2.
    model = trainstep.apply(one_weight(1.0), "label_smoothing", smoothing=0.2)
    model.compile(sgd(0.1), losses.BinaryCrossentropy(from_logits=True))
    model.train_on_batch(np.full((1, 1), 2.0), np.ones((1, 1)))
    assert weight_of(model) == pytest.approx(1 - 0.1 * 2 * (sigmoid(2.0) - 0.9), rel=1e-5)


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["", "sample weights"])
@pytest.mark.parametrize(
    ("loss", "labels"),
    [
        (losses.CategoricalCrossentropy, ONE_HOT),
        (losses.BinaryCrossentropy, ONE_HOT),
        (losses.CategoricalFocalCrossentropy, ONE_HOT),
        (losses.BinaryFocalCrossentropy, ONE_HOT),
    ],
    ids=lambda value: getattr(value, "__name__", "labels"),
)
def test_it_is_what_keras_does_where_the_loss_can_smooth(loss, labels, weights, assert_close):
    """On a net with a regularizer, which counts once, dropout and batch norm; the logged loss is the same as well."""
    fit = {} if weights is None else {"sample_weight": weights}

    def workload(**settings):
        return workload_for(functional, CLASSES, fit, loss=loss(**settings))

    assert_close(list(run(workload(), "label_smoothing")), list(run(workload(label_smoothing=0.1), "standard")))


@pytest.mark.parametrize("from_logits", [False, True])
def test_class_numbers_are_one_hot_labels(from_logits, assert_close):
    def build(task):
        model = functional(task)
        if from_logits:
            model.layers[-1].activation = keras.activations.linear
        return model

    def left(loss, labels):
        workload = workload_for(build, CLASSES, {"sample_weight": WEIGHTS}, loss=loss(from_logits=from_logits))
        return list(run(replace(workload, y=labels), "label_smoothing"))

    numbers = ONE_HOT.argmax(axis=-1)
    expected = left(losses.CategoricalCrossentropy, ONE_HOT)
    assert_close(left(losses.SparseCategoricalCrossentropy, numbers), expected)
    assert_close(left(losses.SparseCategoricalCrossentropy, numbers[:, None]), expected)


def test_masked_entries_count_for_nothing(assert_close):
    x = tokens(20)

    def left(spec, loss, labels):
        return run(Workload(masked, x, labels, lambda: {"optimizer": sgd(), "loss": loss}), spec).variables

    assert_close(
        left("label_smoothing", losses.SparseCategoricalCrossentropy(from_logits=True), x % 3),
        left(
            "standard",
            losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1),
            np.eye(3, dtype="float32")[x % 3],
        ),
    )


def test_each_output_of_classes_is_smoothed_by_its_loss_weight_and_no_other(assert_close):
    def compile(smoothing: float) -> dict:
        cross_entropy = losses.CategoricalCrossentropy(from_logits=True, label_smoothing=smoothing)
        return MULTI.compile() | {"loss": {"value": "mse", "kind": cross_entropy}, "metrics": None}

    y = MULTI.y | {"kind": ONE_HOT}
    ours = run(Workload(MULTI.build, MULTI.x, y, lambda: compile(0.0)), "label_smoothing")
    expected = run(Workload(MULTI.build, MULTI.x, y, lambda: compile(0.1)), "standard")
    assert_close(ours.variables, expected.variables)
    assert_close(ours.history["loss"], expected.history["loss"])


def test_the_loss_is_the_papers_mixture_of_two_cross_entropies(assert_close):
    """Section 7: (1 - smoothing) * H(q, p) + smoothing * H(u, p), q the labels and u the uniform distribution."""
    model = trainstep.apply(dense(CLASSES), "label_smoothing", smoothing=0.3)
    model.compile(sgd(), "categorical_crossentropy")
    p = model.predict(CLASSES.x, verbose=0)
    loss = model.train_on_batch(CLASSES.x, CLASSES.y)
    h_q, h_u = -(CLASSES.y * np.log(p)).sum(axis=-1).mean(), -np.log(p).mean()
    assert_close(np.float32(loss), np.float32(0.7 * h_q + 0.3 * h_u))


def test_metrics_are_those_of_the_labels_as_they_are(assert_close):
    model = trainstep.apply(dense(CLASSES), "label_smoothing", smoothing=0.5)
    model.compile(sgd(0.0), "categorical_crossentropy", metrics=["categorical_crossentropy"])
    history = model.fit(CLASSES.x, CLASSES.y, batch_size=BATCH, verbose=0).history
    smooth, plain = history["loss"][0], history["categorical_crossentropy"][0]
    assert_close(plain, model.evaluate(CLASSES.x, CLASSES.y, verbose=0)[1])
    assert abs(smooth - plain) > 0.005


def test_a_schedule_moves_with_the_updates(assert_close):
    # From 0 to 0.4 over two updates: 0, 0.2, 0.4, ...
    schedule = {"start": 0.0, "end": 0.4, "updates": 2}
    model = prepared(workload_for(dense, CLASSES), "label_smoothing", {"smoothing": schedule})
    twin = prepared(workload_for(dense, CLASSES))
    for smoothing in (0.0, 0.2, 0.4, 0.4):
        twin.compile(sgd(), losses.CategoricalCrossentropy(label_smoothing=smoothing))
        for each in (model, twin):
            each.train_on_batch(CLASSES.x[:4], CLASSES.y[:4])
        assert_close(model.get_weights(), twin.get_weights())


def test_a_loss_that_smooths_already_is_refused():
    workload = workload_for(dense, CLASSES, loss=losses.CategoricalCrossentropy(label_smoothing=0.1))
    with pytest.raises(errors.ModelConflictError, match=r"has label_smoothing=0.1.*would be done twice"):
        run(workload, "label_smoothing")


def test_a_model_that_predicts_no_classes_is_refused_unless_nothing_is_asked_of_it():
    with pytest.raises(errors.ModelConflictError, match=r"label_smoothing needs an output of classes"):
        run(workload_for(dense), "label_smoothing")
    assert_same(run(workload_for(dense), "label_smoothing", {"smoothing": 0.0}), run(workload_for(dense)))
