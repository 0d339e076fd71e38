"""R-Drop: two passes of a batch, with different masks of dropout, are to predict the same."""

from typing import ClassVar

import keras
import numpy as np
import pytest
import tensorflow as tf
from nets import (
    BATCH,
    EXAMPLES,
    AddsLoss,
    Task,
    TimesWeight,
    Workload,
    masked,
    sgd,
    tokens,
    weight_of,
    workload_for,
)
from runs import run

import trainstep
from trainstep import _seam, errors
from trainstep._seam import KERAS_3

CLASSES = Task(classes=True)
TOKENS = tokens(EXAMPLES)
MASKS = np.random.default_rng(5).integers(0, 2, size=(2 * BATCH, 5)).astype("float32")


class GrowsAlongTheBatch(keras.layers.Layer):
    """Multiplies the first example by 1, the second by 2, and so on: so a copy is passed otherwise, as is known."""

    def call(self, x):
        return x * tf.reshape(1 + tf.range(tf.shape(x)[0], dtype=x.dtype), (-1, 1))


class Masked(keras.layers.Layer):
    """A dropout whose masks are known: those of the examples of both passes, one after the other."""

    def call(self, x):
        # Of a batch of n the first pass has the masks from 0 to n, the second those from BATCH to BATCH + n.
        count, masks = tf.shape(x)[0] // 2, tf.constant(MASKS)
        return x * tf.concat([masks[:count], masks[BATCH:][:count]], axis=0)


def sigmoid(z: float) -> float:
    return 1 / (1 + np.exp(-z))


def test_one_weight_by_hand():
    # The two passes see z1 = w and z2 = 2 w; p = s(z). With y = 1: dL/dw = 1/2 ((p1 - 1) + 2 (p2 - 1)).
    # Of two classes KL(p1 || p2) + KL(p2 || p1) = (p2 - p1) (z2 - z1) = (p2 - p1) w, whose derivative is
    # p2 - p1 + w (2 p2 (1 - p2) - p1 (1 - p1)).
    x = keras.Input((1,))
    model = trainstep.apply(keras.Model(x, GrowsAlongTheBatch()(TimesWeight(1.0)(x))), "r_drop", alpha=2.0)
    model.compile(sgd(0.1), keras.losses.BinaryCrossentropy(from_logits=True), metrics=["mae"])
    logs = model.train_on_batch(np.ones((1, 1)), np.ones((1, 1)), return_dict=True)
    p1, p2 = sigmoid(1.0), sigmoid(2.0)
    assert float(logs["mae"]) == 0  # Metrics are of the first pass: |1 - 1|. That of the second would be |1 - 2|.
    assert float(logs["loss"]) == pytest.approx(-(np.log(p1) + np.log(p2)) / 2 + 2 / 4 * (p2 - p1), rel=1e-5)
    gradient = ((p1 - 1) + 2 * (p2 - 1)) / 2 + 2 / 4 * (p2 - p1 + 2 * p2 * (1 - p2) - p1 * (1 - p1))
    assert weight_of(model) == pytest.approx(1 - 0.1 * gradient, rel=1e-5)


def with_known_masks(task: Task = CLASSES) -> keras.Model:
    return keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(5, "tanh"), Masked(), keras.layers.Dense(3, "softmax")]
    )


def loop(alpha: float, weights: np.ndarray) -> list[np.ndarray]:
    """Return the weights that equation 4 of the paper leaves, at half the learning rate."""
    keras.utils.set_random_seed(0)
    variables = [tf.Variable(weight) for weight in with_known_masks().get_weights()]
    kernel, bias, last_kernel, last_bias = variables
    for start in range(0, len(CLASSES.x), BATCH):
        x, y, w = (values[start : start + BATCH] for values in (CLASSES.x, CLASSES.y, weights))
        with tf.GradientTape() as tape:
            h = tf.tanh(x @ kernel + bias)
            p1, p2 = (
                tf.nn.softmax((h * masks[: len(x)]) @ last_kernel + last_bias)
                for masks in (MASKS[:BATCH], MASKS[BATCH:])
            )
            losses = -tf.reduce_sum(y * (tf.math.log(p1) + tf.math.log(p2)), axis=-1)
            both = tf.reduce_sum(p1 * tf.math.log(p1 / p2) + p2 * tf.math.log(p2 / p1), axis=-1)
            loss = tf.reduce_sum(w * (losses + alpha / 2 * both)) / len(x)
        for variable, gradient in zip(variables, tape.gradient(loss, variables), strict=True):
            variable.assign_sub(0.1 / 2 * gradient)
    return [variable.numpy() for variable in variables]


