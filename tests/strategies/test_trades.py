"""TRADES adds to the loss of clean examples how far predictions are off at the worst points near them."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from nets import BATCH, Task, dense, one_weight, sgd, weight_of, workload_for
from runs import assert_same, is_finite, prepared, run

import trainstep
from trainstep._seam import KERAS_3
from trainstep.step import Batch
from trainstep.strategies._balls import l2_norm

CLASSES = Task(classes=True)


def sigmoid(z: float) -> float:
    return 1 / (1 + np.exp(-z))


def moved_by(model: keras.Model, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the examples the attack makes."""
    return model.transform_batch(Batch(tf.constant(x), tf.constant(y))).extra["trades"].numpy()


def test_one_weight_by_hand():
    # Two classes, z = w x, p = s(z), and at the worst point z' = w x', q = s(z').
    # KL = p (z - z') - log(1 + e^z) + log(1 + e^z'):  dKL/dz = p (1 - p) (z - z'),  dKL/dz' = q - p.
    # It is convex in x', so the attack ends on the border, on the side of x on which it started.
    # dL/dw = x (p - y). w = 1, x = 2, y = 1, epsilon = 0.5:
    model = trainstep.apply(one_weight(1.0), "trades", beta=3.0, epsilon=0.5)
    model.compile(sgd(0.1), keras.losses.BinaryCrossentropy(from_logits=True))
    loss = float(model.train_on_batch(np.full((1, 1), 2.0, "float32"), np.ones((1, 1), "float32")))
    p = sigmoid(2.0)
    expected = []
    for moved in (1.5, 2.5):
        q = sigmoid(moved)
        divergence = p * (2 - moved) - np.log1p(np.exp(2.0)) + np.log1p(np.exp(moved))
        gradient = 2 * (p - 1) + 3 * (2 * p * (1 - p) * (2 - moved) + moved * (q - p))
        expected.append((-np.log(p) + 3 * divergence, 1 - 0.1 * gradient))
    assert any((loss, weight_of(model)) == pytest.approx(pair, rel=1e-5) for pair in expected)


def loop(weights: np.ndarray, *, beta: float, epsilon: float, steps: int, step_size: float) -> list[np.ndarray]:
    """Return the weights that the algorithm of the paper, written down with GradientTapes, leaves."""
    keras.utils.set_random_seed(0)
    model = dense(CLASSES)

    def divergence(p: tf.Tensor, q: tf.Tensor) -> tf.Tensor:
        return tf.reduce_sum(p * tf.math.log(p / q), axis=-1)

    for draw, start in enumerate(range(0, len(CLASSES.x), BATCH)):
        x, y, w = (values[start : start + BATCH] for values in (CLASSES.x, CLASSES.y, weights))
        moved = x + 0.001 * tf.random.stateless_normal(x.shape, [0, 2 * draw])
        for _ in range(steps):
            with tf.GradientTape() as tape:
                tape.watch(moved)
                loss = tf.reduce_sum(divergence(model(x), model(moved)))
            moved += step_size * tf.sign(tape.gradient(loss, moved))
            moved = tf.clip_by_value(moved, x - epsilon, x + epsilon)
        with tf.GradientTape() as tape:
            p = model(x)
            losses = -tf.reduce_sum(y * tf.math.log(p), axis=-1) + beta * divergence(p, model(moved))
            loss = tf.reduce_sum(w * losses) / len(x)
        gradients = tape.gradient(loss, model.trainable_variables)
        model.set_weights([w - 0.1 * g.numpy() for w, g in zip(model.get_weights(), gradients, strict=True)])
    return model.get_weights()


def test_it_is_an_own_loop_with_the_algorithm_sample_weights_and_all(assert_close):
    weights = np.linspace(0, 2, len(CLASSES.x)).astype("float32")
    options = {"beta": 2.0, "epsilon": 0.25, "steps": 3, "step_size": 0.1}
    ours = run(workload_for(dense, CLASSES, fit={"sample_weight": weights}), "trades", options, fit={"epochs": 1})
    assert_close(ours.variables, loop(weights, **options))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_examples_are_on_the_border_of_the_ball_and_in_the_range(norm):
    model = prepared(workload_for(dense, CLASSES), "trades", {"norm": norm, "epsilon": 0.125, "clip_range": (-9, 9)})
    moves = moved_by(model, CLASSES.x, CLASSES.y) - CLASSES.x
    lengths = np.abs(moves).max(axis=1) if norm == "linf" else l2_norm(tf.constant(moves)).numpy()
    np.testing.assert_allclose(lengths, 0.125, rtol=1e-4)
    model = prepared(workload_for(dense, CLASSES), "trades", {"norm": norm, "epsilon": 0.125, "clip_range": (-4, 4)})
    assert np.abs(moved_by(model, np.clip(CLASSES.x, -4, 4), CLASSES.y)).max() <= 4


def test_the_attack_needs_no_labels():
    model, twin = (prepared(workload_for(dense, CLASSES), "trades", {"epsilon": 0.25}) for _ in range(2))
    np.testing.assert_array_equal(
        moved_by(model, CLASSES.x, CLASSES.y), moved_by(twin, CLASSES.x, np.roll(CLASSES.y, 1, axis=-1))
    )


