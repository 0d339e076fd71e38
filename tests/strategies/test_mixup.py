"""mixup trains on mixtures of two examples, and of their labels."""

import keras
import numpy as np
import pytest
import scipy.stats
import tensorflow as tf
from nets import ONE_HOT, Task, Workload, X, dense, numbers, one_weight, sgd, tokens, weight_of, workload_for
from runs import assert_same, run
from seen import batches_seen

import trainstep
from trainstep import errors
from trainstep.step import Batch
from trainstep.strategies._mixing import symmetric_beta
from trainstep.strategies.mixup import mixtures

CLASSES = Task(classes=True)
PAIR = Batch(tf.constant([[2.0], [6.0]]), tf.constant([[1.0, 0.0], [0.0, 1.0]]), tf.constant([1.0, 3.0]))
SWAPPED = Batch(*(tf.reverse(values, [0]) for values in PAIR[:3]))
QUARTER = tf.constant([0.25, 0.25])


def shares_drawn(count: int, steps: int = 1, **options) -> list[np.ndarray]:
    """Return the matrix of each step that makes mixtures of examples: what it makes of the unit vectors."""
    unit = np.eye(count, dtype="float32")
    return [batch.x for batch in batches_seen({"mixup": options}, unit, unit, steps=steps)]


def test_two_examples_by_hand():
    # x' = 0.25 * 2 + 0.75 * 6 = 5 and 0.25 * 6 + 0.75 * 2 = 3; so with the labels.
    mixed = mixtures(PAIR._replace(sample_weight=None), SWAPPED._replace(sample_weight=None), QUARTER)
    np.testing.assert_array_equal(mixed.x, [[5], [3]])
    np.testing.assert_array_equal(mixed.y, [[0.25, 0.75], [0.75, 0.25]])
    assert mixed.sample_weight is None


def test_weights_by_hand():
    # w' = 0.25 * 1 + 0.75 * 3 = 2.5 and 0.25 * 3 + 0.75 * 1 = 1.5. Of the first, the example itself weighs 0.25 / 2.5,
    # its partner 2.25 / 2.5; of the second 0.75 / 1.5 each.
    mixed = mixtures(PAIR, SWAPPED, QUARTER)
    np.testing.assert_array_equal(mixed.x, [[5], [3]])
    np.testing.assert_allclose(mixed.sample_weight, [2.5, 1.5])
    np.testing.assert_allclose(mixed.y, [[0.1, 0.9], [0.5, 0.5]])


def test_each_label_counts_as_much_as_its_example_does():
    """For a cross-entropy w' L(y') is lambda w_i L(y_i) + (1 - lambda) w_j L(y_j)."""
    p = tf.constant([[0.2, 0.8], [0.3, 0.7]])
    mixed = mixtures(PAIR, SWAPPED, QUARTER)

    def loss(batch):
        return -tf.reduce_sum(batch.y * tf.math.log(p), axis=-1) * batch.sample_weight

    np.testing.assert_allclose(loss(mixed), 0.25 * loss(PAIR) + 0.75 * loss(SWAPPED), rtol=1e-6)


def test_an_example_and_a_partner_of_weight_zero_weigh_nothing():
    mixed = mixtures(*(batch._replace(sample_weight=tf.zeros(2)) for batch in (PAIR, SWAPPED)), QUARTER)
    np.testing.assert_array_equal(mixed.sample_weight, [0, 0])
    np.testing.assert_array_equal(mixed.y, [[0.25, 0.75], [0.75, 0.25]])


def test_weights_may_be_those_of_entries():
    x, y, weights = numbers(3, 4), numbers(3, 4, 2, seed=1), np.abs(numbers(3, 4, seed=2))
    batch = Batch(*map(tf.constant, (x, y, weights)))
    others = Batch(*(tf.reverse(values, [0]) for values in batch[:3]))
    mixed = mixtures(batch, others, tf.constant([0.5, 0.5, 0.5]))
    np.testing.assert_allclose(mixed.sample_weight, (weights + weights[::-1]) / 2, rtol=1e-6)
    expected = (weights[..., None] * y + weights[::-1, :, None] * y[::-1]) / (weights + weights[::-1])[..., None]
    np.testing.assert_allclose(mixed.y, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.05, 0.2, 1.0, 4.0])
def test_lambda_has_the_beta_distribution(alpha):
    # The greatest difference of both distribution functions, Kolmogorov's statistic, is below 1.63 / sqrt(n) in 99 of
    # 100 draws. It is looked for where float32 tells a lambda from 0 and from 1.
    drawn, points = symmetric_beta(alpha, [20_000], tf.constant([1, 2])).numpy(), np.linspace(1e-5, 1 - 1e-5, 1001)
    below = np.searchsorted(np.sort(drawn), points, side="right") / len(drawn)
    assert np.abs(below - scipy.stats.beta(alpha, alpha).cdf(points)).max() < 1.63 / np.sqrt(len(drawn))


