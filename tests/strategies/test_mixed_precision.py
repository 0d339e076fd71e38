"""Mixed precision: 16 bits inside, 32 outside; a loss scale with a floor and a cap; no step from what is not finite."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from nets import BATCH, KINDS, Subclassed, Workload, X, Y, dense, functional, multi, one_weight, sgd, weight_of
from runs import assert_same, fitted, is_finite, prepared, run

import trainstep
from trainstep import errors
from trainstep._seam import KERAS_3
from trainstep.strategies.mixed_precision import MixedPrecisionOptions, next_scale

pytestmark = pytest.mark.filterwarnings("ignore:mixed_precision computes in float16:UserWarning")

F16 = {"dtype": "float16"}
START = 2.0**10


def column(*values: float) -> np.ndarray:
    return np.array(values, "float32")[:, None]


def half(rate: float = 0.125, **options) -> keras.Model:
    """Return y = w * x under float16, w = 1. The last layer stays in float32, so w is in the one before."""
    x = keras.Input((1,))
    inner = one_weight(1.0)
    model = keras.Model(x, keras.layers.Activation("linear", name="end")(inner.layers[-1](x)))
    # Gradients are float16 with the scale on them: at the default of 2**15 already 2 would be too large.
    trainstep.apply(model, "mixed_precision", **{**F16, "initial_scale": START, **options})
    model.compile(sgd(rate), "mse")
    return model


def state(model: keras.Model) -> tuple[float, int, int]:
    slots = model.strategy_state["mixed_precision"]
    return tuple(slots[name].numpy().item() for name in ("scale", "finite_steps", "skips"))


GOOD = column(2), column(1)  # w = 1: g = 2 (w x - y) x = 4.
BAD = column(np.nan), column(1)


# --- Policies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_compute_in_16_bits_and_everything_outside_is_float32(kind, dtype):
    workload = KINDS[kind]
    model = prepared(workload, "mixed_precision", {"dtype": dtype})
    fitted(model, workload, epochs=1)
    inside = [layer for layer in model.layers if not isinstance(layer, keras.layers.InputLayer)]
    assert any(layer.compute_dtype == dtype for layer in inside)
    assert {tf.as_dtype(v.dtype).name for v in model.weights} == {"float32"}
    outputs = model.predict(workload.x, verbose=0)
    assert {output.dtype.name for output in tf.nest.flatten(outputs)} == {"float32"}
    assert {o.dtype.name for o in tf.nest.flatten(model(tf.nest.map_structure(tf.constant, workload.x)))} == {"float32"}
    trainstep.remove(model)
    assert {layer.compute_dtype for layer in model.layers} == {"float32"}
    assert {tf.as_dtype(v.dtype).name for v in model.weights} == {"float32"}


def test_the_last_layer_stays_in_float32():
    model = trainstep.apply(functional(), "mixed_precision", dtype="bfloat16")
    assert model.get_layer("out").compute_dtype == "float32"
    assert model.get_layer("hidden").compute_dtype == "bfloat16"
    model = trainstep.apply(multi(), "mixed_precision", dtype="bfloat16")
    assert {model.get_layer(name).compute_dtype for name in ("value", "kind")} == {"float32"}


def test_the_last_layer_inside_the_last_layer_stays_in_float32():
    inner = keras.Sequential([keras.Input((6,)), keras.layers.Dense(4, name="deep"), keras.layers.Dense(3, name="end")])
    x = keras.Input((5, 6))
    repeated = keras.layers.TimeDistributed(inner)
    trainstep.apply(keras.Model(x, repeated(x)), "mixed_precision", dtype="bfloat16")
    assert [inner.get_layer(name).compute_dtype for name in ("deep", "end")] == ["bfloat16", "float32"]


class MakesLayersLate(keras.Model):
    def build(self, input_shape):
        self.first, self.last = keras.layers.Dense(4, activation="relu"), keras.layers.Dense(1)
        super().build(input_shape)

    def call(self, x):
        return self.last(self.first(x))


@pytest.mark.parametrize("eagerly", [False, True])
def test_layers_a_model_makes_when_it_is_called_are_changed_before_it_trains(eagerly):
    model = trainstep.apply(MakesLayersLate(), "mixed_precision", dtype="bfloat16")
    model.compile(sgd(), "mse", run_eagerly=eagerly)
    assert np.isfinite(model.fit(X, Y, batch_size=BATCH, verbose=0).history["loss"]).all()
    assert [layer.compute_dtype for layer in (model.first, model.last)] == ["bfloat16"] * 2
    trainstep.remove(model)
    assert [layer.compute_dtype for layer in (model.first, model.last)] == ["float32"] * 2


def test_a_layer_of_two_models_is_put_back_by_the_last():
    shared = keras.layers.Dense(4)
    first, second = (keras.Sequential([keras.Input((6,)), shared, keras.layers.Dense(1)]) for _ in range(2))
    for model in (first, second):
        trainstep.apply(model, "mixed_precision", dtype="bfloat16")
    trainstep.remove(first)
    assert shared.compute_dtype == "bfloat16"
    trainstep.remove(second)
    assert shared.compute_dtype == "float32"


def test_a_layer_that_normalizes_raw_inputs_keeps_their_dtype(assert_close):
    normalize = keras.layers.Normalization()
    normalize.adapt(1000 + X)
    model = keras.Sequential([keras.Input((6,)), normalize, keras.layers.Dense(4), keras.layers.Dense(1)])
    before = model.predict(1000 + X, verbose=0)
    trainstep.apply(model, "mixed_precision", dtype="bfloat16")
    assert normalize.compute_dtype == "float32"
    # In bfloat16 numbers near 1000 are 4 apart, and all would be normalized to a few.
    assert_close([model.predict(1000 + X, verbose=0)], [before], "bfloat16")
    model.compile(sgd(), "mse")
    assert np.isfinite(model.fit(1000 + X, Y, verbose=0).history["loss"]).all()


class KeepsWeightsInAList(keras.layers.Layer):
    def __init__(self):
        super().__init__()
        self.kernels = []

    def build(self, input_shape):
        self.kernels = [self.add_weight(shape=(input_shape[-1], 4), name=f"kernel_{i}") for i in range(2)]

    def call(self, x):
        return x @ self.kernels[0] + x @ self.kernels[1]


@pytest.mark.parametrize("first", ["apply", "build"])
def test_weights_in_a_list_are_cast_or_refused_by_name(first):
    model = keras.Sequential([KeepsWeightsInAList(), keras.layers.Dense(1)])
    if first == "build":
        model.build((None, 6))
        if not KERAS_3:
            with pytest.raises(errors.ModelConflictError, match=r"keeps_weights_in_a_list.* keeps weights in a list"):
                trainstep.apply(model, "mixed_precision", dtype="bfloat16")
            assert {layer.compute_dtype for layer in model.layers} == {"float32"}
            return
    trainstep.apply(model, "mixed_precision", dtype="bfloat16")
    model.compile(sgd(), "mse")
    assert np.isfinite(model.fit(X, Y, verbose=0).history["loss"]).all()
    assert model.layers[0].compute_dtype == "bfloat16"
    trainstep.remove(model)
    model.compile(sgd(), "mse")
    assert np.isfinite(model.fit(X, Y, verbose=0).history["loss"]).all()


def test_layers_inside_layers_are_reached_and_put_back():
    inner = keras.Sequential([keras.Input((6,)), keras.layers.Dense(4, name="deep"), keras.layers.Dense(3)])
    x = keras.Input((6,))
    model = keras.Model(x, keras.layers.Dense(1)(inner(x)))
    trainstep.apply(model, "mixed_precision", dtype="bfloat16")
    assert inner.get_layer("deep").compute_dtype == "bfloat16"
    trainstep.remove(model)
    assert inner.get_layer("deep").compute_dtype == "float32"


def test_a_layer_of_another_dtype_keeps_it():
    x = keras.Input((6,))
    own = keras.layers.Dense(4, dtype="float64", name="own")
    model = keras.Model(x, keras.layers.Dense(1)(own(x)))
    trainstep.apply(model, "mixed_precision", dtype="bfloat16")
    assert own.compute_dtype == "float64"
    trainstep.remove(model)
    assert own.compute_dtype == "float64"


def test_layers_added_before_compile_are_under_the_policy_too():
    model = trainstep.apply(
        keras.Sequential([keras.layers.Dense(4, name="first")]), "mixed_precision", dtype="bfloat16"
    )
    model.add(keras.layers.Dense(3, name="second"))
    model.add(keras.layers.Dense(1, name="last"))
    model.compile(sgd(), "mse")
    model.fit(X, Y, verbose=0)
    assert [layer.compute_dtype for layer in model.layers][1] == "bfloat16"
    assert is_finite(fitted(model, Workload(dense, X, Y)))


def test_batch_norm_keeps_its_statistics_in_float32():
    model = prepared(KINDS["functional"], "mixed_precision", {"dtype": "bfloat16"})
    fitted(model, KINDS["functional"])
    assert {w.dtype for w in model.get_layer("norm").get_weights()} == {np.dtype("float32")}


def test_auto_on_a_cpu_is_bfloat16_without_a_loss_scale():
    if tf.config.list_physical_devices("GPU"):
        pytest.skip("There is a GPU.")
    assert MixedPrecisionOptions().dtype == "bfloat16"
    model = prepared(KINDS["functional"], "mixed_precision")
    assert model.strategy_state["mixed_precision"] == {}
    assert model.loss_scale() is None


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ([(8, 0)], "bfloat16"),
        ([(9, 0), (8, 6)], "bfloat16"),
        ([(7, 5)], "float16"),
        ([(8, 0), (7, 0)], "float16"),
    ],
)
def test_auto_on_gpus_is_what_all_of_them_have(monkeypatch, capabilities, expected):
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: list(range(len(capabilities))))
    monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda i: {"compute_capability": capabilities[i]})
    assert MixedPrecisionOptions().dtype == expected


@pytest.mark.filterwarnings("default")
def test_float16_on_a_cpu_warns_and_says_what_to_do():
    if tf.config.list_physical_devices("GPU"):
        pytest.skip("There is a GPU.")
    model = dense()
    with pytest.warns(UserWarning, match="float16, which CPUs emulate.*Use dtype='bfloat16'"):
        trainstep.apply(model, "mixed_precision", dtype="float16")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_it_trains_as_float32_within_the_precision_of_16_bits(dtype, assert_close):
    smooth = Workload(dense, X, Y / 3, lambda: {"optimizer": sgd(0.02), "loss": "mse"})
    assert_close(run(smooth, "mixed_precision", {"dtype": dtype}).variables, run(smooth).variables, dtype)


# --- The loss scale ---------------------------------------------------------------------------------------------------


def test_a_step_by_hand_is_free_of_the_scale():
    model = half()
    # g = 4 and the loss (2 - 1)^2 = 1: exact in float16 at any scale that is a power of two, up to 2**13.
    assert float(model.train_on_batch(*GOOD)) == 1.0
    assert weight_of(model) == 1 - 0.125 * 4
    assert state(model) == (START, 1, 0)


@pytest.mark.parametrize("scale", [1.0, 2.0**7, 2.0**13])
def test_scaling_changes_nothing_where_nothing_is_rounded(scale):
    model = half(initial_scale=scale)
    model.fit(*GOOD, verbose=0)
    assert weight_of(model) == 0.5


def test_small_gradients_survive_by_the_scale():
    # x = 2**-13, y = -2**-13: residual 2**-12, g = 2 * 2**-12 * 2**-13 = 2**-24. In float16 the product underflows on
    # the way (below 2**-25 it is zero) for smaller ones: x = 2**-15, g = 2**-28.
    tiny = column(2.0**-15), column(-(2.0**-15))
    scaled, unscaled = half(rate=1.0), half(rate=1.0, initial_scale=1.0)
    for model in (scaled, unscaled):
        model.layers[1].w.assign(0.0)
        model.train_on_batch(*tiny)
    # w = 0: residual 2**-15, g = 2 * 2**-15 * 2**-15 = 2**-29.
    assert weight_of(scaled) == -(2.0**-29)
    assert weight_of(unscaled) == 0.0


def test_a_step_that_is_not_finite_moves_nothing_and_halves_the_scale():
    model = half()
    model.train_on_batch(*GOOD)
    before = model.get_weights(), int(model.optimizer.iterations.numpy())
    model.train_on_batch(*BAD)
    tf.nest.map_structure(np.testing.assert_array_equal, model.get_weights(), before[0])
    assert int(model.optimizer.iterations.numpy()) == before[1] == 1
    assert state(model) == (START / 2, 0, 1)
    model.train_on_batch(*GOOD)
    assert state(model) == (START / 2, 1, 0)


def test_the_scale_has_a_floor():
    model = half(initial_scale=4.0, min_scale=1.0, max_consecutive_skips=50)
    scales = []
    for _ in range(4):
        model.train_on_batch(*BAD)
        scales.append(state(model)[0])
    assert scales == [2.0, 1.0, 1.0, 1.0]
    model.train_on_batch(*GOOD)
    assert weight_of(model) == 0.5


def test_the_scale_grows_after_enough_finite_steps_up_to_a_cap():
    model = half(rate=0.0, initial_scale=4.0, growth_interval=2, max_scale=16.0)
    scales = []
    for _ in range(8):
        model.train_on_batch(*GOOD)
        scales.append(state(model)[0])
    assert scales == [4.0, 8.0, 8.0, 16.0, 16.0, 16.0, 16.0, 16.0]


def test_a_skip_starts_the_count_anew():
    model = half(rate=0.0, initial_scale=4.0, growth_interval=2)
    scales = []
    for batch in (GOOD, BAD, GOOD, GOOD):
        model.train_on_batch(*batch)
        scales.append(state(model)[0])
    assert scales == [4.0, 2.0, 2.0, 4.0]


def test_next_scale_by_hand():
    options = MixedPrecisionOptions(growth_interval=3, min_scale=2.0, initial_scale=8.0, max_scale=16.0)

    def after(scale, finite_steps):
        return float(next_scale(tf.constant(scale), tf.constant(finite_steps), options))

    assert after(8.0, 0) == 4.0
    assert after(2.0, 0) == 2.0
    assert after(8.0, 2) == 8.0
    assert after(8.0, 3) == 16.0
    assert after(16.0, 3) == 16.0


def test_an_overflow_by_the_scale_heals_itself():
    """A gradient of 4 at a scale of 2**15 is 2**17, beyond float16's 65504: only where it passes through float16."""
    x = keras.Input((1,))
    model = keras.Sequential([x, keras.layers.Dense(1, use_bias=False, kernel_initializer="ones"), keras.layers.Dense(
        1, use_bias=False, kernel_initializer="ones"), keras.layers.Activation("linear")])  # fmt: skip
    trainstep.apply(model, "mixed_precision", **F16)
    model.compile(sgd(0.0), "mse")
    scales = []
    for _ in range(6):
        model.train_on_batch(column(16), column(0))
        scales.append(state(model)[0])
    # dL/dy = 32; times x = 16: 512 = 2**9. At a scale of 2**6 that is 2**15 < 65504; at 2**7, 2**16: too large.
    assert scales == [2.0**14, 2.0**13, 2.0**12, 2.0**11, 2.0**10, 2.0**9]
    for _ in range(4):
        model.train_on_batch(column(16), column(0))
    assert state(model)[0] == 2.0**6


