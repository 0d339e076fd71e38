"""Defects known from other systems, each as the truth that has to hold here."""

import subprocess
import sys
import time

import keras
import numpy as np
import pytest
import tensorflow as tf
from catalogue import EVALUATING, NAMES, NEUTRAL, REPRESENTATIVES, declaration, spec_of, task_of
from nets import (
    BATCH,
    NUMBERS,
    Workload,
    X,
    Y,
    dense,
    functional,
    masked,
    one_weight,
    sgd,
    tokens,
    weight_of,
    workload_for,
)
from runs import assert_same, fitted, optimizer_variables, prepared, run

import trainstep

pytestmark = pytest.mark.filterwarnings("ignore:mixed_precision computes in float16:UserWarning")

L2 = keras.regularizers.L2(0.5)
F16 = {"dtype": "float16", "initial_scale": 2.0**10}  # At the default of 2**15 a gradient of 2 is too large at first.


def column(*values: float) -> np.ndarray:
    return np.array(values, "float32")[:, None]


def half(spec: dict, rate: float = 0.125) -> keras.Model:
    """Return y = w * x whose weight computes in float16, w = 1."""
    x = keras.Input((1,))
    model = keras.Model(x, keras.layers.Activation("linear")(one_weight(1.0).layers[-1](x)))
    trainstep.apply(model, {"mixed_precision": F16} | spec)
    model.compile(sgd(rate), "mse")
    return model


def test_the_loss_scale_never_reaches_zero_and_the_next_good_batch_trains():
    """Trap 1: after 142 skips in a row Keras 3's scale is 0, and a good batch makes every weight NaN."""
    model = half({"mixed_precision": F16 | {"max_consecutive_skips": 1000}})
    for _ in range(150):
        model.train_on_batch(column(np.nan), column(1))
    assert model.strategy_state["mixed_precision"]["scale"].numpy() == 1.0
    model.train_on_batch(column(2), column(1))
    assert weight_of(model) == 1 - 0.125 * 4  # g = 2 (w x - y) x = 4


def test_the_loss_scale_never_reaches_infinity():
    """Trap 2: Keras 3's scale has no cap, and at infinity no step is ever applied."""
    model = half({"mixed_precision": F16 | {"growth_interval": 1}}, rate=0.0)
    for _ in range(140):  # 2**10 * 2**140 is beyond float32.
        model.train_on_batch(column(0), column(0))
    assert model.strategy_state["mixed_precision"]["scale"].numpy() == 2.0**24


def test_schedules_count_updates():
    """Trap 3: a learning rate of 1/2, 1/4, ... per update, not per micro-batch."""
    model = trainstep.apply(one_weight(), "gradient_accumulation", steps=2)
    model.compile(sgd(keras.optimizers.schedules.ExponentialDecay(0.5, 1, 0.5)), "mse")
    for _ in range(4):
        # y = w - 1 keeps the gradient at 2 (w x - y) x = 2 for x = 1.
        model.train_on_batch(column(1), column(weight_of(model) - 1))
    # Two updates: 0.5 * 2 and 0.25 * 2.
    assert weight_of(model) == 1 - 1 - 0.5


def test_averages_count_updates():
    """Trap 4: Keras's own moving average of the weights moves once per update."""
    small = trainstep.apply(dense(), "gradient_accumulation", steps=4)
    big = dense()
    big.set_weights(small.get_weights())
    for model, size in ((small, BATCH), (big, 4 * BATCH)):
        model.compile(sgd(0.1, use_ema=True, ema_momentum=0.5), "mse")
        model.fit(X[:16], Y[:16], batch_size=size, epochs=4, shuffle=False, verbose=0)
    averages = [v for v in optimizer_variables(big.optimizer) if v.shape == (6, 5)]
    [found] = [v for v in optimizer_variables(small.optimizer) if v.shape == (6, 5)][:1]
    np.testing.assert_allclose(found, averages[0], rtol=2e-5, atol=2e-5)


