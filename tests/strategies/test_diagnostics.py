"""Diagnostics: the numbers of the updates, derived by hand, wherever Keras shows its metrics."""

import time

import keras
import numpy as np
import pytest
import tensorflow as tf
from catalogue import registered
from nets import KINDS, Workload, X, Y, dense, numbers, one_weight, sgd
from runs import fitted, prepared, run

import trainstep
from trainstep import errors

pytestmark = pytest.mark.filterwarnings("ignore:mixed_precision computes in float16:UserWarning")

NAN = float("nan")
F16 = {"dtype": "float16", "initial_scale": 2.0**10}
STACK = {
    "gradient_accumulation": {"steps": 2},
    "mixed_precision": F16,
    "skip_nonfinite": {},
    "diagnostics": {},
    "gradient_clipping": {"global_clipnorm": 3.0},
}
ALWAYS = {"gradient_norm", "effective_batch"}
CLIPPING = {"clipped_gradient_norm", "clipped"}

# y = w x with w = 1, and labels of zero: the gradient 2 (w x - y) x of an example is 2 x^2.
EXAMPLES = np.array([1, 2, 1, 2, 1], "float32")[:, None]  # 2, 8, 2, 8, 2
ZEROS = np.zeros_like(EXAMPLES)


def logs(spec, x=EXAMPLES, epochs=1, compiled=None, **fit) -> dict[str, list[float]]:
    """Return the logs of training the one weight on single examples, at a learning rate of zero: it stays."""
    model = trainstep.apply(one_weight(), spec)
    model.compile(sgd(0.0), "mse", **(compiled or {}))
    arguments = {"batch_size": 1, "shuffle": False, "verbose": 0, **fit}
    return model.fit(x, ZEROS[: len(x)], epochs=epochs, **arguments).history


@pytest.mark.parametrize(
    "compiled", [{}, {"run_eagerly": True}, {"jit_compile": True}, {"steps_per_execution": 2}], ids=str
)
def test_norms_and_the_share_clipped_by_hand(compiled):
    found = logs({"diagnostics": {}, "gradient_clipping": {"global_clipnorm": 4.0}}, compiled=compiled)
    assert found["gradient_norm"] == [pytest.approx((2 + 8 + 2 + 8 + 2) / 5)]
    assert found["clipped_gradient_norm"] == [pytest.approx((2 + 4 + 2 + 4 + 2) / 5)]
    assert found["clipped"] == [pytest.approx(2 / 5)]
    assert found["effective_batch"] == [1.0]


def test_the_norm_of_a_sparse_gradient_is_that_of_its_sums():
    model = keras.Sequential([keras.layers.Input((3,), dtype="int32"), keras.layers.Embedding(5, 1)])
    trainstep.apply(model, {"diagnostics": {}, "gradient_clipping": {"global_clipnorm": 1e6}})
    model.compile(sgd(0.0), lambda y, y_pred: tf.reduce_sum(y_pred))
    history = model.fit(np.zeros((4, 3), "int32"), np.zeros((4, 1)), batch_size=4, verbose=0).history
    # The row of token 0 is used 12 times, each with a gradient of 1.
    assert history["gradient_norm"] == history["clipped_gradient_norm"] == [12.0]


def test_without_clipping_there_is_a_gradient_norm_and_nothing_of_clipping():
    assert logs("diagnostics").keys() == {"loss"} | ALWAYS
    unbounded = {"diagnostics": {}, "gradient_clipping": {"global_clipnorm": float("inf")}}
    assert logs(unbounded).keys() == {"loss"} | ALWAYS


@pytest.mark.parametrize("weighting", ["samples", "batches"])
def test_under_accumulation_the_mean_is_over_updates(weighting):
    """Windows of two: (2 + 8) / 2, (2 + 8) / 2, and the last one with 2 alone, applied when the epoch ends."""
    found = logs({"diagnostics": {}, "gradient_accumulation": {"steps": 2, "weighting": weighting}})
    assert found["gradient_norm"] == [pytest.approx((5 + 5 + 2) / 3)]
    assert found["effective_batch"] == [pytest.approx((2 + 2 + 1) / 3)]


