"""The control: plain Keras, and nothing else."""

import keras
import numpy as np
from nets import one_weight, sgd, weight_of

import trainstep


def test_one_step_by_hand():
    model = trainstep.apply(one_weight(), "standard")
    model.compile(sgd(0.1), "mse")
    # w = 1, x = 1 and 2, y = 3 and 1: residuals w x - y = -2 and 1, loss (4 + 1) / 2 = 2.5.
    # g = mean of 2 (w x - y) x = (-4 + 4) / 2 = 0 for these two; for x = 2, y = 1 alone: g = 2 * 1 * 2 = 4.
    assert model.train_on_batch(np.array([[1.0], [2.0]]), np.array([[3.0], [1.0]])) == 2.5
    assert weight_of(model) == 1.0
    model.train_on_batch(np.array([[2.0]]), np.array([[1.0]]))
    assert weight_of(model) == np.float32(1) - np.float32(0.1) * np.float32(4)


def test_it_costs_nothing_and_keeps_nothing():
    description = trainstep.describe("standard")
    assert (description.cost.forward, description.cost.backward, description.cost.time) == (0, 0, 1.0)
    assert description.options.get("properties", {}) == {}
    model = trainstep.apply(keras.Sequential([keras.layers.Dense(1)]), "standard")
    model.compile(sgd(), "mse")
    model.fit(np.ones((4, 2)), np.ones((4, 1)), verbose=0)
    assert model.strategy_state == {"standard": {}}
