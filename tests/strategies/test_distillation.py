"""Distillation: trained on what a teacher predicts."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from nets import BATCH, MULTI_X, Task, dense, functional, multi_workload, one_weight, sgd, weight_of, workload_for
from runs import fitted, prepared, run

import trainstep
from trainstep import errors
from trainstep._seam import KERAS_3
from trainstep.strategies import distillation
from trainstep.strategies._classes import divergence
from trainstep.strategies.distillation import softened

CLASSES = Task(classes=True)
TEACHER = {"teacher": "the test's"}


@pytest.fixture(autouse=True)
def teacher():
    """Provide a teacher with everything that is easily left in training mode: dropout, and batch norm."""
    keras.utils.set_random_seed(7)
    model = functional(CLASSES)
    model.get_layer("norm").set_weights([2 * np.ones(5), np.ones(5), np.full(5, 0.3), np.full(5, 2.0)])
    distillation.provide("the test's", model)
    yield model
    distillation.withdraw("the test's")


def sigmoid(z: float) -> float:
    return 1 / (1 + np.exp(-z))


def test_one_weight_by_hand():
    # One example, x = 1, y = 1; the teacher's logit is 3, the model's w = 1. T = 2, so q = s(3/2) and p = s(1/2);
    # dKL(q || p)/dw = (p - q) / T. With alpha = 1/4: loss = 3/4 L + 1/4 * 4 KL,
    # gradient = 3/4 (s(1) - 1) + 1/2 (p - q).
    model = trainstep.apply(
        one_weight(1.0), "distillation", teacher=one_weight(3.0), temperature=2.0, alpha=0.25, from_logits=True
    )
    model.compile(sgd(0.1), keras.losses.BinaryCrossentropy(from_logits=True))
    loss = model.train_on_batch(np.ones((1, 1)), np.ones((1, 1)))
    q, p = sigmoid(1.5), sigmoid(0.5)
    divergence = q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p))
    assert float(np.ravel(loss)[0]) == pytest.approx(-0.75 * np.log(sigmoid(1.0)) + divergence, rel=1e-5)
    assert weight_of(model) == pytest.approx(1 - 0.1 * (0.75 * (sigmoid(1.0) - 1) + 0.5 * (p - q)), rel=1e-5)


def test_at_high_temperature_logits_are_matched():
    """Section 2.1 of the paper: T^2 KL becomes the squared distance of zero-mean logits, over twice their number."""
    z, v = np.array([[1.0, -3.0, 2.0]]), np.array([[0.5, 0.5, -1.0]])
    log_p, log_q = (tf.nn.log_softmax(tf.constant(logits)) for logits in (z, v))
    scaled = 1000.0**2 * divergence(softened(log_q, 1000.0), softened(log_p, 1000.0))
    np.testing.assert_allclose(scaled, np.sum((z - v) ** 2, axis=-1) / (2 * 3), rtol=2e-3)


def loop(weights: np.ndarray, soft: np.ndarray, alpha: float, temperature: float) -> list[np.ndarray]:
    """Return the weights that the formula, written down with a GradientTape, leaves; `soft` are probabilities."""
    keras.utils.set_random_seed(0)
    model = dense(CLASSES)
    for start in range(0, len(CLASSES.x), BATCH):
        x, y, w, q = (values[start : start + BATCH] for values in (CLASSES.x, CLASSES.y, weights, soft))
        q = q ** (1 / temperature)
        q /= q.sum(axis=-1, keepdims=True)
        with tf.GradientTape() as tape:
            p = model(x)
            hard = -tf.reduce_sum(y * tf.math.log(p), axis=-1)
            p = p ** (1 / temperature)
            p /= tf.reduce_sum(p, axis=-1, keepdims=True)
            losses = (1 - alpha) * hard + alpha * temperature**2 * tf.reduce_sum(q * tf.math.log(q / p), axis=-1)
            loss = tf.reduce_sum(w * losses) / len(x)
        gradients = tape.gradient(loss, model.trainable_variables)
        model.set_weights([w - 0.1 * g.numpy() for w, g in zip(model.get_weights(), gradients, strict=True)])
    return model.get_weights()


def test_it_is_an_own_loop_with_the_formula_sample_weights_and_all(teacher, assert_close):
    weights = np.linspace(0, 2, len(CLASSES.x)).astype("float32")
    expected = loop(weights, teacher.predict(CLASSES.x, verbose=0), 0.7, 3.0)
    workload = workload_for(dense, CLASSES, fit={"sample_weight": weights})
    ours = run(workload, "distillation", {**TEACHER, "alpha": 0.7, "temperature": 3.0}, fit={"epochs": 1})
    assert_close(ours.variables, expected)


def test_the_teacher_alone_at_temperature_one_is_training_on_its_predictions(teacher, assert_close):
    """Dropout, batch norm and regularizers of the model are those of plain Keras; the teacher's stay as they are."""
    before = [variable.numpy() for variable in teacher.variables]
    soft = teacher.predict(CLASSES.x, verbose=0)
    workload = workload_for(functional, CLASSES)
    plain = prepared(workload)
    plain.fit(CLASSES.x, soft, batch_size=BATCH, epochs=2, shuffle=False, verbose=0)
    ours = run(workload, "distillation", {**TEACHER, "alpha": 1.0, "temperature": 1.0})
    assert_close(ours.variables, [variable.numpy() for variable in plain.variables])
    tf.nest.map_structure(np.testing.assert_array_equal, [variable.numpy() for variable in teacher.variables], before)


