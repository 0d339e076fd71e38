"""Adversarial training: the examples are where NumPy puts them, in the ball and in the range to the last float."""

import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from nets import (
    Workload,
    X,
    Y,
    dense,
    functional,
    one_weight,
    sgd,
    weight_of,
)
from runs import assert_same, fitted, prepared, run

import trainstep
from trainstep import errors
from trainstep.step import Batch
from trainstep.strategies._attacks import ascend, attackable
from trainstep.strategies._balls import l2_norm, perturbed, project, random_delta
from trainstep.strategies.adversarial import AdversarialOptions


def column(*values: float) -> np.ndarray:
    return np.array(values, "float32")[:, None]


# --- One weight, by hand ----------------------------------------------------------------------------------------------


def attacked(x: float, y: float, w: float = 1.0, rate: float = 0.1, **options) -> tuple[float, float]:
    """Return the loss reported, and w after one step."""
    model = trainstep.apply(one_weight(w), "adversarial", **options)
    model.compile(sgd(rate), "mse")
    loss = model.train_on_batch(column(x), column(y))
    return float(loss), weight_of(model)


def test_fgsm_by_hand():
    # w = 1, x = 2, y = 1: dL/dx = 2 (w x - y) w = 2 > 0, so x' = 2.5. There L = 1.5^2 and g = 2 * 1.5 * 2.5 = 7.5.
    assert attacked(2, 1, epsilon=0.5) == (2.25, np.float32(1) - np.float32(0.1) * np.float32(7.5))
    # y = 3: dL/dx = -2, so x' = 1.5. L = 1.5^2, g = 2 * (-1.5) * 1.5 = -4.5.
    assert attacked(2, 3, epsilon=0.5) == (2.25, np.float32(1) + np.float32(0.1) * np.float32(4.5))


def test_pgd_by_hand():
    # Three steps of 0.25 from x = 2 without a random start: 2.25, 2.5, and 2.75 projected back to 2.5.
    options = {"attack": "pgd", "epsilon": 0.5, "steps": 3, "step_size": 0.25, "random_start": False}
    assert attacked(2, 1, **options) == (2.25, np.float32(1) - np.float32(0.1) * np.float32(7.5))


@pytest.mark.parametrize("attack", ["fgsm", "pgd"])
def test_from_a_random_start_a_long_step_still_ends_on_the_border(attack):
    # One number to move, and the gradient never changes its sign: any start ends at x' = 2.5.
    steps = {"pgd": 7, "fgsm": None}[attack]
    options = {"attack": attack, "epsilon": 0.5, "steps": steps, "step_size": 1.0, "random_start": True}
    assert attacked(2, 1, **options)[0] == 2.25


def test_the_clip_range_holds():
    # x' = 2.5 is out of (0, 2.25): L = 1.25^2.
    assert attacked(2, 1, epsilon=0.5, clip_range=(0.0, 2.25))[0] == 1.25**2


def test_data_that_are_not_in_the_clip_range_are_refused():
    model = trainstep.apply(one_weight(), "adversarial", epsilon=0.1, clip_range=(0.0, 1.0))
    model.compile(sgd(), "mse")
    before = weight_of(model)
    with pytest.raises(errors.UnsupportedInputError, match=r"outside of clip_range=\(0\.0, 1\.0\).*\(0, 255\)"):
        model.fit(column(0.5, 200.0), column(1.0, 1.0), verbose=0)
    assert weight_of(model) == before


def test_clean_and_perturbed_examples_are_mixed_by_their_weight():
    # Clean: L = 1, g = 2 * 1 * 2 = 4. Perturbed: L = 2.25, g = 7.5. A quarter and three quarters.
    loss, w = attacked(2, 1, epsilon=0.5, clean_weight=0.25)
    assert loss == 0.25 * 1 + 0.75 * 2.25
    assert w == pytest.approx(1 - 0.1 * (0.25 * 4 + 0.75 * 7.5), rel=1e-6)


@pytest.mark.parametrize(
    "options", [{"epsilon": 0.0}, {"clean_weight": 1.0}, {"epsilon": 0.0, "attack": "pgd"}], ids=str
)
def test_without_a_budget_or_with_clean_examples_only_it_is_plain_keras(options):
    assert_same(run(Workload(functional, X, Y), "adversarial", options), run(Workload(functional, X, Y)))


