"""SWA: the mean of the weights along the way, by which the model is judged."""

import keras
import numpy as np
import pytest
from nets import BATCH, KINDS, X, Y, dense, one_weight, sgd
from runs import assert_same, run

import trainstep
from trainstep._seam import KERAS_3

ONE, ZERO = np.ones((1, 1), "float32"), np.zeros((1, 1), "float32")


def judged(updates: int, spec: dict) -> list[float]:
    """Return what the one weight, which SGD makes 0.8 of itself each time, is judged to be after each update."""
    model = trainstep.apply(one_weight(1.0), spec)
    model.compile(sgd(0.1), "mse")
    found = []
    for _ in range(updates):
        model.train_on_batch(ONE, ZERO)
        found.append(float(model.predict(ONE, verbose=0)[0, 0]))
    return found


def test_by_hand():
    w = [0.8**n for n in range(6)]
    # From the second update on, every second: w2, w4. Before there is a mean, the weights.
    expected = [w[1], w[2], w[2], (w[2] + w[4]) / 2, (w[2] + w[4]) / 2]
    assert judged(5, {"swa": {"start": 2, "period": 2}}) == pytest.approx(expected, rel=1e-6)


def test_it_counts_updates_and_not_micro_batches():
    found = judged(4, {"swa": {}, "gradient_accumulation": {"steps": 2}})
    assert found == pytest.approx([1, 0.8, 0.8, (0.8 + 0.64) / 2], rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_as_without_it(kind):
    """Operation by operation: on Keras 2 the masks of dropout depend on what else is in the graph."""
    assert_same(run(KINDS[kind], "swa", run_eagerly=True), run(KINDS[kind], run_eagerly=True))


@pytest.mark.skipif(KERAS_3, reason="tensorflow-addons is for Keras 2")
@pytest.mark.parametrize(("start", "period"), [(0, 1), (3, 2)])
def test_it_is_that_of_tensorflow_addons(start, period, assert_close):
    tfa = pytest.importorskip("tensorflow_addons")

    def built():
        keras.utils.set_random_seed(0)
        return dense()

    def trained(model, optimizer):
        model.compile(optimizer, "mse")
        model.fit(X, Y, batch_size=BATCH, epochs=2, shuffle=False, verbose=0)
        return model

    optimizer = tfa.optimizers.SWA(keras.optimizers.legacy.SGD(0.1), start_averaging=start, average_period=period)
    theirs = trained(built(), optimizer)
    optimizer.assign_average_vars(theirs.trainable_variables)
    # Theirs counts updates from 0.
    ours = trained(trainstep.apply(built(), "swa", start=start + 1, period=period), keras.optimizers.legacy.SGD(0.1))
    with ours.evaluation_weights():
        assert_close(ours.get_weights(), theirs.get_weights())
