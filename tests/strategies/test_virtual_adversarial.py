"""Virtual adversarial training keeps predictions the same along the directions in which they change most."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from nets import BATCH, Task, X, dense, functional, one_weight, sgd, weight_of, workload_for
from runs import assert_same, is_finite, prepared, run

import trainstep
from trainstep._seam import KERAS_3
from trainstep.step import Batch
from trainstep.strategies.virtual_adversarial import VirtualAdversarialOptions, worst_directions

CLASSES = Task(classes=True)


def sigmoid(z: float) -> float:
    return 1 / (1 + np.exp(-z))


def test_one_weight_by_hand():
    # Two classes, p = s(w x), q = s(w x'); of one number the worst direction is up or down, as it was drawn.
    # LDS = KL(p || q), p a constant: d/dw = x' (q - p); dL/dw = x (p - y). w = 1, x = 2, y = 1, epsilon = 0.5:
    model = trainstep.apply(one_weight(1.0), "virtual_adversarial", alpha=3.0, epsilon=0.5)
    model.compile(sgd(0.1), keras.losses.BinaryCrossentropy(from_logits=True))
    loss = float(model.train_on_batch(np.full((1, 1), 2.0, "float32"), np.ones((1, 1), "float32")))
    p = sigmoid(2.0)
    expected = []
    for moved in (1.5, 2.5):
        q = sigmoid(moved)
        divergence = p * (2 - moved) - np.log1p(np.exp(2.0)) + np.log1p(np.exp(moved))
        expected.append((-np.log(p) + 3 * divergence, 1 - 0.1 * (2 * (p - 1) + 3 * moved * (q - p))))
    assert any((loss, weight_of(model)) == pytest.approx(pair, rel=1e-5) for pair in expected)


def loop(weights: np.ndarray, *, alpha: float, epsilon: float, xi: float, iterations: int) -> list[np.ndarray]:
    """Return the weights that the algorithm of the paper, written down with GradientTapes, leaves."""
    keras.utils.set_random_seed(0)
    model = dense(CLASSES)

    def unit(d: tf.Tensor) -> tf.Tensor:
        return d / tf.norm(d, axis=-1, keepdims=True)

    def divergence(p: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
        return tf.reduce_mean(tf.reduce_sum(p * tf.math.log(p / model(x)), axis=-1))

    for draw, start in enumerate(range(0, len(CLASSES.x), BATCH)):
        x, y, w = (values[start : start + BATCH] for values in (CLASSES.x, CLASSES.y, weights))
        p = tf.constant(model(x))
        d = tf.random.stateless_normal(x.shape, [0, 2 * draw])
        for _ in range(iterations):
            r = xi * unit(d)
            with tf.GradientTape() as tape:
                tape.watch(r)
                value = divergence(p, x + r)
            d = tape.gradient(value, r)
        with tf.GradientTape() as tape:
            loss = -tf.reduce_sum(w * tf.reduce_sum(y * tf.math.log(model(x)), axis=-1)) / len(x)
            loss += alpha * divergence(p, x + epsilon * unit(d))
        gradients = tape.gradient(loss, model.trainable_variables)
        model.set_weights([w - 0.1 * g.numpy() for w, g in zip(model.get_weights(), gradients, strict=True)])
    return model.get_weights()


@pytest.mark.parametrize("iterations", [1, 3])
def test_it_is_an_own_loop_with_the_algorithm_unweighted_examples_and_all(iterations):
    """Sample weights are of the labels: an example of weight 0 counts in the divergence as all others do."""
    weights = np.where(np.arange(len(CLASSES.x)) % 3 == 0, 0.0, 1.5).astype("float32")
    options = {"alpha": 2.0, "epsilon": 0.5, "xi": 0.1, "iterations": iterations}
    ours = run(
        workload_for(dense, CLASSES, fit={"sample_weight": weights}), "virtual_adversarial", options, fit={"epochs": 1}
    )
    for mine, theirs in zip(ours.variables, loop(weights, **options), strict=True):
        # The divergence near its minimum is a difference of logarithms that agree in their first digits.
        np.testing.assert_allclose(mine, theirs, rtol=2e-4, atol=2e-5)


W = np.random.default_rng(3).normal(size=(6, 3)).astype("float32")


def gradients_of(dtype: str):
    """Return what maps perturbations to gradients of the divergence of a linear softmax classifier."""
    x, w = tf.constant(X, dtype), tf.constant(W, dtype)
    log_p = tf.nn.log_softmax(x @ w)

    def gradients_at(deltas: list[tf.Tensor]) -> list[tf.Tensor]:
        [delta] = deltas
        with tf.GradientTape() as tape:
            tape.watch(delta)
            log_q = tf.nn.log_softmax((x + delta) @ w)
            value = tf.reduce_mean(tf.reduce_sum(tf.exp(log_p) * (log_p - log_q), axis=-1))
        return [tape.gradient(value, delta)]

    return gradients_at


def test_it_finds_the_first_eigenvector_of_the_hessian():
    """That of KL at no perturbation is W (diag(p) - p p^T) W^T: the relation of the paper, its equation 9."""
    start = [tf.random.stateless_normal(X.shape, [0, 0], dtype=tf.float64)]
    [found] = worst_directions(gradients_of("float64"), start, 1e-4, 200)
    p = tf.nn.softmax(X @ W).numpy().astype("float64")
    for direction, probabilities in zip(found.numpy(), p, strict=True):
        hessian = W @ (np.diag(probabilities) - np.outer(probabilities, probabilities)) @ W.T
        values, vectors = np.linalg.eigh(hessian)
        if values[-2] < 0.9 * values[-1]:  # Else 200 iterations need not tell the two apart.
            assert abs(direction @ vectors[:, -1]) == pytest.approx(1, abs=1e-4)


def test_the_default_step_is_found_by_float32_and_that_of_the_paper_is_not():
    """The worst example's cosine with the direction in float64."""
    start = [tf.random.stateless_normal(X.shape, [0, 0])]
    [exact] = worst_directions(gradients_of("float64"), [tf.cast(start[0], tf.float64)], 1e-6, 1)

    def worst_cosine(xi: float) -> float:
        [found] = worst_directions(gradients_of("float32"), start, xi, 1)
        return float(tf.reduce_min(tf.reduce_sum(tf.cast(found, tf.float64) * exact, axis=-1)))

    assert worst_cosine(VirtualAdversarialOptions().xi) > 0.99
    assert worst_cosine(1e-6) < 0.9