# --- The closed form on a linear model --------------------------------------------------------------------------------

W = np.array([[0.5], [-2.0], [0.0], [1.0]], "float32")


def linear() -> keras.Model:
    x = keras.Input((4,))
    model = keras.Model(x, keras.layers.Dense(1, use_bias=False, name="out")(x))
    model.set_weights([W])
    return model


def examples_of(model: keras.Model, x: np.ndarray, y: np.ndarray, **options) -> np.ndarray:
    """Return the examples the model would be trained on."""
    trainstep.apply(model, "adversarial", **options)
    model.compile(sgd(), model_loss(model))
    return model.transform_batch(Batch(tf.constant(x), tf.constant(y))).x.numpy()


def model_loss(model: keras.Model):
    return keras.losses.BinaryCrossentropy(from_logits=True) if model.name == "logistic" else "mse"


def logistic() -> keras.Model:
    x = keras.Input((4,))
    model = keras.Model(x, keras.layers.Dense(1, use_bias=False, name="out")(x), name="logistic")
    model.set_weights([W])
    return model


LX = np.random.default_rng(5).normal(size=(6, 4)).astype("float32")
LY = np.array([[0], [1], [1], [0], [1], [0]], "float32")


def input_gradient(kind: str) -> np.ndarray:
    """Return dL/dx of each example but for a positive factor: (w x - y) w, or (sigmoid(w x) - y) w."""
    z = LX @ W
    residual = z - LY if kind == "linear" else 1 / (1 + np.exp(-z)) - LY
    return residual @ W.T


MODELS = {"linear": linear, "logistic": logistic}


@pytest.mark.parametrize("kind", MODELS)
def test_fgsm_is_the_sign_of_the_input_gradient(kind):
    found = examples_of(MODELS[kind](), LX, LY, epsilon=0.125)
    expected = LX.astype(np.float64) + 0.125 * np.sign(input_gradient(kind))
    # Rounded towards x: at most one float32 short of the border.
    np.testing.assert_allclose(found, expected, rtol=0, atol=2**-22)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("attack", ["fgsm", "pgd"])
def test_the_l2_attack_ends_epsilon_away_along_the_gradient(kind, attack):
    """The gradient of a linear score always points along w: every step goes the same way, to the border."""
    found = examples_of(MODELS[kind](), LX, LY, attack=attack, epsilon=0.125, norm="l2", random_start=False)
    gradient = input_gradient(kind)
    expected = LX + 0.125 * gradient / np.linalg.norm(gradient, axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", MODELS)
def test_pgd_in_linf_ends_in_the_corner(kind):
    found = examples_of(MODELS[kind](), LX, LY, attack="pgd", epsilon=0.125, random_start=False)
    np.testing.assert_allclose(found, LX + 0.125 * np.sign(input_gradient(kind)), rtol=0, atol=2**-22)


def test_where_the_gradient_is_zero_nothing_moves():
    # The third weight is 0: that input does not matter, and stays.
    found = examples_of(linear(), LX, LY, epsilon=0.125)
    np.testing.assert_array_equal(found[:, 2], LX[:, 2])
    for norm in ("linf", "l2"):
        model = linear()
        model.set_weights([np.zeros_like(W)])
        np.testing.assert_array_equal(examples_of(model, LX, LY, epsilon=0.125, norm=norm), LX)


def test_each_example_is_attacked_by_itself():
    """An example's perturbation is the same whatever else is in the batch, whatever its weight."""
    together = examples_of(linear(), LX, LY, epsilon=0.125, norm="l2")
    for i in range(len(LX)):
        alone = examples_of(linear(), LX[i : i + 1], LY[i : i + 1], epsilon=0.125, norm="l2")
        np.testing.assert_allclose(alone[0], together[i], rtol=0, atol=1e-6)


# --- The ball and the range, to the last float ------------------------------------------------------------------------

wide = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)
inputs = hnp.arrays(np.float32, (3, 4), elements=wide)
radii = st.floats(1e-6, 1e3)


