"""AGC bounds the gradient of each output by the norm of its weights."""

import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from kernels import KINDS, taken
from nets import X, Y, dense, numbers, one_weight, sgd, weight_of

import trainstep
from trainstep import errors
from trainstep._seam import KERAS_3
from trainstep.strategies._units import outputs_of
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
    # Where the outputs are the rows, (3, 0) and (4, 1); where there are none, all is one.
    np.testing.assert_allclose(unit_norm(tf.constant([[3.0, 0.0], [4.0, 1.0]]), (0,)), [[3], [math.sqrt(17)]])
    np.testing.assert_allclose(unit_norm(tf.constant([[3.0, 0.0], [4.0, 0.0]]), None), [[5]])


layers = keras.layers


@pytest.mark.parametrize("kind", KINDS)
def test_the_unit_is_the_output_whatever_its_axis(kind):
    # Weights (3, 4) and (0, 1), of norms 5 and 1; bounds 2.5 and 0.5. Gradients 10 (3, 4) and 0.01 (3, 4), of norms 50
    # and 0.05: the first is clipped to 2.5 (3, 4) / 5, the other stays.
    build, x, by_outputs = KINDS[kind]
    kernel = by_outputs(np.array([[3, 4], [0, 1]], "float32"))
    expected = by_outputs(np.array([[1.5, 2], [0.03, 0.04]]))
    np.testing.assert_allclose(
        taken({"adaptive_gradient_clipping": {"clipping": 0.5}}, build(), x, kernel), expected, rtol=1e-4
    )


UNITS = {
    "depthwise 1D": (lambda: layers.DepthwiseConv1D(2), (3, 2), [(1, 2, 1), (1,)]),
    "depthwise 2D": (lambda: layers.DepthwiseConv2D(2, depth_multiplier=4), (3, 3, 2), [(1, 1, 2, 4), (1,)]),
    "separable 1D": (lambda: layers.SeparableConv1D(5, 2), (3, 2), [(1, 2, 1), (1, 1, 5), (1,)]),
    "separable 2D": (lambda: layers.SeparableConv2D(5, 2), (3, 3, 2), [(1, 1, 2, 1), (1, 1, 1, 5), (1,)]),
    "convolution": (lambda: layers.Conv1D(5, 2), (3, 2), [(1, 1, 5), (1,)]),
    "transposed 2D": (lambda: layers.Conv2DTranspose(5, 2), (3, 3, 2), [(1, 1, 5, 1), (1,)]),
    "transposed 3D": (lambda: layers.Conv3DTranspose(5, 2), (3, 3, 3, 2), [(1, 1, 1, 5, 1), (1,)]),
    "einsum": (lambda: layers.EinsumDense("...x,xy->...y", 5, bias_axes="y"), (3, 2), [(1, 5), (1,)]),
    "einsum, a kernel each": (lambda: layers.EinsumDense("bhd,hde->bhe", (2, 5)), (2, 3), [(2, 1, 5)]),
    "einsum, to a number": (lambda: layers.EinsumDense("bhd,hd->b", ()), (2, 3), [(1, 1)]),
    # A bias of any rank is one unit, and so are scales: one weight for each output.
    "recurrent": (lambda: layers.GRU(2), (3, 2), [(1, 6), (1, 6), (1, 1)]),
    "einsum that scales": (lambda: layers.EinsumDense("bhd,hd->bhd", (2, 3)), (2, 3), [(1, 1)]),
    "depthwise that scales": (lambda: layers.DepthwiseConv2D(1), (3, 3, 2), [(1, 1, 1, 1), (1,)]),
}
"""Layers, the shape of their input, and the shapes of the norms of the units of their weights."""


def shapes_of_norms(model: keras.Model) -> list[tuple[int, ...]]:
    pairs = zip(model.trainable_variables, outputs_of(model), strict=True)
    return [tuple(unit_norm(tf.convert_to_tensor(weight), outputs).shape) for weight, outputs in pairs]


@pytest.mark.parametrize("kind", UNITS)
def test_each_kind_of_layer_has_its_units(kind):
    build, shape, expected = UNITS[kind]
    assert shapes_of_norms(keras.Sequential([keras.Input(shape), build()])) == expected


def test_the_units_of_attention_are_those_of_each_head():
    x = keras.Input((5, 4))
    model = keras.Model(x, layers.MultiHeadAttention(num_heads=2, key_dim=3)(x, x))
    # Query, key and value lead from 4 entries to 2 heads of 3, the output from these to 4. Their biases are one each.
    assert shapes_of_norms(model) == [*[(1, 2, 3), (1, 1)] * 3, (1, 1, 4), (1,)]


@pytest.mark.skipif(not KERAS_3, reason="Keras 2 has no LoRA")
def test_of_the_kernels_of_lora_the_first_has_the_units_of_what_it_stands_for():
    layer = layers.EinsumDense("abc,cde->abde", (1, 2, 5), lora_rank=3)
    # (4, 2, 3) leads from 4 entries to 2 heads of 3, and (3, 5) from 3 to 5.
    assert shapes_of_norms(keras.Sequential([keras.Input((1, 4)), layer])) == [(1, 2, 3), (1, 5)]


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
    return keras.Sequential([keras.Input((6,)), layers.Dense(5, "tanh", name="hid"), layers.Dense(1, name="out")])


def test_a_pattern_that_matches_nothing_is_refused_with_what_there_is():
    with pytest.raises(errors.ModelConflictError, match=r"no trainable weight is called 'oout'.*hid/kernel"):
        trainstep.apply(named(), "adaptive_gradient_clipping", exclude=("oout",))


@pytest.mark.parametrize("other", ["gradient_clipping", "percentile_clipping"])
def test_beside_another_clipping_it_is_refused(other):
    with pytest.raises(errors.StrategyConflictError, match="both clip"):
        trainstep.apply(dense(), ["adaptive_gradient_clipping", other])
