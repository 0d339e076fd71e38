"""The confidence penalty rewards a classifier for the entropy of what it predicts."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from nets import BATCH, Task, TimesWeight, Workload, dense, functional, one_weight, sgd, weight_of, workload_for
from runs import prepared, run

import trainstep
from trainstep import _seam

CLASSES = Task(classes=True)


def sigmoid(z: float) -> float:
    return 1 / (1 + np.exp(-z))


def test_one_weight_by_hand():
    # p = s(w x), two classes; dH/dw = -x w x p (1 - p), for dH/dz = -z p (1 - p); dL/dw = (p - y) x.
    # w = 1, x = 2, y = 1: p = s(2); the gradient is 2 (p - 1) + 0.5 * 2 * 2 p (1 - p).
    model = trainstep.apply(one_weight(1.0), "confidence_penalty", beta=0.5)
    model.compile(sgd(0.1), keras.losses.BinaryCrossentropy(from_logits=True))
    model.train_on_batch(np.full((1, 1), 2.0), np.ones((1, 1)))
    p = sigmoid(2.0)
    gradient = 2 * (p - 1) + 0.5 * 2 * 2 * p * (1 - p)
    assert weight_of(model) == pytest.approx(1 - 0.1 * gradient, rel=1e-5)


def loop(beta: float, weights: np.ndarray) -> list[np.ndarray]:
    """Return the weights that equation 3 of the paper, written down with a GradientTape, leaves."""
    keras.utils.set_random_seed(0)
    model = dense(CLASSES)
    for start in range(0, len(CLASSES.x), BATCH):
        x, y, w = (values[start : start + BATCH] for values in (CLASSES.x, CLASSES.y, weights))
        with tf.GradientTape() as tape:
            p = model(x)
            losses = -tf.reduce_sum(y * tf.math.log(p), axis=-1) + beta * tf.reduce_sum(p * tf.math.log(p), axis=-1)
            loss = tf.reduce_sum(w * losses) / len(x)
        gradients = tape.gradient(loss, model.trainable_variables)
        model.set_weights([w - 0.1 * g.numpy() for w, g in zip(model.get_weights(), gradients, strict=True)])
    return model.get_weights()


def test_it_is_an_own_loop_with_the_formula_sample_weights_and_all(assert_close):
    weights = np.linspace(0, 2, len(CLASSES.x)).astype("float32")
    ours = run(
        workload_for(dense, CLASSES, fit={"sample_weight": weights}), "confidence_penalty", {"beta": 0.5},
        fit={"epochs": 1},
    )  # fmt: skip
    assert_close(ours.variables, loop(0.5, weights))


def test_a_schedule_moves_with_the_updates_and_traces_once(assert_close):
    # From 0 to 1 over two updates: beta is 0, 0.5, 1, 1, ...
    schedule = {"start": 0.0, "end": 1.0, "updates": 2}
    model = prepared(workload_for(dense, CLASSES), "confidence_penalty", {"beta": schedule})
    twin = prepared(workload_for(dense, CLASSES), "confidence_penalty", {"beta": 0.0})
    for beta in (0.0, 0.5, 1.0, 1.0):
        model.train_on_batch(CLASSES.x[:4], CLASSES.y[:4])
        trainstep.remove(twin)
        trainstep.apply(twin, "confidence_penalty", beta=beta)
        twin.compile(sgd(), "categorical_crossentropy")
        twin.train_on_batch(CLASSES.x[:4], CLASSES.y[:4])
        assert_close(model.get_weights(), twin.get_weights())


@pytest.mark.parametrize("kind", ["sparse", "logits"])
def test_labels_and_predictions_may_be_written_in_other_ways(kind, assert_close):
    """Class numbers are one-hot labels; a softmax in the loss is one in the last layer."""
    expected = run(workload_for(functional, CLASSES), "confidence_penalty")
    labels = CLASSES.y if kind == "logits" else CLASSES.y.argmax(axis=-1)
    loss = (
        keras.losses.CategoricalCrossentropy(from_logits=True)
        if kind == "logits"
        else "sparse_categorical_crossentropy"
    )

    def build():
        model = functional(CLASSES)
        if kind == "logits":
            model.layers[-1].activation = keras.activations.linear
        return model

    written = Workload(build, CLASSES.x, labels, lambda: {"optimizer": sgd(), "loss": loss})
    assert_close(run(written, "confidence_penalty").variables, expected.variables)


def test_from_the_threshold_on_more_entropy_is_not_rewarded_by_hand():
    # Of p = s(z), z = w x: H = -p log p - (1 - p) log (1 - p), 0.69 at z = 0 and 0.09 at z = 4. With a threshold of 0.5
    # the first of x = 0.1, 4 has the reward 0.5, and no gradient; the second has all of it: dH/dw = -z x p (1 - p).
    model = trainstep.apply(one_weight(1.0), "confidence_penalty", beta=0.5, threshold=0.5)
    model.compile(sgd(0.1), keras.losses.BinaryCrossentropy(from_logits=True))
    loss = model.train_on_batch(np.array([[0.1], [4.0]]), np.ones((2, 1)))
    p, q = sigmoid(0.1), sigmoid(4.0)
    entropy = -q * np.log(q) - (1 - q) * np.log(1 - q)
    assert float(np.ravel(loss)[0]) == pytest.approx(-(np.log(p) + np.log(q)) / 2 - 0.5 * (0.5 + entropy) / 2, rel=1e-5)
    gradient = (0.1 * (p - 1) + 4 * (q - 1)) / 2 + 0.5 * 4 * 4 * q * (1 - q) / 2
    assert weight_of(model) == pytest.approx(1 - 0.1 * gradient, rel=1e-5)


def test_the_entropy_is_weighed_as_the_loss_of_its_output_is(assert_close):
    """Twice the loss, all of it, is twice the learning rate."""
    doubled = workload_for(dense, CLASSES, loss_weights=[2.0])
    faster = workload_for(dense, CLASSES, optimizer=lambda: sgd(0.2))
    assert_close(run(doubled, "confidence_penalty").variables, run(faster, "confidence_penalty").variables)


def test_of_several_units_it_is_the_mean_as_the_loss_is():
    """The same unit twice is trained as once."""
    left = []
    for units in (1, 2):
        x = keras.Input((1,))
        z = TimesWeight(1.0)(x)
        twice = keras.layers.Concatenate()([z, z]) if units == 2 else z
        model = trainstep.apply(keras.Model(x, twice), "confidence_penalty", beta=0.5)
        model.compile(sgd(0.1), keras.losses.BinaryCrossentropy(from_logits=True))
        model.train_on_batch(np.full((1, 1), 2.0), np.ones((1, units)))
        left.append(weight_of(model))
    assert left[1] == pytest.approx(left[0], rel=1e-6)


def test_a_weight_with_a_name_is_for_the_output_of_that_name():
    """Keras weighs an output that none is given for by one."""
    outputs = {"a": np.zeros((2, 3)), "b": np.zeros((2, 3))}
    weights = np.array([1.0, 2.0])
    for given, of in (({"b": weights}, outputs), ([None, weights], [outputs["a"], outputs["b"]])):
        first, second = _seam.for_each_output(None, given, of)
        assert first is None
        assert second is weights
    assert all(each is weights for each in _seam.for_each_output(None, weights, outputs))