@settings(max_examples=150, deadline=None, database=None)
@given(
    x=inputs,
    delta=inputs,
    epsilon=radii,
    norm=st.sampled_from(["linf", "l2"]),
    ends=st.none() | st.tuples(wide, wide),
)
def test_no_example_leaves_the_ball_or_the_range(x, delta, epsilon, norm, ends):
    clip_range = (min(ends), max(ends)) if ends and ends[0] != ends[1] else None
    found = perturbed(tf.constant(x), tf.constant(delta), epsilon, norm, clip_range).numpy()
    moved = found.astype(np.float64) - x.astype(np.float64)  # Exact, or rounded at 2**-53 of its size.
    if norm == "linf":
        assert (np.abs(moved) <= epsilon).all()
    else:
        assert (np.linalg.norm(moved, axis=1) <= epsilon * (1 + 4 * 2**-53)).all()
    if clip_range is not None:
        low, high = clip_range
        assert (found >= np.minimum(x, low)).all()
        assert (found <= np.maximum(x, high)).all()
        inside = (x >= low) & (x <= high)
        assert ((found >= low) & (found <= high))[inside].all()


@settings(max_examples=50, deadline=None, database=None)
@given(x=inputs, gradient=inputs, epsilon=radii, norm=st.sampled_from(["linf", "l2"]), steps=st.integers(1, 4))
def test_ascent_stays_in_the_ball_from_anywhere_in_it(x, gradient, epsilon, norm, steps):
    start = project(tf.constant(gradient[::-1].copy()), epsilon, norm)
    [found] = ascend(
        lambda moved: [tf.constant(gradient)], [tf.constant(x)], [start],
        epsilon=epsilon, norm=norm, steps=steps, step_size=epsilon, clip_range=None,
    )  # fmt: skip
    moved = found.numpy().astype(np.float64) - x.astype(np.float64)
    length = np.abs(moved).max() if norm == "linf" else np.linalg.norm(moved, axis=1).max()
    assert length <= epsilon * (1 + 4 * 2**-53)


@settings(max_examples=50, deadline=None, database=None)
@given(delta=inputs, epsilon=radii, norm=st.sampled_from(["linf", "l2"]))
def test_projection_moves_nothing_inside_the_ball_and_the_rest_to_its_border(delta, epsilon, norm):
    found = project(tf.constant(delta), epsilon, norm).numpy().astype(np.float64)
    for out, given_ in zip(found, delta.astype(np.float64), strict=True):
        length = np.abs(given_).max() if norm == "linf" else np.linalg.norm(given_)
        if length <= epsilon * (1 - 1e-6):
            np.testing.assert_array_equal(out, given_)
        elif norm == "l2":
            np.testing.assert_allclose(out, given_ * min(1, epsilon / length), rtol=1e-5, atol=1e-30)
        else:
            np.testing.assert_allclose(out, np.clip(given_, -epsilon, epsilon), rtol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("value", [1e-20, 1e-30, 3e38])
def test_the_direction_of_the_tiniest_and_the_largest_gradient_is_a_direction(norm, value):
    """Squares of such numbers leave the range of float32; their direction does not."""
    [found] = ascend(
        lambda moved: [tf.constant([[value, 0.0], [0.0, -value]])], [tf.zeros((2, 2))], [tf.zeros((2, 2))],
        epsilon=0.5, norm=norm, steps=1, step_size=0.5, clip_range=None,
    )  # fmt: skip
    np.testing.assert_allclose(found, [[0.5, 0.0], [0.0, -0.5]], atol=1e-6)


# --- The random start -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_random_start_is_uniform_in_the_ball(norm):
    delta = random_delta(tf.zeros((4000, 2)), 0.5, norm, tf.constant([0, 0])).numpy()
    lengths = np.abs(delta).max(axis=1) if norm == "linf" else np.linalg.norm(delta, axis=1)
    assert lengths.max() <= 0.5 * (1 + 1e-6)
    # In two dimensions a ball of half the radius holds a quarter of it: 1000 of 4000, standard deviation 27.
    assert abs((lengths < 0.25).sum() - 1000) < 6 * 27
    # Centred: each mean has a standard deviation of at most 0.29 / sqrt(4000) = 0.0046.
    assert np.abs(delta.mean(axis=0)).max() < 6 * 0.0046


def test_the_seed_decides_the_random_start_and_each_step_draws_anew():
    options = {"epsilon": 0.5, "random_start": True, "step_size": 1e-6}
    first = examples_of(linear(), LX, LY, **options, seed=1)
    np.testing.assert_array_equal(examples_of(linear(), LX, LY, **options, seed=1), first)
    assert not np.array_equal(examples_of(linear(), LX, LY, **options, seed=2), first)
    model = linear()
    examples_of(model, LX, LY, **options, seed=1)
    second = model.transform_batch(Batch(tf.constant(LX), tf.constant(LY))).x.numpy()
    assert not np.array_equal(second, first)


# --- Options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "steps", "length", "random"),
    [
        ({}, 1, 0.5, False),
        ({"random_start": True}, 1, 1.25 * 0.5, True),
        ({"attack": "pgd"}, 7, 2.5 * 0.5 / 7, True),
        ({"attack": "pgd", "steps": 10, "random_start": False}, 10, 2.5 * 0.5 / 10, False),
        ({"attack": "pgd", "step_size": 0.25}, 7, 0.25, True),
        ({"steps": 1}, 1, 0.5, False),
    ],
    ids=str,
)
def test_what_none_stands_for(options, steps, length, random):
    made = AdversarialOptions(epsilon=0.5, **options)
    assert (made.num_steps, made.length, made.starts_at_random) == (steps, pytest.approx(length), random)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 2}, "fgsm takes one step, not 2; use attack='pgd'"),
        ({"clip_range": (1.0, 0.0)}, "the lower end must be below the upper"),
        ({"clip_range": (1.0, 1.0)}, "the lower end must be below the upper"),
        ({"clip_range": (math.nan, 1.0)}, "clip_range"),
        ({"clip_range": (0.0,)}, "clip_range"),
        ({"attack": "fsgm"}, "attack: .*'fgsm' or 'pgd'.*Given: 'fsgm'"),
        ({"epsilon": math.inf}, "epsilon"),
        ({"norm": "l1"}, "norm"),
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(errors.InvalidOptionsError, match=message):
        trainstep.model_class(keras.Model, "adversarial", **options)