def test_the_effective_batch_counts_examples_where_batches_weigh_the_same():
    spec = {"diagnostics": {}, "gradient_accumulation": {"steps": 2, "weighting": "batches"}}
    # Batches of 2, 2 and 1: a window of four, and one of one.
    assert logs(spec, batch_size=2)["effective_batch"] == [pytest.approx((4 + 1) / 2)]


def test_the_last_window_is_in_the_logs_with_validation_too():
    spec = {"diagnostics": {}, "gradient_accumulation": {"steps": 2}}
    found = logs(spec, epochs=2, validation_data=(EXAMPLES, ZEROS))
    assert found["gradient_norm"] == [pytest.approx((5 + 5 + 2) / 3)] * 2
    assert found.keys() == {"loss", "val_loss"} | ALWAYS  # An evaluation updates nothing.


def test_a_window_that_is_carried_on_counts_in_the_epoch_it_is_applied_in():
    found = logs({"diagnostics": {}, "gradient_accumulation": {"steps": 4, "last_window": "carry"}}, epochs=2)
    # First 2, 8, 2, 8; then the 2 that was left with 2, 8, 2.
    assert found["gradient_norm"] == [pytest.approx((2 + 8 + 2 + 8) / 4), pytest.approx((2 + 2 + 8 + 2) / 4)]


def test_skipped_updates_are_counted_by_the_epoch_and_are_no_part_of_any_mean():
    model = trainstep.apply(one_weight(), ["diagnostics", "skip_nonfinite"])
    model.compile(sgd(0.0), "mse")
    bad = np.where([[0], [1], [0], [1], [0]], NAN, EXAMPLES).astype("float32")
    counts = []
    for x in (bad, EXAMPLES):
        history = model.fit(x, ZEROS, batch_size=1, shuffle=False, verbose=0).history
        counts += history["skipped_updates"]
        assert history["gradient_norm"] == [pytest.approx(2.0 if x is bad else 22 / 5)]
        assert history["effective_batch"] == [1.0]
    assert counts == [2.0, 0.0]


def test_under_float16_the_loss_scale_is_the_last_and_skips_are_counted_once():
    spec = {"diagnostics": {}, "mixed_precision": F16, "skip_nonfinite": {}}
    bad = np.array([[NAN], [1], [NAN], [1], [1]], "float32")
    found = logs(spec, x=bad, epochs=2)
    assert found["skipped_updates"] == [2.0, 2.0]
    assert found["loss_scale"] == [2.0**8, 2.0**6]
    assert logs({"diagnostics": {}, "mixed_precision": {"dtype": "bfloat16"}}).keys() == {"loss"} | ALWAYS


def test_an_epoch_without_an_update_shows_zeros():
    """As Keras's metrics do that nothing entered; the loss scale is there all the same."""
    found = logs({"diagnostics": {}, "mixed_precision": F16}, x=np.full((2, 1), NAN, "float32"))
    assert [found[name] for name in ("gradient_norm", "effective_batch", "skipped_updates")] == [[0.0], [0.0], [2.0]]
    assert found["loss_scale"] == [2.0**8]


def test_the_norm_is_that_of_the_gradient_tape():
    model = prepared(KINDS["subclassed"], "diagnostics", optimizer=sgd(0.0))
    model.drop.rate = 0.0
    with tf.GradientTape() as tape:
        y_pred = model(X, training=True)
        loss = tf.reduce_mean(tf.square(y_pred - Y)) + tf.add_n(model.losses)
    gradients = [tf.convert_to_tensor(g) for g in tape.gradient(loss, model.trainable_variables)]
    expected = np.sqrt(sum(np.sum(np.square(g.numpy())) for g in gradients))
    found = model.train_on_batch(X, Y, return_dict=True)
    assert float(found["gradient_norm"]) == pytest.approx(expected, rel=2e-5)


def test_train_on_batch_reports_that_batch():
    model = prepared(Workload(one_weight, EXAMPLES, ZEROS), "diagnostics", optimizer=sgd(0.0))
    for x, norm in ((1, 2), (2, 8)):
        model.reset_metrics()  # Keras 3.12 goes on with the means of the epoch, here as for its loss.
        found = model.train_on_batch(np.full((3, 1), x, "float32"), np.zeros((3, 1), "float32"), return_dict=True)
        assert float(found["gradient_norm"]) == norm
        assert float(found["effective_batch"]) == 3


