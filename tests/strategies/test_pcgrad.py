"""PCGrad takes out of each task's gradient what works against another task."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from nets import BATCH, Task, Workload, dense, functional, numbers, sgd, two_tasks, workload_for
from runs import assert_same, differs, run

import trainstep
from trainstep import errors
from trainstep.strategies._tasks import inner_products
from trainstep.strategies.pcgrad import conflicting, surgery

OUTPUTS = Task(outputs=True)


def stepped(model: keras.Model, x: dict, y: dict, spec="pcgrad", **compiled) -> np.ndarray:
    """Return the first weight after a step of SGD of length 1 on one example, flat."""
    if spec:
        trainstep.apply(model, spec)
    model.compile(**{"optimizer": sgd(1.0), "loss": {"a": "mse", "b": "mse"}, **compiled})
    model.train_on_batch(*tf.nest.map_structure(lambda value: np.array([value], "float32"), (x, y)))
    return model.get_weights()[0].ravel()


def of_two(left, right, a, b):
    return {"left": np.array(left), "right": np.array(right)}, {"a": np.array([a]), "b": np.array([b])}


# The loss of a task is (w . x - y)^2, its gradient at w = 0 is -2 y x: here g_a = (1, 0) and g_b = (-1, 1).
CONFLICT = of_two([1, 0], [-1, 1], -0.5, -0.5)


def test_two_weights_by_hand():
    # g_a . g_b = -1: g_a + 1/2 g_b = (0.5, 0.5), and g_b + 1/1 g_a = (0, 1). The sum, (0.5, 1.5), is descended.
    assert stepped(two_tasks(), *CONFLICT) == pytest.approx([-0.5, -1.5], rel=1e-6)
    assert stepped(two_tasks(), *CONFLICT, spec=None) == pytest.approx([0, -1], rel=1e-6)


def test_loss_weights_are_part_of_the_tasks():
    # g_a = (4, 0), g_b = (-1, 1), product -4: g_a + 4/2 g_b = (2, 2), g_b + 4/16 g_a = (0, 1).
    ours = stepped(two_tasks(), *CONFLICT, loss_weights={"a": 4.0, "b": 1.0})
    assert ours == pytest.approx([-2, -3], rel=1e-6)


def test_a_regularizer_is_no_task_and_counts_once():
    # 0.5 w^2 with w = (3, -2) adds w itself. The labels are such that the tasks' gradients are those above:
    # w . (1, 0) = 3, w . (-1, 1) = -5.
    model = two_tasks(kernel_regularizer=keras.regularizers.L2(0.5))
    model.set_weights([np.array([[3.0], [-2.0]])])
    x, _ = CONFLICT
    ours = stepped(model, x, {"a": np.array([3 - 0.5]), "b": np.array([-5 - 0.5])})
    assert ours == pytest.approx([3 - 3 - 0.5, -2 + 2 - 1.5], abs=1e-6)


class OneMadeOfTheOther(keras.Model):
    """Puts out a = w . left, and b = 2 a + v . left: the loss of b has a gradient through a."""

    def __init__(self):
        super().__init__()
        self.w = keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")
        self.v = keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")

    def call(self, x):
        a = self.w(x)
        return {"a": a, "b": 2 * a + self.v(x)}


def test_an_output_made_of_another_is_a_task_of_its_own():
    # At zero, x = 1: dL_a = -2 y_a = 1 by w and 0 by v; dL_b = -2 y_b (2, 1) = (-2, -1) for y_b = 0.5. Product -2.
    # g_a + 2/5 g_b = (0.2, -0.4); g_b + 2/1 g_a = (0, -1). Were b also counted as a part of a, g_a would be (-1, 0).
    model = OneMadeOfTheOther()
    trainstep.apply(model, "pcgrad")
    model.compile(sgd(1.0), {"a": "mse", "b": "mse"})
    model.train_on_batch(np.ones((1, 1)), {"a": np.full((1, 1), -0.5), "b": np.full((1, 1), 0.5)})
    assert np.ravel(model.get_weights()) == pytest.approx([-0.2, 1.4], rel=1e-6)


# --- The formula ------------------------------------------------------------------------------------------------------


def projected(gradients: np.ndarray, orders: np.ndarray) -> np.ndarray:
    """Return algorithm 1 of the paper, line by line: the projected gradients, one in each row."""
    result = gradients.copy()
    for i, order in enumerate(orders):
        for j in order:
            if j != i and result[i] @ gradients[j] < 0:
                result[i] -= (result[i] @ gradients[j]) / (gradients[j] @ gradients[j]) * gradients[j]
    return result


@pytest.mark.parametrize("seed", range(5))
def test_surgery_is_algorithm_1(seed):
    generator = np.random.default_rng(seed)
    gradients = generator.normal(size=(4, 6)).astype("float32")
    orders = generator.permuted(np.tile(np.arange(4), (4, 1)), axis=1)
    shares = surgery(inner_products([[tf.constant(row)] for row in gradients]), tf.constant(orders, tf.int32))
    assert not np.allclose(shares, 1)
    np.testing.assert_allclose(shares.numpy() @ gradients, projected(gradients, orders).sum(axis=0), rtol=1e-4)


def test_of_two_tasks_neither_works_against_the_other_afterwards():
    gradients = np.array([[3.0, 1.0, -2.0], [-1.0, 0.5, 2.0]])
    after = projected(gradients, np.array([[0, 1], [1, 0]]))
    assert after[0] @ gradients[1] == pytest.approx(0, abs=1e-12)
    assert after[1] @ gradients[0] == pytest.approx(0, abs=1e-12)
    shares = surgery(inner_products([[tf.constant(row, tf.float32)] for row in gradients]), tf.constant([[0, 1]] * 2))
    np.testing.assert_allclose(shares.numpy() @ gradients, after.sum(axis=0), rtol=1e-5)


def test_on_a_line_nothing_is_left_of_two_tasks_in_conflict():
    # g = 2 and -1: 2 + 2 * -1 = 0, and -1 + 0.5 * 2 = 0.
    shares = surgery(tf.constant([[4.0, -2.0], [-2.0, 1.0]]), tf.constant([[1, 0], [0, 1]]))
    assert shares.numpy().tolist() == [1 + 0.5, 1 + 2]


def test_a_task_without_a_gradient_is_in_nobodys_way():
    shares = surgery(tf.constant([[1.0, 0.0], [0.0, 0.0]]), tf.constant([[0, 1], [0, 1]]))
    assert shares.numpy().tolist() == [1, 1]


def test_weights_that_only_one_task_has_are_part_of_its_gradient():
    one, other = [tf.constant([1.0, 2.0]), tf.constant(3.0), None], [tf.constant([-1.0, 1.0]), None, tf.constant(5.0)]
    assert inner_products([one, other]).numpy().tolist() == [[1 + 4 + 9, -1 + 2], [-1 + 2, 1 + 1 + 25]]


def test_the_share_of_conflicts_is_among_all_pairs():
    products = tf.constant([[1.0, -1.0, 2.0], [-1.0, 1.0, 0.0], [2.0, 0.0, 1.0]])
    assert conflicting(products).numpy() == pytest.approx(1 / 3)


# --- Whole runs -------------------------------------------------------------------------------------------------------


WEIGHTS = {"kind": np.linspace(0, 2, 22).astype("float32"), "value": np.linspace(3, 0, 22).astype("float32")}


def loop() -> list[np.ndarray]:
    """Return the weights that algorithm 1 of the paper, written down with a GradientTape, leaves."""
    keras.utils.set_random_seed(0)
    model = dense(OUTPUTS)
    for start in range(0, len(OUTPUTS.x), BATCH):
        part = slice(start, start + BATCH)
        with tf.GradientTape(persistent=True) as tape:
            p = model(OUTPUTS.x[part])
            kind = -tf.reduce_sum(OUTPUTS.y["kind"][part] * tf.math.log(p["kind"]), axis=-1)
            value = tf.reduce_mean(tf.square(p["value"] - OUTPUTS.y["value"][part]), axis=-1)
            losses = [tf.reduce_mean(kind * WEIGHTS["kind"][part]), tf.reduce_mean(value * WEIGHTS["value"][part])]
        before, found = model.get_weights(), [tape.gradient(loss, model.trainable_variables) for loss in losses]
        flat = np.array([flattened(gradients, before) for gradients in found])
        descended = projected(flat, np.array([[1], [0]])).sum(axis=0)
        steps = np.split(descended, np.cumsum([w.size for w in before])[:-1])
        model.set_weights([w - 0.1 * step.reshape(w.shape) for w, step in zip(before, steps, strict=True)])
    return model.get_weights()


def flattened(gradients, weights) -> np.ndarray:
    pairs = zip(gradients, weights, strict=True)
    return np.concatenate([np.ravel(np.zeros_like(w) if g is None else g) for g, w in pairs])


def test_it_is_an_own_loop_with_the_algorithm_sample_weights_and_all(assert_close):
    workload = workload_for(dense, OUTPUTS, fit={"sample_weight": WEIGHTS})
    ours = run(workload, "pcgrad", fit={"epochs": 1})
    assert_close(ours.variables, loop())
    assert differs(ours, run(workload, fit={"epochs": 1}))  # There were conflicts.


def twins() -> keras.Model:
    """Return two outputs that are the same function of the input, with dropout, batch norm and a regularizer."""
    model = functional()
    names = ("value", "again")
    return keras.Model(model.inputs[0], {n: keras.layers.Activation("linear", name=n)(model.outputs[0]) for n in names})


def test_without_conflicts_it_is_plain_keras_bit_for_bit():
    """Two tasks with the same labels agree in everything."""
    task = Task()
    workload = Workload(
        twins, task.x, {"value": task.y, "again": task.y}, lambda: {"optimizer": sgd(0.05), "loss": ["mse", "mse"]}
    )
    # Eagerly: what TensorFlow fuses in a graph depends on the rest of it.
    ours, plain = (run(workload, spec, run_eagerly=True) for spec in ("pcgrad", None))
    assert ours.history == plain.history
    for one, other in zip(ours.variables, plain.variables, strict=True):
        np.testing.assert_array_equal(one, other)


class ThreeTasks(keras.Model):
    def __init__(self):
        super().__init__()
        self.hidden = keras.layers.Dense(3, "tanh")
        self.last = [keras.layers.Dense(1) for _ in range(3)]

    def call(self, x):
        h = self.hidden(x)
        return [last(h) for last in self.last]


def three_tasks() -> Workload:
    x, y = numbers(20, 4), [numbers(20, 1, seed=seed) for seed in (1, 2, 3)]
    return Workload(ThreeTasks, x, y, lambda: {"optimizer": sgd(), "loss": ["mse", "mae", "mse"]})


def test_the_order_is_that_of_the_seed():
    """Of three tasks; of two there is one order, and the seed is all the same."""
    ours = [run(three_tasks(), "pcgrad", {"seed": seed}) for seed in (0, 0, 1)]
    assert_same(ours[0], ours[1])
    assert differs(ours[0], ours[2])
    of_two = [run(workload_for(dense, OUTPUTS), "pcgrad", {"seed": seed}) for seed in (0, 1)]
    assert not differs(*of_two)


@pytest.mark.parametrize("workload", [three_tasks(), workload_for(dense, OUTPUTS)], ids=["three tasks", "two tasks"])
@pytest.mark.parametrize("batch_size", [4, 3])
def test_replicas_project_the_gradients_of_the_whole_batch(workload, batch_size, mirrored, assert_close):
    """In equal shares, and in unequal ones of two and one."""
    one = run(workload, "pcgrad", fit={"batch_size": batch_size})
    with mirrored.scope():
        two = run(workload, "pcgrad", fit={"batch_size": batch_size})
    assert_close(two.variables, one.variables)
    assert_close(two.history["loss"], one.history["loss"])


def scaling() -> keras.optimizers.Optimizer:
    module = keras.optimizers if hasattr(keras.optimizers, "LossScaleOptimizer") else keras.mixed_precision
    return module.LossScaleOptimizer(sgd(), initial_scale=2.0**10)


def test_a_loss_scale_changes_nothing(assert_close):
    ours = run(workload_for(dense, OUTPUTS, optimizer=scaling), "pcgrad")
    assert_close(ours.variables, run(workload_for(dense, OUTPUTS), "pcgrad").variables)


def test_both_passes_of_an_objective_are_part_of_the_tasks(assert_close):
    """Clean and attacked examples in halves, with an attack that hardly moves anything, are one pass."""
    halves = run(workload_for(dense, OUTPUTS), {"adversarial": {"epsilon": 1e-30, "clean_weight": 0.5}, "pcgrad": {}})
    assert_close(halves.variables, run(workload_for(dense, OUTPUTS), "pcgrad").variables)


def test_it_is_told_how_often_tasks_were_in_conflict():
    model = trainstep.apply(two_tasks(), ["pcgrad", "diagnostics"])
    model.compile(sgd(0.0), {"a": "mse", "b": "mse"})
    x, y = tf.nest.map_structure(lambda value: value[np.newaxis], CONFLICT)
    history = model.fit(x, y, verbose=0).history
    assert history["conflicting_tasks"] == [1.0]


@pytest.mark.parametrize("loss", ["mse", {"a": "mse"}, {"a": "mse", "b": None}], ids=str)
def test_a_model_of_one_task_is_refused(loss):
    model = dense() if loss == "mse" else two_tasks()
    trainstep.apply(model, "pcgrad")
    model.compile(sgd(), loss)
    x, y = (Task().x, Task().y) if loss == "mse" else tf.nest.map_structure(lambda v: v[np.newaxis], CONFLICT)
    y = {"a": y["a"]} if loss == {"a": "mse"} else y
    with pytest.raises(errors.ModelConflictError, match=r"pcgrad is for models of several .*depends on 1 of its"):
        model.fit(x, y, verbose=0)
