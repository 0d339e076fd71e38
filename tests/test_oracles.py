"""Strategies train as their namesakes in optax do, and `dp_sgd` clips as TensorFlow Privacy does.

The values are in `oracles/`, in JSON, and were made with these alone, in environments of their own, by the scripts
beside them: `optax_values.py`, `tensorflow_privacy_values.py`.
"""

import json
import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from nets import sgd

import trainstep
from trainstep.strategies.adaptive_gradient_clipping import clip_unitwise

ORACLES = pathlib.Path(__file__).parent / "oracles"
OPTAX = json.loads((ORACLES / "optax_values.json").read_text())
PRIVACY = json.loads((ORACLES / "tensorflow_privacy_values.json").read_text())
X, Y = np.array(OPTAX["x"], "float32"), np.array(OPTAX["y"], "float32")


def as_weights(values: list) -> list[np.ndarray]:
    return [np.array(value, "float32") for value in values]


def trained(spec, **options) -> list[list[np.ndarray]]:
    """Return what the model is judged by after each update."""
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, "tanh"), keras.layers.Dense(1)])
    trainstep.apply(model, spec, **options)
    model.compile(sgd(0.1), "mse")
    model.set_weights(as_weights(OPTAX["start"]))
    found = []
    for x, y in zip(X, Y, strict=True):
        model.train_on_batch(x, y)
        with model.evaluation_weights():
            found.append(model.get_weights())
    return found


NAMESAKES = {
    "sgd": ("standard", {}),
    "adaptive_gradient_clipping": ("adaptive_gradient_clipping", {"clipping": 0.2, "eps": 0.5}),
    "gradient_centralization": ("gradient_centralization", {}),
    "gradient_clipping, global_clipnorm": ("gradient_clipping", {"global_clipnorm": 0.5}),
    "gradient_clipping, clipvalue": ("gradient_clipping", {"clipvalue": 0.3}),
    "lookahead": ("lookahead", {"k": 3, "alpha": 0.4}),
    "sam": ("sam", {"rho": 0.3}),
    "ema": ("ema", {"decay": 0.8, "warmup": False}),
}


@pytest.mark.parametrize("what", NAMESAKES)
def test_weights_are_those_of_optax_after_each_update(what, assert_close):
    name, options = NAMESAKES[what]
    expected = [as_weights(values) for values in OPTAX[what]]
    assert_close(trained(name, **options), expected)


@pytest.mark.parametrize("what", [what for what in NAMESAKES if what != "sgd"])
def test_the_values_of_optax_are_of_something_that_differs_from_plain_descent(what):
    plain, namesake = (as_weights(OPTAX[key][-1]) for key in ("sgd", what))
    assert not all(np.allclose(a, b, rtol=1e-3) for a, b in zip(plain, namesake, strict=True))


@pytest.mark.parametrize("ghost", [True, False])
def test_examples_are_clipped_one_by_one_as_tensorflow_privacy_clips_them(ghost, assert_close):
    found = trained("dp_sgd", l2_norm_clip=0.5, noise_multiplier=0.0, ghost=ghost)
    assert_close(found, [as_weights(values) for values in PRIVACY["dp_sgd"]])
    assert not np.allclose(found[-1][0], as_weights(OPTAX["sgd"][-1])[0], rtol=1e-2)  # Much is clipped.


def test_noise_dies_away_as_that_of_optax():
    """The noise of each update over that without annealing, from the same random numbers: optax draws others."""
    zeros, noise = np.zeros(200, "float32"), []
    for gamma in (0.55, 0.0):
        layer = keras.layers.Dense(200, use_bias=False, kernel_initializer="zeros")
        model = trainstep.apply(keras.Sequential([keras.Input((1,)), layer]), "gradient_noise", eta=1.0, gamma=gamma)
        model.compile(sgd(1.0), "mse")
        steps = []
        for _ in OPTAX["gradient_noise"]:
            model.set_weights([zeros[np.newaxis]])
            model.train_on_batch(np.zeros((1, 1)), zeros[np.newaxis])
            steps.append(model.get_weights()[0].ravel())
        noise.append(np.array(steps))
    np.testing.assert_allclose((noise[0] / noise[1]).mean(axis=1), OPTAX["gradient_noise"], rtol=1e-5)
    assert OPTAX["gradient_noise"] == pytest.approx([(1 + t) ** (-0.55 / 2) for t in range(len(noise[0]))], rel=1e-6)


def test_the_units_of_a_convolution_are_those_of_optax(assert_close):
    values = {name: np.array(value, "float32") for name, value in OPTAX["a kernel of a convolution, clipped"].items()}
    clipped = clip_unitwise(tf.constant(values["gradient"]), tf.constant(values["weight"]), clipping=0.2, eps=1e-3)
    assert_close(clipped.numpy(), values["clipped"])
    assert not np.allclose(values["clipped"], values["gradient"])