def test_two_replicas_report_what_one_device_does(mirrored, assert_close):
    x, y = numbers(20, 6), 3 * numbers(20, 1, seed=1)

    def history(distribution):
        keras.utils.set_random_seed(0)
        with distribution.scope():
            model = trainstep.apply(dense(), STACK)
            model.compile(sgd(), "mse")
        found = model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0).history
        return {name: list(map(float, values)) for name, values in found.items()}

    one = history(tf.distribute.get_strategy())
    assert one.keys() == {"loss", "loss_scale", "skipped_updates"} | ALWAYS | CLIPPING
    assert one["effective_batch"] == [pytest.approx((8 + 8 + 4) / 3)] * 2
    assert_close(history(mirrored), one, "float16")


def test_logs_of_a_batch_are_those_of_one_device(mirrored):
    seen = []
    with mirrored.scope():
        model = trainstep.apply(one_weight(), "diagnostics")
        model.compile(sgd(0.0), "mse")
    callback = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append(dict(logs)))
    model.fit(EXAMPLES[:4], ZEROS[:4], batch_size=2, shuffle=False, verbose=0, callbacks=[callback])
    # (2 + 8) / 2 in both batches, of two examples each.
    assert [(logs["gradient_norm"], logs["effective_batch"]) for logs in seen] == [(5.0, 2.0)] * 2


def test_a_bad_batch_on_two_replicas_is_one_skipped_update(mirrored):
    with mirrored.scope():
        model = trainstep.apply(one_weight(), ["diagnostics", "skip_nonfinite"])
        model.compile(sgd(0.0), "mse")
    x = np.array([[NAN], [1], [1], [1]], "float32")
    found = model.fit(x, np.zeros_like(x), batch_size=2, shuffle=False, verbose=0).history
    assert (found["skipped_updates"], found["gradient_norm"], found["effective_batch"]) == ([1.0], [2.0], [2.0])


# --- Where they are shown, and where they are not ---------------------------------------------------------------------


class Slow(keras.callbacks.Callback):
    """Waits longer than the 50 milliseconds in which a progress bar draws itself once."""

    def on_train_batch_begin(self, batch, logs=None):
        time.sleep(0.06)


@pytest.mark.skipif("3.0" < keras.__version__ < "3.13", reason="the bar of Keras shows means of means")
def test_the_progress_bar_shows_the_number_of_the_epoch_and_not_a_mean_of_means(capsys):
    logs("diagnostics", verbose=1, callbacks=[Slow()])
    bars = capsys.readouterr().out.replace("\b", "\n").replace("\r", "\n").split("\n")
    # After the fourth batch: (2 + 8 + 2 + 8) / 4; after the last: 22 / 5.
    assert any("4/5" in bar and "gradient_norm: 5.0000" in bar for bar in bars)
    assert any("5/5" in bar and "gradient_norm: 4.4000" in bar for bar in bars)


def test_tensorboard_gets_them(tmp_path):
    spec = {"diagnostics": {}, "gradient_accumulation": {"steps": 2}}
    logs(spec, callbacks=[keras.callbacks.TensorBoard(tmp_path, write_graph=False)])
    scalars = {}
    for path in tmp_path.glob("train/events*"):
        for record in tf.data.TFRecordDataset(str(path)):
            for value in tf.compat.v1.Event.FromString(record.numpy()).summary.value:
                scalars[value.tag] = value.tensor
    assert tf.make_ndarray(scalars["epoch_gradient_norm"]) == pytest.approx((5 + 5 + 2) / 3)
    assert tf.make_ndarray(scalars["epoch_effective_batch"]) == pytest.approx(5 / 3)


def test_callbacks_may_watch_them():
    stop = keras.callbacks.EarlyStopping(monitor="gradient_norm", mode="min", patience=0)
    assert len(logs("diagnostics", epochs=5, callbacks=[stop])["loss"]) == 2  # It stays as it is.


