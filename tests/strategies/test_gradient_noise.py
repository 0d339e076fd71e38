"""Gradient noise: normal, of a variance that dies away, the same at every run of one seed."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from nets import KINDS, numbers, sgd
from runs import assert_same, run

import trainstep
from trainstep.strategies._updates import add_noise


def moves(updates: int, **options) -> np.ndarray:
    """Return how far 10,000 weights without gradient move in each update of SGD(1): (updates, weights)."""
    model = keras.Sequential(
        [keras.layers.Input((100,)), keras.layers.Dense(100, use_bias=False, kernel_initializer="zeros")]
    )
    trainstep.apply(model, "gradient_noise", **options)
    model.compile(sgd(1.0), lambda y, y_pred: 0.0 * tf.reduce_sum(y_pred))
    found, before = [], model.get_weights()[0]
    for _ in range(updates):
        model.train_on_batch(np.zeros((1, 100)), np.zeros((1, 100)))
        after = model.get_weights()[0]
        found.append((before - after).ravel())
        before = after
    return np.array(found)


def test_the_variance_is_that_of_equation_1():
    noise = moves(3, eta=0.3, gamma=0.55)
    # eta / (1 + t)^gamma; of 10,000 the sample variance is within 5 % (3.5 standard errors of sqrt(2 / 10,000)).
    np.testing.assert_allclose(noise.var(axis=1), 0.3 / np.arange(1, 4) ** 0.55, rtol=0.05)
    np.testing.assert_allclose(noise.mean(axis=1), 0, atol=4 * np.sqrt(0.3 / 10_000))
    assert np.abs(np.corrcoef(noise)[np.triu_indices(3, 1)]).max() < 0.05


def test_a_seed_gives_the_same_noise_and_another_seed_another():
    np.testing.assert_array_equal(moves(2, seed=1), moves(2, seed=1))
    assert np.abs(moves(1, seed=1) - moves(1, seed=2)).max() > 0.01


def test_weights_have_noise_of_their_own_and_none_stays_none():
    tensors = [tf.zeros((50,)), None, tf.zeros((50,))]
    one, nothing, other = add_noise(tensors, tf.constant(1.0), tf.constant([0, 0]))
    assert nothing is None
    assert np.abs(one - other).max() > 0.1


def test_the_sparse_gradient_of_an_embedding_becomes_dense():
    sparse = tf.IndexedSlices(tf.ones((2, 3)), tf.constant([1, 1]), tf.constant([4, 3]))
    [noisy] = add_noise([sparse], tf.constant(0.0), tf.constant([0, 0]))
    np.testing.assert_array_equal(noisy, [[0] * 3, [2] * 3, [0] * 3, [0] * 3])


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_without_noise_it_is_plain_keras(gamma):
    assert_same(run(KINDS["functional"], "gradient_noise", {"eta": 0.0, "gamma": gamma}), run(KINDS["functional"]))


def test_the_noise_keeps_the_dtype():
    [noisy] = add_noise([tf.constant(numbers(3), tf.float16)], tf.constant(0.1), tf.constant([0, 0]))
    assert noisy.dtype == tf.float16
