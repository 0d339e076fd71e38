"""Gradient centralization takes the mean out of what each output's weights are told."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from kernels import KINDS, taken
from nets import BATCH, X, Y, dense, numbers, sgd

import trainstep
from trainstep.strategies.gradient_centralization import centralize


def test_by_hand():
    # Columns are outputs: means 2 and 4.
    gradient = tf.constant([[1.0, 2.0], [3.0, 6.0]])
    np.testing.assert_array_equal(centralize(gradient), [[-1, -2], [1, 2]])


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (3, 3, 2, 4)], ids=["dense", "1D", "2D"])
def test_kernels_of_any_rank_lose_the_mean_over_all_axes_but_the_last(shape):
    gradient = numbers(*shape)
    expected = gradient - gradient.mean(axis=tuple(range(len(shape) - 1)), keepdims=True)
    np.testing.assert_allclose(centralize(tf.constant(gradient)), expected, rtol=1e-6, atol=1e-6)


def test_vectors_and_none_stay():
    vector = tf.constant([1.0, 2.0])
    assert centralize(vector) is vector
    assert centralize(None) is None
    matrix = tf.constant([[1.0, 2.0], [3.0, 6.0]])
    assert centralize(matrix, outputs=None) is matrix


layers = keras.layers


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_is_that_of_each_output_whatever_its_axis(kind):
    # Gradients 10 (3, 4) and 0.01 (3, 4), whose means are 35 and 0.035.
    build, x, by_outputs = KINDS[kind]
    expected = by_outputs(np.array([[-5, 5], [-0.005, 0.005]]))
    np.testing.assert_allclose(
        taken("gradient_centralization", build(), x, by_outputs(np.zeros((2, 2), "float32"))), expected, rtol=1e-4
    )


def test_biases_of_two_axes_are_left_alone():
    """A GRU has one for the inputs and one for its state, which are told the same: less their mean, nothing."""

    def bias_after_a_step(strategy: str) -> np.ndarray:
        keras.utils.set_random_seed(0)
        model = trainstep.apply(keras.Sequential([keras.Input((3, 2)), layers.GRU(2)]), strategy)
        model.compile(sgd(), "mse")
        model.train_on_batch(numbers(4, 3, 2), numbers(4, 2))
        return model.get_weights()[2]

    bias = bias_after_a_step("gradient_centralization")
    np.testing.assert_array_equal(bias, bias_after_a_step("standard"))
    assert np.abs(bias).min() > 0


def test_a_sparse_gradient_is_centralized_as_what_it_stands_for():
    sparse = tf.IndexedSlices(tf.constant([[3.0, 6.0]]), tf.constant([1]), tf.constant([3, 2]))
    np.testing.assert_array_equal(centralize(sparse), [[-1, -2], [2, 4], [-1, -2]])


def test_the_table_of_an_embedding_is_left_alone():
    """Its rows are inputs of nothing: of a batch of token 1 alone, no other row may move."""
    net = keras.Sequential([keras.Input((1,), dtype="int32"), keras.layers.Embedding(3, 2), keras.layers.Dense(1)])
    model = trainstep.apply(net, "gradient_centralization")
    model.compile(sgd(), "mse")
    before = model.layers[0].get_weights()[0]
    model.train_on_batch(np.ones((2, 1)), np.ones((2, 1, 1)))
    moved = np.abs(model.layers[0].get_weights()[0] - before).max(axis=1)
    assert moved[1] > 0
    assert moved[0] == moved[2] == 0


def test_for_convolutions_alone_a_dense_kernel_stays():
    gradient = tf.constant(numbers(3, 4))
    assert centralize(gradient, lowest_rank=3) is gradient


def trained(**options) -> list[np.ndarray]:
    keras.utils.set_random_seed(0)
    model = trainstep.apply(dense(), "gradient_centralization", **options)
    model.compile(sgd(), "mse")
    model.fit(X, Y, batch_size=BATCH, shuffle=False, verbose=0)
    return model.get_weights()


def test_the_sum_of_what_leads_to_an_output_never_changes_under_sgd():
    """The paper's projection, section 4.2: e^T (w_t - w_0) = 0."""
    keras.utils.set_random_seed(0)
    before = dense().get_weights()
    for start, end in zip(before[::2], trained()[::2], strict=True):
        np.testing.assert_allclose(end.sum(axis=0), start.sum(axis=0), atol=1e-5)
        assert np.abs(end - start).max() > 1e-3


def test_it_is_an_own_loop_with_the_formula(assert_close):
    keras.utils.set_random_seed(0)
    model = dense()
    for start in range(0, len(X), BATCH):
        x, y = X[start : start + BATCH], Y[start : start + BATCH]
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x) - y))
        gradients = [g.numpy() for g in tape.gradient(loss, model.trainable_variables)]
        moved = [
            w - 0.1 * (g - g.mean(axis=0, keepdims=True) if g.ndim > 1 else g)
            for w, g in zip(model.get_weights(), gradients, strict=True)
        ]
        model.set_weights(moved)
    assert_close(trained(), model.get_weights())
