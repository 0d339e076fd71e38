"""Clipping bounds the gradient the optimizer sees: of the whole batch, entry by entry or by its norm."""

import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from nets import BATCH, Workload, X, Y, dense, functional, multi, one_weight, sgd, weight_of
from runs import assert_same, run

import trainstep
from trainstep import errors
from trainstep.strategies.gradient_clipping import GradientClippingOptions, clip


def stepped(x: float, y: float, **options) -> float:
    """Return w after one step of SGD(0.1) from w = 1."""
    model = trainstep.apply(one_weight(1.0), "gradient_clipping", **options)
    model.compile(sgd(0.1), "mse")
    model.train_on_batch(np.array([[x]]), np.array([[y]]))
    return weight_of(model)


@pytest.mark.parametrize("kind", ["global_clipnorm", "clipnorm", "clipvalue"])
def test_one_weight_by_hand(kind):
    # w = 1, x = 2, y = -1: g = 2 (w x - y) x = 2 * 3 * 2 = 12. Above 3: clipped to 3, so w = 1 - 0.1 * 3.
    assert stepped(2, -1, **{kind: 3.0}) == np.float32(1) - np.float32(0.1) * np.float32(3)
    # y = 5: g = 2 * (-3) * 2 = -12, clipped to -3.
    assert stepped(2, 5, **{kind: 3.0}) == np.float32(1) + np.float32(0.1) * np.float32(3)
    # 12 is not above 12, nor above 100: as it is, to the last bit.
    assert stepped(2, -1, **{kind: 12.0}) == np.float32(1) - np.float32(0.1) * np.float32(12)
    assert stepped(2, -1, **{kind: 100.0}) == np.float32(1) - np.float32(0.1) * np.float32(12)


def test_the_default_is_a_global_norm_of_one():
    assert stepped(2, -1) == np.float32(1) - np.float32(0.1)
    assert GradientClippingOptions().global_clipnorm == 1.0


@pytest.mark.parametrize(
    "options", [{"global_clipnorm": 0.5}, {"clipnorm": 0.3}, {"clipvalue": 0.05}], ids=lambda o: next(iter(o))
)
@pytest.mark.parametrize("build", [dense, functional], ids=lambda build: build.__name__)
def test_it_is_the_flag_of_kerass_own_optimizer(options, build, assert_close):
    """On one device, in float32, with nothing else in the way, Keras's flag and the strategy are the same formula."""
    oracle = run(Workload(build, X, Y, lambda: {"optimizer": sgd(0.1, **options), "loss": "mse"}))
    ours = run(Workload(build, X, Y, lambda: {"optimizer": sgd(0.1), "loss": "mse"}), "gradient_clipping", options)
    assert_close([ours.variables, ours.history], [oracle.variables, oracle.history])


def test_adam_sees_the_clipped_gradient(assert_close):
    def adam(**flags):
        return lambda: {"optimizer": keras.optimizers.Adam(0.01, **flags), "loss": "mse"}

    oracle = run(Workload(dense, X, Y, adam(clipvalue=0.01)))
    ours = run(Workload(dense, X, Y, adam()), "gradient_clipping", {"clipvalue": 0.01})
    assert_close(ours.variables, oracle.variables)


@pytest.mark.parametrize("kind", ["global_clipnorm", "clipnorm", "clipvalue"])
def test_infinity_and_a_bound_never_reached_clip_nothing(kind):
    workload = Workload(functional, X, Y)
    assert_same(run(workload, "gradient_clipping", {kind: math.inf}), run(workload))
    # Operation by operation: in a graph TensorFlow fuses a backward pass otherwise where something looks at gradients.
    assert_same(run(workload, "gradient_clipping", {kind: 1e30}, run_eagerly=True), run(workload, run_eagerly=True))


finite = st.floats(-1e10, 1e10, width=32, allow_subnormal=False)  # TensorFlow flushes subnormal numbers to zero.
arrays = hnp.arrays(np.float32, hnp.array_shapes(max_dims=2, max_side=4), elements=finite)