@pytest.mark.parametrize("compiled", [{}, {"run_eagerly": True}, {"steps_per_execution": 2}], ids=str)
def test_too_many_skips_stop_training_and_say_why(compiled):
    model = half(max_consecutive_skips=3)
    model.compile(sgd(), "mse", **compiled)
    x, y = np.full((8, 1), np.nan, "float32"), np.ones((8, 1), "float32")
    message = r"not finite 3 updates in a row \(max_consecutive_skips\).* train with dtype='bfloat16'\.$"
    with pytest.raises(errors.NonFiniteGradientError, match=message):
        model.fit(x, y, batch_size=1, verbose=0)
    assert weight_of(model) == 1.0


@pytest.mark.parametrize("compiled", [{}, {"run_eagerly": True}, {"jit_compile": True}], ids=str)
def test_too_many_skips_stop_train_on_batch(compiled):
    model = half(max_consecutive_skips=2)
    model.compile(sgd(), "mse", **compiled)
    model.train_on_batch(*BAD)
    with pytest.raises(errors.NonFiniteGradientError, match="not finite 2 updates in a row"):
        model.train_on_batch(*BAD)


def test_too_many_skips_stop_training_under_xla_when_the_epoch_ends():
    """XLA leaves assertions out, so the epoch's end has to notice."""
    model = half(max_consecutive_skips=3)
    model.compile(sgd(), "mse", jit_compile=True)
    x, y = np.full((8, 1), np.nan, "float32"), np.ones((8, 1), "float32")
    with pytest.raises(errors.NonFiniteGradientError, match="not finite 3 updates in a row"):
        model.fit(x, y, batch_size=1, verbose=0)
    assert weight_of(model) == 1.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_number_in_a_batch_leaves_all_weights_untouched(bad):
    model = prepared(KINDS["functional"], "mixed_precision", F16)
    model.train_on_batch(X[:BATCH], Y[:BATCH])
    before = [w.numpy() for w in model.trainable_variables]
    y = Y[:BATCH].copy()
    y[1] = bad
    model.train_on_batch(X[:BATCH], y)
    tf.nest.map_structure(np.testing.assert_array_equal, [w.numpy() for w in model.trainable_variables], before)
    model.train_on_batch(X[:BATCH], Y[:BATCH])
    assert all(np.isfinite(w.numpy()).all() for w in model.trainable_variables)