def test_evaluation_and_the_models_own_metrics_are_those_of_keras():
    plain, ours = prepared(KINDS["functional"]), prepared(KINDS["functional"], "diagnostics")
    for model in (plain, ours):
        fitted(model, KINDS["functional"], epochs=1, validation_split=0.2)
    assert [m.name for m in ours.metrics] == [m.name for m in plain.metrics]
    assert ours.evaluate(X, Y, verbose=0, return_dict=True).keys() == {"loss"}
    assert np.ndim(ours.test_on_batch(X, Y)) == 0
    assert len(ours.variables) == len(plain.variables)


class Evaluates(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        assert self.model.evaluate(EXAMPLES, ZEROS, verbose=0, return_dict=True).keys() == {"loss"}


def test_an_evaluation_within_the_epoch_leaves_them_alone():
    assert logs("diagnostics", callbacks=[Evaluates()])["gradient_norm"] == [pytest.approx(22 / 5)]


def test_they_survive_a_new_compile_and_a_model_that_is_saved_and_loaded(tmp_path):
    model = prepared(Workload(one_weight, EXAMPLES, ZEROS), "diagnostics", optimizer=sgd(0.0))
    for _ in range(2):
        model.compile(sgd(0.0), "mse")
        assert model.fit(EXAMPLES, ZEROS, batch_size=1, verbose=0).history["gradient_norm"] == [pytest.approx(22 / 5)]
    trainstep.remove(model)
    assert "gradient_norm" not in model.fit(EXAMPLES, ZEROS, verbose=0).history
    dense_one = prepared(Workload(dense, X, Y), "diagnostics")
    fitted(dense_one, Workload(dense, X, Y))
    dense_one.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    histories = [fitted(each, Workload(dense, X, Y)).history for each in (dense_one, loaded)]
    assert histories[0] == histories[1]
    assert "gradient_norm" in histories[0]


class OwnLogs(keras.Model):
    """Returns logs of its own making, and lists its metrics itself."""

    def __init__(self):
        super().__init__()
        self.out, self.mine = keras.layers.Dense(1), keras.metrics.Mean(name="mine")

    def call(self, x):
        return self.out(x)

    @property
    def metrics(self):
        return [self.mine]

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        self.mine.update_state(tf.ones(()))
        return {"mine": self.mine.result()}


def test_a_model_with_logs_of_its_own_gets_them_too():
    history = run(Workload(OwnLogs, X, Y), "diagnostics").history
    assert history["mine"] == [1.0, 1.0]
    assert history.keys() == {"mine"} | ALWAYS


# --- Strategies of others ---------------------------------------------------------------------------------------------


def of_others(name, reports, record=None) -> type[trainstep.Strategy]:
    class Other(trainstep.Strategy):
        declaration = trainstep.Declaration(
            name, trainstep.Stage.AVERAGING, "Reports.", "", neutral={}, reports=lambda options: reports
        )

        def update_weights(self, update):
            super().update_weights(update)
            self.record(*(record or ("entries", lambda: 7.0)))

    return Other


def test_a_strategy_of_others_reports_by_declaring_a_name():
    with registered(of_others("other", {"entries": trainstep.Report(over="sum")})):
        assert logs(["diagnostics", "other"], epochs=2)["entries"] == [5 * 7.0, 5 * 7.0]


def test_what_nobody_collects_is_not_computed():
    def never():
        raise AssertionError

    with registered(of_others("unread", {"entries": trainstep.Report()}, ("entries", never))):
        assert logs("unread").keys() == {"loss"}


def test_a_name_that_is_not_declared_is_refused():
    expected = pytest.raises(errors.StrategyDefinitionError, match="'entries' is recorded, and no strategy declares it")
    with registered(of_others("undeclared", {})), expected:
        logs("undeclared")


def test_one_name_over_two_things_is_refused():
    with (
        registered(of_others("contrary", {"gradient_norm": trainstep.Report(over="last")})),
        pytest.raises(errors.StrategyDefinitionError, match=r"'contrary' reports 'gradient_norm' over 'last'.*'mean'"),
    ):
        trainstep.apply(one_weight(), ["diagnostics", "contrary"])


def test_it_leaves_the_weights_of_training_without_it(assert_close):
    """But for rounding."""
    plain, ours = run(KINDS["functional"]), run(KINDS["functional"], "diagnostics")
    assert_close(ours.variables, plain.variables)
    assert_close(ours.optimizer, plain.optimizer)
