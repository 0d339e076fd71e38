"""Micro-batches: the parts of a batch give its gradient, its loss and its metrics."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from nets import (
    BATCH,
    EXAMPLES,
    MULTI_X,
    MULTI_Y,
    AddsLoss,
    Workload,
    X,
    Y,
    classes,
    dense,
    masked,
    numbers,
    one_weight,
    sgd,
    tokens,
    weight_of,
)
from runs import fitted, prepared, run

import trainstep
from trainstep.step import Batch
from trainstep.strategies.micro_batches import part_of, weighted_sum

WEIGHTS = np.linspace(0, 2, EXAMPLES).astype("float32")
CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def column(*values: float) -> np.ndarray:
    return np.array(values, "float32")[:, None]


def with_metrics() -> dict:
    return {"optimizer": keras.optimizers.Adam(0.01), "loss": "mse", "metrics": ["mae"], "weighted_metrics": ["mse"]}


def regularized() -> keras.Model:
    regularizer = keras.regularizers.L2(0.01)
    return keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(5, "tanh", kernel_regularizer=regularizer), keras.layers.Dense(1)]
    )


def multi() -> keras.Model:
    """Return a net from two inputs to two outputs, with a loss of its own and without dropout."""
    left, right = keras.Input((6,), name="left"), keras.Input((3,), name="right")
    h = AddsLoss()(keras.layers.Dense(4, "tanh")(keras.layers.Concatenate()([left, right])))
    outputs = {"value": keras.layers.Dense(1, name="value")(h), "kind": keras.layers.Dense(3, name="kind")(h)}
    return keras.Model({"left": left, "right": right}, outputs)


def multi_compile() -> dict:
    loss = {"value": "mse", "kind": CROSS_ENTROPY}
    return {"optimizer": sgd(), "loss": loss, "metrics": {"value": ["mae"], "kind": ["accuracy"]}}


def classifier() -> keras.Model:
    return keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)])


def label_tokens() -> dict:
    return {"optimizer": sgd(), "loss": CROSS_ENTROPY, "metrics": ["accuracy"]}


SITUATIONS = {
    "metrics": Workload(dense, X, Y, with_metrics),
    "sample_weight": Workload(dense, X, Y, with_metrics, {"sample_weight": WEIGHTS}),
    "class_weight": Workload(
        classifier, X, classes(EXAMPLES), label_tokens, {"class_weight": {0: 1.0, 1: 3.0, 2: 0.5}}
    ),
    "a regularizer": Workload(regularized, X, Y),
    "two inputs, two outputs, add_loss": Workload(multi, MULTI_X, MULTI_Y, multi_compile),
    "a mask": Workload(masked, tokens(EXAMPLES), tokens(EXAMPLES) % 3, label_tokens),
    "a batch of one": Workload(dense, X[: 2 * BATCH + 1], Y[: 2 * BATCH + 1]),
}


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_the_parts_are_the_batch(situation, count, assert_close):
    """Batches of 4 in two or three parts, even and uneven; the last batch of an epoch is shorter."""
    workload = SITUATIONS[situation]
    mine, plain = run(workload, "micro_batches", {"count": count}), run(workload)
    # Keras 3 logs the losses of single outputs as a mean over calls of `compute_loss`, whatever the examples in each.
    logs = [
        {key: values for key, values in each.history.items() if not key.endswith("_loss")} for each in (mine, plain)
    ]
    assert_close([mine.variables, mine.optimizer, logs[0]], [plain.variables, plain.optimizer, logs[1]])


@pytest.mark.parametrize(
    "compiled", [{"run_eagerly": True}, {"jit_compile": True}, {"steps_per_execution": 2}], ids=str
)
def test_the_parts_are_the_batch_however_the_step_runs(compiled, assert_close):
    workload = Workload(dense, X[:20], Y[:20])
    mine, plain = run(workload, "micro_batches", {"count": 3}, **compiled), run(workload)
    assert_close([mine.variables, mine.history], [plain.variables, plain.history])


def test_a_batch_with_fewer_examples_than_parts(assert_close):
    workload = Workload(dense, X, Y)
    mine, plain = run(workload, "micro_batches", {"count": 7}), run(workload)
    assert_close([mine.variables, mine.history], [plain.variables, plain.history])


def test_a_step_by_hand():
    model = trainstep.apply(one_weight(), "micro_batches", count=2)
    model.compile(sgd(0.125), "mse")
    # w = 1; gradients 2 (w x - y) x: of (1, 0) 2; of (2, 1) 4; of (3, 4) -6. Parts of 1 and of 2 examples:
    # g_1 = 2, g_2 = (4 - 6) / 2 = -1; (1 * 2 + 2 * -1) / 3 = 0. A mean of the parts' means would be 1 / 2.
    model.train_on_batch(column(1, 2, 3), column(0, 1, 4))
    assert weight_of(model) == 1.0
    # Of (2, 0): 8; of (1, 1): 0; of (1, 0): 2; of (1, 1): 0. The mean is 2.5.
    model.train_on_batch(column(2, 1, 1, 1), column(0, 1, 0, 1))
    assert weight_of(model) == 1 - 0.125 * 2.5
    assert int(model.optimizer.iterations.numpy()) == 2


def test_a_window_of_batches_in_parts_is_the_one_batch(assert_close):
    spec = {"micro_batches": {"count": 2}, "gradient_accumulation": {"steps": 2}}
    workload = Workload(dense, X[:16], Y[:16])
    mine = run(workload, spec)
    plain = run(workload, fit={"batch_size": 2 * BATCH})
    assert_close(mine.variables, plain.variables)


def test_parts_on_two_replicas_are_the_batch_on_one(mirrored, assert_close):
    workload = Workload(dense, X[:16], Y[:16], fit={"batch_size": 8})
    with mirrored.scope():
        model = prepared(workload, "micro_batches", {"count": 3})
    mine, plain = fitted(model, workload), run(workload)
    assert_close([mine.variables, mine.history], [plain.variables, plain.history])


def test_parts_wait_for_each_other():
    """Otherwise all would be in memory at once: no two parts may run at the same time."""
    order = []

    class Watch(keras.layers.Layer):
        def call(self, x):
            def note(value):
                order.append(("in", len(value)))
                return value

            y = tf.ensure_shape(tf.numpy_function(note, [x], x.dtype), x.shape)

            @tf.custom_gradient
            def watched(z):
                def backward(g):
                    def note_back(value):
                        order.append(("out", len(value)))
                        return value

                    return tf.ensure_shape(tf.numpy_function(note_back, [g], g.dtype), z.shape)

                return tf.identity(z), backward

            return watched(y + 0 * x)

    inputs = keras.Input((6,))
    h = Watch()(keras.layers.Dense(5)(inputs))
    model = trainstep.apply(keras.Model(inputs, keras.layers.Dense(1)(h)), "micro_batches", count=4)
    model.compile(sgd(), "mse", jit_compile=False)
    model.train_on_batch(numbers(8, 6), numbers(8, 1))
    assert order[-8:] == [("in", 2), ("out", 2)] * 4


def test_part_of_cuts_everything_that_has_examples():
    batch = Batch({"a": tf.range(5), "b": tf.reshape(tf.range(10), (5, 2))}, (tf.range(5),), None, {"c": tf.range(5)})
    part = part_of(batch, tf.constant(1), tf.constant(3))
    assert part.x["a"].numpy().tolist() == [1, 2]
    assert part.x["b"].numpy().tolist() == [[2, 3], [4, 5]]
    assert part.y[0].numpy().tolist() == [1, 2]
    assert part.sample_weight is None
    assert part.extra["c"].numpy().tolist() == [1, 2]


def test_weighted_sum_by_hand():
    sparse = tf.IndexedSlices(tf.constant([[2.0]]), tf.constant([1]), tf.constant([2, 1]))
    totals = [tf.constant(1.0), None, None, tf.constant([[1.0], [1.0]])]
    [a, b, c, d] = weighted_sum(totals, [tf.constant(2.0), tf.constant(3.0), None, sparse], tf.constant(4.0))
    assert (float(a), float(b), c, d.numpy().tolist()) == (1 + 4 * 2, 4 * 3, None, [[1], [1 + 4 * 2]])
    [zero] = weighted_sum([None], [tf.constant(float("nan"))], tf.constant(0.0))
    assert float(zero) == 0.0


def test_a_batch_that_is_not_finite_is_not_hidden():
    y = Y[:BATCH].copy()
    y[1] = np.nan
    model = prepared(Workload(dense, X, Y), "micro_batches", {"count": 2})
    model.train_on_batch(X[:BATCH], y)
    assert np.isnan(model.get_weights()[0]).all()
