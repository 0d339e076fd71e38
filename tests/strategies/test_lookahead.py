"""Lookahead: slow weights that go a part of the way of the fast ones."""

import keras
import numpy as np
import pytest
from nets import BATCH, X, Y, dense, one_weight, sgd, weight_of

import trainstep
from trainstep._seam import KERAS_3


def test_by_hand():
    model = trainstep.apply(one_weight(1.0), "lookahead", k=2, alpha=0.5)
    model.compile(sgd(0.1), "mse")
    weights = []
    for _ in range(4):
        model.train_on_batch(np.ones((1, 1)), np.zeros((1, 1)))  # w = w - 0.1 * 2 w = 0.8 w
        weights.append(weight_of(model))
    # 0.8; 0.64, half of the way from 1: 0.82; 0.656; 0.5248, half of the way from 0.82: 0.6724.
    assert weights == pytest.approx([0.8, 0.82, 0.656, 0.6724], rel=1e-6)


def test_k_counts_updates_and_not_micro_batches():
    model = trainstep.apply(one_weight(1.0), {"lookahead": {"k": 2}, "gradient_accumulation": {"steps": 2}})
    model.compile(sgd(0.1), "mse")
    for _ in range(4):
        model.train_on_batch(np.ones((1, 1)), np.zeros((1, 1)))
    assert weight_of(model) == pytest.approx(0.82, rel=1e-6)


def test_slow_weights_start_where_training_does():
    """Weights that are set after `compile` count."""
    model = trainstep.apply(one_weight(1.0), "lookahead", k=1, alpha=0.5)
    model.compile(sgd(0.1), "mse")
    model.set_weights([np.array(2.0, "float32")])
    model.train_on_batch(np.ones((1, 1)), np.zeros((1, 1)))
    assert weight_of(model) == pytest.approx((2 + 1.6) / 2, rel=1e-6)


@pytest.mark.skipif(KERAS_3, reason="tensorflow-addons is for Keras 2")
@pytest.mark.parametrize(("k", "alpha"), [(1, 0.3), (3, 0.5), (5, 0.8)])
def test_it_is_that_of_tensorflow_addons(k, alpha, assert_close):
    tfa = pytest.importorskip("tensorflow_addons")

    def trained(model, optimizer):
        model.compile(optimizer, "mse")
        model.fit(X, Y, batch_size=BATCH, epochs=2, shuffle=False, verbose=0)
        return model.get_weights()

    def built():
        keras.utils.set_random_seed(0)
        return dense()

    inner = keras.optimizers.legacy.Adam(0.01)
    theirs = trained(built(), tfa.optimizers.Lookahead(inner, sync_period=k, slow_step_size=alpha))
    ours = trained(trainstep.apply(built(), "lookahead", k=k, alpha=alpha), keras.optimizers.legacy.Adam(0.01))
    assert_close(ours, theirs)
