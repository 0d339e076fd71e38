"""Devices, seeds and the one tolerance of the suite."""

import gc
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from economy import economize
from tensorflow.python.framework import ops  # noqa: TID251  Nothing public forgets what it registers.

from trainstep._seam import KERAS_3

pytest_plugins = ["ledger"]

# Four logical CPUs for the tests of `tf.distribute`; it has to happen before anything touches a device.
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 4
)
# The nets are tiny: more threads cost time, and the workers of pytest-xdist share the cores.
tf.config.threading.set_intra_op_parallelism_threads(1)

# Two runs that are equal in exact arithmetic, but sum in another order or fuse other operations (eager and graph,
# XLA, two replicas), differ by rounding. A float32 operation is off by at most 2**-24 = 6e-8; the runs here make some
# hundred of them in a row, and Adam and the attacks' normalization divide by small numbers. In 16 bits one operation
# is off by 2**-11 (float16) or 2**-8 (bfloat16); about four in a row decide a gradient of these nets.
TOLERANCE = {"float32": 2e-5, "float16": 4 * 2**-11, "bfloat16": 4 * 2**-8}


# Keras 3 would collect garbage, too, which is done below.
CLEARED = {"free_memory": False} if KERAS_3 else {}


def pytest_configure(config: pytest.Config) -> None:
    """Fail before the first test where Keras does not run on TensorFlow, and begin to economize."""
    del config
    assert keras.backend.backend() == "tensorflow"
    economize()


def _forget_gradients() -> None:
    """Drop the gradients of functions that earlier tests traced, which TensorFlow keeps, with their graphs, for good.

    Each traced step of an optimizer leaves some: ten megabytes a test.
    """
    gradients = ops.gradient_registry._registry
    for name in [name for name in gradients if name.startswith("CustomGradient-")]:
        del gradients[name]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Give each test the same seeds, fresh layer names, and the default dtype policy."""
    keras.backend.clear_session(**CLEARED)
    _forget_gradients()
    gc.collect()  # Of the test before: what is frozen while it is in a cycle stays for ever.
    gc.freeze()  # What has survived need not be looked at again.
    keras.utils.set_random_seed(0)
    yield
    policy = getattr(keras.mixed_precision, "global_policy", None) or keras.mixed_precision.dtype_policy
    assert policy().name == "float32"


@pytest.fixture(scope="session")
def mirrored() -> tf.distribute.Strategy:
    """Return the one strategy of two replicas; a second one in a process would reuse the keys of its collectives."""
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


@pytest.fixture(scope="session")
def mirrored_four() -> tf.distribute.Strategy:
    """Return the one strategy of four replicas; it reduces without collectives, whose keys are those of `mirrored`."""
    devices = [f"CPU:{index}" for index in range(4)]
    return tf.distribute.MirroredStrategy(devices, cross_device_ops=tf.distribute.ReductionToOneDevice())


@pytest.fixture(scope="session")
def assert_close() -> Callable[..., None]:
    """Return the comparison for what is equal in exact arithmetic only; `dtype` is the coarsest one computed in."""

    def compare(actual: Any, expected: Any, dtype: str = "float32") -> None:
        tolerance = TOLERANCE[dtype]
        tf.nest.map_structure(
            lambda a, e: np.testing.assert_allclose(a, e, rtol=tolerance, atol=tolerance), actual, expected
        )

    return compare
