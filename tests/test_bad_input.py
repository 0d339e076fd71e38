"""What comes of input that is wrong, or unusual: the result of plain Keras, or an error that says what to do."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from catalogue import EVALUATING, NAMES, REPRESENTATIVES, coarsest_dtype, declaration, spec_of, task_of
from nets import BATCH, NUMBERS, X, Y, dense, sgd

import trainstep
from trainstep import errors
from trainstep._seam import KERAS_3

pytestmark = pytest.mark.filterwarnings("ignore:mixed_precision computes in float16:UserWarning")

FULL = {
    "adversarial": {"epsilon": 0.01},
    "gradient_accumulation": {"steps": 2},
    "gradient_clipping": {"global_clipnorm": 1.0},
    "mixed_precision": {"dtype": "float16", "growth_interval": 10},
}
ANYWHERE = [
    name for name in NAMES if task_of(name) == NUMBERS and not (declaration(name).example and name in EVALUATING)
]
"""Those that train any net for any task: for others this says nothing, and each has a refusal of its own."""


EVALUATING_ANYWHERE = [name for name in ANYWHERE if name in [*EVALUATING, "standard", "gradient_centralization"]]
"""The others see no inputs, labels or losses; a gradient is sparse where inputs are."""


def needs(name: str, *kinds: str) -> bool:
    return bool(set(declaration(name).needs) & set(kinds))


def prepared(name, model=None, loss=None, **compiled) -> keras.Model:
    spec = spec_of(name) if isinstance(name, str) else name
    keras.utils.set_random_seed(0)
    model = trainstep.apply(model or dense(task_of(*spec)), spec)
    model.compile(sgd(), loss or task_of(*spec).loss, **compiled)
    return model


def data_of(name, change=lambda values: values) -> tuple:
    """Return the inputs and labels of the task of `name`, of each tensor what `change` makes of it."""
    task = task_of(name)
    return tf.nest.map_structure(change, task.x), tf.nest.map_structure(change, task.y)


@pytest.mark.parametrize("name", [name for name in NAMES if not task_of(name).images])
def test_an_empty_batch_moves_nothing(name):
    """But for images: within a graph TensorFlow's oneDNN makes a wrong shape of a convolution of no examples."""
    model = prepared(name)
    before = model.get_weights()
    assert float(np.ravel(model.train_on_batch(*data_of(name, lambda values: values[:0])))[0]) == 0.0
    tf.nest.map_structure(np.testing.assert_array_equal, model.get_weights(), before)


@pytest.mark.parametrize("name", EVALUATING)
def test_float64_inputs_are_trained_on_as_float32(name):
    weights = []
    for dtype in ("float32", "float64"):
        model = prepared(name, run_eagerly=True)
        x, y = data_of(name, lambda values: values[:10].astype(dtype))  # noqa: B023  Called here.
        model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0)
        weights.append(model.get_weights())
    tf.nest.map_structure(np.testing.assert_array_equal, *weights)


@pytest.mark.parametrize("name", [name for name in EVALUATING if not declaration(name).example])
def test_integer_inputs_are_trained_on_as_their_values_or_refused(name):
    x, y = data_of(name)
    whole = np.round(3 * x)
    model = prepared(name)
    if needs(name, "float inputs"):
        with pytest.raises(errors.UnsupportedInputError, match=r"int32.*Cast images to float32"):
            model.fit(whole.astype("int32"), y, verbose=0)
        return
    weights = []
    for dtype in ("float32", "int32"):
        model = prepared(name)
        model.fit(whole.astype(dtype), y, batch_size=BATCH, shuffle=False, verbose=0)
        weights.append(model.get_weights())
    tf.nest.map_structure(np.testing.assert_array_equal, *weights)


@pytest.mark.parametrize("name", EVALUATING_ANYWHERE)
def test_labels_out_of_range_are_the_error_of_tensorflow(name):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model = prepared(name, keras.Sequential([keras.layers.Input((6,)), keras.layers.Dense(3)]), loss)
    with pytest.raises(tf.errors.InvalidArgumentError, match="label value of 7 which is outside the valid range"):
        model.fit(X, np.full(len(X), 7), verbose=0)