@settings(max_examples=30, deadline=None, database=None)
@given(gradients=st.lists(arrays, min_size=1, max_size=3), bound=st.floats(2.0**-20, 2.0**20, width=32))
def test_what_comes_out_is_within_the_bound_and_points_the_same_way(gradients, bound):
    tensors = [tf.constant(gradient) for gradient in gradients]
    norm = math.sqrt(sum(float(np.sum(np.square(gradient, dtype=np.float64))) for gradient in gradients))
    clipped = [g.numpy().astype(np.float64) for g in clip(tensors, GradientClippingOptions(global_clipnorm=bound))]
    length = math.sqrt(sum(float(np.sum(np.square(gradient))) for gradient in clipped))
    # A float32 norm, division and product: each within 2**-24, the norm's sum of at most 48 squares within 48 * 2**-24.
    assert length <= bound * (1 + 64 * 2**-24)
    share = min(1.0, bound / norm) if norm else 1.0
    for out, gradient in zip(clipped, gradients, strict=True):
        np.testing.assert_allclose(out, gradient.astype(np.float64) * share, rtol=1e-4, atol=1e-30)
    by_value = clip(tensors, GradientClippingOptions(clipvalue=bound))
    for out, gradient in zip(by_value, gradients, strict=True):
        np.testing.assert_array_equal(out.numpy(), np.clip(gradient, -np.float32(bound), np.float32(bound)))


def test_global_and_per_weight_norms_by_hand():
    gradients = [tf.constant([3.0, 0.0]), None, tf.constant([4.0])]
    # ||g|| = 5 over all: times 2.5 / 5. Each by itself: 3 to 2.5, 4 to 2.5.
    together = clip(gradients, GradientClippingOptions(global_clipnorm=2.5))
    assert [None if g is None else g.numpy().tolist() for g in together] == [[1.5, 0.0], None, [2.0]]
    apart = clip(gradients, GradientClippingOptions(clipnorm=2.5))
    assert [None if g is None else g.numpy().tolist() for g in apart] == [[2.5, 0.0], None, [2.5]]


@pytest.mark.parametrize("kind", ["global_clipnorm", "clipnorm", "clipvalue"])
def test_a_sparse_gradient_is_clipped_as_the_dense_one_it_stands_for(kind):
    # Row 1 is there twice: 3 + 4 = 7 in all, where the norm of the slices as they lie would be 5.
    sparse = tf.IndexedSlices(tf.constant([[3.0], [4.0]]), tf.constant([1, 1]), tf.constant([3, 1]))
    [clipped] = clip([sparse], GradientClippingOptions(**{kind: 3.5}))
    assert tf.convert_to_tensor(clipped).numpy().tolist() == [[0.0], [3.5], [0.0]]


@pytest.mark.parametrize("kind", ["global_clipnorm", "clipnorm", "clipvalue"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_noticeable(kind, bad):
    [out] = clip([tf.constant([bad, 1.0])], GradientClippingOptions(**{kind: 0.5}))
    assert not np.isfinite(out.numpy()[0])


@pytest.mark.parametrize("kind", ["global_clipnorm", "clipnorm"])
def test_a_norm_beyond_float32_stays_noticeable(kind):
    """3e30 squared is infinity, and one over that zero: it must not become the gradient in silence."""
    [out] = clip([tf.constant([3e30, 4e30])], GradientClippingOptions(**{kind: 0.5}))
    assert np.isnan(out.numpy()).all()


def test_a_zero_gradient_stays_zero():
    for kind in ("global_clipnorm", "clipnorm", "clipvalue"):
        [out] = clip([tf.zeros(3)], GradientClippingOptions(**{kind: 0.5}))
        assert out.numpy().tolist() == [0, 0, 0]


def test_more_than_one_bound_is_refused():
    with pytest.raises(errors.InvalidOptionsError, match="exactly one of global_clipnorm, clipnorm and clipvalue"):
        trainstep.model_class(keras.Model, "gradient_clipping", clipnorm=1.0, clipvalue=1.0)


def test_clipping_keeps_no_state():
    model = trainstep.apply(multi(), "gradient_clipping")
    model.compile(sgd(), "mse")
    assert model.strategy_state == {"gradient_clipping": {}}


@pytest.mark.parametrize("batch_size", [1, BATCH, 22])
def test_the_update_is_never_longer_than_the_bound_times_the_rate(batch_size):
    model = trainstep.apply(dense(), "gradient_clipping", global_clipnorm=0.01)
    model.compile(sgd(1.0), "mse")
    before = model.get_weights()
    model.train_on_batch(X[:batch_size], Y[:batch_size])
    change = np.concatenate([(a - b).ravel() for a, b in zip(model.get_weights(), before, strict=True)])
    assert np.linalg.norm(change) == pytest.approx(0.01, rel=1e-4)