@pytest.mark.parametrize("metric", ["loss", "mae"])
def test_logs_are_unscaled(metric):
    model = half(rate=0.0)
    model.compile(sgd(0.0), "mse", metrics=["mae"])
    # |2 - 1| = 1, squared 1: whatever the scale.
    assert model.fit(*GOOD, verbose=0).history[metric] == [1.0]


def test_the_scale_is_saved_with_the_optimizer(tmp_path):
    model = half()
    model.train_on_batch(*BAD)
    path = tf.train.Checkpoint(optimizer=model.optimizer).save(str(tmp_path / "state"))
    other = half()
    other.strategy_state  # noqa: B018
    tf.train.Checkpoint(optimizer=other.optimizer).restore(path).assert_existing_objects_matched()
    assert state(other) == (START / 2, 0, 1)


def test_order_of_the_scales_is_checked():
    with pytest.raises(errors.InvalidOptionsError, match="min_scale <= initial_scale <= max_scale must hold"):
        trainstep.model_class(keras.Model, "mixed_precision", initial_scale=0.5)


# --- Conflicts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("policy", "dtype"), [("mixed_float16", "bfloat16"), ("mixed_bfloat16", "float16")])
def test_a_model_built_under_another_mixed_policy_is_refused(policy, dtype):
    model = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(4, name="hidden", dtype=policy), keras.layers.Dense(1)]
    )
    with pytest.raises(errors.ModelConflictError, match=f"'hidden' has the dtype policy '{policy}' already"):
        trainstep.apply(model, "mixed_precision", dtype=dtype)
    assert type(model) is keras.Sequential
    assert model.get_layer("hidden").dtype_policy.name == policy


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_model_under_the_same_mixed_policy_trains_like_one_changed_by_the_strategy(dtype):
    """Keras adds no loss scale of its own: there is one."""

    def built() -> keras.Model:
        policies = [f"mixed_{dtype}", "float32"]
        layers = [keras.layers.Dense(5, "tanh", dtype=policies[0]), keras.layers.Dense(1, dtype=policies[1])]
        return keras.Sequential([keras.Input((6,)), *layers])

    assert_same(
        run(Workload(built, X, Y), "mixed_precision", {"dtype": dtype}),
        run(Workload(dense, X, Y), "mixed_precision", {"dtype": dtype}),
    )


