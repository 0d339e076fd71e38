"""Robust accuracy as it is known in closed form, as foolbox finds it, and the signs that it is none."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from nets import Task, dense, functional, multi_workload, sgd
from runs import prepared

import trainstep
from trainstep import errors
from trainstep.benchmarks import foreign_attack
from trainstep.benchmarks.datasets import load_digits
from trainstep.robustness import Budget, masking_signs


def linear(weights: list[float], bias: float, activation: str = "softmax", factor: float = 1.0) -> keras.Model:
    """Return a net of two classes, the logit of one of which is 0, that of the other w x + b, times `factor`."""
    x = keras.Input((len(weights),))
    logits = keras.layers.Rescaling(factor)(keras.layers.Dense(2, name="dense")(x))
    model = keras.Model(x, keras.layers.Activation(activation)(logits))
    column = np.array(weights, "float32")[:, None]
    model.get_layer("dense").set_weights([np.hstack([0 * column, column]), np.array([0, bias], "float32")])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=activation == "linear"))
    return model


# Of 8 x - 4 the classes meet at x = 0.5. The distances to it are 0.5, 0.15, 0.08, 0.5 and 0.08; the last is wrong.
X = np.array([[0.0], [0.35], [0.42], [1.0], [0.58], [0.9]], "float32")
Y = np.array([0, 0, 0, 1, 1, 0])


@pytest.mark.parametrize("activation", ["softmax", "linear"])
def test_a_model_of_one_input_by_hand(activation):
    found = trainstep.evaluate_robustness(
        linear([8.0], -4.0, activation), (X, Y), epsilon=0.1, steps=4, restarts=2, clip_range=(0, 1)
    )
    assert found.accuracy == pytest.approx(5 / 6)
    assert found.robust_accuracy == found.fgsm_accuracy == pytest.approx(3 / 6)
    assert 3 / 6 - 1e-6 <= found.noise_accuracy <= 5 / 6 + 1e-6
    radii, accuracies = zip(*found.by_epsilon, strict=True)
    assert radii == pytest.approx((0.05, 0.1, 0.2, 0.4, 1.0))
    assert accuracies == pytest.approx((5 / 6, 3 / 6, 2 / 6, 2 / 6, 0))
    assert (found.zero_gradients, found.warnings, found.examples) == (0, (), 6)
    text = str(found)
    assert "PGD, 4 steps, 2 random starts, linf epsilon 0.1, inputs within [0, 1]; 6 examples" in text
    assert "robust accuracy        50.0%" in text


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_linear_model_withstands_just_where_the_distance_to_its_border_says(norm):
    # The distance to w x + b = 0 is |w x + b| over the L2 norm of w, and in the L-infinity norm over its L1 norm.
    w, b, epsilon = np.array([3.0, -1.0, 2.0]), 0.5, 0.3
    x = np.random.default_rng(0).normal(size=(200, 3)).astype("float32")
    scores = x @ w + b
    distance = np.abs(scores) / np.linalg.norm(w, 2 if norm == "l2" else 1)
    x, scores, distance = (values[abs(distance - epsilon) > 0.1 * epsilon] for values in (x, scores, distance))
    y = np.where(np.arange(len(x)) % 10 == 0, scores < 0, scores > 0).astype("int64")  # Every tenth is wrong.
    found = trainstep.evaluate_robustness(linear(list(w), b), (x, y), epsilon=epsilon, norm=norm, steps=20, restarts=2)
    expected = np.mean((np.arange(len(x)) % 10 != 0) & (distance > epsilon))
    assert 0.2 < expected < 0.8
    assert found.robust_accuracy == pytest.approx(expected)
    assert found.warnings == ()


def test_labels_and_data_may_be_written_in_other_ways():
    def measured(model, data, **arguments):
        found = trainstep.evaluate_robustness(model, data, epsilon=0.1, steps=4, restarts=1, **arguments)
        return found.accuracy, found.robust_accuracy, found.fgsm_accuracy

    model = linear([8.0], -4.0)
    expected = measured(model, (X, Y))
    assert measured(model, (X, np.eye(2)[Y])) == expected
    assert measured(model, (X, Y[:, None])) == expected
    assert measured(model, tf.data.Dataset.from_tensor_slices((X, Y)).batch(4), batch_size=5) == expected
    x = keras.Input((1,))
    binary = keras.Model(x, keras.layers.Dense(1, "sigmoid")(x))  # Not compiled.
    binary.set_weights([np.array([[8.0]]), np.array([-4.0])])
    assert measured(binary, (X, Y), from_logits=False) == expected


CLASSES = Task(classes=True)


def test_the_model_stays_as_it_is():
    model = functional(CLASSES)
    model.compile("adam", "categorical_crossentropy", metrics=["accuracy"])
    model.fit(CLASSES.x, CLASSES.y, verbose=0)
    before = [variable.numpy() for variable in [*model.variables, *(v for m in model.metrics for v in m.variables)]]
    trainstep.evaluate_robustness(model, (CLASSES.x, CLASSES.y), epsilon=0.5, steps=3, restarts=2)
    after = [variable.numpy() for variable in [*model.variables, *(v for m in model.metrics for v in m.variables)]]
    tf.nest.map_structure(np.testing.assert_array_equal, after, before)


def test_a_model_with_strategies_has_the_weights_it_is_judged_by():
    keras.utils.set_random_seed(0)
    model = trainstep.apply(dense(CLASSES), "ema", decay=0.9)
    model.compile(sgd(1.0), "categorical_crossentropy")
    model.fit(CLASSES.x, CLASSES.y, epochs=3, verbose=0)
    twin = dense(CLASSES)
    with model.evaluation_weights():
        twin.set_weights(model.get_weights())
    twin.compile("sgd", "categorical_crossentropy")
    ours, plain = (
        trainstep.evaluate_robustness(each, (CLASSES.x, CLASSES.y), epsilon=0.3, steps=5, restarts=2)
        for each in (model, twin)
    )
    assert ours == plain


def test_a_model_that_only_hides_its_gradients_is_told():
    """The same border as that of a model that is not robust, behind a softmax that is 0 or 1 to the last float."""
    found = trainstep.evaluate_robustness(
        linear([8.0], -4.0, factor=1e4), (X, Y), epsilon=0.1, steps=4, restarts=1, clip_range=(0, 1)
    )
    assert found.robust_accuracy > 3 / 6
    assert found.zero_gradients == pytest.approx(5 / 6)  # All that are right: of the last the loss is not near 0.
    assert any("gradient with respect to the input is zero for 83.3%" in warning for warning in found.warnings)
    assert any("of the whole range of the inputs, 1, " in warning for warning in found.warnings)
    assert "WARNING: " in str(found)


def test_each_sign_is_told_by_itself():
    good = {"by_epsilon": [(0.1, 0.6), (0.2, 0.3), (1.0, 0.0)], "zero_gradients": 0.0}
    assert masking_signs(0.6, 0.65, 0.8, **good) == []
    assert masking_signs(0.6, 0.595, 0.595, **good) == []  # Within the luck of the draw.
    cases = {
        "one step (FGSM) breaks more than the attack: accuracy 50.0% against 60.0%.": masking_signs(
            0.6, 0.5, 0.8, **good
        ),
        "noise breaks more than the attack: accuracy 40.0% against 60.0%.": masking_signs(0.6, 0.65, 0.4, **good),
        "a larger ball breaks less: 70.0% at 0.2 against 60.0% at 0.1.": masking_signs(
            0.6, 0.65, 0.8, **good | {"by_epsilon": [(0.1, 0.6), (0.2, 0.7), (1.0, 0.0)]}
        ),
        "in a ball of the whole range of the inputs, 1, 30.0% withstand, and none could.": masking_signs(
            0.6, 0.65, 0.8, **good | {"by_epsilon": [(0.1, 0.6), (1.0, 0.3)]}
        ),
        "the gradient with respect to the input is zero for 20.0% of the examples.": masking_signs(
            0.6, 0.65, 0.8, **good | {"zero_gradients": 0.2}
        ),
    }
    for sign, found in cases.items():
        assert found == [sign]


def test_what_cannot_be_attacked_is_refused():
    model = linear([8.0], -4.0)
    with pytest.raises(errors.NotAModelError, match=r"takes a keras\.Model, not int"):
        trainstep.evaluate_robustness(3, (X, Y), epsilon=0.1)
    with pytest.raises(errors.InvalidOptionsError, match=r"evaluate_robustness: epsilon: .*Given: 0"):
        trainstep.evaluate_robustness(model, (X, Y), epsilon=0.0)
    with pytest.raises(errors.InvalidOptionsError, match="the lower end must be below the upper"):
        trainstep.evaluate_robustness(model, (X, Y), epsilon=0.1, clip_range=(1.0, 0.0))
    with pytest.raises(errors.UnsupportedInputError, match="not ndarray"):
        trainstep.evaluate_robustness(model, X, epsilon=0.1)
    with pytest.raises(errors.UnsupportedInputError, match="inputs of a floating dtype"):
        trainstep.evaluate_robustness(
            keras.Sequential([keras.Input((1,)), keras.layers.Dense(2)]),
            (X.astype(int), Y),
            epsilon=0.1,
            from_logits=True,
        )
    for labels, message in {
        (0.5,) * 6: "whole numbers, not such as 0.5",
        (float("nan"),) * 6: "whole numbers, not such as nan",
        ((1.0, 0.0, 0.0),) * 6: r"one-hot, \(batch, 2\), not \(6, 3\)",
    }.items():
        with pytest.raises(errors.UnsupportedInputError, match=message):
            trainstep.evaluate_robustness(model, (X, np.array(labels)), epsilon=0.1)
    with pytest.raises(errors.UnsupportedInputError, match="has single examples"):
        trainstep.evaluate_robustness(model, tf.data.Dataset.from_tensor_slices((X, Y)), epsilon=0.1)
    with pytest.raises(errors.ModelConflictError, match=r"trained by no loss.*Or say what its scores are"):
        trainstep.evaluate_robustness(keras.Sequential([keras.Input((1,)), keras.layers.Dense(2)]), (X, Y), epsilon=0.1)
    with pytest.raises(errors.UnsupportedInputError, match=r"as low as -4, so they are logits.*from_logits=True"):
        trainstep.evaluate_robustness(linear([8.0], -4.0, "linear"), (X, Y), epsilon=0.1, from_logits=False)
    workload = multi_workload(CLASSES)
    several = prepared(workload)
    with pytest.raises(errors.UnsupportedInputError, match="as its only output"):
        trainstep.evaluate_robustness(several, (workload.x, workload.y), epsilon=0.1)
    regression = dense()
    regression.compile("sgd", "mse")
    with pytest.raises(errors.ModelConflictError, match="evaluate_robustness needs an output of classes"):
        trainstep.evaluate_robustness(regression, (CLASSES.x, CLASSES.y), epsilon=0.1)


def test_fgsm_is_one_step():
    model = linear([8.0], -4.0)
    found = trainstep.evaluate_robustness(model, (X, Y), attack="fgsm", epsilon=0.1)
    assert found.robust_accuracy == found.fgsm_accuracy == pytest.approx(3 / 6)
    assert str(found).startswith("FGSM, linf epsilon 0.1; 6 examples")


def test_a_step_grows_with_the_ball():
    assert Budget(epsilon=0.1, step_size=0.02).at(0.2).step_size == pytest.approx(0.04)
    assert Budget(epsilon=0.1).at(0.2).step_size is None


@pytest.fixture(scope="module")
def on_digits():
    """Return a trained model, its validation data as tensors, its logits, and what we find."""
    split = load_digits()
    keras.utils.set_random_seed(0)
    model = trainstep.models.build("mlp", input_shape=split.train[0].shape[1:], classes=10)
    model.compile("adam", "sparse_categorical_crossentropy")
    model.fit(*split.train, epochs=10, verbose=0)
    x, y = (tf.convert_to_tensor(values) for values in split.validation)
    found = trainstep.evaluate_robustness(model, (x, y), epsilon=0.1, restarts=3, clip_range=(0.0, 1.0))
    return x, y, foreign_attack.logits_of(model), found


def test_foolbox_finds_the_same_on_digits(on_digits):
    """PGD of the same budget, restarts too: by the luck of one start alone they differ by a point now and then."""
    foolbox = pytest.importorskip("foolbox", reason="in the environment of tensorflow-addons")
    x, y, logits, ours = on_digits
    attack = foolbox.attacks.LinfPGD(rel_stepsize=2.5 / 40, steps=40, random_start=True).repeat(3)
    _, _, success = attack(foolbox.TensorFlowModel(logits, bounds=(0, 1)), x, y, epsilons=0.1)
    theirs = np.mean((np.argmax(logits(x), axis=1) == y.numpy()) & ~success.numpy())
    assert 0.1 < ours.robust_accuracy < ours.accuracy - 0.1
    assert ours.robust_accuracy == pytest.approx(theirs, abs=0.01)
    assert ours.warnings == ()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # Of what it imports.
def test_the_adversarial_robustness_toolbox_finds_the_same_on_digits(on_digits):
    art = pytest.importorskip("art.attacks.evasion", reason="in the environment of tensorflow-addons")
    estimators = pytest.importorskip("art.estimators.classification")
    x, y, logits, ours = on_digits

    def model(images, training=False):
        del training
        return logits(tf.cast(images, tf.float32))

    classifier = estimators.TensorFlowV2Classifier(
        model, nb_classes=10, input_shape=x.shape[1:], clip_values=(0.0, 1.0),
        loss_object=tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )  # fmt: skip
    attack = art.ProjectedGradientDescent(
        classifier, eps=0.1, eps_step=2.5 * 0.1 / 40, max_iter=40, num_random_init=3, batch_size=len(x), verbose=False
    )
    moved = attack.generate(x.numpy(), y.numpy())
    right = [np.argmax(logits(tf.constant(images)), axis=1) == y.numpy() for images in (x.numpy(), moved)]
    assert ours.robust_accuracy == pytest.approx(np.mean(right[0] & right[1]), abs=0.01)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x, y: (16 * x, y), r"inputs go from .* to 16, outside of clip_range=\(0.0, 1.0\)"),
        (lambda x, y: (np.full_like(x, np.nan), y), "not a number"),
        (lambda x, y: (x, y + 7), "labels go from 7 to .*, and the model has 2 classes: 0 to 1"),
        (lambda x, y: (x, y[:-1]), r"different numbers of examples: \[5, 6\]"),
    ],
    ids=["another range", "no numbers", "no such classes", "fewer labels"],
)
def test_data_that_would_make_every_model_look_robust_or_wrong_are_refused(change, said):
    model = keras.Sequential([keras.layers.Input((2,)), keras.layers.Dense(2, "softmax")])
    model.compile("sgd", "sparse_categorical_crossentropy")
    x, y = np.linspace(0, 1, 12, dtype="float32").reshape(6, 2), np.array([0, 1] * 3)
    with pytest.raises(errors.UnsupportedInputError, match=said):
        trainstep.evaluate_robustness(model, change(x, y), epsilon=0.1, clip_range=(0.0, 1.0))
