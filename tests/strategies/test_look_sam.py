"""LookSAM ascends in some steps, and turns the gradient of the others the way it was turned then."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from nets import BATCH, Workload, X, Y, dense, functional, one_weight, sgd, two_weights, weight_of
from runs import assert_same, differs, prepared, run

import trainstep
from trainstep import errors
from trainstep._seam import KERAS_3
from trainstep.strategies.look_sam import turn, turned


def test_two_weights_by_hand():
    # L = (w1^2 + 4 w2^2) / 2, see `two_weights`: g = (3, 4) at (3, 1), of norm 5. rho = 0.5: e = (0.3, 0.4), and
    # g_s = (3.3, 5.6) is descended. g_s . g / ||g||^2 = 32.3 / 25: g_v = (-0.576, 0.432), of norm 0.72.
    model, x, y = two_weights(3.0, 1.0)
    trainstep.apply(model, "look_sam", rho=0.5, interval=2, alpha=0.5).compile(sgd(0.1), "mse")
    model.train_on_batch(x, y)
    np.testing.assert_allclose(model.get_weights()[0][:, 0], [3 - 0.33, 1 - 0.56], rtol=1e-6)
    [g_v] = model.strategy_state["look_sam"]["turn"]
    np.testing.assert_allclose(g_v.numpy()[:, 0], [-0.576, 0.432], rtol=1e-5)
    # Again from (3, 1), between: g + 0.5 * (5 / 0.72) * g_v = (3, 4) + 2.5 * (-0.8, 0.6) = (1, 5.5).
    model.set_weights([np.array([[3.0], [1.0]])])
    model.train_on_batch(x, y)
    np.testing.assert_allclose(model.get_weights()[0][:, 0], [3 - 0.1, 1 - 0.55], rtol=1e-5)
    # And the third ascends as the first did.
    model.set_weights([np.array([[3.0], [1.0]])])
    model.train_on_batch(x, y)
    np.testing.assert_allclose(model.get_weights()[0][:, 0], [3 - 0.33, 1 - 0.56], rtol=1e-6)


def test_what_is_added_has_the_length_of_alpha_gradients_and_is_orthogonal_to_that_of_the_ascent():
    g, g_s = [tf.constant([3.0, 4.0]), None], [tf.constant([3.3, 5.6]), None]
    g_v = turn(g, g_s)
    assert float(tf.reduce_sum(g_v[0] * g[0])) == pytest.approx(0, abs=1e-5)
    added = turned([tf.constant([0.0, 10.0]), None], g_v, 0.7)
    assert float(tf.norm(added[0])) == pytest.approx(7, rel=1e-5)
    assert g_v[1] is None
    assert added[1] is None


def test_what_rounding_leaves_of_parallel_gradients_turns_nothing():
    """One weight has no orthogonal part: in between it trains as plain Keras does."""
    g = [tf.constant([0.1, 0.7, 0.3])]
    np.testing.assert_array_equal(turn(g, [1.7 * g[0]])[0], np.zeros(3))
    # w - 0.2 (w + 0.5), then w - 0.2 w, on the loss w^2.
    model = trainstep.apply(one_weight(1.0), "look_sam", rho=0.5, interval=2)
    model.compile(sgd(0.1), "mse")
    for _ in range(2):
        model.train_on_batch(np.ones((1, 1)), np.zeros((1, 1)))
    assert weight_of(model) == pytest.approx(0.7 * 0.8, rel=1e-6)


def loop(rho: float, k: int, alpha: float, weights: np.ndarray) -> list[np.ndarray]:
    """Return the weights that algorithm 1 of the paper, written down with a GradientTape, leaves."""
    keras.utils.set_random_seed(0)
    model = dense()

    def gradients(x, y, w):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(w * tf.reduce_sum(tf.square(model(x) - y), axis=-1)) / len(x)
        return [g.numpy() for g in tape.gradient(loss, model.trainable_variables)]

    def norm(vectors):
        return np.sqrt(sum(np.square(each).sum() for each in vectors))

    g_v = []
    for t, start in enumerate(range(0, len(X), BATCH)):
        batch = [values[start : start + BATCH] for values in (X, Y, weights)]
        at, g = model.get_weights(), gradients(*batch)
        if t % k == 0:
            model.set_weights([w + rho * each / norm(g) for w, each in zip(at, g, strict=True)])
            g_s = gradients(*batch)
            cosine = sum((a * b).sum() for a, b in zip(g, g_s, strict=True)) / norm(g) / norm(g_s)
            g_v = [b - norm(g_s) * cosine * a / norm(g) for a, b in zip(g, g_s, strict=True)]
        else:
            g_s = [a + alpha * norm(g) / norm(g_v) * v for a, v in zip(g, g_v, strict=True)]
        model.set_weights([w - 0.1 * each for w, each in zip(at, g_s, strict=True)])
    return model.get_weights()


@pytest.mark.parametrize("interval", [1, 2, 3])
def test_it_is_an_own_loop_with_the_formula_sample_weights_and_all(interval, assert_close):
    weights = np.linspace(0, 2, len(X)).astype("float32")
    workload = Workload(dense, X, Y, fit={"sample_weight": weights})
    options = {"rho": 0.5, "interval": interval, "alpha": 0.3}
    ours = run(workload, "look_sam", options, fit={"epochs": 1})
    assert_close(ours.variables, loop(0.5, interval, 0.3, weights))


def test_with_an_interval_of_one_it_is_sam_and_without_alpha_sam_with_that_interval(assert_close):
    workload = Workload(dense, X, Y)
    assert_close(
        run(workload, "look_sam", {"rho": 0.5, "interval": 1}).variables, run(workload, "sam", {"rho": 0.5}).variables
    )
    assert_close(
        run(workload, "look_sam", {"rho": 0.5, "interval": 3, "alpha": 0.0}).variables,
        run(workload, "sam", {"rho": 0.5, "interval": 3}).variables,
    )


def test_a_turn_that_is_not_finite_is_not_kept():
    """A bad batch where it ascends costs one update, and spoils none of those up to the next ascent."""
    spec = {"skip_nonfinite": {}, "look_sam": {"rho": 0.5, "interval": 3}}
    model = prepared(Workload(dense, X, Y), spec)
    for x in (X[:4], X[4:8], X[8:12], np.full_like(X[:4], np.nan), X[12:16], X[16:20]):
        before = [kept.numpy() for kept in model.strategy_state["look_sam"]["turn"]]
        model.train_on_batch(x, Y[:4])
    assert int(model.optimizer.iterations.numpy()) == 5
    assert np.isfinite(model.get_weights()[0]).all()
    assert np.any(before[0] != 0)
    tf.nest.map_structure(
        np.testing.assert_array_equal, [kept.numpy() for kept in model.strategy_state["look_sam"]["turn"]], before
    )


def test_statistics_and_metrics_are_those_of_the_first_evaluation():
    """At a learning rate of zero the weights stay, to the bit, and everything else is as in plain training."""
    workload = Workload(functional, X, Y, lambda: {"optimizer": sgd(0.0), "loss": "mse", "metrics": ["mae"]})
    ours, plain = run(workload, "look_sam", {"rho": 0.5, "interval": 2}), run(workload)
    if KERAS_3:
        assert_same(ours._replace(state=None), plain)
    else:
        assert not differs(ours._replace(variables=ours.variables[:4]), plain._replace(variables=plain.variables[:4]))


def test_the_parts_of_a_batch_do_not_matter(assert_close):
    workload, options = Workload(dense, X, Y), {"rho": 0.5, "interval": 2}
    whole = run(workload, "look_sam", options)
    assert_close(run(workload, {"look_sam": options, "micro_batches": {"count": 3}}).variables, whole.variables)


def on(distribution):
    keras.utils.set_random_seed(0)
    with distribution.scope():
        model = trainstep.apply(dense(), "look_sam", rho=0.5, interval=2)
        model.compile(sgd(), "mse")
    model.fit(X[:20], Y[:20], batch_size=6, epochs=2, shuffle=False, verbose=0)  # Unequal shares, one of them empty.
    return model.get_weights(), [kept.numpy() for kept in model.strategy_state["look_sam"]["turn"]]


def test_several_replicas_are_one_device_and_keep_one_turn(mirrored_four, assert_close):
    assert_close(on(mirrored_four), on(tf.distribute.get_strategy()))


@pytest.mark.parametrize("other", ["sam", "gsam", "adversarial_weight_perturbation"])
def test_two_ascents_are_refused(other):
    with pytest.raises(errors.StrategyConflictError, match="gradient at other weights"):
        trainstep.plan(["look_sam", other])