def test_auto_is_decided_when_the_options_are_checked():
    """A file holds what was decided, so that what loads it elsewhere finds the state it was saved with."""
    model = trainstep.apply(dense(), "mixed_precision")
    assert model.get_config()["strategies"]["mixed_precision"]["dtype"] == MixedPrecisionOptions().dtype != "auto"


@keras.saving.register_keras_serializable("trainstep_tests")
class InItsBases(trainstep.model_class(keras.Model, "mixed_precision", dtype="bfloat16")):
    """Has the strategy by its own definition."""


def in_its_bases() -> keras.Model:
    x = keras.Input((6,))
    return InItsBases(x, keras.layers.Dense(1)(keras.layers.Dense(5, "tanh")(x)))


@pytest.mark.parametrize("copied", ["cloned", "from its config", "saved and loaded"])
@pytest.mark.parametrize("build", [functional, dense, in_its_bases], ids=lambda build: build.__name__)
def test_a_copy_trains_like_the_model(build, copied, tmp_path):
    """`clone_model` copies layers with the policies they have; what is saved holds those the layers had before."""
    model = build()
    if not isinstance(model, InItsBases):
        trainstep.apply(model, "mixed_precision", dtype="bfloat16")
    if copied == "cloned":
        copy = keras.models.clone_model(model)
    elif copied == "from its config":
        copy = type(model).from_config(model.get_config())
    else:
        model.save(tmp_path / "model.keras")
        copy = keras.models.load_model(tmp_path / "model.keras")
    is_plain = copied == "cloned" and build is dense  # Keras clones a Sequential to a plain one.
    assert (trainstep.applied(copy) == {}) == is_plain
    if is_plain:
        trainstep.apply(copy, "mixed_precision", dtype="bfloat16")
    copy.set_weights(model.get_weights())
    runs = []
    for each in (model, copy):
        each.compile(sgd(), "mse")
        keras.utils.set_random_seed(0)
        runs.append(fitted(each, Workload(build, X, Y)))
        assert "mixed_bfloat16" in [layer.dtype_policy.name for layer in each.layers]
    assert_same(runs[1], runs[0])
    if build is not in_its_bases:
        assert {layer.dtype_policy.name for layer in trainstep.remove(copy).layers} == {"float32"}


def test_compile_wraps_no_second_loss_scale_around_the_optimizer():
    model = prepared(KINDS["functional"], "mixed_precision", F16)
    assert type(model.optimizer) is type(sgd())
    model.compile(sgd(), "mse")
    assert type(model.optimizer) is type(sgd())


def test_a_subclassed_model_is_set_before_and_after_its_first_batch():
    before = run(Workload(Subclassed, X, Y), "mixed_precision", {"dtype": "bfloat16"})
    model = prepared(Workload(Subclassed, X, Y))
    model.predict(X[:1], verbose=0)
    keras.utils.set_random_seed(0)
    trainstep.apply(model, "mixed_precision", dtype="bfloat16")
    model.compile(sgd(), "mse")
    after = fitted(model, Workload(Subclassed, X, Y))
    assert [v.shape for v in after.variables] == [v.shape for v in before.variables]
    assert is_finite(after)
