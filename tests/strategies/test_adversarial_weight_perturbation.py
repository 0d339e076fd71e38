"""AWP descends at weights moved, each tensor by its size, to where the loss is high."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from nets import BATCH, Workload, X, Y, dense, functional, one_weight, sgd, two_weights
from runs import assert_same, differs, run

import trainstep
from trainstep import errors
from trainstep._seam import KERAS_3
from trainstep.strategies.adversarial_weight_perturbation import perturbation

NAME = "adversarial_weight_perturbation"


def test_two_weights_by_hand():
    # L = (w1^2 + 4 w2^2) / 2, see `two_weights`: g = (3, 4) at (3, 1), of norm 5, in one kernel. gamma = 0.5:
    # v = 0.5 * sqrt(10) * (0.6, 0.8), and the gradient at w + v, (w1 + v1, 4 (w2 + v2)), is descended from w.
    model, x, y = two_weights(3.0, 1.0)
    trainstep.apply(model, NAME, gamma=0.5).compile(sgd(0.1), "mse")
    model.train_on_batch(x, y)
    v = 0.5 * np.sqrt(10) * np.array([0.6, 0.8])
    descended = np.array([1, 4]) * (np.array([3, 1]) + v)
    np.testing.assert_allclose(model.get_weights()[0][:, 0], np.array([3, 1]) - 0.1 * descended, rtol=1e-6)


def test_each_tensor_moves_by_its_own_size_and_those_of_one_dimension_stay():
    weights = [tf.constant([[3.0, 4.0]]), tf.constant([5.0, 5.0]), tf.constant([[10.0]]), tf.zeros((1, 1))]
    gradients = [tf.constant([[0.0, 100.0]]), tf.constant([1.0, 1.0]), None, tf.ones((1, 1))]
    moves = perturbation(weights, gradients, 0.1)
    np.testing.assert_allclose(moves[0], [[0.0, 0.5]], rtol=1e-6)  # 0.1 * 5, however long the gradient is.
    assert moves[1] is None
    assert moves[2] is None
    np.testing.assert_array_equal(moves[3], [[0.0]])
    assert float(perturbation(weights, [tf.zeros_like(w) for w in weights], 0.1)[0][0, 0]) == 0


def loop(gamma: float, epsilon: float, weights: np.ndarray) -> list[np.ndarray]:
    """Return the weights that AT-AWP, written down as the authors' code does it, leaves: FGSM, a proxy, two moves."""
    keras.utils.set_random_seed(0)
    model = dense()

    def loss(x, y, w):
        return tf.reduce_sum(w * tf.reduce_sum(tf.square(model(x) - y), axis=-1)) / len(x)

    def gradients(*batch):
        with tf.GradientTape() as tape:
            value = loss(*batch)
        return [g.numpy() for g in tape.gradient(value, model.trainable_variables)]

    for start in range(0, len(X), BATCH):
        x, y, w = (values[start : start + BATCH] for values in (X, Y, weights))
        moved = tf.constant(x)
        with tf.GradientTape() as tape:
            tape.watch(moved)
            value = loss(moved, y, w)
        x = x + epsilon * np.sign(tape.gradient(value, moved))
        before = model.get_weights()
        proxy = [at + 0.01 * g for at, g in zip(before, gradients(x, y, w), strict=True)]
        differences = [after - at for after, at in zip(proxy, before, strict=True)]
        moves = [
            np.linalg.norm(at) / (np.linalg.norm(d) + 1e-20) * d if at.ndim > 1 else 0 * d
            for at, d in zip(before, differences, strict=True)
        ]
        model.set_weights([at + gamma * move for at, move in zip(before, moves, strict=True)])
        descended = gradients(x, y, w)
        model.set_weights([at - 0.1 * g for at, g in zip(before, descended, strict=True)])
    return model.get_weights()


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_it_is_an_own_loop_with_the_formula_sample_weights_and_all(epsilon, assert_close):
    """With adversarial training around it, and by itself."""
    weights = np.linspace(0.1, 2, len(X)).astype("float32")
    workload = Workload(dense, X, Y, fit={"sample_weight": weights})
    ours = run(workload, {NAME: {"gamma": 0.2}, "adversarial": {"epsilon": epsilon}}, fit={"epochs": 1})
    assert_close(ours.variables, loop(0.2, epsilon, weights))


def test_the_loss_is_the_whole_objective_clean_examples_too(assert_close):
    """Half clean and half adversarial is what it is without adversarial examples, where these are the clean ones."""
    clean = Workload(dense, X, Y)
    mixed = {NAME: {"gamma": 0.2}, "adversarial": {"epsilon": 1e-7, "clean_weight": 0.5}}
    assert_close(run(clean, mixed).variables, run(clean, NAME, {"gamma": 0.2}).variables)


def test_a_warmup_is_a_schedule():
    # Nothing moves before the second update: at gamma = 0 the gradient (3, 4) at (3, 1) is descended.
    model, x, y = two_weights(3.0, 1.0)
    trainstep.apply(model, NAME, gamma={"start": 0.0, "end": 0.5, "first": 0, "updates": 1})
    model.compile(sgd(0.1), "mse")
    model.train_on_batch(x, y)
    np.testing.assert_allclose(model.get_weights()[0][:, 0], [3 - 0.3, 1 - 0.4], rtol=1e-6)
    model.set_weights([np.array([[3.0], [1.0]])])
    model.train_on_batch(x, y)
    assert model.get_weights()[0][0, 0] == pytest.approx(3 - 0.1 * (3 + 0.3 * np.sqrt(10)), rel=1e-6)


def test_statistics_and_metrics_are_those_of_the_first_evaluation():
    """At a learning rate of zero the weights stay, to the bit, and everything else is as in plain training."""
    workload = Workload(functional, X, Y, lambda: {"optimizer": sgd(0.0), "loss": "mse", "metrics": ["mae"]})
    ours, plain = run(workload, NAME, {"gamma": 0.5}), run(workload)
    if KERAS_3:
        assert_same(ours, plain)
    else:
        assert not differs(ours._replace(variables=ours.variables[:4]), plain._replace(variables=plain.variables[:4]))


def test_the_parts_of_a_batch_do_not_matter(assert_close):
    workload = Workload(dense, X, Y)
    whole = run(workload, NAME, {"gamma": 0.3})
    assert_close(run(workload, {NAME: {"gamma": 0.3}, "micro_batches": {"count": 3}}).variables, whole.variables)


def test_a_model_without_a_weight_to_move_is_refused():
    model = trainstep.apply(one_weight(), NAME)
    model.compile(sgd(), "mse")
    with pytest.raises(errors.ModelConflictError, match=r"two dimensions or more.*depends on none: .*w"):
        model.fit(X[:, :1], Y, verbose=0)


@pytest.mark.parametrize("other", ["sam", "gsam", "look_sam"])
def test_two_ascents_are_refused(other):
    with pytest.raises(errors.StrategyConflictError, match="gradient at other weights"):
        trainstep.plan([NAME, other])
