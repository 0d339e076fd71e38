"""Accumulation: K micro-batches are the one batch they make up, and the optimizer never hears of them."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from nets import (
    BATCH,
    WithoutTrainingArgument,
    Workload,
    X,
    Y,
    dense,
    masked,
    numbers,
    one_weight,
    sgd,
    tokens,
    weight_of,
)
from runs import fitted, optimizer_variables, prepared, run

import trainstep


def accumulating(steps: int = 2, rate: float = 0.1, **options) -> keras.Model:
    model = trainstep.apply(one_weight(1.0), "gradient_accumulation", steps=steps, **options)
    model.compile(sgd(rate), "mse")
    return model


def column(*values: float) -> np.ndarray:
    return np.array(values, "float32")[:, None]


# --- By hand ----------------------------------------------------------------------------------------------------------

# w = 1, loss (w x - y)^2, g = 2 (w x - y) x. Data: (x, y) = (1, 0): g = 2; (2, 0): g = 8; (3, 0): g = 18.


def test_nothing_moves_until_the_window_is_full():
    model = accumulating(2)
    model.train_on_batch(column(1), column(0))
    assert weight_of(model) == 1.0
    model.train_on_batch(column(2), column(0))
    # G = (2 + 8) / 2 = 5.
    assert weight_of(model) == np.float32(1) - np.float32(0.1) * np.float32(5)


def test_examples_weigh_the_same_in_unequal_batches():
    model = accumulating(2)
    model.train_on_batch(column(1, 2), column(0, 0))
    model.train_on_batch(column(3), column(0))
    # Mean over the three examples: (2 + 8 + 18) / 3 = 28 / 3. A mean of means would be ((2 + 8) / 2 + 18) / 2 = 11.5.
    assert weight_of(model) == pytest.approx(1 - 0.1 * 28 / 3, rel=1e-6)


def test_batches_weigh_the_same_on_request():
    model = accumulating(2, weighting="batches")
    model.train_on_batch(column(1, 2), column(0, 0))
    model.train_on_batch(column(3), column(0))
    assert weight_of(model) == pytest.approx(1 - 0.1 * 11.5, rel=1e-6)


def test_a_sum_is_the_mean_times_the_batches_taken():
    model = accumulating(2, rate=0.01, reduction="sum")
    model.train_on_batch(column(1), column(0))
    model.train_on_batch(column(2), column(0))
    assert weight_of(model) == pytest.approx(1 - 0.01 * 10, rel=1e-6)  # 2 + 8


def test_a_window_of_nothing_but_padding_does_what_such_a_batch_does():
    """On Keras 3 its loss is 0 and nothing moves; on Keras 2 its loss is NaN already."""
    padding = np.zeros((4, 5), "int32")
    weights = []
    for spec, batch_size in ((None, 4), ({"gradient_accumulation": {"steps": 2}}, 2)):
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        workload = Workload(masked, padding, padding, lambda loss=loss: {"optimizer": sgd(), "loss": loss})
        weights.append(run(workload, spec, fit={"batch_size": batch_size, "epochs": 1}).variables)
    tf.nest.map_structure(np.testing.assert_array_equal, *weights)


def test_a_sum_over_a_window_that_is_not_full_counts_what_is_there():
    model = accumulating(3, rate=0.01, reduction="sum")
    model.fit(column(1, 2), column(0, 0), batch_size=1, shuffle=False, verbose=0)
    assert weight_of(model) == pytest.approx(1 - 0.01 * 10, rel=1e-6)


def test_the_last_window_is_applied_when_the_epoch_ends():
    model = accumulating(4)
    model.fit(column(1, 2), column(0, 0), batch_size=1, shuffle=False, verbose=0)
    assert weight_of(model) == np.float32(1) - np.float32(0.1) * np.float32(5)
    assert model.strategy_state["gradient_accumulation"]["count"].numpy() == 0


def test_the_last_window_is_carried_on_request():
    model = accumulating(4, last_window="carry")
    model.fit(column(1, 2), column(0, 0), batch_size=1, shuffle=False, verbose=0)
    assert weight_of(model) == 1.0
    model.fit(column(3, 1), column(0, 0), batch_size=1, shuffle=False, verbose=0)
    # The window of four is full: (2 + 8 + 18 + 2) / 4 = 7.5.
    assert weight_of(model) == np.float32(1) - np.float32(0.1) * np.float32(7.5)


def test_the_window_starts_anew_after_an_update():
    model = accumulating(2)
    for x in (1, 2):
        model.train_on_batch(column(x), column(0))
    w = weight_of(model)  # 0.5
    for x in (1, 1):
        model.train_on_batch(column(x), column(0))
    # g = 2 w x^2 = 1 for both.
    assert weight_of(model) == np.float32(w) - np.float32(0.1) * np.float32(2 * w)


def test_train_on_batch_leaves_the_last_window_open_and_fit_goes_on_from_there():
    model = accumulating(2)
    model.train_on_batch(column(1), column(0))
    model.fit(column(2), column(0), batch_size=1, verbose=0)
    assert weight_of(model) == np.float32(1) - np.float32(0.1) * np.float32(5)


def test_validation_sees_the_epochs_last_update():
    model = accumulating(4)
    history = model.fit(column(1, 2), column(0, 0), batch_size=1, shuffle=False, verbose=0,
                        validation_data=(column(1), column(0))).history  # fmt: skip
    assert history["val_loss"] == [pytest.approx(0.5**2)]  # w = 1 - 0.1 * 5


def test_callbacks_see_the_epochs_last_update():
    seen = []

    class Look(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            seen.append(weight_of(self.model))

    accumulating(4).fit(column(1, 2), column(0, 0), batch_size=1, shuffle=False, verbose=0, callbacks=[Look()])
    assert seen == [0.5]


def test_the_last_window_is_applied_in_a_callback_list_too():
    model = accumulating(4)
    callbacks = keras.callbacks.CallbackList([], add_history=True, model=model)
    for expected in (0.5, 0.25):  # G = (2 w + 8 w) / 2 = 5 w, each time.
        model.fit(column(1, 2), column(0, 0), batch_size=1, shuffle=False, verbose=0, callbacks=callbacks)
        assert weight_of(model) == expected


# --- The one big batch ------------------------------------------------------------------------------------------------


def legacy(name: str, *args, **kwargs) -> keras.optimizers.Optimizer | None:
    try:
        return getattr(keras.optimizers.legacy, name)(*args, **kwargs)
    except (AttributeError, ImportError):
        return None


OPTIMIZERS = {
    "sgd": lambda: sgd(0.1),
    "momentum": lambda: sgd(0.1, momentum=0.9, nesterov=True),
    "adam": lambda: keras.optimizers.Adam(0.05),
    "adamw": lambda: keras.optimizers.AdamW(0.05, weight_decay=0.1),
    "ema": lambda: sgd(0.1, use_ema=True, ema_momentum=0.5),
    "schedule": lambda: sgd(keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5)),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_four_batches_are_the_one_batch_they_make_up(optimizer, assert_close):
    """Weights, slots, schedule, average and count: 22 examples in windows of 16 and 6, micro-batches of 4 and 2."""

    def compiled():
        return {"optimizer": OPTIMIZERS[optimizer](), "loss": "huber"}

    small = run(Workload(dense, X, Y, compiled), "gradient_accumulation", {"steps": 4})
    big = run(Workload(dense, X, Y, compiled), fit={"batch_size": 16})
    assert_close(small.variables, big.variables)
    # Ours has three kinds of variables more, after those of the optimizer.
    assert_close(small.optimizer[: len(big.optimizer)], big.optimizer)


@pytest.mark.parametrize("sizes", [(4, 2), (1, 5), (2, 2, 2), (6,)])
def test_unequal_batches_are_the_one_batch_they_make_up(sizes, assert_close):
    model = prepared(Workload(dense, X, Y), "gradient_accumulation", {"steps": len(sizes)})
    start = 0
    for size in sizes:
        model.train_on_batch(X[start : start + size], Y[start : start + size])
        start += size
    one = prepared(Workload(dense, X, Y))
    one.train_on_batch(X[:6], Y[:6])
    assert_close(model.get_weights(), one.get_weights())


def test_sample_weights_are_those_of_the_big_batch(assert_close):
    weights = np.linspace(0, 3, len(X)).astype("float32")
    small = run(Workload(dense, X, Y, fit={"sample_weight": weights}), "gradient_accumulation", {"steps": 4})
    big = run(Workload(dense, X, Y, fit={"sample_weight": weights, "batch_size": 16}))
    assert_close(small.variables, big.variables)


def test_a_loss_that_sums_adds_up_on_request(assert_close):
    """Unequal batches too: a sum over examples is the sum of sums."""
    workload = Workload(dense, X[:6], Y[:6], lambda: {"optimizer": sgd(0.01), "loss": keras.losses.MeanSquaredError(
        reduction="sum")})  # fmt: skip
    model = prepared(workload, "gradient_accumulation", {"steps": 2, "weighting": "batches", "reduction": "sum"})
    model.train_on_batch(X[:4], Y[:4])
    model.train_on_batch(X[4:6], Y[4:6])
    assert_close(model.get_weights(), run(workload, fit={"batch_size": 6, "epochs": 1}).variables)


def test_masked_sequences_are_weighed_by_their_unmasked_entries(assert_close):
    """Keras divides by the unmasked entries of a batch: the sum over micro-batches must too."""
    x = tokens(16)
    assert len({int((x[i : i + 4] > 0).sum()) for i in range(0, 16, 4)}) > 1  # They do hold different numbers.

    def compiled():
        return {"optimizer": sgd(0.5), "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True)}

    small = run(Workload(masked, x, x % 3, compiled), "gradient_accumulation", {"steps": 4}, {"epochs": 3})
    big = run(Workload(masked, x, x % 3, compiled), fit={"batch_size": 16, "epochs": 3})
    assert_close(small.variables, big.variables)


def test_a_sparse_gradient_adds_up(assert_close):
    def embedded():
        return keras.Sequential([keras.Input((3,), dtype="int32"), keras.layers.Embedding(7, 2), keras.layers.Flatten(),
                                 keras.layers.Dense(1)])  # fmt: skip

    x = tokens(16, 3)
    small = run(Workload(embedded, x, Y[:16]), "gradient_accumulation", {"steps": 4})
    big = run(Workload(embedded, x, Y[:16]), fit={"batch_size": 16})
    assert_close(small.variables, big.variables)


@pytest.mark.parametrize(
    "compiled", [{"run_eagerly": True}, {"steps_per_execution": 4}, {"jit_compile": True}], ids=str
)
def test_the_window_is_the_same_however_the_step_runs(compiled, assert_close):
    workload = Workload(dense, X[:20], Y[:20], lambda: {"optimizer": keras.optimizers.Adam(0.05), "loss": "mse"})
    graph = run(workload, "gradient_accumulation", {"steps": 4}, jit_compile=False)
    assert_close(list(run(workload, "gradient_accumulation", {"steps": 4}, **compiled)), list(graph))


# --- The optimizer counts updates -------------------------------------------------------------------------------------


def test_iterations_schedules_decay_and_slots_move_once_per_window():
    model = prepared(Workload(dense, X, Y, lambda: {"optimizer": OPTIMIZERS["adamw"](), "loss": "mse"}),
                     "gradient_accumulation", {"steps": 3})  # fmt: skip
    own = None
    for i in range(1, 7):
        before = [v.copy() for v in model.get_weights()], optimizer_variables(model.optimizer)
        model.train_on_batch(X[:BATCH], Y[:BATCH])
        assert int(model.optimizer.iterations.numpy()) == i // 3
        own = own or len(before[1])
        if i % 3:
            # Weight decay acts even on a zero gradient, momentum moves on by itself: neither may happen.
            tf.nest.map_structure(np.testing.assert_array_equal, model.get_weights(), before[0])


def test_the_logs_are_those_of_every_micro_batch():
    # w = 1: losses 1, 4, 9 of the three batches of one example. The mean is over all of them.
    model = accumulating(3, rate=0.0)
    history = model.fit(column(1, 2, 3), column(0, 0, 0), batch_size=1, shuffle=False, verbose=0).history
    assert history["loss"] == [pytest.approx(14 / 3)]


def test_what_ends_an_epoch_is_traced_once():
    traces = []

    class Looking(trainstep.Strategy):
        declaration = trainstep.Declaration("looking", trainstep.Stage.REPORT, "", "", neutral={})

        def update_weights(self, update):
            traces.append(1)
            super().update_weights(update)

    model = type("Net", (trainstep.strategies.GradientAccumulation, Looking, WithoutTrainingArgument), {})()
    model.compile(sgd(), "mse")
    fitted(model, Workload(dense, X, Y), epochs=1)
    first = len(traces)
    fitted(model, Workload(dense, X, Y), epochs=3)
    assert len(traces) == first > 0


def test_a_window_of_one_is_no_window():
    model = accumulating(1)
    model.train_on_batch(column(1), column(0))
    assert weight_of(model) == np.float32(1) - np.float32(0.1) * np.float32(2)
    assert model.strategy_state["gradient_accumulation"] == {}


def test_state_is_saved_and_a_stopped_window_goes_on(tmp_path):
    """Weights and optimizer restored in the middle of a window give what never stopping gives, bit for bit."""
    x, y = numbers(8, 6), numbers(8, 1, seed=3)

    def model():
        return prepared(Workload(dense, x, y, lambda: {"optimizer": keras.optimizers.Adam(0.05), "loss": "mse"}),
                        "gradient_accumulation", {"steps": 4})  # fmt: skip

    def train(net, first, last):
        for i in range(first, last):
            net.train_on_batch(x[2 * (i % 4) : 2 * (i % 4) + 2], y[2 * (i % 4) : 2 * (i % 4) + 2])

    never_stopped = model()
    train(never_stopped, 0, 8)
    stopped = model()
    train(stopped, 0, 6)
    checkpoint = tf.train.Checkpoint(model=stopped, optimizer=stopped.optimizer).save(str(tmp_path / "state"))
    restored = model()
    tf.train.Checkpoint(model=restored, optimizer=restored.optimizer).restore(
        checkpoint
    ).assert_existing_objects_matched()
    train(restored, 6, 8)
    tf.nest.map_structure(np.testing.assert_array_equal, restored.get_weights(), never_stopped.get_weights())


def test_early_stopping_by_hand_between_epochs_keeps_the_window_closed():
    model = accumulating(4)

    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.stop_training = True

    model.fit(column(1, 2, 3), column(0, 0, 0), batch_size=1, shuffle=False, verbose=0, callbacks=[Stop()])
    # Keras leaves the epoch after the first batch, and ends it: G = 2.
    assert weight_of(model) == np.float32(1) - np.float32(0.1) * np.float32(2)


def test_recompiling_opens_a_new_window():
    model = accumulating(2)
    model.train_on_batch(column(3), column(0))
    model.compile(sgd(0.1), "mse")
    model.train_on_batch(column(1), column(0))
    model.train_on_batch(column(2), column(0))
    assert weight_of(model) == np.float32(1) - np.float32(0.1) * np.float32(5)


def test_frozen_layers_keep_no_sums():
    model = dense()
    model.layers[0].trainable = False
    trainstep.apply(model, "gradient_accumulation", steps=2)
    model.compile(sgd(), "mse")
    result = fitted(model, Workload(dense, X, Y))
    assert len(model.strategy_state["gradient_accumulation"]["gradients"]) == 2
    assert np.isfinite(result.history["loss"]).all()


def test_a_weight_frozen_in_the_middle_of_a_window_begins_a_new_one_when_it_thaws(assert_close):
    model = trainstep.apply(dense(), "gradient_accumulation", steps=3, last_window="carry")
    optimizer = sgd()
    for trainable, batches in ((True, 2), (False, 1)):  # The window of three closes without the first layer.
        model.layers[0].trainable = trainable
        model.compile(optimizer, "mse")
        model.fit(X[: 4 * batches], Y[: 4 * batches], batch_size=4, shuffle=False, verbose=0)
    model.layers[0].trainable = True
    model.compile(optimizer, "mse")
    whole = dense()
    whole.set_weights(model.get_weights())
    whole.compile(sgd(), "mse")
    model.fit(X[:12], Y[:12], batch_size=4, shuffle=False, verbose=0)
    whole.fit(X[:12], Y[:12], batch_size=12, verbose=0)
    assert_close(model.get_weights(), whole.get_weights())


class WithUnused(keras.Model):
    """Has a layer the output does not depend on."""

    def __init__(self):
        super().__init__()
        self.out, self.unused = keras.layers.Dense(1), keras.layers.Dense(2)

    def call(self, x):
        self.unused(x)
        return self.out(x)


@pytest.mark.filterwarnings("ignore:Gradients do not exist", "ignore:The model does not have any trainable")
@pytest.mark.parametrize("compiled", [{}, {"run_eagerly": True}], ids=str)
def test_a_short_last_window_does_not_decay_a_weight_without_a_gradient(compiled):
    model = trainstep.apply(WithUnused(), "gradient_accumulation", steps=4)
    model.compile(keras.optimizers.AdamW(0.1, weight_decay=0.5), "mse", **compiled)
    model.predict(X[:1], verbose=0)
    before, out = model.unused.get_weights()[0], model.out.get_weights()[0]
    model.fit(X, Y, batch_size=BATCH, epochs=1, verbose=0)  # Six batches: a window, and half of one.
    np.testing.assert_array_equal(model.unused.get_weights()[0], before)
    assert not np.array_equal(model.out.get_weights()[0], out)


def test_models_trained_one_after_the_other_are_not_said_to_be_traced_too_often(caplog):
    """TensorFlow warns at the fifth function with the same code that is traced and never called again."""
    for _ in range(7):
        model = trainstep.apply(one_weight(), "gradient_accumulation", steps=3)
        model.compile(sgd(), "mse")
        model.fit(column(1.0, 2.0), column(0.0, 0.0), batch_size=1, verbose=0)
    assert "retracing" not in caplog.text