def test_it_is_an_own_loop_with_the_formula_sample_weights_and_all(assert_close):
    weights = np.linspace(0, 2, len(CLASSES.x)).astype("float32")
    workload = workload_for(with_known_masks, CLASSES, fit={"sample_weight": weights})
    assert_close(run(workload, "r_drop", {"alpha": 3.0}, fit={"epochs": 1}).variables, loop(3.0, weights))


def without_dropout(task: Task = CLASSES) -> keras.Model:
    """Return a net with everything that could count twice: a regularizer, `add_loss`, batch norm."""
    return keras.Sequential(
        [
            keras.Input(task.shape),
            *task.first_layers(kernel_regularizer=keras.regularizers.L2(0.01)),
            keras.layers.BatchNormalization(),
            AddsLoss(),
            *task.last_layers().values(),
        ]
    )


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "sum"])
def test_without_dropout_both_passes_agree_and_it_is_plain_keras(reduction, assert_close):
    """Regularizers, `add_loss`, batch-norm statistics and the loss of a batch, mean or sum, count once."""

    def workload() -> Workload:
        return workload_for(
            without_dropout, CLASSES, loss=keras.losses.CategoricalCrossentropy(reduction=reduction),
            optimizer=lambda: sgd(0.02),
        )  # fmt: skip

    ours, plain = run(workload(), "r_drop", {"alpha": 5.0}), run(workload())
    assert_close(ours.variables, plain.variables)
    assert_close(ours.history, plain.history)


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "sum"])
def test_a_mask_without_dropout_is_plain_keras(reduction, assert_close):
    one_hot = np.eye(3, dtype="float32")[TOKENS % 3]
    loss = keras.losses.CategoricalCrossentropy(from_logits=True, reduction=reduction)
    workload = Workload(masked, TOKENS, one_hot, lambda: {"optimizer": sgd(), "loss": loss})
    assert_close(run(workload, "r_drop").variables, run(workload).variables)


def test_the_divergence_is_weighed_as_the_loss_of_its_output_is(assert_close):
    """Twice the loss, all of it, is twice the learning rate."""
    doubled = workload_for(with_known_masks, CLASSES, loss_weights=[2.0])
    faster = workload_for(with_known_masks, CLASSES, optimizer=lambda: sgd(0.2))
    assert_close(run(doubled, "r_drop").variables, run(faster, "r_drop").variables)


def test_a_layer_that_keeps_a_state_for_each_example_is_refused():
    x = keras.Input(batch_shape=(BATCH, 6))
    h = keras.layers.LSTM(2, stateful=True, name="memory")(keras.layers.Reshape((6, 1))(x))
    model = trainstep.apply(keras.Model(x, keras.layers.Dense(3, "softmax")(h)), "r_drop")
    model.compile(sgd(), "categorical_crossentropy")
    with pytest.raises(errors.ModelConflictError, match="'memory' keeps a state for each example"):
        model.train_on_batch(CLASSES.x[:BATCH], CLASSES.y[:BATCH])


def test_a_model_that_was_made_for_batches_of_one_size_trains_on_any():
    x = keras.Input(batch_shape=(BATCH, 6))
    model = trainstep.apply(keras.Model(x, keras.layers.Dense(3, "softmax")(x)), "r_drop")
    model.compile(sgd(), "categorical_crossentropy")
    assert np.isfinite(model.fit(CLASSES.x, CLASSES.y, batch_size=BATCH, verbose=0).history["loss"]).all()


# --- What both passes have in common passes once ----------------------------------------------------------------------


class Counting(keras.layers.Dense):
    """Notes of how many examples the batches are that it sees."""

    seen: ClassVar[list[int | None]] = []

    def call(self, inputs):
        Counting.seen.append(inputs.shape[0])
        return super().call(inputs)


