"""AGC bounds the gradient of each output by the norm of its weights."""

import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from nets import X, Y, dense, numbers, one_weight, sgd, weight_of

import trainstep
from trainstep import errors
from trainstep.strategies.adaptive_gradient_clipping import clip_unitwise, unit_norm


def stepped(x: float, y: float, initial: float = 1.0, **options) -> float:
    """Return w after one step of SGD(0.1)."""
    model = trainstep.apply(one_weight(initial), "adaptive_gradient_clipping", **options)
    model.compile(sgd(0.1), "mse")
    model.train_on_batch(np.array([[x]]), np.array([[y]]))
    return weight_of(model)


def test_one_weight_by_hand():
    # w = 1, x = 2, y = -1: g = 2 (w x - y) x = 12, above 0.5 * |w|: clipped to 0.5.
    assert stepped(2, -1, clipping=0.5) == pytest.approx(1 - 0.1 * 0.5, rel=1e-6)
    # A bound of 12 |w| changes nothing, to the last bit.
    assert stepped(2, -1, clipping=12.0) == np.float32(1) - np.float32(0.1) * np.float32(12)


def test_weights_near_zero_are_taken_for_eps():
    # w = 0: g = 2 (0 - y) x = 4 with y = -1, x = 2; the bound is 0.5 * eps = 0.05.
    assert stepped(2, -1, initial=0.0, clipping=0.5, eps=0.1) == pytest.approx(-0.1 * 0.05, rel=1e-5)


def test_each_output_is_a_unit_and_a_vector_is_one():
    # Columns (3, 4) and (0, 1).
    np.testing.assert_allclose(unit_norm(tf.constant([[3.0, 0.0], [4.0, 1.0]])), [[5, 1]])
    np.testing.assert_allclose(unit_norm(tf.constant([3.0, 4.0])), [5])
    np.testing.assert_allclose(unit_norm(tf.constant(-3.0)), 3)


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (3, 3, 2, 4)], ids=["dense", "1D", "2D"])
def test_it_is_equation_3_of_the_paper_in_numpy(shape):
    gradient, weight = 5 * numbers(*shape), numbers(*shape, seed=1)
    axes = tuple(range(len(shape) - 1))

    def norm(a):
        return np.sqrt(np.square(a).sum(axis=axes, keepdims=True))

    bound = 0.3 * np.maximum(norm(weight), 1e-3)
    expected = np.where(norm(gradient) > bound, gradient * bound / norm(gradient), gradient)
    np.testing.assert_allclose(
        clip_unitwise(tf.constant(gradient), tf.constant(weight), 0.3, 1e-3), expected, rtol=1e-5
    )


def test_what_is_not_finite_stays_so_and_spoils_no_other_unit():
    clipped = clip_unitwise(tf.constant([[math.inf, 1.0], [1.0, 1.0]]), tf.ones((2, 2)), 0.1, 1e-3).numpy()
    assert np.isnan(clipped[:, 0]).all()
    assert np.isfinite(clipped[:, 1]).all()


def test_what_is_excluded_by_name_is_left_alone():
    def trained(**options):
        keras.utils.set_random_seed(0)
        model = trainstep.apply(named(), "adaptive_gradient_clipping", clipping=1e-3, **options)
        start = model.get_weights()
        model.compile(sgd(), "mse")
        model.train_on_batch(X, Y)
        return [np.abs(a - b).max() for a, b in zip(model.get_weights(), start, strict=True)]

    first, last = trained()[0], trained()[2]
    assert trained(exclude=("out",))[0] == first
    assert trained(exclude=("out",))[2] > 10 * last
    assert trained(exclude=("*/kernel",))[0] > 10 * first


def named() -> keras.Model:
    layers = keras.layers
    return keras.Sequential([keras.Input((6,)), layers.Dense(5, "tanh", name="hid"), layers.Dense(1, name="out")])


def test_a_pattern_that_matches_nothing_is_refused_with_what_there_is():
    model = trainstep.apply(named(), "adaptive_gradient_clipping", exclude=("oout",))
    model.compile(sgd(), "mse")
    with pytest.raises(errors.ModelConflictError, match=r"no trainable weight is called 'oout'.*hid/kernel"):
        model.train_on_batch(X, Y)


@pytest.mark.parametrize("other", ["gradient_clipping", "percentile_clipping"])
def test_beside_another_clipping_it_is_refused(other):
    with pytest.raises(errors.StrategyConflictError, match="both clip"):
        trainstep.apply(dense(), ["adaptive_gradient_clipping", other])
