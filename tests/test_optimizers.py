"""Optimizers of every make under every strategy: Keras's, those of Keras 2 before 2.11, those of tensorflow-addons."""

import importlib.util
import warnings

import keras
import numpy as np
import pytest
from catalogue import NAMES, NEUTRAL, declaration
from nets import Workload, X, Y, dense
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


def workload(optimizer) -> Workload:
    return Workload(dense, X, Y, lambda: {"optimizer": optimizer(), "loss": "mse"})


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
def test_every_optimizer_of_keras_updates_once_per_window_under_the_whole_catalogue(optimizer):
    model = prepared(workload(OWN[optimizer]), NAMES)
    before = model.get_weights()
    assert is_finite(fitted(model, workload(OWN[optimizer]), epochs=1))
    assert not np.array_equal(model.get_weights()[0], before[0])
    assert int(model.optimizer.iterations.numpy()) == 2  # Six batches in windows of four.


LEGACY = {
    "SGD": {"learning_rate": 0.1, "momentum": 0.9},
    "Adam": {"learning_rate": 0.05},
    "RMSprop": {"learning_rate": 0.02},
}


@needs_legacy
@pytest.mark.parametrize("optimizer", LEGACY)
@pytest.mark.parametrize("name", NEUTRAL)
def test_an_old_optimizer_under_neutral_options_is_plain_keras_bit_for_bit(name, optimizer):
    def old():
        return getattr(keras.optimizers.legacy, optimizer)(**LEGACY[optimizer])

    assert_same(run(workload(old), name, dict(declaration(name).neutral)), run(workload(old)))


@needs_legacy
@pytest.mark.parametrize("optimizer", LEGACY)
@pytest.mark.parametrize("spec", [*([name] for name in NAMES), NAMES], ids="+".join)
def test_an_old_optimizer_trains_under_every_strategy(spec, optimizer):
    def old():
        return getattr(keras.optimizers.legacy, optimizer)(**LEGACY[optimizer])

    model = prepared(workload(old), spec)
    before = model.get_weights()
    assert is_finite(fitted(model, workload(old)))
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
@pytest.mark.parametrize("optimizer", ADDONS)
@pytest.mark.parametrize("spec", [*([name] for name in NAMES), NAMES], ids="+".join)
def test_an_optimizer_of_addons_trains_under_every_strategy(spec, optimizer, tfa):
    made = workload(lambda: ADDONS[optimizer](tfa))
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
    made = Workload(
        dense,
        X,
        Y,
        lambda: {"optimizer": "sgd", "loss": tfa.losses.PinballLoss(0.7), "metrics": [tfa.metrics.RSquare()]},
    )
    for name in NAMES:
        result = run(made, name)
        assert is_finite(result)
        assert "r_square" in result.history


def test_the_optimizers_own_variables_come_first():
    """What a strategy keeps is behind them, so that the plain optimizer's state can be read off."""
    plain = prepared(workload(lambda: keras.optimizers.Adam(0.05)))
    ours = prepared(workload(lambda: keras.optimizers.Adam(0.05)), NAMES)
    for model in (plain, ours):
        fitted(model, workload(None), epochs=1)
    own = optimizer_variables(plain.optimizer)
    assert [v.shape for v in optimizer_variables(ours.optimizer)[: len(own)]] == [v.shape for v in own]