@pytest.mark.parametrize("name", EVALUATING_ANYWHERE)
def test_sparse_inputs_are_trained_on_as_dense_ones_or_refused(name, assert_close):
    def build() -> keras.Model:
        keras.utils.set_random_seed(0)
        x = keras.Input((6,), sparse=True)
        return keras.Model(x, keras.layers.Dense(1)(x))

    model = prepared(name, build())
    sparse = tf.sparse.from_dense(np.where(X > 0, X, 0))
    if needs(name, "float inputs", "dense inputs"):
        with pytest.raises(errors.UnsupportedInputError, match="dense"):
            model.train_on_batch(sparse, Y)
        return
    model.train_on_batch(sparse, Y)
    dense_one = prepared(name, build())
    dense_one.train_on_batch(tf.sparse.to_dense(sparse), Y)
    # Two ways to multiply, each with its rounding; under mixed precision only the dense one is in 16 bits.
    assert_close(model.get_weights(), dense_one.get_weights(), coarsest_dtype(model))


@pytest.mark.parametrize("name", EVALUATING_ANYWHERE)
def test_a_loss_function_may_return_one_value_per_example(name):
    """Keras takes the mean of it."""
    weights = []
    for loss in ("mse", lambda y, y_pred: tf.reduce_mean(tf.square(y - y_pred), axis=-1)):
        model = prepared(name, loss=loss)
        model.fit(X, Y, batch_size=BATCH, shuffle=False, verbose=0)
        weights.append(model.get_weights())
    for one, other in zip(*weights, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


class LossPerExample(keras.Model):
    def __init__(self):
        super().__init__()
        self.last = keras.layers.Dense(1)

    def call(self, x):
        return self.last(x)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        del x, sample_weight, training
        return tf.reduce_mean(tf.square(y - y_pred), axis=-1)


@pytest.mark.parametrize("name", EVALUATING_ANYWHERE)
def test_a_compute_loss_that_is_no_scalar_is_refused(name):
    model = prepared(name, LossPerExample())
    with pytest.raises(errors.ModelConflictError, match=r"LossPerExample returned a loss of shape .*reduce_mean"):
        model.train_on_batch(X, Y)


@pytest.mark.skipif(not KERAS_3, reason="Keras 2 refuses to compile without an optimizer")
@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_a_model_compiled_without_an_optimizer_evaluates_and_refuses_to_train(name):
    task = task_of(name)
    model = trainstep.apply(dense(task), spec_of(name))
    model.compile(None, task.loss)
    assert np.isfinite(model.evaluate(task.x, task.y, verbose=0)).all()
    with pytest.raises(errors.NotCompiledError, match="no optimizer to train with"):
        model.fit(task.x, task.y, verbose=0)


@pytest.mark.parametrize("spec", [*ANYWHERE, FULL], ids=lambda spec: spec if isinstance(spec, str) else "full stack")
def test_hundreds_of_steps_without_a_gradient_leave_weights_and_state_as_numbers(spec):
    """With the labels predicted exactly the gradient is zero: nothing may be divided by its norm, or grow for ever."""
    model = prepared(spec, keras.Sequential([keras.layers.Input((2,)), keras.layers.Dense(2), keras.layers.Dense(1)]))
    model.layers[-1].set_weights([np.zeros((2, 1), "float32"), np.zeros(1, "float32")])
    before = model.get_weights()
    zeros = np.zeros((400, 2), "float32")
    model.fit(zeros, zeros[:, :1], batch_size=1, verbose=0)
    if all(declaration(name).stage != trainstep.Stage.NOISE for name in trainstep.applied(model)):
        tf.nest.map_structure(np.testing.assert_array_equal, model.get_weights(), before)
    assert all(np.isfinite(weight).all() for weight in model.get_weights())
    for slots in model.strategy_state.values():
        for slot in slots.values():
            for variable in tf.nest.flatten(slot):
                assert not np.isnan(variable.numpy()).any()
    if spec is FULL:  # At its cap: it doubles with every ten of the 200 updates.
        assert model.strategy_state["mixed_precision"]["scale"].numpy() == 2.0**24


class Sums(keras.Model):
    """Takes the sum of each row, and one weight times that."""

    def __init__(self):
        super().__init__()
        self.last = keras.layers.Dense(1)

    def call(self, x):
        return self.last(tf.reshape(tf.reduce_sum(x, axis=1), (-1, 1)))


@pytest.mark.parametrize("name", EVALUATING_ANYWHERE)
def test_ragged_inputs_are_trained_on_as_padded_ones_or_refused(name, assert_close):
    rows = [[1.0, 2.0], [3.0], [4.0, 5.0, 6.0], [7.0], [0.5], [0.25, 0.5]]
    ragged = tf.ragged.constant(rows)
    weights = []
    for x in (ragged, ragged.to_tensor()):
        model = prepared(name, Sums())
        data = tf.data.Dataset.from_tensor_slices((x, np.ones((6, 1), "float32"))).batch(4)
        if needs(name, "float inputs") and x is ragged:
            with pytest.raises(errors.UnsupportedInputError, match="dense"):
                model.fit(data, shuffle=False, verbose=0)
            return
        model.fit(data, shuffle=False, verbose=0)
        weights.append(model.get_weights())
    assert_close(*weights)


GUARDS = {
    "skip_nonfinite": {"max_consecutive": 1000},
    "mixed_precision": {"dtype": "float16", "max_consecutive_skips": 1000},
}


@pytest.mark.parametrize("name", GUARDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_shard_of_200_bad_batches_costs_their_updates_and_nothing_else(name, bad):
    """Then the loss scale of float16 is at its floor, and grows again; the run goes on from where it was."""
    model = prepared({name: GUARDS[name]})
    before = model.get_weights()
    shard = np.full((200 * 2, 6), bad, "float32")
    model.fit(shard, np.zeros((400, 1), "float32"), batch_size=2, verbose=0)
    tf.nest.map_structure(np.testing.assert_array_equal, model.get_weights(), before)
    assert int(model.optimizer.iterations.numpy()) == 0
    model.fit(X, Y, batch_size=BATCH, verbose=0)
    assert int(model.optimizer.iterations.numpy()) == -(-len(X) // BATCH)
    assert all(np.isfinite(w).all() for w in model.get_weights())
    assert np.isfinite(model.evaluate(X, Y, verbose=0))


@pytest.mark.parametrize("name", GUARDS)
def test_such_a_shard_stops_training_by_default_with_the_weights_it_had(name):
    model = prepared({name: {option: value for option, value in GUARDS[name].items() if option == "dtype"}})
    before = model.get_weights()
    shard = np.full((200 * 2, 6), np.nan, "float32")
    with pytest.raises(errors.NonFiniteGradientError, match="50 updates in a row"):
        model.fit(shard, np.zeros((400, 1), "float32"), batch_size=2, verbose=0)
    tf.nest.map_structure(np.testing.assert_array_equal, model.get_weights(), before)


class OnlyOwnLoss(keras.Model):
    """A model whose loss does not go through what is given to `compile`."""

    def __init__(self):
        super().__init__()
        self.out = keras.layers.Dense(1)

    def call(self, x):
        return self.out(x)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return tf.reduce_mean(tf.abs(y_pred - tf.cast(y, y_pred.dtype)))


@pytest.mark.parametrize("name", EVALUATING_ANYWHERE)
def test_a_loss_of_ones_own_is_logged_as_keras_does_or_truly(name):
    """Keras 2 logs no loss where `compute_loss` enters none; it must not be logged as zero."""
    model = prepared(name, OnlyOwnLoss())
    history = model.fit(X, Y, batch_size=BATCH, validation_data=(X, Y), verbose=0).history
    assert 0.0 not in [value for key in history for value in history[key]]
