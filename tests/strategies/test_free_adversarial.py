"""Free adversarial training: each replay of a batch is an update, and its gradient moves the examples as well."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from nets import (
    BATCH,
    MULTI_X,
    MULTI_Y,
    Task,
    X,
    Y,
    dense,
    functional,
    multi,
    multi_compile,
    one_weight,
    sgd,
    weight_of,
    workload_for,
)
from runs import assert_same, is_finite, prepared, run

import trainstep
from trainstep import errors
from trainstep.strategies.free_adversarial import next_delta, with_gradient_noted


def column(*values: float) -> np.ndarray:
    return np.array(values, "float32")[:, None]


def test_one_weight_by_hand():
    # L = (w x' - y)^2, dL/dw = 2 (w x' - y) x', dL/dx = 2 (w x' - y) w; w = 1, x = 2, y = 1, epsilon = 0.5, from zero.
    # First: x' = 2,   dL/dw = 2 * 1 * 2 = 4,        w = 1 - 0.125 * 4 = 0.5;  dL/dx = 2 * 1 * 1 > 0 at the old w.
    # Then:  x' = 2.5, L = 0.25^2, dL/dw = 2 * 0.25 * 2.5 = 1.25, w = 0.5 - 0.125 * 1.25.
    model = trainstep.apply(one_weight(), "free_adversarial", epsilon=0.5, replays=2, start="zero")
    model.compile(sgd(0.125), "mse")
    assert float(model.train_on_batch(column(2), column(1))) == 0.25**2  # That of the last replay.
    assert weight_of(model) == 0.5 - 0.125 * 1.25
    assert int(model.optimizer.iterations.numpy()) == 2


def test_a_step_is_as_long_as_the_ball_is_wide_and_ends_in_it():
    found = next_delta(column(0.0, 0.3, 0.5, -0.5, 0.2), column(7.0, 1.0, 2.0, 3.0, 0.0), 0.5)
    np.testing.assert_array_equal(found, column(0.5, 0.5, 0.5, 0.0, 0.2))
    np.testing.assert_array_equal(next_delta(column(0.25), column(np.nan), 0.5), column(0.25))


def loop(weights: np.ndarray, *, replays: int, epsilon: float) -> list[np.ndarray]:
    """Return the weights that algorithm 1 of the paper, written down with a GradientTape, leaves."""
    keras.utils.set_random_seed(0)
    model = dense()
    for start in range(0, len(X), BATCH):
        x, y, w = (values[start : start + BATCH] for values in (X, Y, weights))
        delta = tf.zeros(x.shape)
        for _ in range(replays):
            moved = x + delta
            with tf.GradientTape() as tape:
                tape.watch(moved)
                loss = tf.reduce_sum(w * tf.square(model(moved) - y)[:, 0]) / len(x)
            gradients, of_input = tape.gradient(loss, [model.trainable_variables, moved])
            model.set_weights([w - 0.1 * g.numpy() for w, g in zip(model.get_weights(), gradients, strict=True)])
            delta = tf.clip_by_value(delta + epsilon * tf.sign(of_input), -epsilon, epsilon)
    return model.get_weights()


def test_it_is_an_own_loop_with_the_algorithm_sample_weights_and_all(assert_close):
    weights = np.linspace(0, 2, len(X)).astype("float32")
    workload = workload_for(dense, fit={"sample_weight": weights})
    options = {"replays": 3, "epsilon": 0.25}
    ours = run(workload, "free_adversarial", {**options, "start": "zero"}, fit={"epochs": 1})
    assert_close(ours.variables, loop(weights, **options))


@pytest.mark.parametrize("eager", [True, False])
def test_the_gradient_to_the_input_comes_with_that_to_the_weights(eager):
    # L = (w x)^2: dL/dw = 2 w x^2, dL/dx = 2 w^2 x. The anchor is in no formula, and gets no gradient.
    w, anchor, x = tf.Variable(3.0), tf.Variable(5.0), tf.constant([[2.0]])

    def gradients():
        noted = []
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.square(w * with_gradient_noted(x, tf.convert_to_tensor(anchor), noted.append)))
        found = tape.gradient(loss, [w, anchor])
        assert found[1] is None
        [of_input] = noted
        return found[0], of_input

    of_weight, of_input = gradients() if eager else tf.function(gradients)()
    assert (float(of_weight), of_input.numpy().tolist()) == (24.0, [[36.0]])


class Counting(keras.layers.Layer):
    """Counts how often gradients pass through it."""

    passed = 0

    def call(self, x):
        @tf.custom_gradient
        def same(x):
            def pulled(upstream):
                Counting.passed += 1
                return upstream

            return tf.identity(x), pulled

        return same(x)


def test_a_replay_has_one_backward_pass():
    def counted(task: Task) -> keras.Model:
        hidden = keras.layers.Dense(5, "tanh")
        return keras.Sequential([keras.Input(task.shape), hidden, Counting(), keras.layers.Dense(1)])

    Counting.passed = 0
    model = prepared(workload_for(counted), "free_adversarial", {"replays": 3, "epsilon": 0.25}, run_eagerly=True)
    model.train_on_batch(X[:4], Y[:4])
    assert Counting.passed == 3


def test_without_a_ball_a_batch_is_trained_on_several_times(assert_close):
    ours = prepared(workload_for(dense), "free_adversarial", {"replays": 3, "epsilon": 0.0})
    plain = prepared(workload_for(dense))
    ours.train_on_batch(X[:4], Y[:4])
    for _ in range(3):
        plain.train_on_batch(X[:4], Y[:4])
    assert_close(ours.get_weights(), plain.get_weights())


@pytest.mark.parametrize("options", [{"replays": 1, "start": "zero"}, {"replays": 1, "epsilon": 0.0}], ids=str)
def test_one_replay_from_the_examples_themselves_is_plain_keras(options):
    assert_same(run(workload_for(functional), "free_adversarial", options), run(workload_for(functional)))


def test_examples_stay_in_the_ball_and_in_the_range():
    seen = []

    def watched(task: Task) -> keras.Model:
        class Net(keras.Model):
            def __init__(self):
                super().__init__()
                self.out = keras.layers.Dense(1)

            def call(self, x):
                seen.append(x.numpy())
                return self.out(x)

        del task
        return Net()

    x = np.clip(X[:4], -1, 1)
    options = {"replays": 4, "epsilon": 0.125, "clip_range": (-1.0, 1.0)}
    prepared(workload_for(watched), "free_adversarial", options, run_eagerly=True).train_on_batch(x, Y[:4])
    *_, first, second, third, last = seen
    for replay in (first, second, third, last):
        assert np.abs(replay.astype("float64") - x).max() <= 0.125
        assert np.abs(replay).max() <= 1
    assert not np.array_equal(first, x)  # From anywhere in the ball.
    assert not np.array_equal(second, first)


def test_a_batch_in_parts_moves_as_a_whole_does(assert_close):
    """What is noted part by part is put together: with `micro_batches` the same weights, up to rounding."""
    options = {"replays": 3, "epsilon": 0.25}
    whole = run(workload_for(dense), {"free_adversarial": options})
    parts = run(workload_for(dense), {"free_adversarial": options, "micro_batches": {"count": 3}})
    assert_close(parts.variables, whole.variables)


def test_an_ascent_does_not_change_where_examples_move(assert_close):
    """The first gradient is noted: with a SAM that hardly ascends, the same weights, up to what the ascent changes."""
    options = {"replays": 3, "epsilon": 0.25}
    alone = run(workload_for(dense), {"free_adversarial": options})
    beside = run(workload_for(dense), {"free_adversarial": options, "sam": {"rho": 1e-9}})
    assert_close(beside.variables, alone.variables)


@pytest.mark.filterwarnings("ignore:mixed_precision computes in float16:UserWarning")
def test_the_loss_scale_does_not_change_where_examples_move():
    spec = {
        "free_adversarial": {"replays": 2, "epsilon": 0.5, "start": "zero"},
        "mixed_precision": {"dtype": "float16"},
    }
    model = trainstep.apply(one_weight(), spec)
    model.compile(sgd(0.125), "mse")
    assert float(model.train_on_batch(column(2), column(1))) == 0.25**2


def test_chosen_inputs_are_moved_and_the_others_not():
    model = trainstep.apply(multi(), "free_adversarial", epsilon=0.5, inputs=("right",), start="zero")
    model.compile(**multi_compile())
    assert np.isfinite(model.fit(MULTI_X, MULTI_Y, batch_size=BATCH, verbose=0).history["loss"]).all()
    with pytest.raises(errors.UnsupportedInputError, match=r"no input 'rigth'. Did you mean 'right'"):
        trainstep.apply(trainstep.remove(model), "free_adversarial", inputs=("rigth",)).fit(MULTI_X, MULTI_Y, verbose=0)


def test_epsilon_may_be_on_a_schedule():
    schedule = {"start": 0.0, "end": 0.25, "updates": 8}
    assert is_finite(run(workload_for(dense), "free_adversarial", {"epsilon": schedule}))


@pytest.mark.parametrize("other", ["adversarial", "trades", "mart", "dp_sgd"])
def test_what_it_cannot_be_combined_with_is_refused(other):
    with pytest.raises(errors.StrategyConflictError, match="free_adversarial"):
        trainstep.plan(["free_adversarial", other])


def test_the_cost_is_a_plain_step_for_each_replay():
    assert trainstep.plan("free_adversarial", replays=8).time == 8
    assert trainstep.plan("free_adversarial", replays=1, epsilon=0.0).time == 1
