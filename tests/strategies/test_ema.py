"""EMA: a smoothed copy of the weights, by which the model is judged, while training goes on as without it."""

import keras
import numpy as np
import pytest
from nets import BATCH, KINDS, X, Y, dense, one_weight, sgd, weight_of
from runs import assert_same, run

import trainstep
from trainstep import errors
from trainstep._seam import KERAS_3
from trainstep.strategies.ema import EmaOptions

ONE, ZERO = np.ones((1, 1), "float32"), np.zeros((1, 1), "float32")


def judged(updates: int, **options) -> list[float]:
    """Return what the one weight, which SGD makes 0.8 of itself each time, is judged to be after each update."""
    model = trainstep.apply(one_weight(1.0), "ema", **options)
    model.compile(sgd(0.1), "mse")
    found = []
    for _ in range(updates):
        model.train_on_batch(ONE, ZERO)
        found.append(float(model.predict(ONE, verbose=0)[0, 0]))
    return found


def test_by_hand():
    # Weights 1, 0.8, 0.64, 0.512; the average starts at 1: 0.5 * 1 + 0.5 * 0.8, ...
    assert judged(3, decay=0.5, warmup=False) == pytest.approx([0.9, 0.77, 0.641], rel=1e-6)


def test_the_warm_up_forgets_faster_at_first():
    # Of the average 1/10 is kept, then 2/11: less than the decay.
    first = 0.1 * 1 + 0.9 * 0.8
    assert judged(2, decay=0.5) == pytest.approx([first, 2 / 11 * first + 9 / 11 * 0.64], rel=1e-6)


def test_after_a_half_life_half_of_the_average_is_new():
    assert EmaOptions(half_life=10.0).kept ** 10 == pytest.approx(0.5)
    with pytest.raises(errors.InvalidOptionsError, match="give decay or half_life, not both"):
        trainstep.plan("ema", decay=0.9, half_life=2.0)


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_as_without_it(kind):
    """Operation by operation: on Keras 2 the masks of dropout depend on what else is in the graph."""
    assert_same(run(KINDS[kind], "ema", run_eagerly=True), run(KINDS[kind], run_eagerly=True))


def test_validation_and_evaluate_take_the_average_and_the_weights_come_back():
    model = trainstep.apply(one_weight(1.0), "ema", decay=0.5, warmup=False)
    model.compile(sgd(0.1), "mse")
    history = model.fit(ONE, ZERO, validation_data=(ONE, ZERO), verbose=0).history
    assert history["val_loss"] == [pytest.approx(0.9**2, rel=1e-6)]
    assert model.evaluate(ONE, ZERO, verbose=0) == pytest.approx(0.9**2, rel=1e-6)
    assert weight_of(model) == pytest.approx(0.8, rel=1e-6)
    with model.evaluation_weights():
        assert weight_of(model) == pytest.approx(0.9, rel=1e-6)


def test_or_the_weights_by_option_and_before_any_update():
    model = trainstep.apply(one_weight(1.0), "ema", decay=0.5, evaluate_with="weights")
    assert model.predict(ONE, verbose=0)[0, 0] == 1.0  # Not even compiled.
    model.compile(sgd(0.1), "mse")
    model.train_on_batch(ONE, ZERO)
    assert model.predict(ONE, verbose=0)[0, 0] == pytest.approx(0.8, rel=1e-6)


def test_averaging_twice_is_refused():
    with pytest.raises(errors.StrategyConflictError, match="both are averages"):
        trainstep.apply(dense(), ["ema", "swa"])


@pytest.mark.skipif(KERAS_3, reason="tensorflow-addons is for Keras 2")
@pytest.mark.parametrize("dynamic", [False, True])
def test_it_is_the_moving_average_of_tensorflow_addons(dynamic, assert_close):
    tfa = pytest.importorskip("tensorflow_addons")

    def built():
        keras.utils.set_random_seed(0)
        return dense()

    def trained(model, optimizer):
        model.compile(optimizer, "mse")
        model.fit(X, Y, batch_size=BATCH, epochs=2, shuffle=False, verbose=0)
        return model

    optimizer = tfa.optimizers.MovingAverage(keras.optimizers.legacy.SGD(0.1), 0.8, dynamic_decay=dynamic)
    theirs = trained(built(), optimizer)
    optimizer.assign_average_vars(theirs.trainable_variables)
    ours = trained(trainstep.apply(built(), "ema", decay=0.8, warmup=dynamic), keras.optimizers.legacy.SGD(0.1))
    with ours.evaluation_weights():
        assert_close(ours.get_weights(), theirs.get_weights())


def test_the_average_is_in_the_file(tmp_path):
    model = trainstep.apply(dense(), "ema", decay=0.5)
    model.compile("sgd", "mse")
    model.fit(X, Y, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), model.predict(X, verbose=0))