def test_without_labels_it_trains_on_the_divergence_alone(assert_close):
    """As it does with labels of weight 0; regularizers and what layers add count all the same."""
    options = {"alpha": 2.0, "epsilon": 0.5}
    weights = np.zeros(len(CLASSES.x), "float32")
    expected = run(workload_for(functional, CLASSES, fit={"sample_weight": weights}), "virtual_adversarial", options)
    model = prepared(workload_for(functional, CLASSES), "virtual_adversarial", options)
    history = model.fit(CLASSES.x, batch_size=BATCH, epochs=2, shuffle=False, verbose=0).history
    assert_close([variable.numpy() for variable in model.variables], expected.variables)
    assert_close(history["loss"], expected.history["loss"])
    assert history["loss"][0] > 0


@pytest.mark.parametrize("loss", ["sparse_categorical_crossentropy", "binary_crossentropy"])
def test_whatever_cross_entropy_it_is_labels_may_be_missing(loss):
    model = prepared(workload_for(dense, CLASSES, loss=loss), "virtual_adversarial", {"epsilon": 0.5})
    before = model.get_weights()
    assert np.isfinite(model.fit(CLASSES.x, verbose=0).history["loss"]).all()
    assert not np.array_equal(model.get_weights()[0], before[0])


def test_the_added_passes_leave_no_trace_in_batch_norm():
    workload = workload_for(functional, CLASSES, optimizer=lambda: sgd(0.0))
    ours, plain = run(workload, "virtual_adversarial"), run(workload, "standard")
    for mine, theirs in zip(ours.variables, plain.variables, strict=True):
        if KERAS_3 or mine.dtype.kind == "f":
            np.testing.assert_array_equal(mine, theirs)


def with_dropout(task: Task = CLASSES) -> keras.Model:
    x = keras.Input(task.shape)
    h = keras.layers.Dropout(0.5, seed=1)(keras.layers.Dense(8, "tanh")(x))
    return keras.Model(x, keras.layers.Dense(3, "softmax")(h))


@pytest.mark.skipif(not KERAS_3, reason="the state of dropout cannot be reached on Keras 2: other masks, other results")
def test_all_passes_have_the_same_masks_of_dropout(assert_close):
    """What is not moved off the spot is not off, dropout or not; later masks are as without it."""
    workload = workload_for(with_dropout, CLASSES)
    ours, plain = run(workload, "virtual_adversarial", {"epsilon": 1e-30}), run(workload, "standard")
    assert_close(ours.history, plain.history)
    assert_close(ours.variables, plain.variables)


def test_without_a_radius_it_is_plain_keras():
    assert_same(run(workload_for(dense), "virtual_adversarial", {"epsilon": 0.0}), run(workload_for(dense)))


def test_directions_are_drawn_anew_for_each_step_and_by_the_seed():
    def drawn(seed: int) -> list[np.ndarray]:
        model = prepared(workload_for(dense, CLASSES), "virtual_adversarial", {"seed": seed})
        batch = Batch(tf.constant(CLASSES.x), tf.constant(CLASSES.y))
        return [model.transform_batch(batch).extra["virtual_adversarial"][0].numpy() for _ in range(2)]

    (first, second), (again, _), (other, _) = drawn(1), drawn(1), drawn(2)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, other)


def test_perturbed_examples_stay_in_the_range():
    """At the lower end of the range and pushed against it, what is compared is the example with itself."""
    x = np.full((4, 1), 2.0, "float32")
    seen = []
    for seed in range(8):
        model = trainstep.apply(one_weight(), "virtual_adversarial", epsilon=0.5, clip_range=(2.0, 3.0), seed=seed)
        model.compile(sgd(0.0), keras.losses.BinaryCrossentropy(from_logits=True))
        seen.append(float(model.train_on_batch(x[:1], np.ones((1, 1), "float32"))))
    p, q = sigmoid(2.0), sigmoid(2.5)
    up = -np.log(p) + p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    assert {round(loss, 5) for loss in seen} == {round(-np.log(p), 5), round(up, 5)}


def test_alpha_and_epsilon_may_be_on_a_schedule():
    schedule = {"start": 0.0, "end": 1.0, "updates": 4}
    result = run(workload_for(dense, CLASSES), "virtual_adversarial", {"epsilon": schedule, "alpha": schedule})
    assert is_finite(result)


def test_the_cost_is_that_of_the_iterations_and_of_a_second_example():
    assert trainstep.plan("virtual_adversarial", iterations=2).time == pytest.approx((3 + 2 * 2 + 3) / 3)
    assert trainstep.plan("virtual_adversarial", alpha=0.0).time == 1
