"""What `docs/running.md` says of a run: weights that are exchanged, models that are exported, fits that follow fits."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from catalogue import REPRESENTATIVES, coarsest_dtype, declaration, spec_of, task_of
from nets import BATCH, X, Y, dense
from runs import optimizer_variables

import trainstep
from trainstep import errors

pytestmark = pytest.mark.filterwarnings("ignore:mixed_precision computes in float16:UserWarning")

ACCUMULATION = {"steps": 4, "last_window": "carry"}  # Six batches an epoch: a window is open when one ends.


def trained(name=None, optimizer=None, like=None, **options) -> keras.Model:
    """Return a model trained for what the strategy `name`, or that of `like`, needs."""
    task = task_of(name or like or "standard")
    keras.utils.set_random_seed(0)
    model = dense(task)
    if name:
        trainstep.apply(model, name, **spec_of(name)[name] | options)
    # Six steps are less work than to trace one.
    model.compile(optimizer or keras.optimizers.Adam(0.01), task.loss, run_eagerly=True)
    model.fit(task.x, task.y, batch_size=BATCH, shuffle=False, verbose=0)
    return model


@pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer:UserWarning")  # Keras 3 saves it, too.
@pytest.mark.parametrize("name", REPRESENTATIVES)
@pytest.mark.parametrize("direction", ["to plain", "from plain"])
def test_weights_files_are_exchanged_with_a_plain_model(direction, name, tmp_path):
    ours, plain, task = trained(name), trained(like=name), task_of(name)
    source, target = (ours, plain) if direction == "to plain" else (plain, ours)
    source.save_weights(tmp_path / "model.weights.h5")
    target.load_weights(tmp_path / "model.weights.h5")
    tf.nest.map_structure(np.testing.assert_array_equal, target.get_weights(), source.get_weights())
    assert np.isfinite(target.fit(task.x, task.y, verbose=0).history["loss"]).all()


@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_an_exported_model_predicts_without_trainstep(name, tmp_path, assert_close):
    model = trained(name)
    model.export(str(tmp_path / "exported"))
    exported = tf.saved_model.load(str(tmp_path / "exported"))
    x = task_of(name).x
    served = tf.nest.map_structure(lambda values: values.numpy(), exported.serve(tf.constant(x)))
    assert_close(served, model.predict(x, verbose=0), coarsest_dtype(model))


@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_compiling_with_the_same_optimizer_keeps_state_and_with_a_new_one_does_not(name):
    optimizer = keras.optimizers.Adam(0.01)
    model = trained(name, optimizer)
    before = optimizer_variables(optimizer)
    model.compile(optimizer, task_of(name).loss)
    tf.nest.map_structure(np.testing.assert_array_equal, optimizer_variables(model.optimizer), before)
    model.compile(keras.optimizers.Adam(0.01), task_of(name).loss)
    for key, slot in declaration(name).state(declaration(name).options(**declaration(name).example)).items():
        state = model.strategy_state[name][key]
        for variable in tf.nest.flatten(state):
            assert np.all(variable.numpy() == slot.initial)


def test_a_window_is_open_when_the_optimizer_is_compiled_again():
    """So that the test above speaks of a state that could be lost."""
    model = trained("gradient_accumulation", **ACCUMULATION)
    assert model.strategy_state["gradient_accumulation"]["count"].numpy() == 2
    model.compile(model.optimizer, "mse")
    assert model.strategy_state["gradient_accumulation"]["count"].numpy() == 2


def test_layers_unfrozen_since_are_refused_with_the_same_optimizer():
    keras.utils.set_random_seed(0)
    model = trainstep.apply(dense(), "gradient_accumulation")
    model.layers[0].trainable = False
    optimizer = keras.optimizers.Adam(0.01)
    model.compile(optimizer, "mse")
    model.fit(X, Y, verbose=0)
    model.layers[0].trainable = True
    with pytest.raises(errors.ModelConflictError, match=r"layers were unfrozen since.* Compile the model with a new"):
        model.compile(optimizer, "mse")
    model.compile(keras.optimizers.Adam(0.01), "mse")
    assert np.isfinite(model.fit(X, Y, verbose=0).history["loss"]).all()
