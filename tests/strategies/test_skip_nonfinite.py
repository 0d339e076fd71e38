"""Skip nonfinite: a bad batch leaves what was before it, and too many stop training."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from nets import BATCH, KINDS, Workload, X, Y, dense, one_weight, sgd, weight_of
from runs import optimizer_variables, prepared, run

import trainstep
from trainstep import errors

NAN, INF = float("nan"), float("inf")


def column(*values: float) -> np.ndarray:
    return np.array(values, "float32")[:, None]


GOOD = column(2), column(1)
BAD = column(2), column(NAN)


def guarded(optimizer=None, compiled=None, **options) -> keras.Model:
    """Return y = w * x with w = 1; the gradient of GOOD is 2 (2 w - 1) 2 = 4."""
    model = trainstep.apply(one_weight(), "skip_nonfinite", **options)
    model.compile(optimizer or sgd(0.125), "mse", **(compiled or {}))
    return model


def skips(model: keras.Model) -> int:
    return int(model.strategy_state["skip_nonfinite"]["skips"].numpy())


@pytest.mark.parametrize("compiled", [{}, {"run_eagerly": True}, {"jit_compile": True}], ids=str)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_bad_batch_leaves_weights_and_optimizer_as_they_were(bad, compiled):
    model = guarded(keras.optimizers.Adam(keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5)), compiled)
    model.train_on_batch(*GOOD)
    weights, slots = model.get_weights(), optimizer_variables(model.optimizer)
    model.train_on_batch(column(2), column(bad))
    tf.nest.map_structure(np.testing.assert_array_equal, model.get_weights(), weights)
    tf.nest.map_structure(np.testing.assert_array_equal, optimizer_variables(model.optimizer)[:-1], slots[:-1])
    assert skips(model) == 1
    model.train_on_batch(*GOOD)
    assert skips(model) == 0
    assert not np.array_equal(model.get_weights()[0], weights[0])


def test_a_step_by_hand():
    model = guarded()
    model.train_on_batch(*BAD)
    assert weight_of(model) == 1.0
    model.train_on_batch(*GOOD)
    assert weight_of(model) == 1 - 0.125 * 4
    assert int(model.optimizer.iterations.numpy()) == 1


@pytest.mark.parametrize("kind", ["functional", "sequential", "subclassed"])
def test_batch_norm_statistics_stay_finite(kind):
    model = prepared(KINDS[kind], "skip_nonfinite")
    model.train_on_batch(X[:BATCH], Y[:BATCH])
    before = model.get_weights()
    x = X[:BATCH].copy()
    x[1] = NAN
    model.train_on_batch(x, Y[:BATCH])
    tf.nest.map_structure(np.testing.assert_array_equal, model.get_weights(), before)
    model.train_on_batch(X[:BATCH], Y[:BATCH])
    assert all(np.isfinite(weight).all() for weight in model.get_weights())
    assert all((weight != old).any() for weight, old in zip(model.get_weights(), before, strict=True))


@pytest.mark.parametrize("optimizer", [sgd, lambda: keras.optimizers.Adam(0.01)], ids=["sgd", "adam"])
def test_on_finite_gradients_it_is_plain_keras(optimizer, assert_close):
    workload = Workload(dense, X, Y, lambda: {"optimizer": optimizer(), "loss": "mse"})
    mine, plain = run(workload, "skip_nonfinite"), run(workload)
    assert_close([mine.variables, mine.optimizer, mine.history], [plain.variables, plain.optimizer, plain.history])


def test_plain_keras_loses_the_model_to_one_such_batch():
    """The reason for all this."""
    model = prepared(KINDS["functional"])
    x = X[:BATCH].copy()
    x[1] = NAN
    model.train_on_batch(x, Y[:BATCH])
    assert np.isnan(model.get_weights()[0]).all()


@pytest.mark.parametrize("compiled", [{}, {"run_eagerly": True}, {"steps_per_execution": 2}], ids=str)
def test_too_many_in_a_row_stop_training_and_say_why(compiled):
    model = guarded(compiled=compiled, max_consecutive=3)
    x, y = np.full((8, 1), NAN, "float32"), np.ones((8, 1), "float32")
    with pytest.raises(errors.NonFiniteGradientError, match=r"not finite 3 updates in a row \(max_consecutive\)"):
        model.fit(x, y, batch_size=1, verbose=0)
    assert weight_of(model) == 1.0


def test_too_many_that_are_not_in_a_row_do_not():
    model = guarded(max_consecutive=2)
    for _ in range(4):
        model.train_on_batch(*BAD)
        model.train_on_batch(*GOOD)
    assert skips(model) == 0


@pytest.mark.parametrize("compiled", [{}, {"run_eagerly": True}, {"jit_compile": True}], ids=str)
def test_raise_stops_at_the_first_and_training_can_go_on_with_better_data(compiled):
    model = guarded(compiled=compiled, action="raise")
    x, y = column(2, 2, 2, 2), column(1, NAN, 1, 1)
    with pytest.raises(errors.NonFiniteGradientError, match=r"not finite \(action: raise\)"):
        model.fit(x, y, batch_size=1, shuffle=False, verbose=0)
    model.fit(column(2, 2), column(1, 1), batch_size=1, verbose=0)
    model.train_on_batch(*GOOD)
    assert np.isfinite(weight_of(model))


def test_it_drops_the_window_a_bad_batch_is_in():
    spec = {"gradient_accumulation": {"steps": 2}, "skip_nonfinite": {}}
    model = trainstep.apply(one_weight(), spec)
    model.compile(sgd(0.125), "mse")
    for batch in (GOOD, BAD, GOOD, GOOD):
        model.train_on_batch(*batch)
    assert weight_of(model) == 0.5  # One window is left: its mean gradient is 4.
    assert int(model.optimizer.iterations.numpy()) == 1


def test_a_bad_batch_of_one_replica_is_skipped_on_both(mirrored):
    with mirrored.scope():
        model = prepared(KINDS["functional"], "skip_nonfinite")
    x = X[:16].copy()
    x[1] = NAN
    model.fit(x, Y[:16], batch_size=8, epochs=2, shuffle=False, verbose=0)
    assert int(model.optimizer.iterations.numpy()) == 2
    assert all(np.isfinite(weight).all() for weight in model.get_weights())
