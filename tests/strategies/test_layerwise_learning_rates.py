"""Layerwise learning rates: each layer goes its share of the way the optimizer takes it."""

import keras
import numpy as np
import pytest
from nets import X, Y, sgd

import trainstep
from trainstep import errors
from trainstep.strategies.layerwise_learning_rates import depths


def net() -> keras.Model:
    keras.utils.set_random_seed(0)
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(5, "tanh", name="a"),
            layers.Dense(4, "tanh", name="b"),
            layers.Dense(1, name="c"),
        ]
    )


def step(optimizer, **options) -> list[np.ndarray]:
    """Return how far each weight moved in one step."""
    model = net() if not options else trainstep.apply(net(), "layerwise_learning_rates", **options)
    before = model.get_weights()
    model.compile(optimizer, "mse")
    model.train_on_batch(X, Y)
    return [after - start for after, start in zip(model.get_weights(), before, strict=True)]


OPTIMIZERS = [lambda: sgd(0.1), lambda: keras.optimizers.Adam(0.01), lambda: keras.optimizers.AdamW(0.01)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=["SGD", "Adam", "AdamW"])
def test_the_last_layer_has_the_learning_rate_and_each_before_a_share_of_it(optimizer, assert_close):
    plain, ours = step(optimizer()), step(optimizer(), decay=0.5)
    assert_close(ours, [m * move for m, move in zip((0.25, 0.25, 0.5, 0.5, 1, 1), plain, strict=True)])


def test_a_multiplier_by_name_replaces_that_of_the_depth(assert_close):
    plain, ours = step(sgd()), step(sgd(), decay=0.5, multipliers={"a": 2.0, "*/bias": 0.0})
    assert_close(ours, [m * move for m, move in zip((2, 0, 0.5, 0, 1, 0), plain, strict=True)])


def test_depth_is_of_layers_from_the_end():
    assert depths(net().trainable_variables) == [2, 2, 1, 1, 0, 0]


def test_a_name_that_is_none_is_refused():
    with pytest.raises(errors.ModelConflictError, match=r"no trainable weight is called 'aa'.*a/kernel"):
        step(sgd(), multipliers={"aa": 1.0})