@pytest.mark.parametrize(
    ("options", "time"),
    [
        ({}, 5 / 3),
        ({"attack": "pgd"}, (3 + 2 * 7) / 3),
        ({"clean_weight": 0.5}, (3 + 2 + 3) / 3),
        ({"epsilon": 0.0}, 1.0),
        ({"clean_weight": 1.0}, 1.0),
    ],
    ids=str,
)
def test_the_cost_is_a_forward_and_an_input_backward_pass_per_step_of_the_attack(options, time):
    assert trainstep.plan("adversarial", **options).time == pytest.approx(time)


# --- It leaves no trace -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("attack", ["fgsm", "pgd"])
def test_the_attack_leaves_batch_norm_and_metrics_alone(attack, mode):
    """An attack that moves nothing off the spot is plain Keras: its passes count for no statistic and no metric."""
    options = {"attack": attack, "attack_mode": mode, "epsilon": 1e-30, "random_start": False}

    def no_dropout():
        x = keras.Input((6,))
        return keras.Model(x, keras.layers.Dense(1)(keras.layers.BatchNormalization()(keras.layers.Dense(5)(x))))

    workload = Workload(no_dropout, X, Y, lambda: {"optimizer": sgd(), "loss": "mse", "metrics": ["mae"]})
    assert_same(run(workload, "adversarial", options, {"epochs": 1})._replace(optimizer=[]),
                run(workload, fit={"epochs": 1})._replace(optimizer=[]))  # fmt: skip


def test_the_attack_in_inference_mode_draws_no_dropout():
    options = {"attack": "pgd", "epsilon": 1e-30, "random_start": False}
    assert_same(run(Workload(functional, X, Y), "adversarial", options), run(Workload(functional, X, Y)))


def test_the_trained_on_example_has_a_higher_loss_than_the_clean_one():
    clean = prepared(Workload(dense, X, Y), "standard").train_on_batch(X, Y)
    attack = prepared(Workload(dense, X, Y), "adversarial", {"epsilon": 0.1}).train_on_batch(X, Y)
    strong = prepared(Workload(dense, X, Y), "adversarial", {"epsilon": 0.1, "attack": "pgd"}).train_on_batch(X, Y)
    assert clean < attack
    assert clean < strong


def test_metrics_are_of_the_examples_trained_on():
    model = trainstep.apply(one_weight(1.0), "adversarial", epsilon=0.5)
    model.compile(sgd(0.0), "mse", metrics=["mae"])
    # x' = 2.5 as in test_fgsm_by_hand: |2.5 - 1| = 1.5.
    history = model.fit(column(2), column(1), verbose=0).history
    assert (history["loss"], history["mae"]) == ([2.25], [1.5])


