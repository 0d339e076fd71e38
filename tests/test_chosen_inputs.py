"""Which inputs are moved by strategies that move them: those chosen by name, else all that can be."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from catalogue import NAMES, declaration, task_of
from nets import MULTI_X, MULTI_Y, X, Y, multi, multi_compile, multi_workload, sgd, tokens

import trainstep
from trainstep import errors
from trainstep.step import Batch

CHOOSING = [name for name in NAMES if "inputs" in declaration(name).options.model_fields]


def test_chosen_inputs_are_moved_and_the_others_not():
    model = trainstep.apply(multi(), "adversarial", epsilon=0.5, inputs=("right",))
    model.compile(**multi_compile())
    found = model.transform_batch(Batch(*tf.nest.map_structure(tf.constant, (MULTI_X, MULTI_Y)))).x
    np.testing.assert_array_equal(found["left"], MULTI_X["left"])
    assert np.abs(found["right"] - MULTI_X["right"]).max() > 0.4


def test_all_floating_inputs_are_moved_by_default():
    model = trainstep.apply(multi(), "adversarial", epsilon=0.5)
    model.compile(**multi_compile())
    found = model.transform_batch(Batch(*tf.nest.map_structure(tf.constant, (MULTI_X, MULTI_Y)))).x
    for name, value in found.items():
        assert 0.4 < np.abs(value - MULTI_X[name]).max() <= 0.5


def refused() -> Any:
    return pytest.raises(
        errors.UnsupportedInputError, match=r"no input 'rigth'. Did you mean 'right'.* Inputs: 'left', 'right'"
    )


@pytest.mark.parametrize("name", CHOOSING)
def test_an_unknown_input_is_refused_by_name_before_there_is_any_data(name):
    with refused():
        trainstep.apply(multi(), name, inputs=("rigth",))
    model = trainstep.apply(multi(task_of(name)), name, inputs=("right",))
    workload = multi_workload(task_of(name))
    model.compile(**workload.compile())
    model.train_on_batch(*tf.nest.map_structure(lambda values: values[:4], (workload.x, workload.y)))


def test_an_unknown_input_of_a_model_that_knows_none_is_refused_at_the_first_batch():
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.net = multi()

        def call(self, x):
            return self.net(x)

    model = trainstep.apply(Net(), "adversarial", inputs=("rigth",))
    model.compile(**multi_compile())
    with refused():
        model.fit(MULTI_X, MULTI_Y, verbose=0)


@pytest.mark.parametrize("dtype", ["int32", "uint8"])
def test_integer_inputs_are_refused_with_the_reason(dtype):
    model = trainstep.apply(keras.Sequential([keras.layers.Dense(1)]), "adversarial")
    model.compile(sgd(), "mse")
    with pytest.raises(errors.UnsupportedInputError, match=f"floating dtype.*{dtype}.*Cast images to float32"):
        model.fit(np.ones((4, 2), dtype), np.ones((4, 1)), verbose=0)


def test_tokens_are_refused_and_floats_beside_them_are_attacked():
    def model():
        ids, values = keras.Input((3,), dtype="int32", name="ids"), keras.Input((6,), name="values")
        h = keras.layers.Concatenate()([keras.layers.Flatten()(keras.layers.Embedding(7, 2)(ids)), values])
        return keras.Model({"ids": ids, "values": values}, keras.layers.Dense(1)(h))

    net = trainstep.apply(model(), "adversarial", epsilon=0.5)
    net.compile(sgd(), "mse")
    x = {"ids": tokens(4, 3).astype("int32"), "values": X[:4]}
    found = net.transform_batch(Batch(tf.nest.map_structure(tf.constant, x), tf.constant(Y[:4]))).x
    np.testing.assert_array_equal(found["ids"], x["ids"])
    assert np.abs(found["values"] - x["values"]).max() > 0.4
    net = trainstep.apply(model(), "adversarial", inputs=("ids",))
    net.compile(sgd(), "mse")
    with pytest.raises(errors.UnsupportedInputError, match=r"\['ids'\] is not one"):
        net.fit(x, Y[:4], verbose=0)
