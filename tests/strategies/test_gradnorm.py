"""GradNorm weighs the tasks so that the gradients of their losses, weighted, are where it wants them."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from nets import BATCH, MULTI, MULTI_X, MULTI_Y, Task, dense, sgd, two_tasks, workload_for
from runs import run

import trainstep
from trainstep import errors
from trainstep.strategies._tasks import backward_weighted
from trainstep.strategies.gradnorm import GradnormOptions, next_weights

OUTPUTS = Task(outputs=True)


def moved(weights, norms, losses, initial, **options) -> list[float]:
    tensors = [tf.constant(values, tf.float32) for values in (weights, norms, losses, initial)]
    return next_weights(*tensors, GradnormOptions(**options)).numpy().tolist()


# --- The weights of the tasks -----------------------------------------------------------------------------------------


def test_two_tasks_by_hand():
    # G = (3, 2), its mean 2.5. At first all rates are 1: the first task is above, and falls by 0.1 * 3, the second
    # rises by 0.1 * 2: (0.7, 1.2), times 2 / 1.9.
    ours = moved([1, 1], [3, 2], [5, 7], [5, 7], learning_rate=0.1)
    assert ours == pytest.approx([0.7 * 2 / 1.9, 1.2 * 2 / 1.9], rel=1e-6)
    # Once the second has halved its loss: r = (1, 0.5) / 0.75 = (4/3, 2/3), targets (10/3, 5/3) with alpha = 1. Now the
    # first is below, and the second above: (1.3, 0.8).
    ours = moved([1, 1], [3, 2], [5, 3.5], [5, 7], learning_rate=0.1, alpha=1.0)
    assert ours == pytest.approx([1.3 * 2 / 2.1, 0.8 * 2 / 2.1], rel=1e-6)
    # alpha = 0 does not look at the rates.
    ours = moved([1, 1], [3, 2], [5, 3.5], [5, 7], learning_rate=0.1, alpha=0.0)
    assert ours == pytest.approx([0.7 * 2 / 1.9, 1.2 * 2 / 1.9], rel=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_they_follow_the_gradient_of_equation_2(seed):
    generator = np.random.default_rng(seed)
    values = [generator.uniform(0.5, 2, size=5).astype("float32") for _ in range(4)]
    w, norms, losses, initial = (tf.Variable(value) for value in values)
    with tf.GradientTape() as tape:
        weighted = w * norms
        rates = (losses / initial) / tf.reduce_mean(losses / initial)
        loss = tf.reduce_sum(tf.abs(weighted - tf.stop_gradient(tf.reduce_mean(weighted) * rates**1.5)))
    expected = w - 0.01 * tape.gradient(loss, w)
    np.testing.assert_allclose(
        moved(*values, learning_rate=0.01), expected * 5 / tf.reduce_sum(expected), rtol=1e-5
    )  # fmt: skip


def test_left_alone_the_norms_become_equal():
    """With alpha=0, and gradients that stay as they are: w_i G_i all the same, up to a step."""
    norms = np.array([4.0, 1.0, 0.5])
    weights = [1.0, 1.0, 1.0]
    for _ in range(2000):
        weights = moved(weights, norms, [1, 1, 1], [1, 1, 1], learning_rate=0.001, alpha=0.0)
    assert weights * norms == pytest.approx(3 / (1 / norms).sum(), abs=0.02)
    assert sum(weights) == pytest.approx(3)


def test_a_weight_never_falls_below_zero():
    # 1 - 0.5 * 10 is below 0; the other one takes all.
    assert moved([1, 1], [10, 1], [1, 1], [1, 1], learning_rate=0.5) == [0, 2]
    # And from 0 it comes back: G = (0, 2), the first is below the mean, 1: (5, 1.5) times 2 / 6.5.
    ours = moved([0, 2], [10, 1], [1, 1], [1, 1], learning_rate=0.5)
    assert ours == pytest.approx([10 / 6.5, 3 / 6.5], rel=1e-6)


def test_what_is_not_finite_moves_no_weight():
    assert moved([0.5, 1.5], [np.nan, 1], [1, 1], [1, 1]) == [0.5, 1.5]
    assert moved([0.5, 1.5], [1, 1], [np.inf, 1], [1, 1]) == [0.5, 1.5]


def test_only_what_goes_back_is_weighted():
    x = tf.Variable([1.0, 2.0])
    with tf.GradientTape() as tape:
        y = backward_weighted(x, tf.constant(3.0))
        loss = tf.reduce_sum(y**2)
    assert y.numpy().tolist() == [1, 2]
    assert tape.gradient(loss, x).numpy().tolist() == [3 * 2, 3 * 4]


# --- Whole steps ------------------------------------------------------------------------------------------------------


def test_two_steps_by_hand():
    # The loss of a task is (w . x - y)^2, its gradient 2 (w . x - y) x. At w = 0: g_a = (3, 0), g_b = (0, 1); the first
    # step is along (3, 1), to w = (-0.3, -0.1). G = (3, 1), its mean 2: the tasks' weights become (0.7, 1.1) * 2 / 1.8.
    # Then g_a = 2 * 1.2 = 2.4, g_b = 2 * 0.4 = 0.8, both weighted.
    model = trainstep.apply(two_tasks(), "gradnorm", learning_rate=0.1)
    model.compile(sgd(0.1), {"a": "mse", "b": "mse"})
    x = {"left": np.array([[1.0, 0.0]]), "right": np.array([[0.0, 1.0]])}
    y = {"a": np.array([[-1.5]]), "b": np.array([[-0.5]])}
    model.train_on_batch(x, y)
    assert model.get_weights()[0].ravel() == pytest.approx([-0.3, -0.1], rel=1e-6)
    state = model.strategy_state["gradnorm"]
    assert np.array(state["weights"])[:3] == pytest.approx([7 / 9, 11 / 9, 1], rel=1e-6)
    assert np.array(state["initial"])[:3] == pytest.approx([2.25, 0.25, 0], rel=1e-6)
    model.train_on_batch(x, y)
    assert model.get_weights()[0].ravel() == pytest.approx([-0.3 - 0.1 * 7 / 9 * 2.4, -0.1 - 0.1 * 11 / 9 * 0.8])


WEIGHTS = {"kind": np.linspace(0, 2, 22).astype("float32"), "value": np.linspace(3, 0, 22).astype("float32")}


def loop(shared: slice) -> tuple[list[np.ndarray], np.ndarray]:
    """Return what algorithm 1 of the paper, written down with a GradientTape, leaves: weights, and those of tasks."""
    keras.utils.set_random_seed(0)
    model, task_weights, initial = dense(OUTPUTS), np.ones(2), None
    for start in range(0, len(OUTPUTS.x), BATCH):
        part = slice(start, start + BATCH)
        with tf.GradientTape(persistent=True) as tape:
            p = model(OUTPUTS.x[part])
            kind = -tf.reduce_sum(OUTPUTS.y["kind"][part] * tf.math.log(p["kind"]), axis=-1)
            value = tf.reduce_mean(tf.square(p["value"] - OUTPUTS.y["value"][part]), axis=-1)
            losses = [tf.reduce_mean(kind * WEIGHTS["kind"][part]), tf.reduce_mean(value * WEIGHTS["value"][part])]
            whole = task_weights[0] * losses[0] + task_weights[1] * losses[1]
        gradients = tape.gradient(whole, model.trainable_variables)
        norms = [
            np.sqrt(sum(np.square(g).sum() for g in tape.gradient(loss, model.trainable_variables[shared])))
            for loss in losses
        ]
        values = np.array([loss.numpy() for loss in losses])
        initial = values if initial is None else initial
        rates = (values / initial) / np.mean(values / initial)
        weighted = task_weights * norms
        task_weights = task_weights - 0.01 * np.sign(weighted - weighted.mean() * rates**1.5) * norms
        task_weights = 2 * task_weights / task_weights.sum()
        model.set_weights([w - 0.1 * g.numpy() for w, g in zip(model.get_weights(), gradients, strict=True)])
    return model.get_weights(), task_weights


@pytest.mark.parametrize(("options", "shared"), [({}, slice(0, 2)), ({"shared": "*/kernel"}, slice(0, 1))])
def test_it_is_an_own_loop_with_the_algorithm_sample_weights_and_all(options, shared, assert_close):
    """By default both weights of the layer that the outputs share."""
    pattern = {"shared": dense(OUTPUTS).layers[1].name + "*/kernel*"} if options else {}
    keras.backend.clear_session()
    workload = workload_for(dense, OUTPUTS, fit={"sample_weight": WEIGHTS})
    keras.utils.set_random_seed(0)
    model = trainstep.apply(workload.build(), "gradnorm", learning_rate=0.01, **pattern)
    model.compile(**workload.compile())
    model.fit(workload.x, workload.y, batch_size=BATCH, shuffle=False, verbose=0, sample_weight=WEIGHTS)
    weights, of_tasks = loop(shared)
    assert_close(model.get_weights(), weights)
    assert_close(np.array(model.strategy_state["gradnorm"]["weights"])[:2], of_tasks)


def test_loss_weights_are_those_it_starts_from():
    """Norms are of the weighted losses; the rates, of how far a loss has come, know no weights."""
    model = trainstep.apply(MULTI.build(), "gradnorm", learning_rate=0.05)
    model.compile(**{**MULTI.compile(), "loss_weights": {"value": 1e-3, "kind": 1.0}, "optimizer": sgd(0.0)})
    model.fit(MULTI_X, MULTI_Y, batch_size=BATCH, epochs=3, verbose=0)
    kind, value = np.array(model.strategy_state["gradnorm"]["weights"])[:2]
    assert value > kind
    assert kind + value == pytest.approx(2)


def test_a_bad_first_batch_is_not_the_measure_of_the_others():
    x = OUTPUTS.x.copy()
    x[1] = np.nan
    model = trainstep.apply(dense(OUTPUTS), {"gradnorm": {}, "skip_nonfinite": {}})
    model.compile(sgd(), OUTPUTS.loss)
    for part in (slice(4), slice(4, 8)):
        model.train_on_batch(x[part], {name: labels[part] for name, labels in OUTPUTS.y.items()})
    state = {name: slot.numpy() for name, slot in model.strategy_state["gradnorm"].items()}
    assert state["updates"] == 1
    assert (state["initial"][:2] > 0).all()
    assert state["weights"][:2].sum() == pytest.approx(2)


@pytest.mark.parametrize("batch_size", [4, 3])
def test_replicas_measure_the_whole_batch(batch_size, mirrored, assert_close):
    """In equal shares, and in unequal ones of two and one."""
    one = run(workload_for(dense, OUTPUTS), "gradnorm", fit={"batch_size": batch_size})
    with mirrored.scope():
        two = run(workload_for(dense, OUTPUTS), "gradnorm", fit={"batch_size": batch_size})
    assert_close(two.variables, one.variables)
    assert_close(two.state, one.state)


def test_with_pcgrad_the_weighted_gradients_are_projected():
    # At w = 0, where a first step at a rate of 0 stays, g_a = (3, 0) and g_b = (-1, 1), of norm sqrt(2): the first is
    # above the mean. Then a and b, weighted, are projected, each on the other.
    model = trainstep.apply(two_tasks(), {"gradnorm": {"learning_rate": 0.1}, "pcgrad": {}})
    model.compile(sgd(0.0), {"a": "mse", "b": "mse"})
    x = {"left": np.array([[1.0, 0.0]]), "right": np.array([[-1.0, 1.0]])}
    y = {"a": np.array([[-1.5]]), "b": np.array([[-0.5]])}
    model.train_on_batch(x, y)
    w = np.array(model.strategy_state["gradnorm"]["weights"])[:2]
    expected = np.array([1 - 0.3, 1 + 0.1 * np.sqrt(2)])
    assert w == pytest.approx(2 * expected / expected.sum(), rel=1e-6)
    a, b = w[0] * np.array([3.0, 0.0]), w[1] * np.array([-1.0, 1.0])
    after = a - (a @ b) / (b @ b) * b + b - (a @ b) / (a @ a) * a
    model.optimizer.learning_rate = 1.0
    model.train_on_batch(x, y)
    assert model.get_weights()[0].ravel() == pytest.approx(-after, rel=1e-5)


@pytest.mark.parametrize("interval", [1, 2])
def test_with_sam_both_evaluations_are_of_the_weighted_loss(interval):
    # 1.5 (w_1 + 1.5)^2 + 0.5 (w_2 + 0.5)^2, at 0: the gradient is (4.5, 0.5). At e = 0.2 * (4.5, 0.5) / |(4.5, 0.5)|
    # it is (3 (e_1 + 1.5), e_2 + 0.5).
    model = trainstep.apply(two_tasks(), {"gradnorm": {}, "sam": {"rho": 0.2, "interval": interval}})
    model.compile(sgd(1.0), {"a": "mse", "b": "mse"})
    of_tasks = model.strategy_state["gradnorm"]["weights"]
    of_tasks.assign([1.5, 0.5, *([1.0] * (of_tasks.shape[0] - 2))])
    x = {"left": np.array([[1.0, 0.0]]), "right": np.array([[0.0, 1.0]])}
    model.train_on_batch(x, {"a": np.array([[-1.5]]), "b": np.array([[-0.5]])})
    e = 0.2 * np.array([4.5, 0.5]) / np.hypot(4.5, 0.5)
    assert -model.get_weights()[0].ravel() == pytest.approx([3 * (e[0] + 1.5), e[1] + 0.5], rel=1e-5)


def test_while_what_the_tasks_share_is_frozen_their_weights_stay():
    model = trainstep.apply(dense(OUTPUTS), "gradnorm")
    optimizer = sgd()
    model.compile(optimizer, OUTPUTS.loss)
    model.train_on_batch(OUTPUTS.x, OUTPUTS.y)
    before = np.array(model.strategy_state["gradnorm"]["weights"])
    model.layers[1].trainable = False
    model.compile(optimizer, OUTPUTS.loss)
    model.train_on_batch(OUTPUTS.x, OUTPUTS.y)
    assert before[0] != 1
    np.testing.assert_array_equal(model.strategy_state["gradnorm"]["weights"], before)


def test_it_reports_the_weights_of_the_tasks():
    model = trainstep.apply(dense(OUTPUTS), ["gradnorm", "diagnostics"])
    model.compile(sgd(), OUTPUTS.loss)
    history = model.fit(OUTPUTS.x, OUTPUTS.y, batch_size=BATCH, verbose=0).history
    weights = np.array(model.strategy_state["gradnorm"]["weights"])[:2]
    assert history["smallest_task_weight"] == pytest.approx([weights.min()])
    assert history["largest_task_weight"] == pytest.approx([weights.max()])


# --- What it refuses --------------------------------------------------------------------------------------------------


def trained(model: keras.Model, x, y, loss, **options) -> None:
    trainstep.apply(model, "gradnorm", **options)
    model.compile(sgd(), loss)
    model.train_on_batch(x, y)


def test_a_model_of_one_task_is_refused():
    with pytest.raises(errors.ModelConflictError, match="gradnorm is for models of several tasks"):
        trained(dense(), Task().x, Task().y, "mse")


def test_outputs_that_share_no_weights_are_refused():
    x = keras.Input((6,))
    model = keras.Model(x, {name: keras.layers.Dense(1, name=name)(x) for name in ("a", "b")})
    with pytest.raises(errors.ModelConflictError, match="the outputs share no weights"):
        trained(model, Task().x, {"a": Task().y, "b": Task().y}, {"a": "mse", "b": "mse"})


def test_a_pattern_of_weights_that_are_not_shared_is_refused():
    with pytest.raises(errors.ModelConflictError, match="do not all depend on 'kind'"):
        trained(dense(OUTPUTS), OUTPUTS.x, OUTPUTS.y, OUTPUTS.loss, shared="kind")
    with pytest.raises(errors.ModelConflictError, match="gradnorm: no trainable weight is called 'trunk'"):
        trained(dense(OUTPUTS), OUTPUTS.x, OUTPUTS.y, OUTPUTS.loss, shared="trunk")


class LossOfItsOwn(keras.Model):
    def __init__(self):
        super().__init__()
        self.first, self.last = keras.layers.Dense(2), [keras.layers.Dense(1) for _ in range(2)]

    def call(self, x):
        h = self.first(x)
        return {"a": self.last[0](h), "b": self.last[1](h)}

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, **kwargs):
        return tf.reduce_mean(tf.square(y_pred["a"] - y["a"])) + tf.reduce_mean(tf.square(y_pred["b"]))


def test_a_task_whose_loss_compile_does_not_know_is_refused():
    with pytest.raises(errors.ModelConflictError, match="was given none for the output 0"):
        trained(LossOfItsOwn(), Task().x, {"a": Task().y, "b": Task().y}, None)