def test_predictions_are_further_off_there_than_at_random_points():
    model = prepared(workload_for(dense, CLASSES), "trades", {"epsilon": 0.25})
    p = model(CLASSES.x).numpy()

    def divergence(moved: np.ndarray) -> np.ndarray:
        return np.sum(p * np.log(p / model(moved).numpy()), axis=-1)

    noise = np.random.default_rng(0).uniform(-0.25, 0.25, CLASSES.x.shape).astype("float32")
    assert (divergence(moved_by(model, CLASSES.x, CLASSES.y)) > divergence(CLASSES.x + noise)).all()


def test_without_a_ball_it_is_plain_keras():
    assert_same(run(workload_for(dense), "trades", {"epsilon": 0.0}), run(workload_for(dense)))


def with_dropout(task: Task = CLASSES) -> keras.Model:
    x = keras.Input(task.shape)
    h = keras.layers.Dropout(0.5, seed=1)(keras.layers.Dense(8, "tanh")(x))
    return keras.Model(x, keras.layers.Dense(3, "softmax")(h))


@pytest.mark.skipif(not KERAS_3, reason="the state of dropout cannot be reached on Keras 2: other masks, other results")
def test_both_passes_have_the_same_masks_of_dropout(assert_close):
    """Examples that are not moved off the spot are no further off, dropout or not; later masks are as without it."""
    workload = workload_for(with_dropout, CLASSES)
    ours, plain = run(workload, "trades", {"epsilon": 1e-30}), run(workload, "standard")
    assert_close(ours.history, plain.history)
    assert_close(ours.variables, plain.variables)


def test_metrics_are_those_of_the_clean_examples():
    workload = workload_for(dense, CLASSES, metrics=["categorical_crossentropy"])
    plain, ours = (prepared(workload, name).train_on_batch(CLASSES.x, CLASSES.y) for name in ("standard", "trades"))
    assert float(ours[1]) == pytest.approx(float(plain[1]), rel=1e-6)
    assert float(ours[0]) > float(plain[0])


def test_regularizers_count_once():
    def regularized(task: Task) -> keras.Model:
        penalty = keras.regularizers.L2(0.5)
        return keras.Sequential([keras.Input(task.shape), keras.layers.Dense(3, "softmax", kernel_regularizer=penalty)])

    workload = workload_for(regularized, CLASSES)
    plain, ours = (
        prepared(workload, *spec).train_on_batch(CLASSES.x, CLASSES.y)
        for spec in [("standard",), ("trades", {"epsilon": 1e-30})]
    )
    assert float(ours) == pytest.approx(float(plain), rel=1e-5)


def test_each_output_of_classes_counts_by_its_loss_weight():
    """And one that is a number not at all."""
    x = keras.Input((6,))
    heads = {name: keras.layers.Dense(3, "softmax", name=name)(x) for name in ("kind", "other")}
    model = keras.Model(x, {**heads, "value": keras.layers.Dense(1, name="value")(x)})
    trainstep.apply(model, "trades", epsilon=0.25, beta=3.0)
    cross_entropies = dict.fromkeys(heads, "categorical_crossentropy")
    model.compile(sgd(), {**cross_entropies, "value": "mse"}, loss_weights={"kind": 0.5, "other": 2.0, "value": 7.0})
    labels = {**dict.fromkeys(heads, tf.constant(CLASSES.y)), "value": tf.zeros((len(CLASSES.x), 1))}
    batch = model.transform_batch(Batch(tf.constant(CLASSES.x), labels))
    p, q = model(batch.x), model(batch.extra["trades"])
    divergences = {name: np.sum(p[name] * np.log(p[name] / q[name]), axis=-1).mean() for name in heads}
    ours, clean = (model.compute_objective(each).loss for each in (batch, batch._replace(extra={})))
    expected = 3 * (0.5 * divergences["kind"] + 2 * divergences["other"])
    assert float(ours - clean) == pytest.approx(expected, rel=1e-4)


def test_of_several_yes_or_no_answers_the_mean_counts():
    """As in their cross-entropy: to ask each question twice changes nothing."""

    def asked(times: int) -> float:
        x = keras.Input((1,))
        once = one_weight(1.0).layers[-1](x)
        answers = keras.layers.Concatenate()([once] * times) if times > 1 else once
        model = trainstep.apply(keras.Model(x, answers), "trades", epsilon=0.5, beta=3.0)
        model.compile(sgd(0.0), keras.losses.BinaryCrossentropy(from_logits=True))
        return float(model.train_on_batch(np.full((1, 1), 2.0, "float32"), np.ones((1, times), "float32")))

    assert asked(2) == pytest.approx(asked(1), rel=1e-6)


def test_beta_and_epsilon_may_be_on_a_schedule():
    schedule = {"start": 0.0, "end": 0.25, "updates": 4}
    result = run(workload_for(dense, CLASSES), "trades", {"epsilon": schedule, "beta": {**schedule, "end": 6.0}})
    assert is_finite(result)


def test_the_cost_is_that_of_the_attack_and_of_two_examples_for_one():
    assert trainstep.plan("trades", steps=5).time == pytest.approx((1 + 5 * 2 + 2 * 3) / 3)
    assert trainstep.plan("trades", beta=0.0).time == 1
