"""Optimizers of every make under every strategy: Keras's, those of Keras 2 before 2.11, those of tensorflow-addons."""

import importlib.util
import warnings
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from catalogue import COMPATIBLE, EVALUATING, NAMES, NEUTRAL, REPRESENTATIVES, TOGETHER, declaration, spec_of, task_of
from nets import Workload, X, Y, dense, workload_for
from runs import assert_same, fitted, is_finite, optimizer_variables, prepared, run

import trainstep

pytestmark = pytest.mark.filterwarnings("ignore:mixed_precision computes in float16:UserWarning")


def has_legacy_optimizers() -> bool:
    try:
        keras.optimizers.legacy.SGD()
    except (AttributeError, ImportError):
        return False
    return True


HAS_LEGACY = has_legacy_optimizers()
needs_legacy = pytest.mark.skipif(not HAS_LEGACY, reason="This Keras has no optimizers of the old kind.")
needs_addons = pytest.mark.skipif(
    not HAS_LEGACY or importlib.util.find_spec("tensorflow_addons") is None,
    reason="tensorflow-addons is not installed; its last release runs on TensorFlow 2.15 only.",
)


@pytest.fixture(scope="module")
def tfa():
    """Return tensorflow-addons, which announces its end when imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import tensorflow_addons  # noqa: PLC0415  Only where it is installed.

        return tensorflow_addons


def workload(optimizer, *names: str) -> Workload:
    return workload_for(dense, task_of(*names), optimizer=optimizer)


ON_GRADIENTS = [name for name in TOGETHER if name not in EVALUATING]
OWN = {
    "Adadelta": lambda: keras.optimizers.Adadelta(1.0),
    "Adafactor": lambda: keras.optimizers.Adafactor(0.05),
    "Adagrad": lambda: keras.optimizers.Adagrad(0.1),
    "Adamax": lambda: keras.optimizers.Adamax(0.05),
    "Ftrl": lambda: keras.optimizers.Ftrl(0.1),
    "Lion": lambda: keras.optimizers.Lion(0.01),
    "Nadam": lambda: keras.optimizers.Nadam(0.05),
    "RMSprop": lambda: keras.optimizers.RMSprop(0.02, momentum=0.5, centered=True),
}


@pytest.mark.parametrize("optimizer", OWN)
def test_every_optimizer_of_keras_updates_once_per_window_under_all_that_acts_on_gradients_and_weights(optimizer):
    everything = workload(OWN[optimizer], *ON_GRADIENTS)
    model = prepared(everything, ON_GRADIENTS)
    before = model.get_weights()
    assert is_finite(fitted(model, everything, epochs=1))
    assert not np.array_equal(model.get_weights()[0], before[0])
    assert int(model.optimizer.iterations.numpy()) == 2  # Six batches in windows of four.


LEGACY = {
    "SGD": {"learning_rate": 0.1, "momentum": 0.9},
    "Adam": {"learning_rate": 0.05},
    "RMSprop": {"learning_rate": 0.02},
}


@needs_legacy
@pytest.mark.parametrize("optimizer", LEGACY)
@pytest.mark.parametrize(
    "names", [["standard"], [name for name in NEUTRAL if name in COMPATIBLE]], ids=["control", "all"]
)
def test_an_old_optimizer_under_neutral_options_is_plain_keras_bit_for_bit(names, optimizer):
    def old():
        return getattr(keras.optimizers.legacy, optimizer)(**LEGACY[optimizer])

    spec = {name: dict(declaration(name).neutral) for name in names}
    assert_same(run(workload(old), spec), run(workload(old)))


def each_once(optimizers: dict) -> Any:
    """Return marks: each optimizer under all at once that acts on gradients; the first under each alone, and others."""
    first = next(iter(optimizers))
    alone = [name for name in NAMES if name not in EVALUATING or name in REPRESENTATIVES]
    pairs = [*(([name], first) for name in alone), *((ON_GRADIENTS, optimizer) for optimizer in optimizers)]
    ids = [f"{spec[0] if len(spec) == 1 else 'all'}-{optimizer}" for spec, optimizer in pairs]
    return pytest.mark.parametrize(("spec", "optimizer"), pairs, ids=ids)


@needs_legacy
@each_once(LEGACY)
def test_an_old_optimizer_trains_under_every_strategy(spec, optimizer):
    def old():
        return getattr(keras.optimizers.legacy, optimizer)(**LEGACY[optimizer])

    model = prepared(workload(old, *spec), spec)
    before = model.get_weights()
    assert is_finite(fitted(model, workload(old, *spec)))
    assert not np.array_equal(model.get_weights()[0], before[0])


@needs_legacy
@pytest.mark.parametrize("optimizer", LEGACY)
def test_an_old_optimizer_sees_the_one_big_batch(optimizer, assert_close):
    def old():
        return getattr(keras.optimizers.legacy, optimizer)(**LEGACY[optimizer])

    small = run(workload(old), "gradient_accumulation", {"steps": 4})
    big = run(workload(old), fit={"batch_size": 16})
    assert_close(small.variables, big.variables)


@needs_legacy
def test_an_old_optimizer_that_clips_is_refused_beside_the_strategy():
    model = trainstep.apply(dense(), "gradient_clipping")
    with pytest.raises(trainstep.errors.OptimizerConflictError, match=r"clipnorm=0.5"):
        model.compile(keras.optimizers.legacy.SGD(0.1, clipnorm=0.5), "mse")


@needs_legacy
def test_an_old_optimizer_takes_no_step_from_what_is_not_finite():
    model = trainstep.apply(dense(), "mixed_precision", dtype="float16")
    model.compile(keras.optimizers.legacy.Adam(0.1), "mse")
    before = model.get_weights()
    model.train_on_batch(np.full((4, 6), np.nan, "float32"), Y[:4])
    for now, then in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)


ADDONS = {
    "AdamW": lambda tfa: tfa.optimizers.AdamW(weight_decay=0.01, learning_rate=0.05),
    "LAMB": lambda tfa: tfa.optimizers.LAMB(0.05),
    "RectifiedAdam": lambda tfa: tfa.optimizers.RectifiedAdam(0.05),
    "Lookahead": lambda tfa: tfa.optimizers.Lookahead(keras.optimizers.legacy.SGD(0.1), sync_period=2),
    "MovingAverage": lambda tfa: tfa.optimizers.MovingAverage(keras.optimizers.legacy.SGD(0.1), average_decay=0.5),
    "SWA": lambda tfa: tfa.optimizers.SWA(keras.optimizers.legacy.Adam(0.05), start_averaging=1, average_period=2),
}


@needs_addons
@each_once(ADDONS)
def test_an_optimizer_of_addons_trains_under_every_strategy(spec, optimizer, tfa):
    made = workload(lambda: ADDONS[optimizer](tfa), *spec)
    model = prepared(made, spec)
    before = model.get_weights()
    assert is_finite(fitted(model, made))
    assert not np.array_equal(model.get_weights()[0], before[0])


@needs_addons
@pytest.mark.parametrize("optimizer", ADDONS)
def test_an_optimizer_of_addons_sees_the_one_big_batch(optimizer, tfa, assert_close):
    """Weights and slots: averages and synchronizations count updates, never micro-batches."""
    made = workload(lambda: ADDONS[optimizer](tfa))
    small, big = run(made, "gradient_accumulation", {"steps": 4}), run(made, fit={"batch_size": 16})
    assert_close(small.variables, big.variables)


@needs_addons
def test_losses_and_metrics_of_addons_are_used(tfa):
    made = workload_for(dense, loss=tfa.losses.PinballLoss(0.7), metrics=[tfa.metrics.RSquare()])
    everywhere = [name for name in TOGETHER if not task_of(name).classes and not task_of(name).outputs]
    result = run(made, everywhere)
    assert is_finite(result)
    assert "r_square" in result.history


# --- Oracles: what Keras and tensorflow-addons do themselves ----------------------------------------------------------


@pytest.mark.parametrize("bound", [{"clipnorm": 0.3}, {"global_clipnorm": 0.5}, {"clipvalue": 0.05}], ids=str)
@pytest.mark.parametrize("optimizer", ["momentum", "Adam", "AdamW"])
def test_clipping_is_the_flag_of_the_optimizer(optimizer, bound, assert_close):
    def made(**flags):
        if optimizer == "momentum":
            return keras.optimizers.SGD(0.1, momentum=0.9, **flags)
        return getattr(keras.optimizers, optimizer)(0.05, **flags)

    oracle = run(workload(lambda: made(**bound)))
    ours = run(workload(made), "gradient_clipping", bound)
    assert_close([ours.variables, ours.optimizer, ours.history], [oracle.variables, oracle.optimizer, oracle.history])


@needs_addons
@pytest.mark.parametrize("bound", [{"clipnorm": 0.3}, {"clipvalue": 0.05}], ids=str)
@pytest.mark.parametrize("optimizer", ["LAMB", "RectifiedAdam"])
def test_clipping_is_the_flag_of_an_optimizer_of_addons(optimizer, bound, tfa, assert_close):
    def made(**flags):
        return getattr(tfa.optimizers, optimizer)(0.05, **flags)

    oracle, ours = run(workload(lambda: made(**bound))), run(workload(made), "gradient_clipping", bound)
    assert_close([ours.variables, ours.optimizer], [oracle.variables, oracle.optimizer])


def under_float16() -> keras.Model:
    """Return the net of `dense` as Keras mixes its precision: float16, and float32 in the last layer."""
    half, last = keras.layers.Dense(5, "tanh", dtype="mixed_float16"), keras.layers.Dense(1, dtype="float32")
    return keras.Sequential([keras.Input((6,)), half, last])


@pytest.mark.parametrize("make", [lambda: keras.optimizers.SGD(0.1, momentum=0.9), lambda: keras.optimizers.Adam(0.05)],
                         ids=["momentum", "Adam"])  # fmt: skip
def test_mixed_precision_is_the_loss_scale_optimizer_where_nothing_overflows(make, assert_close):
    """The same scale, never moved: in 12 updates, all finite, it neither halves nor doubles."""
    scale = 2.0**10

    def wrapped():
        return keras.mixed_precision.LossScaleOptimizer(make(), initial_scale=scale)

    if not hasattr(keras.mixed_precision, "LossScaleOptimizer"):  # Keras 3 has moved it.

        def wrapped():
            return keras.optimizers.LossScaleOptimizer(make(), initial_scale=scale)

    oracle = run(Workload(under_float16, X, Y, lambda: {"optimizer": wrapped(), "loss": "mse"}))
    ours = prepared(workload(make), "mixed_precision", {"dtype": "float16", "initial_scale": scale})
    result = fitted(ours, workload(make))
    assert ours.strategy_state["mixed_precision"]["scale"].numpy() == scale
    # One rounding in float16 here or there: as far as that goes.
    assert_close([result.variables, result.history], [oracle.variables, oracle.history], "float16")


def lambs() -> dict:
    """Return LAMB, of Keras 3; that of addons is among `ADDONS`."""
    return {"Lamb": lambda: keras.optimizers.Lamb(0.05)} if hasattr(keras.optimizers, "Lamb") else {}


BIG = {
    "SGD": lambda: keras.optimizers.SGD(0.1),
    "momentum": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "Adam": lambda: keras.optimizers.Adam(0.05),
    **lambs(),
}


@pytest.mark.parametrize("optimizer", BIG)
def test_accumulation_is_the_big_batch(optimizer, assert_close):
    small = run(workload(BIG[optimizer]), "gradient_accumulation", {"steps": 4})
    big = run(workload(BIG[optimizer]), fit={"batch_size": 16})
    assert_close(small.variables, big.variables)
    assert_close(small.optimizer[: len(big.optimizer)], big.optimizer)


# --- State ------------------------------------------------------------------------------------------------------------


def of_the_old_kind(name, tfa):
    return getattr(keras.optimizers.legacy, name)(**LEGACY[name]) if name in LEGACY else ADDONS[name](tfa)


FULL_STATE = {
    "gradient_accumulation": {"steps": 4},
    "mixed_precision": {"dtype": "float16", "growth_interval": 2, "initial_scale": 2.0**8},
    "skip_nonfinite": {},
    "gradient_clipping": {},
    "diagnostics": {},
}


def by_batch(model, starts) -> None:
    for start in starts:
        model.train_on_batch(X[start : start + 4], Y[start : start + 4])


@needs_addons
@pytest.mark.parametrize("optimizer", [*LEGACY, *ADDONS])
@pytest.mark.parametrize("spec", [{"gradient_accumulation": {"steps": 4}}, FULL_STATE], ids="+".join)
def test_a_checkpoint_in_the_middle_of_a_window_goes_on_as_if_never_stopped(spec, optimizer, tfa, tmp_path):
    made = workload(lambda: of_the_old_kind(optimizer, tfa))
    whole, stopped, restored = [prepared(made, spec) for _ in range(3)]
    by_batch(whole, range(0, 20, 2))
    by_batch(stopped, range(0, 10, 2))
    path = tf.train.Checkpoint(model=stopped, optimizer=stopped.optimizer).save(str(tmp_path / "state"))
    tf.train.Checkpoint(model=restored, optimizer=restored.optimizer).restore(path).assert_existing_objects_matched()
    by_batch(restored, range(10, 20, 2))
    tf.nest.map_structure(np.testing.assert_array_equal, restored.get_weights(), whole.get_weights())
    tf.nest.map_structure(
        np.testing.assert_array_equal, optimizer_variables(restored.optimizer), optimizer_variables(whole.optimizer)
    )


@needs_addons
@pytest.mark.parametrize("optimizer", [*LEGACY, *ADDONS])
def test_a_keras_file_warns_that_it_holds_no_state_of_such_an_optimizer(optimizer, tfa, tmp_path):
    """Plain Keras 2 drops the slots in silence. Weights and strategies are there, and training goes on."""
    made = workload(lambda: of_the_old_kind(optimizer, tfa))
    model = prepared(made, FULL_STATE)
    by_batch(model, range(0, 10, 2))
    with pytest.warns(UserWarning, match=r"does not save the variables of .*, a legacy optimizer.*tf.train.Checkpoint"):
        model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert trainstep.applied(loaded) == trainstep.applied(model)
    tf.nest.map_structure(np.testing.assert_array_equal, loaded.get_weights(), model.get_weights())
    assert loaded.strategy_state["gradient_accumulation"]["count"].numpy() == 0
    assert is_finite(fitted(loaded, made))


@needs_legacy
def test_an_optimizer_that_can_hold_no_state_is_refused_by_compile():
    """Keras 2 takes the optimizers of TensorFlow 1; what needs no state trains with them."""
    for name, options in [*spec_of(*NAMES).items(), ("mixed_precision", {"dtype": "float16"})]:
        made = workload(lambda: tf.compat.v1.train.GradientDescentOptimizer(0.1), name)
        if declaration(name).state(declaration(name).options(**options)):
            with pytest.raises(
                trainstep.errors.OptimizerConflictError, match=f"TFOptimizer cannot hold the state of '{name}'"
            ):
                prepared(made, name, options)
        else:
            prepared(made, name, options)
    model = prepared(workload(lambda: tf.compat.v1.train.GradientDescentOptimizer(0.1)), "gradient_clipping")
    assert model.train_on_batch(X, Y) > model.train_on_batch(X, Y)


class Neither:
    """What is no optimizer at all."""

    def apply_gradients(self, grads_and_vars):
        del grads_and_vars


def test_what_is_no_optimizer_is_refused_by_compile():
    with pytest.raises(ValueError, match="Could not interpret optimizer identifier"):
        prepared(workload(Neither, *TOGETHER), TOGETHER)


def test_the_optimizers_own_variables_come_first():
    """What a strategy keeps is behind them, so that the plain optimizer's state can be read off."""
    made = workload(lambda: keras.optimizers.Adam(0.05), *TOGETHER)
    plain, ours = (made.build() for _ in range(2))
    trainstep.apply(ours, spec_of(*TOGETHER))
    for model in (plain, ours):
        model.compile(**made.compile(), run_eagerly=True)
        model.train_on_batch(*tf.nest.map_structure(lambda values: values[:4], (made.x, made.y)))
    own = optimizer_variables(plain.optimizer)
    assert [v.shape for v in optimizer_variables(ours.optimizer)[: len(own)]] == [v.shape for v in own]
