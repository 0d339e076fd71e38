"""Optimizers, and schedules of the learning rate, as a file has them."""

import keras
import numpy as np
import pytest

from trainstep.benchmarks import optimizers
from trainstep.benchmarks.errors import InvalidComparisonError


def rates(given, updates, steps):
    """Return the learning rate at each of `steps`."""
    schedule = optimizers.make(given, updates)._learning_rate
    return [float(schedule(step)) for step in steps]


def test_an_optimizer_is_that_of_keras():
    made = optimizers.make({"name": "sgd", "learning_rate": 0.5, "momentum": 0.9, "nesterov": True}, None)
    expected = keras.optimizers.SGD(0.5, momentum=0.9, nesterov=True)
    assert type(made) is type(expected)
    assert optimizers.settings_of(made) == optimizers.settings_of(expected)
    assert optimizers.settings_of(made)["learning_rate"] == 0.5


@pytest.mark.parametrize("name", ["adam", "Adam", "AdamW", "adamw", "RMSprop"])
def test_names_are_those_of_keras_in_any_case(name):
    assert type(optimizers.make(name, None)).__name__.lower() == name.lower()


def test_an_optimizer_as_keras_writes_it_is_one():
    config = keras.optimizers.serialize(keras.optimizers.SGD(0.25))
    assert optimizers.settings_of(optimizers.make(config, None))["learning_rate"] == 0.25


@pytest.mark.parametrize("name", ["cosine", "cosine_decay", "CosineDecay"])
def test_a_cosine_ends_with_the_budget(name):
    # 0.1 * (1 + cos(pi * t / 100)) / 2: all, half and nothing of 0.1.
    given = {"name": "sgd", "learning_rate": 0.1, "schedule": {"name": name}}
    np.testing.assert_allclose(rates(given, 100, [0, 50, 100]), [0.1, 0.05, 0], atol=1e-8)


def test_a_warmup_is_part_of_the_budget():
    schedule = {"name": "cosine", "warmup_steps": 20, "warmup_target": 0.4, "initial_learning_rate": 0.0}
    # From 0 to 0.4 in 20 updates, and down to 0 in the 80 that are left: half of it at 60.
    given = {"name": "sgd", "schedule": schedule}
    np.testing.assert_allclose(rates(given, 100, [0, 10, 20, 60, 100]), [0, 0.2, 0.4, 0.2, 0], atol=1e-7)


def test_other_schedules_have_their_own_options():
    steps = {"name": "piecewise_constant", "boundaries": [10, 20], "values": [1.0, 0.5, 0.25]}
    assert rates({"name": "sgd", "schedule": steps}, None, [0, 15, 30]) == [1.0, 0.5, 0.25]
    halved = {"name": "exponential", "decay_steps": 10, "decay_rate": 0.5}
    np.testing.assert_allclose(rates({"name": "adam", "learning_rate": 2.0, "schedule": halved}, None, [0, 10]), [2, 1])


def test_a_schedule_is_in_the_settings():
    made = optimizers.make({"name": "sgd", "schedule": {"name": "cosine"}}, 40)
    schedule = optimizers.settings_of(made)["learning_rate"]
    assert schedule["class"] == "CosineDecay"
    assert (schedule["initial_learning_rate"], schedule["decay_steps"]) == (0.001, 40)


def test_settings_are_the_numbers_that_were_given():
    """Keras keeps 0.001 as a float32, which is 0.0010000000474974513."""
    assert optimizers.settings_of(keras.optimizers.Adam(0.001))["learning_rate"] == 0.001
    assert "name" not in optimizers.settings_of(keras.optimizers.Adam())


@pytest.mark.parametrize("text", ["sgd:momentum=0.9,learning_rate=0.1", "sgd : momentum = 0.9, learning_rate=.1"])
def test_an_optimizer_can_be_written_in_a_line(text):
    assert optimizers.parse(text) == {"name": "sgd", "momentum": 0.9, "learning_rate": 0.1}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("adamm", "Unknown optimizer 'adamm'. Did you mean 'adam"),
        (3, "a name, or {name"),
        ({"learning_rate": 1}, "a name, or {name"),
        ({"name": "sgd", "momentun": 0.9}, "unknown option 'momentun'. Did you mean 'momentum'"),
        ({"name": "sgd", "schedule": 3}, "A schedule is a name"),
        ({"name": "sgd", "schedule": {"name": "cosinus"}}, "Unknown schedule 'cosinus'. Did you mean 'cosine_decay'"),
        (
            {"name": "sgd", "schedule": {"name": "cosine", "steps": 3}},
            "unknown option 'steps'. Did you mean 'decay_steps'",
        ),
        ({"name": "sgd", "schedule": "cosine"}, "needs decay_steps"),
        ({"name": "sgd", "learning_rate": 1.0, "schedule": "piecewise_constant"}, "has all learning rates itself"),
        ({"name": "sgd", "schedule": "piecewise_constant"}, "Keras refuses the options of 'piecewise_constant'"),
        ({"name": "sgd", "momentum": 3.0}, "Keras refuses the options of 'sgd'"),
        (
            {"name": "sgd", "learning_rate": 1.0, "schedule": {"name": "cosine", "initial_learning_rate": 1.0}},
            "not both",
        ),
    ],
)
def test_what_keras_does_not_have_is_refused(given, message):
    with pytest.raises(InvalidComparisonError, match=message):
        optimizers.make(given, None)


def test_two_optimizers_in_a_line_are_refused():
    with pytest.raises(InvalidComparisonError, match="NAME:OPTION=VALUE"):
        optimizers.parse("sgd + adam")