Counting.__module__ = keras.layers.Dense.__module__  # Layers of others may draw numbers by themselves.


def sequential(*layers) -> keras.Model:
    return keras.Sequential([keras.Input((6,)), *layers, keras.layers.Dense(3, "softmax")])


def late_dropout() -> keras.Model:
    return sequential(
        Counting(5), keras.layers.BatchNormalization(), Counting(4), keras.layers.Dropout(0.5), Counting(4)
    )


def around_dropout() -> keras.Model:
    """Return a net in which something goes past the dropout."""
    x = keras.Input((6,))
    before = Counting(4)(Counting(5)(x))
    after = Counting(4)(keras.layers.Dropout(0.5)(before))
    return keras.Model(x, keras.layers.Dense(3, "softmax")(keras.layers.Add()([before, after])))


def of_two_branches() -> keras.Model:
    """Return a net of which one branch draws, and the other begins at the input, too."""
    x = keras.Input((6,))
    drawn = Counting(4)(keras.layers.Dropout(0.5)(Counting(5)(x)))
    return keras.Model(x, keras.layers.Dense(3, "softmax")(keras.layers.Add()([drawn, Counting(4)(x)])))


class OwnNoise(keras.layers.Layer):
    """A layer of a user, which may do anything."""

    def call(self, inputs):
        return inputs


def of_own_layers() -> keras.Model:
    return sequential(Counting(5), OwnNoise(), Counting(4), keras.layers.Dropout(0.5))


def of_a_subclass() -> keras.Model:
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.first, self.drop, self.out = Counting(4), keras.layers.Dropout(0.5), keras.layers.Dense(3, "softmax")

        def call(self, x, training=None):
            return self.out(self.drop(self.first(x), training=training))

    return Net()


def of_an_inner_model() -> keras.Model:
    """Return a net whose first layers are a model of their own."""
    return sequential(sequential(Counting(5)), keras.layers.Dropout(0.5), Counting(4))


def of_arithmetic() -> keras.Model:
    """Return a net with operations that are no layers, of Keras 3 at least."""
    x = keras.Input((6,))
    h = Counting(4)(Counting(5)(x) * 2.0 + 1.0)
    return keras.Model(x, keras.layers.Dense(3, "softmax")(Counting(4)(keras.layers.Dropout(0.5)(h))))


def of_a_layer_used_before_and_after() -> keras.Model:
    layer, x = Counting(6), keras.Input((6,))
    return keras.Model(x, keras.layers.Dense(3, "softmax")(layer(keras.layers.Dropout(0.5)(layer(x)))))


@pytest.mark.parametrize(
    ("build", "seen"),
    [
        (late_dropout, [4, 4, 8]),
        (around_dropout, [4, 4, 8]),
        (of_two_branches, [8, 8, 8]),
        (of_an_inner_model, [4, 8]),
        (of_arithmetic, [4, 4, 8] if KERAS_3 else [4, 8, 8]),
        (of_a_layer_used_before_and_after, [8, 8]),
        (of_own_layers, [4, 8]),
        (of_a_subclass, [8]),
    ],
)
def test_what_comes_before_the_first_random_number_passes_once(build, seen):
    """Of a batch of four: only where nothing goes past the layer from which on it is repeated."""
    model = trainstep.apply(build(), "r_drop")
    model.compile(sgd(), "categorical_crossentropy", run_eagerly=True)
    model.predict(CLASSES.x[:BATCH], verbose=0)
    Counting.seen.clear()
    model.train_on_batch(CLASSES.x[:BATCH], CLASSES.y[:BATCH])
    assert sorted(Counting.seen) == seen


@pytest.mark.parametrize("build", [late_dropout, around_dropout, of_an_inner_model, of_arithmetic])
def test_passing_once_what_is_the_same_changes_nothing(build, monkeypatch, assert_close):
    """Beside a net that is repeated from its input on, with the same masks of dropout."""
    workload = workload_for(lambda task: build(), CLASSES)
    once = run(workload, "r_drop", {"alpha": 3.0})
    monkeypatch.setattr(_seam, "_last_before_chance", lambda model: None)
    assert_close(run(workload, "r_drop", {"alpha": 3.0}).variables, once.variables)