def test_the_last_window_is_not_lost():
    """Trap 5: ten batches in windows of four are three updates, not two."""
    model = prepared(Workload(dense, X, Y), "gradient_accumulation", {"steps": 4})
    fitted(model, Workload(dense, X[:20], Y[:20]), batch_size=2, epochs=1)
    assert int(model.optimizer.iterations.numpy()) == 3


def test_micro_batches_of_four_and_two_are_the_batch_of_six():
    """Trap 6: a mean of examples, not of means."""
    small = prepared(Workload(dense, X, Y), "gradient_accumulation", {"steps": 2})
    big = prepared(Workload(dense, X, Y))
    fitted(small, Workload(dense, X[:6], Y[:6]), batch_size=4, epochs=3)
    fitted(big, Workload(dense, X[:6], Y[:6]), batch_size=6, epochs=3)
    for a, b in zip(small.get_weights(), big.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_accumulation_runs_under_a_mirrored_strategy(mirrored):
    """Trap 7: no "merge_call called while defining a new graph"."""
    with mirrored.scope():
        model = prepared(Workload(dense, X, Y), "gradient_accumulation", {"steps": 2})
    fitted(model, Workload(dense, X[:20], Y[:20]), epochs=1)
    assert int(model.optimizer.iterations.numpy()) == 3


def half_policy(build):
    """Build a model under Keras's own float16 policy."""

    def made():
        keras.mixed_precision.set_global_policy("mixed_float16")
        try:
            return build()
        finally:
            keras.mixed_precision.set_global_policy("float32")

    return made


@pytest.mark.parametrize("name", [name for name in NEUTRAL if name in [*REPRESENTATIVES, "standard"]])
def test_a_model_under_kerass_own_float16_policy_trains_as_plain_keras_does(name):
    """Trap 8: compile wraps the optimizer, and a step that does not scale the loss trains at 1/32768 of the step."""
    workload = Workload(half_policy(functional), X, Y)
    assert_same(run(workload, name, dict(declaration(name).neutral)), run(workload))


def regularized() -> keras.Model:
    """Return y = w x with w = 1 and its regularizer."""
    return keras.Sequential([
        keras.Input((1,)),
        keras.layers.Dense(1, use_bias=False, kernel_initializer="ones", kernel_regularizer=L2, name="hidden"),
        keras.layers.Activation("linear"),
    ])  # fmt: skip


def test_regularization_is_in_the_gradient():
    """Trap 9: with a loss of nothing but the regularizer, w moves by its gradient alone, under every strategy."""
    # x = 0: the data's gradient is 0. L2(0.5) is 0.5 w^2 with the gradient w = 1.
    for name in NEUTRAL:
        net = trainstep.apply(regularized(), name, **declaration(name).neutral)
        net.compile(sgd(0.125), "mse", run_eagerly=True)
        net.fit(column(0), column(0), verbose=0)
        assert net.get_weights()[0].item() == 1 - 0.125, name


@pytest.mark.parametrize("name", [name for name in EVALUATING if task_of(name) == NUMBERS])
def test_regularization_is_in_the_gradient_of_evaluations_of_ones_own(name):
    """Trap 9 again, with default options: of an ascent the gradient is that of the weight it leads to, but not zero."""
    net = trainstep.apply(regularized(), spec_of(name))
    net.compile(sgd(0.125), "mse")
    net.fit(column(0), column(0), verbose=0)
    assert 0 < net.get_weights()[0].item() < 1 - 0.1


@pytest.mark.parametrize(
    "optimizer", [lambda: sgd(0.1, momentum=0.9), lambda: keras.optimizers.Adam(0.1)], ids=["momentum", "adam"]
)
def test_momentum_moves_nothing_inside_a_window(optimizer):
    """Trap 10: an optimizer called with zero gradients moves on by its momentum."""
    model = trainstep.apply(one_weight(), "gradient_accumulation", steps=3)
    model.compile(optimizer(), "mse")
    seen = []
    for _ in range(9):
        model.train_on_batch(column(1), column(0))
        seen.append(weight_of(model))
    assert seen[0] == seen[1] == 1.0
    assert seen[2] == seen[3] == seen[4] != 1.0
    assert seen[5] == seen[6] == seen[7] != seen[4]


def test_clipping_is_of_the_accumulated_gradient():
    """Trap 11: (8 - 12) / 2 = -2 is within the bound of 3; clipped one by one, 3 and -3 cancel."""
    model = trainstep.apply(
        one_weight(), {"gradient_accumulation": {"steps": 2}, "gradient_clipping": {"global_clipnorm": 3.0}}
    )
    model.compile(sgd(0.125), "mse")
    model.train_on_batch(column(2), column(0))
    model.train_on_batch(column(2), column(5))
    assert weight_of(model) == 1 + 0.125 * 2


def test_what_accumulation_does_to_batch_norm_is_said():
    """Trap 12: micro-batches are normalized by their own statistics, here too; the plan does not hide it."""
    assert "micro-batch" in str(trainstep.plan("gradient_accumulation"))
    one = trainstep.apply(functional(), "gradient_accumulation", steps=2)
    one.compile(sgd(0.0), "mse")
    before = one.get_layer("norm").get_weights()
    one.train_on_batch(X[:BATCH], Y[:BATCH])
    assert not np.array_equal(one.get_layer("norm").get_weights()[2], before[2])


def test_clipping_sees_the_unscaled_gradient():
    """Trap 13: clipped with the scale on it, the weight would move by 3 / 32768 of the rate."""
    model = half({"gradient_clipping": {"global_clipnorm": 3.0}})
    model.train_on_batch(column(2), column(-1))  # g = 2 * 3 * 2 = 12, clipped to 3.
    assert weight_of(model) == 1 - 0.125 * 3


def test_clipping_under_kerass_own_loss_scale_sees_the_unscaled_gradient():
    """Trap 13, where the scale is of Keras's making."""
    scaled = getattr(keras.optimizers, "LossScaleOptimizer", None) or keras.mixed_precision.LossScaleOptimizer
    model = trainstep.apply(one_weight(), "gradient_clipping", global_clipnorm=3.0)
    model.compile(scaled(sgd(0.125), initial_scale=2.0**10), "mse")
    model.train_on_batch(column(2), column(-1))
    assert weight_of(model) == 1 - 0.125 * 3


def test_clipping_is_of_the_sum_over_replicas(mirrored):
    """Trap 14: 8 on one replica and -12 on the other are -2 together."""
    with mirrored.scope():
        model = trainstep.apply(one_weight(), "gradient_clipping", global_clipnorm=3.0)
        model.compile(sgd(0.125), "mse")
    model.fit(column(2, 2), column(0, 5), batch_size=2, shuffle=False, verbose=0)
    assert weight_of(model) == 1 + 0.125 * 2


def test_on_a_cpu_the_default_is_bfloat16_and_float16_warns():
    """Trap 15: float16 on a CPU can take hundreds of times as long."""
    if tf.config.list_physical_devices("GPU"):
        pytest.skip("There is a GPU.")
    model = trainstep.apply(dense(), "mixed_precision")
    assert model.layers[0].compute_dtype == "bfloat16"
    with pytest.warns(UserWarning, match="CPUs emulate"):
        trainstep.apply(dense(), "mixed_precision", **F16)


@pytest.mark.parametrize("name", NAMES)
def test_no_strategy_switches_xla_on(name):
    """Trap 16: on a CPU, XLA makes convolutions two to four times slower; only the user, or Keras, switches it on."""
    for given in ({}, {"jit_compile": False}):
        plain, model = (prepared(workload_for(dense, task_of(name)), spec, **given) for spec in (None, name))
        assert model.jit_compile == plain.jit_compile


@pytest.mark.parametrize("name", NAMES)
def test_no_state_hangs_on_the_model(name):
    """Trap 17: a tf.Variable on a model is saved by one Keras and lost by the other; a late one raises."""
    workload = workload_for(dense, task_of(name))
    model = prepared(workload, name, run_eagerly=True)
    attributes = set(vars(model))
    weights = len(model.weights)
    fitted(model, workload, epochs=1)
    fresh = set(vars(model)) - attributes
    assert not [key for key in fresh if isinstance(getattr(model, key, None), tf.Variable)]
    assert len(model.weights) == weights
    slots = tf.nest.flatten(model.strategy_state[name])
    held = {id(getattr(v, "value", v)) if not isinstance(v, tf.Variable) else id(v) for v in slots}
    variables = model.optimizer.variables
    known = {
        id(getattr(v, "value", v)) if not isinstance(v, tf.Variable) else id(v)
        for v in (variables() if callable(variables) else variables)
    }
    assert held <= known


def test_a_masked_loss_is_weighed_by_what_it_is_the_mean_of():
    """What users ask for: losses per token, normalized by all tokens of the window."""
    x = np.concatenate([tokens(4)[:2], np.full((2, 5), 3)])

    def compiled():
        return {"optimizer": sgd(0.5), "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True)}

    small = run(Workload(masked, x, x % 3, compiled), "gradient_accumulation", {"steps": 4}, {"batch_size": 1})
    big = run(Workload(masked, x, x % 3, compiled), fit={"batch_size": 4})
    for a, b in zip(small.variables, big.variables, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_a_step_of_the_control_is_not_slower_than_of_keras_by_an_order():
    """A guard against retracing at each step, no benchmark."""

    def seconds(spec):
        model = prepared(Workload(dense, X, Y), spec)
        fitted(model, Workload(dense, X, Y), epochs=2)
        start = time.perf_counter()
        fitted(model, Workload(dense, X, Y), epochs=10)
        return time.perf_counter() - start

    assert seconds("standard") < 5 * seconds(None) + 1


LOADS = """
import sys, numpy as np, trainstep, keras
folder = sys.argv[1]
model = keras.models.load_model(folder + "/model.keras")
x, y = np.load(folder + "/x.npy"), np.load(folder + "/y.npy")
for start in range(10, 20, 2):
    model.train_on_batch(x[start:start + 2], y[start:start + 2])
np.savez(folder + "/weights.npz", *model.get_weights())
print(*trainstep.applied(model))
"""


@pytest.mark.shows("saved", of="all together")
def test_a_class_made_at_run_time_loads_in_a_new_process(tmp_path):
    """Trap 18: "Could not locate class". The whole stack, saved inside a window, goes on as if never stopped."""
    spec = {
        "adversarial": {"epsilon": 0.1, "random_start": True},
        "gradient_accumulation": {"steps": 4},
        "mixed_precision": {"dtype": "float16"},
        "gradient_clipping": {"global_clipnorm": 0.5},
    }
    model = prepared(Workload(dense, X, Y, lambda: {"optimizer": keras.optimizers.Adam(0.01), "loss": "mse"}), spec)
    for start in range(0, 20, 2):
        if start == 10:  # Five batches: one whole window, and one batch of the next.
            model.save(tmp_path / "model.keras")
        model.train_on_batch(X[start : start + 2], Y[start : start + 2])
    np.save(tmp_path / "x.npy", X)
    np.save(tmp_path / "y.npy", Y)
    done = subprocess.run(
        [sys.executable, "-c", LOADS, str(tmp_path)], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["adversarial", "gradient_accumulation", "mixed_precision", "gradient_clipping"]
    with np.load(tmp_path / "weights.npz") as loaded:
        tf.nest.map_structure(np.testing.assert_array_equal, list(loaded.values()), model.get_weights())
