"""MART trains on adversarial examples, by a boosted cross-entropy, and more on those the model is wrong about."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from nets import BATCH, Task, dense, one_weight, sgd, weight_of, workload_for
from runs import is_finite, prepared, run

import trainstep
from trainstep import errors
from trainstep._seam import KERAS_3
from trainstep.step import Batch
from trainstep.strategies.mart import margin_loss, weighted_divergence

CLASSES = Task(classes=True)


def sigmoid(z: float) -> float:
    return 1 / (1 + np.exp(-z))


def test_one_weight_by_hand():
    # Two classes, z = w x, p = s(z). w = 1, x = 2, y = 1: the cross-entropy falls with x, so x' = 1.5; q = s(w x').
    # BCE(q, 1) = -log q - log(1 - (1 - q)) = -2 log q, of which d/dz' = 2 (q - 1).
    # D = KL(p || q) = p (z - z') - log(1 + e^z) + log(1 + e^z'):  dD/dz = p (1 - p) (z - z'),  dD/dz' = q - p.
    # d(1 - p)/dz = -p (1 - p).
    model = trainstep.apply(one_weight(1.0), "mart", beta=3.0, epsilon=0.5)
    model.compile(sgd(0.1), keras.losses.BinaryCrossentropy(from_logits=True))
    loss = float(model.train_on_batch(np.full((1, 1), 2.0, "float32"), np.ones((1, 1), "float32")))
    p, q = sigmoid(2.0), sigmoid(1.5)
    divergence = p * 0.5 - np.log1p(np.exp(2.0)) + np.log1p(np.exp(1.5))
    of_divergence = 2 * p * (1 - p) * 0.5 + 1.5 * (q - p)
    gradient = 1.5 * 2 * (q - 1) + 3 * ((1 - p) * of_divergence - divergence * 2 * p * (1 - p))
    assert loss == pytest.approx(-2 * np.log(q) + 3 * divergence * (1 - p), rel=1e-5)
    assert weight_of(model) == pytest.approx(1 - 0.1 * gradient, rel=1e-5)


def loop(weights: np.ndarray, *, beta: float, epsilon: float, steps: int, step_size: float) -> list[np.ndarray]:
    """Return the weights that the algorithm of the paper, written down with GradientTapes, leaves."""
    keras.utils.set_random_seed(0)
    model = dense(CLASSES)
    for draw, start in enumerate(range(0, len(CLASSES.x), BATCH)):
        x, y, w = (values[start : start + BATCH] for values in (CLASSES.x, CLASSES.y, weights))
        moved = x + 0.001 * tf.random.stateless_normal(x.shape, [0, 2 * draw])
        for _ in range(steps):
            with tf.GradientTape() as tape:
                tape.watch(moved)
                loss = -tf.reduce_sum(w[:, None] * y * tf.math.log(model(moved)))
            moved += step_size * tf.sign(tape.gradient(loss, moved))
            moved = tf.clip_by_value(moved, x - epsilon, x + epsilon)
        with tf.GradientTape() as tape:
            p, q = model(x), model(moved)
            p_y, q_y = tf.reduce_sum(y * p, axis=-1), tf.reduce_sum(y * q, axis=-1)
            rival = tf.reduce_max((1 - y) * q, axis=-1)
            boosted = -tf.math.log(q_y) - tf.math.log(1 - rival)
            losses = boosted + beta * tf.reduce_sum(p * tf.math.log(p / q), axis=-1) * (1 - p_y)
            loss = tf.reduce_sum(w * losses) / len(x)
        gradients = tape.gradient(loss, model.trainable_variables)
        model.set_weights([w - 0.1 * g.numpy() for w, g in zip(model.get_weights(), gradients, strict=True)])
    return model.get_weights()


def test_it_is_an_own_loop_with_the_algorithm_sample_weights_and_all(assert_close):
    weights = np.linspace(0, 2, len(CLASSES.x)).astype("float32")
    options = {"beta": 2.0, "epsilon": 0.25, "steps": 3, "step_size": 0.1}
    ours = run(workload_for(dense, CLASSES, fit={"sample_weight": weights}), "mart", options, fit={"epochs": 1})
    assert_close(ours.variables, loop(weights, **options))


def test_the_margin_is_to_the_likeliest_other_class():
    # y is the first class. The likeliest other has 0.3 in the first row, 0.6 in the second.
    q, y = np.array([[0.5, 0.3, 0.2], [0.1, 0.3, 0.6]], "float32"), np.array([[1, 0, 0]] * 2, "float32")
    found = margin_loss(tf.math.log(q), tf.constant(y))
    np.testing.assert_allclose(found, -np.log([0.7, 0.4]), rtol=1e-6)


def test_the_margin_of_a_model_that_is_sure_and_wrong_is_finite_and_has_a_gradient():
    # Logits (0, 50, 0) and y the first class: 1 - q_2 = 2 e^-50, in float32 0 as a difference.
    logits = tf.constant([[0.0, 50.0, 0.0]])
    with tf.GradientTape() as tape:
        tape.watch(logits)
        loss = tf.reduce_sum(margin_loss(tf.nn.log_softmax(logits), tf.constant([[1.0, 0.0, 0.0]])))
    assert float(loss) == pytest.approx(50 - np.log(2), rel=1e-6)
    np.testing.assert_allclose(tape.gradient(loss, logits), [[-0.5, 1.0, -0.5]], atol=1e-6)


def test_the_divergence_counts_as_much_as_the_model_is_wrong():
    p, q = np.array([[0.9, 0.1], [0.2, 0.8]], "float32"), np.array([[0.5, 0.5]] * 2, "float32")
    y = np.array([[1, 0]] * 2, "float32")
    found = weighted_divergence(*(tf.math.log(values) for values in (p, q)), tf.constant(y))
    np.testing.assert_allclose(found, np.sum(p * np.log(p / q), axis=-1) * [0.1, 0.8], rtol=1e-5)


def test_where_nothing_moves_the_boosted_cross_entropy_of_clean_examples_is_left(assert_close):
    model = prepared(workload_for(dense, CLASSES), "mart", {"epsilon": 0.0})
    q = model(CLASSES.x).numpy()
    expected = -np.log(np.sum(CLASSES.y * q, axis=-1)) - np.log(1 - np.max((1 - CLASSES.y) * q, axis=-1))
    assert_close(float(model.train_on_batch(CLASSES.x, CLASSES.y)), expected.mean())


def test_class_numbers_are_one_hot_labels(assert_close):
    model, twin = (
        prepared(workload_for(dense, CLASSES), "mart", loss=f"{kind}categorical_crossentropy")
        for kind in ("", "sparse_")
    )
    model.train_on_batch(CLASSES.x, CLASSES.y)
    twin.train_on_batch(CLASSES.x, CLASSES.y.argmax(axis=-1))
    assert_close(twin.get_weights(), model.get_weights())


def test_of_several_yes_or_no_answers_the_mean_counts():
    """As in their cross-entropy: to ask each question twice changes nothing."""

    def asked(times: int) -> float:
        x = keras.Input((1,))
        once = one_weight(1.0).layers[-1](x)
        answers = keras.layers.Concatenate()([once] * times) if times > 1 else once
        model = trainstep.apply(keras.Model(x, answers), "mart", epsilon=0.5, beta=3.0)
        model.compile(sgd(0.0), keras.losses.BinaryCrossentropy(from_logits=True))
        return float(model.train_on_batch(np.full((1, 1), 2.0, "float32"), np.ones((1, times), "float32")))

    assert asked(2) == pytest.approx(asked(1), rel=1e-6)


def with_dropout(task: Task = CLASSES) -> keras.Model:
    x = keras.Input(task.shape)
    h = keras.layers.Dropout(0.5, seed=1)(keras.layers.Dense(8, "tanh")(x))
    return keras.Model(x, keras.layers.Dense(3, "softmax")(h))


@pytest.mark.skipif(not KERAS_3, reason="the state of dropout cannot be reached on Keras 2: other masks, other results")
def test_both_passes_have_the_same_masks_of_dropout(assert_close):
    """Examples that are not moved have no divergence, dropout or not, however much it weighs."""
    workload = workload_for(with_dropout, CLASSES)
    much, none = (run(workload, "mart", {"epsilon": 1e-30, "beta": beta}) for beta in (100.0, 0.0))
    assert_close(much.history, none.history)
    assert_close(much.variables, none.variables)


def test_metrics_are_those_of_the_examples_trained_on():
    workload = workload_for(dense, CLASSES, metrics=["categorical_crossentropy"])
    model = prepared(workload, "mart", {"epsilon": 0.25})
    moved = model.transform_batch(Batch(tf.constant(CLASSES.x), tf.constant(CLASSES.y))).extra["mart"]
    twin = prepared(workload)
    expected = twin.test_on_batch(moved, CLASSES.y)[1]
    again = prepared(workload, "mart", {"epsilon": 0.25})  # With the first draw once more.
    assert float(again.train_on_batch(CLASSES.x, CLASSES.y)[1]) == pytest.approx(float(expected), rel=1e-6)


def test_regularizers_count_once():
    def regularized(task: Task, penalty: float) -> keras.Model:
        layer = keras.layers.Dense(3, "softmax", kernel_regularizer=keras.regularizers.L2(penalty))
        return keras.Sequential([keras.Input(task.shape), layer])

    def loss(penalty: float) -> tuple[float, float]:
        model = prepared(workload_for(lambda task: regularized(task, penalty), CLASSES), "mart")
        return float(np.square(model.get_weights()[0]).sum()), float(model.train_on_batch(CLASSES.x, CLASSES.y))

    (squares, without), (_, with_it) = loss(0.0), loss(0.5)
    assert with_it - without == pytest.approx(0.5 * squares, rel=1e-5)


def test_epsilon_and_beta_may_be_on_a_schedule():
    schedule = {"start": 0.0, "end": 0.25, "updates": 4}
    assert is_finite(run(workload_for(dense, CLASSES), "mart", {"epsilon": schedule, "beta": {**schedule, "end": 6.0}}))


@pytest.mark.parametrize("other", ["adversarial", "trades"])
def test_there_is_one_attack_at_a_time(other):
    with pytest.raises(errors.StrategyConflictError, match="one would attack what the other has made"):
        trainstep.plan(["mart", other])


def test_the_cost_is_that_of_the_attack_and_of_two_examples_for_one():
    assert trainstep.plan("mart", steps=5).time == pytest.approx((5 * 2 + 2 * 3) / 3)
    assert trainstep.plan("mart", epsilon=0.0).time == 2
