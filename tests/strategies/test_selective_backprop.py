"""Selective backprop trains on the part of a batch whose loss is high."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from nets import (
    MULTI,
    Task,
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
from runs import assert_same, prepared, run

import trainstep
from trainstep import errors
from trainstep._seam import with_mask
from trainstep.step import Batch
from trainstep.strategies._losses import losses_of_examples
from trainstep.strategies.selective_backprop import SelectiveBackpropOptions, chosen

TOP = SelectiveBackpropOptions(choose="top")
SEED = tf.constant([0, 0])


def column(*values: float) -> np.ndarray:
    return np.array(values, "float32")[:, None]


def shares_kept(keep: float, draws: int, losses: list[float]) -> np.ndarray:
    """Return how often each example is kept of so many batches with these losses."""
    options, count = SelectiveBackpropOptions(keep=keep), tf.constant(round(keep * len(losses)))
    drawn = [chosen(tf.constant(losses), count, options, tf.constant([3, draw])).numpy() for draw in range(draws)]
    return np.bincount(np.concatenate(drawn), minlength=len(losses)) / draws


def test_the_highest_losses_are_kept_in_the_order_of_the_batch():
    losses = tf.constant([0.5, 3.0, 1.0, 2.0, 0.1])
    np.testing.assert_array_equal(chosen(losses, tf.constant(3), TOP, SEED), [1, 2, 3])


@pytest.mark.parametrize("choose", ["top", "sample"])
def test_a_loss_that_is_not_finite_is_always_kept(choose):
    losses = tf.constant([0.5, np.nan, 9.0, np.inf, 0.1])
    for draw in range(20):
        kept = chosen(losses, tf.constant(2), SelectiveBackpropOptions(choose=choose), tf.constant([0, draw]))
        np.testing.assert_array_equal(kept, [1, 3])


def test_odds_are_those_of_the_paper():
    """Of one example drawn of four, by F^beta with keep = 1/4, so beta = 3; F is taken in the middle of each rank."""
    odds = (np.array([0.5, 2.5, 1.5, 3.5]) / 4) ** 3
    shares = shares_kept(0.25, 2000, [0.1, 5.0, 0.2, 7.0])
    # Four standard deviations of 2000 draws are at most 4 * sqrt(0.25 / 2000) = 0.045.
    np.testing.assert_allclose(shares, odds / odds.sum(), atol=0.045)


def test_draws_are_without_replacement_as_numpy_makes_them():
    losses = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    odds = (np.arange(6) + 0.5) / 6  # keep = 1/2: beta = 1.
    generator = np.random.default_rng(0)
    expected = [generator.choice(6, 3, replace=False, p=odds / odds.sum()) for _ in range(2000)]
    shares = np.bincount(np.concatenate(expected), minlength=6) / 2000
    np.testing.assert_allclose(shares_kept(0.5, 2000, losses), shares, atol=0.06)  # Of both the deviations above.


def test_one_weight_by_hand():
    # w = 1, x = 1: losses (1 - y)^2 = 0, 1, 4, 9; the last two are kept.
    # g = mean 2 (w - y) = (2 * -2 + 2 * -3) / 2 = -5.
    model = trainstep.apply(one_weight(1.0), "selective_backprop", choose="top")
    model.compile(sgd(0.1), "mse")
    logged = model.train_on_batch(np.ones((4, 1)), column(1, 2, 3, 4))
    assert weight_of(model) == pytest.approx(1 + 0.1 * 5)
    assert float(np.ravel(logged)[0]) == pytest.approx((4 + 9) / 2)


def test_sample_weights_weigh_the_losses_by_hand():
    # Losses 1, 4, 9 weighed by 9, 2, 0: 9, 8, 0. Kept are the first two: g = (9 * 2 * -1 + 2 * 2 * -2) / 2 = -13.
    model = trainstep.apply(one_weight(1.0), "selective_backprop", choose="top")
    model.compile(sgd(0.1), "mse")
    model.train_on_batch(np.ones((3, 1)), column(2, 3, 4), sample_weight=np.array([9.0, 2.0, 0.0]))
    assert weight_of(model) == pytest.approx(1 + 0.1 * 13)


@pytest.mark.parametrize(("keep", "kept"), [(0.1, 1), (0.5, 2), (0.51, 3), (0.75, 3), (0.76, 4)])
def test_so_many_are_kept_as_the_share_asks_for_rounded_up(keep, kept):
    # Losses (0 - y)^2 with w = 0 and x = 1: the highest are those of the highest labels, and g = mean -2 y of them.
    model = trainstep.apply(one_weight(0.0), "selective_backprop", choose="top", keep=keep)
    model.compile(sgd(1.0), "mse")
    model.train_on_batch(np.ones((4, 1)), column(1, 2, 3, 4))
    assert weight_of(model) == pytest.approx(2 * np.mean([4, 3, 2, 1][:kept]))


def test_it_is_an_own_loop(assert_close):
    keras.utils.set_random_seed(0)
    model = dense()
    for start in range(0, len(X), 4):
        x, y = X[start : start + 4], Y[start : start + 4]
        losses = np.mean((model(x) - y) ** 2, axis=-1)
        kept = np.sort(np.argsort(-losses)[: -(-len(x) // 2)])
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x[kept]) - y[kept]))
        gradients = tape.gradient(loss, model.trainable_variables)
        model.set_weights([w - 0.1 * g.numpy() for w, g in zip(model.get_weights(), gradients, strict=True)])
    assert_close(
        run(workload_for(dense), "selective_backprop", {"choose": "top"}, fit={"epochs": 1}).variables,
        model.get_weights(),
    )


def test_it_looks_at_the_losses_without_dropout_and_leaves_statistics_alone():
    """Of two examples it keeps the one of the higher loss in inference, and batch norm has seen this one only."""
    model = prepared(workload_for(functional), "selective_backprop", {"choose": "top", "keep": 0.5})
    plain = prepared(workload_for(functional))
    x, y = X[:2], Y[:2]
    kept = int(np.argmax((model.predict(x, verbose=0) - y) ** 2))
    model.train_on_batch(x, y)
    plain.train_on_batch(x[kept : kept + 1], y[kept : kept + 1])
    # Moving mean and variance. Not beta: on Keras 2 both draw their dropout, which comes after it, by other seeds.
    pairs = zip(*(each.get_layer("norm").get_weights()[2:] for each in (model, plain)), strict=True)
    for ours, expected in pairs:
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-7)


def test_the_loss_of_an_example_is_by_all_outputs_masks_and_weights():
    task = Task(outputs=True)
    model = dense(task)
    model.compile(sgd(), task.loss, loss_weights={"kind": 2.0, "value": 0.5})
    weights = {"kind": np.full(22, 3.0, "float32"), "value": np.linspace(0, 1, 22, dtype="float32")}
    y_pred = model(task.x)
    losses = losses_of_examples("selective_backprop", model, Batch(task.x, task.y, weights), y_pred)
    cross_entropies = -(task.y["kind"] * np.log(y_pred["kind"])).sum(axis=-1)
    squares = ((y_pred["value"] - task.y["value"]) ** 2).numpy()[:, 0]
    expected = 2 * weights["kind"] * cross_entropies + 0.5 * weights["value"] * squares
    np.testing.assert_allclose(losses, expected, rtol=1e-4, atol=1e-6)


def test_masked_entries_are_no_part_of_the_loss_of_an_example():
    model = masked()
    model.compile(sgd(), "mse")
    y_pred = with_mask(tf.constant([[[1.0], [5.0]], [[2.0], [3.0]]]), tf.constant([[True, False], [True, True]]))
    # (1 - 0)^2; and the mean of 4 and 9.
    losses = losses_of_examples("selective_backprop", model, Batch(None, tf.zeros((2, 2, 1))), y_pred)
    np.testing.assert_allclose(losses, [1, 6.5])


def test_it_chooses_between_start_and_end_and_is_interrupted():
    # w = 0 and a learning rate of 0: the loss that is logged is the mean of squares of what is kept. Of (1, 3) all make
    # 5, the half 9. Updates 0 to 6, with start 1, end 6 and every third interrupted: all, half, all, half, half, all,
    # all.
    options = {"choose": "top", "start": 1, "end": 6, "interrupt": 3}
    model = trainstep.apply(one_weight(0.0), "selective_backprop", **options)
    model.compile(sgd(0.0), "mse")
    logged = []
    for _ in range(7):
        model.reset_metrics()
        logged.append(float(np.ravel(model.train_on_batch(np.ones((2, 1)), column(1, 3)))[0]))
    assert logged == [5, 9, 5, 9, 9, 5, 5]


@pytest.mark.parametrize("options", [{"start": 10**6}, {"start": 0, "interrupt": 1}, {"keep": 1.0}], ids=str)
def test_when_all_is_kept_it_is_plain_keras(options):
    ours, plain = run(workload_for(dense), "selective_backprop", options), run(workload_for(dense))
    assert_same(ours._replace(state=[]), plain)


def test_a_number_of_examples_that_changes_is_refused_under_xla():
    model = trainstep.apply(dense(), "selective_backprop", start=5)
    with pytest.raises(errors.ModelConflictError, match=r"XLA cannot compile this step. selective_backprop: how many"):
        model.compile(sgd(), "mse", jit_compile=True)
    compiled = dense()
    compiled.compile(sgd(), "mse", jit_compile=True)
    with pytest.raises(errors.ModelConflictError, match="Or compile with jit_compile=False"):
        trainstep.apply(compiled, "selective_backprop", start=5)


def test_an_end_before_the_start_is_refused():
    with pytest.raises(errors.InvalidOptionsError, match="5 is not after 7"):
        trainstep.apply(dense(), "selective_backprop", start=7, end=5)


class OwnLoss(keras.Model):
    def __init__(self):
        super().__init__()
        self.out = keras.layers.Dense(1)

    def call(self, x):
        return self.out(x)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, **kwargs):
        return tf.reduce_mean(tf.square(y - y_pred))


def test_a_model_without_a_loss_of_each_example_is_refused():
    with pytest.raises(errors.ModelConflictError, match="the model is compiled without one"):
        run(Workload(OwnLoss, X, Y, lambda: {"optimizer": sgd()}), "selective_backprop")

    def one_for_all(y, y_pred):
        return tf.reduce_mean(tf.square(y - y_pred))

    with pytest.raises(errors.ModelConflictError, match="is one number for all"):
        run(workload_for(dense, loss=one_for_all), "selective_backprop")


def test_sequences_and_several_inputs_train():
    x = tokens(20)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    for workload in (Workload(masked, x, x % 3, lambda: {"optimizer": sgd(), "loss": loss}), MULTI):
        assert np.isfinite(run(workload, "selective_backprop").history["loss"]).all()