def test_examples_are_mixed_by_one_lambda_with_a_permutation_of_the_batch():
    for matrix in shares_drawn(8, steps=4):
        np.testing.assert_allclose(matrix.sum(axis=0), 1, rtol=1e-6)
        np.testing.assert_allclose(matrix.sum(axis=1), 1, rtol=1e-6)
        share = min(value for value in np.diag(matrix))
        others = ~np.isclose(np.diag(matrix), 1)
        np.testing.assert_array_equal(np.diag(matrix)[others], share)
        assert ((matrix > 0).sum(axis=1) == np.where(others, 2, 1)).all()


def test_each_example_may_have_a_lambda_of_its_own():
    [matrix] = shares_drawn(64, per="example", alpha=1.0)
    np.testing.assert_allclose(matrix.sum(axis=1), 1, rtol=1e-6)
    assert len(np.unique(np.diag(matrix))) > 50


def test_each_step_and_each_seed_draws_anew():
    first, second = shares_drawn(6, steps=2, alpha=1.0)
    [other] = shares_drawn(6, alpha=1.0, seed=1)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, other)
    np.testing.assert_array_equal(first, shares_drawn(6, alpha=1.0)[0])


def test_one_weight_by_hand():
    # x' = M x and y' = M y for what is drawn; g = mean 2 (w x' - y') x'.
    [matrix] = shares_drawn(2, alpha=1.0, seed=4)
    assert 0.01 < matrix[0, 1] < 0.99
    x, y = np.array([[1.0], [3.0]], "float32"), np.array([[5.0], [-1.0]], "float32")
    model = trainstep.apply(one_weight(2.0), "mixup", alpha=1.0, seed=4)
    model.compile(sgd(0.1), "mse")
    model.train_on_batch(x, y)
    mixed_x, mixed_y = matrix @ x, matrix @ y
    gradient = np.mean(2 * (2 * mixed_x - mixed_y) * mixed_x)
    assert weight_of(model) == pytest.approx(2 - 0.1 * gradient, rel=1e-5)


def test_it_is_an_own_loop_on_the_mixtures(assert_close):
    batch, steps = 11, 2
    keras.utils.set_random_seed(0)
    model = dense(CLASSES)
    for step, matrix in enumerate(shares_drawn(batch, steps=steps)):
        rows = slice(step * batch, (step + 1) * batch)
        with tf.GradientTape() as tape:
            p = model(matrix @ CLASSES.x[rows])
            loss = -tf.reduce_mean(tf.reduce_sum(matrix @ CLASSES.y[rows] * tf.math.log(p), axis=-1))
        gradients = tape.gradient(loss, model.trainable_variables)
        model.set_weights([w - 0.1 * g.numpy() for w, g in zip(model.get_weights(), gradients, strict=True)])
    ours = run(workload_for(dense, CLASSES), "mixup", fit={"epochs": 1, "batch_size": batch})
    assert_close(ours.variables, model.get_weights())


def test_an_input_that_is_no_float_stays_that_of_the_example():
    x = {"ids": tokens(6), "values": X[:6]}
    [batch] = batches_seen({"mixup": {"alpha": 1.0}}, x, ONE_HOT[:6])
    np.testing.assert_array_equal(batch.x["ids"], x["ids"])
    assert not np.allclose(batch.x["values"], x["values"])


def test_class_numbers_are_refused():
    workload = Workload(lambda: dense(CLASSES), X, ONE_HOT.argmax(axis=-1), lambda: {"optimizer": sgd(), "loss": "mse"})
    with pytest.raises(errors.UnsupportedInputError, match=r"these are int.*keras.utils.to_categorical"):
        run(workload, "mixup")


def test_floats_that_are_taken_for_class_numbers_are_refused():
    workload = workload_for(dense, CLASSES, loss="sparse_categorical_crossentropy")
    with pytest.raises(errors.ModelConflictError, match=r"class numbers cannot be.*keras.utils.to_categorical"):
        run(Workload(workload.build, X, ONE_HOT.argmax(axis=-1).astype("float32"), workload.compile), "mixup")


def test_no_labels_are_refused():
    with pytest.raises(errors.UnsupportedInputError, match="there are no labels"):
        batches_seen({"mixup": {}}, X[:4], None)


def test_inputs_that_cannot_be_mixed_are_refused_unless_nothing_is_asked_of_them():
    with pytest.raises(errors.UnsupportedInputError, match="dense inputs of a floating dtype"):
        batches_seen({"mixup": {}}, tokens(4), ONE_HOT[:4])
    plain = workload_for(dense, CLASSES, loss="sparse_categorical_crossentropy")
    numbered = Workload(plain.build, X, ONE_HOT.argmax(axis=-1), plain.compile)
    assert_same(run(numbered, "mixup", {"alpha": 0.0}), run(numbered))