def test_with_clean_examples_metrics_are_of_these():
    model = trainstep.apply(one_weight(1.0), "adversarial", epsilon=0.5, clean_weight=0.25)
    model.compile(sgd(0.0), "mse", metrics=["mae"])
    history = model.fit(column(2), column(1), verbose=0).history
    assert (history["loss"], history["mae"]) == ([0.25 * 1 + 0.75 * 2.25], [1.0])


def test_regularization_counts_once():
    """With equal clean and perturbed examples the mixture is the plain loss, regularizer and all."""

    def regularized():
        return keras.Sequential(
            [keras.Input((6,)), keras.layers.Dense(1, kernel_regularizer=keras.regularizers.L2(0.5))]
        )

    mixed = run(Workload(regularized, X, Y), "adversarial", {"epsilon": 1e-30, "clean_weight": 0.5})
    for a, b in zip(mixed.variables, run(Workload(regularized, X, Y)).variables, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


def test_a_subclassed_model_not_yet_built_is_attacked():
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.out = keras.layers.Dense(1)

        def call(self, x):
            return self.out(x)

    assert np.isfinite(
        fitted(prepared(Workload(Net, X, Y), "adversarial", {"attack": "pgd"}), Workload(Net, X, Y)).history["loss"]
    ).all()


def test_images_keep_their_shape():
    def net():
        return keras.Sequential(
            [keras.Input((4, 4, 2)), keras.layers.Conv2D(2, 3), keras.layers.Flatten(), keras.layers.Dense(1)]
        )

    x = np.random.default_rng(0).uniform(size=(8, 4, 4, 2)).astype("float32")
    for norm in ("linf", "l2"):
        model = prepared(
            Workload(net, x, Y[:8]), "adversarial", {"norm": norm, "clip_range": (0.0, 1.0), "epsilon": 0.25}
        )
        found = model.transform_batch(Batch(tf.constant(x), tf.constant(Y[:8]))).x
        assert found.shape == x.shape
        assert float(tf.reduce_min(found)) >= 0
        assert float(tf.reduce_max(found)) <= 1
        length = np.abs(found - x).max() if norm == "linf" else float(tf.reduce_max(l2_norm(found - x)))
        assert 0.1 < length <= 0.25 * (1 + 1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_inputs_are_moved_in_float32(dtype):
    """Neighbouring float16 numbers around 2 are 2**-9 apart: a ball of 2**-11 would hold none but the centre."""
    model = trainstep.apply(linear(), "adversarial", epsilon=2.0**-11)
    model.compile(sgd(), "mse")
    x = tf.cast(tf.fill((2, 4), 2.0), dtype)
    found = model.transform_batch(Batch(x, tf.zeros((2, 1)))).x
    assert found.dtype == tf.float32
    np.testing.assert_allclose(np.abs(found - tf.cast(x, tf.float32)).max(), 2.0**-11, rtol=1e-3)


@pytest.mark.skipif(keras.__version__[0] != "2", reason="Keras 3 has no `add_metric`.")
@pytest.mark.parametrize("options", [{}, {"attack": "pgd"}, {"attack_mode": "training"}], ids=str)
def test_the_attack_leaves_metrics_of_layers_alone(options):
    inputs = keras.Input((6,))
    model = keras.Model(inputs, keras.layers.Dense(1)(inputs))
    model.add_metric(tf.reduce_mean(model.output), name="mean", aggregation="mean")
    trainstep.apply(model, "adversarial", **options).compile(sgd(0.0), "mse")
    model.train_on_batch(X[:4], Y[:4])
    [mean] = [metric for metric in model.metrics if metric.name == "mean"]
    assert float(mean.count) == 1.0


def test_inputs_are_chosen_by_the_keys_of_a_dict_with_all_that_is_under_one():
    x = {"image": (tf.zeros((2, 3)), tf.zeros((2, 3), tf.int32)), "other": tf.zeros((2, 1))}
    assert attackable(x, None, None) == [True, False, True]
    assert attackable(x, None, ["other"]) == [False, False, True]
    with pytest.raises(errors.UnsupportedInputError, match="image: int32"):
        attackable(x, None, ["image"])