def test_the_model_grows_by_nothing(teacher, tmp_path):
    workload = workload_for(dense, CLASSES)
    model, plain = prepared(workload, "distillation", TEACHER), prepared(workload)
    fitted(model, workload, epochs=1)
    fitted(plain, workload, epochs=1)
    assert [w.shape for w in model.weights] == [w.shape for w in plain.weights]
    assert model.count_params() == plain.count_params()
    assert len(model.layers) == len(plain.layers)
    for each, name in ((model, "ours"), (plain, "plain")):
        each.save(tmp_path / f"{name}.keras")
    sizes = [(tmp_path / f"{name}.keras").stat().st_size for name in ("ours", "plain")]
    assert sizes[0] - sizes[1] < 2000  # The options; the weights of the teacher alone take more.


def test_a_saved_model_predicts_without_its_teacher_and_says_how_to_train(tmp_path):
    teacher = dense(CLASSES)
    distillation.provide("big", teacher)
    workload = workload_for(dense, CLASSES)
    model = prepared(workload, "distillation", {"teacher": "big"})
    fitted(model, workload, epochs=1)
    model.save(tmp_path / "model.keras")
    distillation.withdraw("big")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert trainstep.applied(loaded)["distillation"].teacher == "big"
    np.testing.assert_array_equal(loaded.predict(CLASSES.x, verbose=0), model.predict(CLASSES.x, verbose=0))
    loaded.evaluate(CLASSES.x, CLASSES.y, verbose=0)
    with pytest.raises(errors.ModelConflictError, match=r"there is no teacher 'big'.*provide\('big', model\)"):
        loaded.fit(CLASSES.x, CLASSES.y, verbose=0)
    distillation.provide("big", lambda: teacher)
    for each in (model, loaded):
        each.fit(CLASSES.x, CLASSES.y, batch_size=BATCH, shuffle=False, verbose=0)
    distillation.withdraw("big")
    tf.nest.map_structure(np.testing.assert_array_equal, loaded.get_weights(), model.get_weights())


def test_a_model_itself_is_provided_under_its_own_name():
    one, other = (keras.Sequential(dense(CLASSES).layers, name="big_net") for _ in range(2))
    names = [
        trainstep.applied(trainstep.apply(dense(CLASSES), "distillation", teacher=each))["distillation"].teacher
        for each in (one, other, one)
    ]
    assert names == ["big_net", "big_net_1", "big_net"]
    for name in set(names):
        distillation.withdraw(name)


def test_a_path_is_the_model_saved_there_under_two_replicas_too(teacher, tmp_path, mirrored, assert_close):
    teacher.save(tmp_path / "teacher.keras")
    expected = run(workload_for(dense, CLASSES), "distillation", TEACHER)
    by_path = {"teacher": str(tmp_path / "teacher.keras")}
    with mirrored.scope():  # The file is read first in a step, inside of the replicas.
        model = prepared(workload_for(dense, CLASSES), "distillation", by_path)
    two = fitted(model, workload_for(dense, CLASSES))
    one = run(workload_for(dense, CLASSES), "distillation", by_path)
    assert_close(two.variables, expected.variables)
    assert_close(one.variables, expected.variables)


