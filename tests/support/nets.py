"""Tiny models of every kind, and what to train them on."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import tensorflow as tf

EXAMPLES = 22  # Batches of 4 leave a short one of 2; windows of 4 batches leave one of 2.
BATCH = 4


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    """Return float32 numbers of the normal distribution, the same at every call."""
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def classes(count: int, num_classes: int = 3) -> np.ndarray:
    return np.random.default_rng(7).integers(0, num_classes, size=count)


def tokens(count: int, length: int = 5) -> np.ndarray:
    """Return token numbers from 1 to 6, followed by zeros for padding, one token at least."""
    generator = np.random.default_rng(8)
    x = generator.integers(1, 7, size=(count, length))
    lengths = generator.integers(1, length + 1, size=count)
    return np.where(np.arange(length) < lengths[:, None], x, 0)


def functional(activation: str | None = None, units: int = 1) -> keras.Model:
    """Return a net with everything that is easily lost: dropout, batch norm, a regularizer."""
    x = keras.Input((6,), name="numbers")
    h = keras.layers.Dense(5, "tanh", kernel_regularizer=keras.regularizers.L2(0.01), name="hidden")(x)
    h = keras.layers.BatchNormalization(name="norm")(h)
    h = keras.layers.Dropout(0.25, seed=1, name="drop")(h)
    return keras.Model(x, keras.layers.Dense(units, activation, name="out")(h))


def dense() -> keras.Model:
    """Return a net without randomness."""
    return keras.Sequential([keras.Input((6,)), keras.layers.Dense(5, "tanh"), keras.layers.Dense(1)])


def sequential() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(5, "tanh", kernel_regularizer=keras.regularizers.L2(0.01)),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.25, seed=1),
            keras.layers.Dense(1),
        ]
    )


class Subclassed(keras.Model):
    """Builds itself at its first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = keras.layers.Dense(5, "tanh", kernel_regularizer=keras.regularizers.L2(0.01))
        self.norm = keras.layers.BatchNormalization()
        self.drop = keras.layers.Dropout(0.25, seed=1)
        self.out = keras.layers.Dense(1)

    def call(self, x: Any, training: bool | None = None) -> Any:
        h = self.norm(self.hidden(x), training=training)
        return self.out(self.drop(h, training=training))


class WithoutTrainingArgument(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = keras.layers.Dense(5, "tanh")
        self.drop = keras.layers.Dropout(0.25, seed=1)
        self.out = keras.layers.Dense(1)

    def call(self, x: Any) -> Any:
        return self.out(self.drop(self.hidden(x)))


class AddsLoss(keras.layers.Layer):
    """Adds the mean square of what passes through to the loss."""

    def call(self, x: Any) -> Any:
        self.add_loss(0.1 * tf.reduce_mean(tf.square(x)))
        return x


def multi() -> keras.Model:
    """Return a net from two named inputs to two named outputs."""
    left, right = keras.Input((6,), name="left"), keras.Input((3,), name="right")
    h = keras.layers.Concatenate()([keras.layers.Dense(4, "tanh")(left), keras.layers.Dense(2, "tanh")(right)])
    h = keras.layers.Dropout(0.25, seed=1)(AddsLoss()(h))
    outputs = {"value": keras.layers.Dense(1, name="value")(h), "kind": keras.layers.Dense(3, name="kind")(h)}
    return keras.Model({"left": left, "right": right}, outputs)


def masked() -> keras.Model:
    """Return a net that labels each token of padded sequences."""
    x = keras.Input((5,), dtype="int32")
    h = keras.layers.Embedding(7, 4, mask_zero=True)(x)
    return keras.Model(x, keras.layers.Dense(3)(h))


class TimesWeight(keras.layers.Layer):
    """The model of all derivations by hand: y = w * x."""

    def __init__(self, initial: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.initial = initial

    def build(self, input_shape: Any) -> None:
        initializer = keras.initializers.Constant(self.initial)
        self.w = self.add_weight(name="w", shape=(), initializer=initializer)

    def call(self, x: Any) -> Any:
        return self.w * x


def one_weight(initial: float = 1.0) -> keras.Model:
    """Return y = w * x with w = `initial`."""
    x = keras.Input((1,))
    return keras.Model(x, TimesWeight(initial)(x))


def weight_of(model: keras.Model) -> float:
    """Return w of `one_weight`."""
    [w] = model.get_weights()
    return float(w)


def sgd(learning_rate: Any = 0.1, **arguments: Any) -> keras.optimizers.Optimizer:
    return keras.optimizers.SGD(learning_rate, **arguments)


@dataclass(frozen=True)
class Workload:
    """A model, what it is compiled with, and what it is trained on."""

    build: Callable[[], keras.Model]
    x: Any
    y: Any
    compile: Callable[[], dict[str, Any]] = lambda: {"optimizer": sgd(), "loss": "mse"}
    fit: dict[str, Any] = field(default_factory=dict)


X, Y = numbers(EXAMPLES, 6), 3 * numbers(EXAMPLES, 1, seed=1)
MULTI_X = {"left": X, "right": numbers(EXAMPLES, 3, seed=2)}
MULTI_Y = {"value": Y, "kind": classes(EXAMPLES)}


def multi_compile() -> dict[str, Any]:
    cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return {
        "optimizer": sgd(),
        "loss": {"value": "mse", "kind": cross_entropy},
        "loss_weights": {"value": 0.5, "kind": 2.0},
        "metrics": {"value": ["mae"], "kind": ["accuracy"]},
    }


KINDS = {
    "functional": Workload(functional, X, Y),
    "sequential": Workload(sequential, X, Y),
    "subclassed": Workload(Subclassed, X, Y),
    "without training argument": Workload(WithoutTrainingArgument, X, Y),
    "dicts of inputs and outputs": Workload(multi, MULTI_X, MULTI_Y, multi_compile),
}
"""One workload for each kind of Keras model."""
