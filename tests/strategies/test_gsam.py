"""GSAM descends the worst loss near the weights and closes the gap between it and that at the weights."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from nets import BATCH, Workload, X, Y, dense, functional, sgd, two_weights
from runs import assert_same, differs, run

import trainstep
from trainstep import errors
from trainstep._seam import KERAS_3
from trainstep.strategies._ascent import orthogonal_part, projection
from trainstep.strategies.gsam import closing_the_gap


def test_two_weights_by_hand():
    # L = (w1^2 + 4 w2^2) / 2, see `two_weights`: g = (3, 4) at (3, 1), of norm 5. rho = 0.5: e = (0.3, 0.4), and
    # g_p = (3.3, 5.6). g . g_p = 32.3, ||g_p||^2 = 42.25: the part of g orthogonal to g_p is g - (32.3 / 42.25) g_p.
    model, x, y = two_weights(3.0, 1.0)
    trainstep.apply(model, "gsam", rho=0.5, alpha=0.2).compile(sgd(0.1), "mse")
    model.train_on_batch(x, y)
    g, g_p = np.array([3, 4]), np.array([3.3, 5.6])
    descended = g_p - 0.2 * (g - 32.3 / 42.25 * g_p)
    np.testing.assert_allclose(model.get_weights()[0][:, 0], np.array([3, 1]) - 0.1 * descended, rtol=1e-6)


def test_the_part_is_orthogonal_and_none_is_lost():
    g = [tf.constant([3.0, 4.0]), None, tf.constant([[1.0]])]
    g_p = [tf.constant([1.0, -2.0]), None, tf.constant([[2.0]])]
    part = orthogonal_part(g, g_p)
    # g . g_p = 3 - 8 + 2 = -3, ||g_p||^2 = 9: the factor is -1 / 3.
    np.testing.assert_allclose(part[0], [3 + 1 / 3, 4 - 2 / 3], rtol=1e-6)
    np.testing.assert_allclose(part[2], [[1 + 2 / 3]], rtol=1e-6)
    assert part[1] is None
    assert float(tf.reduce_sum(part[0] * g_p[0]) + tf.reduce_sum(part[2] * g_p[2])) == pytest.approx(0, abs=1e-6)
    ours = closing_the_gap(g, g_p, projection(g, g_p), 0.5)
    np.testing.assert_allclose(ours[0], g_p[0] - 0.5 * part[0], rtol=1e-6)
    assert ours[1] is None


def loop(rho: float, alpha: float, weights: np.ndarray) -> list[np.ndarray]:
    """Return the weights that algorithm 1 of the paper, written down with a GradientTape, leaves."""
    keras.utils.set_random_seed(0)
    model = dense()

    def gradients(x, y, w):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(w * tf.reduce_sum(tf.square(model(x) - y), axis=-1)) / len(x)
        return [g.numpy() for g in tape.gradient(loss, model.trainable_variables)]

    for start in range(0, len(X), BATCH):
        batch = [values[start : start + BATCH] for values in (X, Y, weights)]
        at = model.get_weights()
        g = gradients(*batch)
        norm = np.sqrt(sum(np.square(each).sum() for each in g))
        model.set_weights([w + rho * each / norm for w, each in zip(at, g, strict=True)])
        g_p = gradients(*batch)
        norm_p = np.sqrt(sum(np.square(each).sum() for each in g_p))
        cosine = sum((a * b).sum() for a, b in zip(g, g_p, strict=True)) / norm / norm_p
        orthogonal = [a - norm * cosine * b / norm_p for a, b in zip(g, g_p, strict=True)]
        model.set_weights([w - 0.1 * (b - alpha * t) for w, b, t in zip(at, g_p, orthogonal, strict=True)])
    return model.get_weights()


def test_it_is_an_own_loop_with_the_formula_sample_weights_and_all(assert_close):
    weights = np.linspace(0, 2, len(X)).astype("float32")
    workload = Workload(dense, X, Y, fit={"sample_weight": weights})
    ours = run(workload, "gsam", {"rho": 0.5, "alpha": 0.8}, fit={"epochs": 1})
    assert_close(ours.variables, loop(0.5, 0.8, weights))


def test_without_alpha_it_is_sam(assert_close):
    workload = Workload(functional, X, Y)
    if KERAS_3:  # On Keras 2 the evaluations draw masks of their own.
        assert_close(
            run(workload, "gsam", {"rho": 0.5, "alpha": 0.0}).variables, run(workload, "sam", {"rho": 0.5}).variables
        )
    workload = Workload(dense, X, Y)
    assert_close(
        run(workload, "gsam", {"rho": 0.5, "alpha": 0.0}).variables, run(workload, "sam", {"rho": 0.5}).variables
    )


def test_the_part_of_alpha_leaves_the_worst_loss_as_it_is_and_raises_that_at_the_weights():
    """To first order, so at a small rate: the gap between the two closes."""
    g, g_p, rate = np.array([3, 4]), np.array([3.3, 5.6]), 1e-4  # As above.

    def losses(alpha):
        model, x, y = two_weights(3.0, 1.0)
        trainstep.apply(model, "gsam", rho=0.5, alpha=alpha).compile(sgd(rate), "mse")
        model.train_on_batch(x, y)
        w = model.get_weights()[0][:, 0].astype("float64")
        return [float((np.square(at) * [0.5, 2]).sum()) for at in (w + np.array([0.3, 0.4]), w)]

    (worst, here), (worst_with, here_with) = losses(0.0), losses(5.0)
    orthogonal = g - g @ g_p / (g_p @ g_p) * g_p
    assert worst_with == pytest.approx(worst, abs=5e-6)
    assert here_with - here == pytest.approx(rate * 5.0 * orthogonal @ g, abs=5e-6)
    assert here_with - here > 1e-4


def test_statistics_and_metrics_are_those_of_the_first_evaluation():
    """At a learning rate of zero the weights stay, to the bit, and everything else is as in plain training."""
    workload = Workload(functional, X, Y, lambda: {"optimizer": sgd(0.0), "loss": "mse", "metrics": ["mae"]})
    ours, plain = run(workload, "gsam", {"rho": 0.5}), run(workload)
    if KERAS_3:
        assert_same(ours, plain)
    else:
        assert not differs(ours._replace(variables=ours.variables[:4]), plain._replace(variables=plain.variables[:4]))


def test_the_parts_of_a_batch_do_not_matter(assert_close):
    workload = Workload(dense, X, Y)
    whole = run(workload, "gsam", {"rho": 0.5})
    assert_close(run(workload, {"gsam": {"rho": 0.5}, "micro_batches": {"count": 3}}).variables, whole.variables)


def test_a_schedule_of_rho_begins_where_it_says(assert_close):
    # No ascent in the first update, as g_p = g then; see test_two_weights_by_hand for the second.
    model, x, y = two_weights(3.0, 1.0)
    schedule = {"start": 0.0, "end": 0.5, "updates": 1}
    trainstep.apply(model, "gsam", rho=schedule, alpha=0.2).compile(sgd(0.1), "mse")
    model.train_on_batch(x, y)
    np.testing.assert_allclose(model.get_weights()[0][:, 0], [3 - 0.3, 1 - 0.4], rtol=1e-6)
    model.set_weights([np.array([[3.0], [1.0]])])
    model.train_on_batch(x, y)
    other, x, y = two_weights(3.0, 1.0)
    trainstep.apply(other, "gsam", rho=0.5, alpha=0.2).compile(sgd(0.1), "mse")
    other.train_on_batch(x, y)
    assert_close(model.get_weights(), other.get_weights())


@pytest.mark.parametrize("other", ["sam", "look_sam", "adversarial_weight_perturbation"])
def test_two_ascents_are_refused(other):
    with pytest.raises(errors.StrategyConflictError, match="gradient at other weights"):
        trainstep.plan(["gsam", other])