def test_outputs_go_by_name(assert_close):
    """Of a teacher with two outputs, in another order, the one of the same name teaches."""
    x = {"left": keras.Input((6,), name="left"), "right": keras.Input((3,), name="right")}
    kind = keras.layers.Dense(3, name="kind")(x["left"])
    single = keras.Model(x, kind)
    several = keras.Model(x, {"kind": kind, "another": keras.layers.Dense(3, name="another")(x["right"])})
    results = []
    for each in (single, several):
        distillation.provide("named", each)
        results.append(run(multi_workload(CLASSES), "distillation", {"teacher": "named"}))
    distillation.withdraw("named")
    assert single(MULTI_X).shape == (22, 3)
    assert_close(results[1].variables, results[0].variables)


def test_a_teacher_that_computes_in_16_bits_teaches_a_model_in_32(teacher, assert_close):
    half = keras.models.clone_model(teacher)
    half.set_weights(teacher.get_weights())
    trainstep.apply(half, "mixed_precision", dtype="bfloat16")
    half.compile("sgd", "categorical_crossentropy")
    distillation.provide("half", half)
    ours = run(workload_for(dense, CLASSES), "distillation", {"teacher": "half"})
    distillation.withdraw("half")
    assert_close(ours.variables, run(workload_for(dense, CLASSES), "distillation", TEACHER).variables, "bfloat16")


def train(**options) -> None:
    run(workload_for(dense, CLASSES), "distillation", options, fit={"epochs": 1})


def test_a_file_that_is_no_saved_model_is_refused(tmp_path):
    (tmp_path / "teacher.keras").write_text("none")
    with pytest.raises(errors.ModelConflictError, match=r"teacher\.keras' cannot be loaded: .*\. It is to be a model"):
        train(teacher=str(tmp_path / "teacher.keras"))


def test_a_function_that_fails_to_load_a_teacher_says_why():
    def broken():
        raise errors.UnsupportedInputError("the disk is full")

    distillation.provide("broken", broken)
    try:
        with pytest.raises(errors.UnsupportedInputError, match="the disk is full"):
            train(teacher="broken")
    finally:
        distillation.withdraw("broken")


class Branching(keras.Model):
    """A teacher with a condition on a tensor, which autograph makes part of a graph."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(3, "softmax")

    def call(self, x):
        if tf.reduce_sum(x) > 1e9:
            x = 2.0 * x
        return self.dense(x)


@pytest.mark.skipif(KERAS_3, reason="Keras 3 has no conditions on tensors in `call`")
def test_a_teacher_may_branch_on_tensors():
    branching = Branching()
    branching(CLASSES.x[:2])
    train(teacher=branching, from_logits=False)


def test_a_teacher_that_cannot_teach_is_refused():
    with pytest.raises(errors.ModelConflictError, match=r"no teacher 'the tests'.*Did you mean \"the test's\""):
        train(teacher="the tests")
    with pytest.raises(errors.ModelConflictError, match="is not built: call it on a batch"):
        train(teacher=keras.Sequential([keras.layers.Dense(3, "softmax")]))
    with pytest.raises(errors.ModelConflictError, match=r"of shape \(None, 3\), has none like it.*\(None, 2\)"):
        train(teacher=keras.Sequential([keras.Input((6,)), keras.layers.Dense(2, "softmax")]))
    scaled = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3), keras.layers.Rescaling(2.0)])
    with pytest.raises(errors.ModelConflictError, match="Say so: from_logits=True or False"):
        train(teacher=scaled)
    train(teacher=scaled, from_logits=True)
    with pytest.raises(
        errors.ModelConflictError, match=r"fails on the inputs of the model, float32 \(None, 6\): .*\b5\b"
    ):
        train(teacher=keras.Sequential([keras.Input((5,)), keras.layers.Dense(3, "softmax")]))
    distillation.provide("none", lambda: None)
    with pytest.raises(errors.NotAModelError, match=r"the teacher 'none' is to be a keras\.Model, not None"):
        train(teacher="none")
    with pytest.raises(errors.NotAModelError, match="or a function that returns one, not 3"):
        distillation.provide("three", 3)
    with pytest.raises(errors.ModelConflictError, match=r"No teacher 'nine' was provided\. Did you mean 'none'"):
        distillation.withdraw("nine")
    model = dense(CLASSES)
    trainstep.apply(model, "distillation", teacher=model)
    model.compile(sgd(), "categorical_crossentropy")
    with pytest.raises(errors.ModelConflictError, match="cannot be its own teacher"):
        model.fit(CLASSES.x, CLASSES.y, verbose=0)
