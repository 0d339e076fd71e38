"""AutoClip bounds the norm of the gradient by a percentile of those before."""

import itertools
import math

import numpy as np
import pytest
import tensorflow as tf
from nets import one_weight, sgd, weight_of

import trainstep
from trainstep.strategies.percentile_clipping import percentile_of


def trained(gradients: list[float], **options) -> list[float]:
    """Return what is taken from w in each step of SGD(1), for these gradients of the one weight."""
    model = trainstep.apply(one_weight(0.0), "percentile_clipping", **options)
    # loss = g w, so that its gradient is the label g.
    model.compile(sgd(1.0), lambda y, y_pred: tf.reduce_sum(y * y_pred))
    weights = [0.0]
    for gradient in gradients:
        model.train_on_batch(np.ones((1, 1)), np.array([[gradient]], "float32"))
        weights.append(weight_of(model))
    return [float(before - after) for before, after in itertools.pairwise(weights)]


def test_the_median_of_the_norms_by_hand():
    # Norms 4 | 4, 2 | 4, 2, 6 | 4, 2, 6, 1: medians 4, 3, 4, 3.
    assert trained([4, 2, -6, 1], percentile=50.0) == pytest.approx([4, 2, -4, 1])


def test_only_the_last_ones_count():
    # The median of the last two: 4 | (4, 2) 3 | (2, 6) 4 | (6, 1) 3.5 | (1, 8) 4.5.
    assert trained([4, 2, 6, 1, 8], percentile=50.0, history=2) == pytest.approx([4, 2, 4, 1, 4.5])


def test_a_norm_that_is_not_finite_is_forgotten():
    model = trainstep.apply(one_weight(0.0), {"percentile_clipping": {"percentile": 50.0}, "skip_nonfinite": {}})
    model.compile(sgd(1.0), lambda y, y_pred: tf.reduce_sum(y * y_pred))
    for gradient in (2.0, math.nan, 4.0):  # The last is clipped to 3.
        model.train_on_batch(np.ones((1, 1)), np.array([[gradient]], "float32"))
    assert weight_of(model) == pytest.approx(-(2 + 3))


@pytest.mark.parametrize("percentile", [0, 10, 37.5, 50, 99, 100])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_percentiles_are_those_of_numpy(count, percentile):
    values = np.random.default_rng(0).random(7).astype("float32")
    values[count:] = np.inf
    found = percentile_of(tf.constant(values), tf.constant(count), percentile)
    assert float(found) == pytest.approx(np.percentile(values[:count], percentile), rel=1e-5)
