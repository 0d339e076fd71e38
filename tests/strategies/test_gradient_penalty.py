"""Gradient penalty: the loss, and how steep it is at each example."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from nets import X, Y, dense, one_weight, sgd, weight_of

import trainstep


def test_one_weight_by_hand():
    # l = (w x)^2 with x = 2: dl/dx = 2 w^2 x = 4 w^2, squared 16 w^4.
    # At w = 1 the derivatives are 2 w x^2 = 8 and 64 w^3 = 64.
    model = trainstep.apply(one_weight(1.0), "gradient_penalty", weight=0.5)
    model.compile(sgd(0.01), "mse")
    loss = model.train_on_batch(np.array([[2.0]]), np.array([[0.0]]))
    assert float(np.ravel(loss)[0]) == pytest.approx(4 + 0.5 * 16)
    assert weight_of(model) == pytest.approx(1 - 0.01 * (8 + 0.5 * 64), rel=1e-6)


def test_it_is_the_mean_over_the_examples(assert_close):
    def penalized(model):
        x = tf.constant(X)
        with tf.GradientTape() as outer:
            with tf.GradientTape() as inner:
                inner.watch(x)
                losses = tf.reduce_mean(tf.square(model(x) - Y), axis=-1)
            norms = tf.reduce_sum(tf.square(inner.gradient(losses, x)), axis=1)
            loss = tf.reduce_mean(losses) + 0.3 * tf.reduce_mean(norms)
        return outer.gradient(loss, model.trainable_variables)

    keras.utils.set_random_seed(0)
    model = dense()
    start = model.get_weights()
    expected = [w - 0.1 * g.numpy() for w, g in zip(start, penalized(model), strict=True)]
    trainstep.apply(model, "gradient_penalty", weight=0.3)
    model.compile(sgd(0.1), "mse")
    model.train_on_batch(X, Y)
    assert_close(model.get_weights(), expected)


def test_of_a_loss_that_is_a_sum_it_is_the_sum_by_hand():
    # l = (w x)^2: dl/dx = 2 w^2 x, its square 4 w^4 x^2. At w = 1, x = 1 and 2: losses 1 + 4, penalties 4 + 16; the
    # derivatives are 2 w x^2 = 2 + 8 and 16 w^3 x^2 = 16 + 64.
    model = trainstep.apply(one_weight(1.0), "gradient_penalty", weight=0.5)
    model.compile(sgd(0.01), keras.losses.MeanSquaredError(reduction="sum"))
    loss = model.train_on_batch(np.array([[1.0], [2.0]]), np.zeros((2, 1)))
    assert float(np.ravel(loss)[0]) == pytest.approx(5 + 0.5 * 20)
    assert weight_of(model) == pytest.approx(1 - 0.01 * (10 + 0.5 * 80), rel=1e-6)
