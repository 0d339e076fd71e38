"""Tiny models of every kind, and what to train them on."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
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


@dataclass(frozen=True)
class Task:
    """What nets of all kinds are made for, so that strategies that need classes, images or outputs are seen on all."""

    images: bool = False
    """Small images instead of six numbers."""
    classes: bool = False
    """One-hot labels of three classes instead of a number."""
    outputs: bool = False
    """Both of them, each an output."""
    separate: bool = False
    """No batch norm, which mixes examples."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (4, 4, 2) if self.images else (6,)

    @property
    def x(self) -> np.ndarray:
        return IMAGES if self.images else X

    @property
    def y(self) -> Any:
        if self.outputs:
            return {"kind": ONE_HOT, "value": Y}
        return ONE_HOT if self.classes else Y

    @property
    def loss(self) -> Any:
        if self.outputs:
            return {"kind": "categorical_crossentropy", "value": "mse"}
        return "categorical_crossentropy" if self.classes else "mse"

    def first_layers(self, **first: Any) -> list[keras.layers.Layer]:
        """Return new layers from an input to five numbers, the first of them with these arguments, called "hidden"."""
        if not self.images:
            return [keras.layers.Dense(5, "tanh", name="hidden", **first)]
        return [
            keras.layers.Conv2D(5, 2, activation="tanh", name="hidden", **first),
            keras.layers.GlobalAveragePooling2D(),
        ]

    def norm(self, **arguments: Any) -> keras.layers.Layer:
        """Return a new layer that normalizes."""
        kind = keras.layers.LayerNormalization if self.separate else keras.layers.BatchNormalization
        return kind(**arguments)

    def last_layers(self) -> dict[str, keras.layers.Layer]:
        """Return new layers from five numbers to the outputs, by name."""
        if self.outputs:
            return {
                "kind": keras.layers.Dense(3, "softmax", name="kind"),
                "value": keras.layers.Dense(1, name="value"),
            }
        last = keras.layers.Dense(3, "softmax", name="out") if self.classes else keras.layers.Dense(1, name="out")
        return {"out": last}


def outputs(layers: dict[str, keras.layers.Layer], h: Any) -> Any:
    """Return what `layers` make of `h`: one tensor, or several by name."""
    made = {name: layer(h) for name, layer in layers.items()}
    return made if len(made) > 1 else next(iter(made.values()))


NUMBERS = Task()


def functional(task: Task = NUMBERS) -> keras.Model:
    """Return a net with everything that is easily lost: dropout, batch norm, a regularizer."""
    x = h = keras.Input(task.shape, name="numbers")
    for layer in task.first_layers(kernel_regularizer=keras.regularizers.L2(0.01)):
        h = layer(h)
    h = task.norm(name="norm")(h)
    h = keras.layers.Dropout(0.25, seed=1, name="drop")(h)
    return keras.Model(x, outputs(task.last_layers(), h))


def dense(task: Task = NUMBERS) -> keras.Model:
    """Return a net without randomness."""
    if task.outputs:
        x = h = keras.Input(task.shape)
        for layer in task.first_layers():
            h = layer(h)
        return keras.Model(x, outputs(task.last_layers(), h))
    return keras.Sequential([keras.Input(task.shape), *task.first_layers(), *task.last_layers().values()])


def sequential(task: Task = NUMBERS) -> keras.Model:
    return keras.Sequential(
        [
            keras.Input(task.shape),
            *task.first_layers(kernel_regularizer=keras.regularizers.L2(0.01)),
            task.norm(),
            keras.layers.Dropout(0.25, seed=1),
            *task.last_layers().values(),
        ]
    )


class Subclassed(keras.Model):
    """Builds itself at its first batch."""

    def __init__(self, task: Task = NUMBERS) -> None:
        super().__init__()
        self.first = task.first_layers(kernel_regularizer=keras.regularizers.L2(0.01))
        self.norm = task.norm()
        self.drop = keras.layers.Dropout(0.25, seed=1)
        self.last = task.last_layers()

    def call(self, x: Any, training: bool | None = None) -> Any:
        for layer in self.first:
            x = layer(x)
        return outputs(self.last, self.drop(self.norm(x, training=training), training=training))


class WithoutTrainingArgument(keras.Model):
    def __init__(self, task: Task = NUMBERS) -> None:
        super().__init__()
        self.first = task.first_layers()
        self.drop = keras.layers.Dropout(0.25, seed=1)
        self.last = task.last_layers()

    def call(self, x: Any) -> Any:
        for layer in self.first:
            x = layer(x)
        return outputs(self.last, self.drop(x))


class AddsLoss(keras.layers.Layer):
    """Adds the mean square of what passes through to the loss."""

    def call(self, x: Any) -> Any:
        self.add_loss(0.1 * tf.reduce_mean(tf.square(x)))
        return x


def multi(task: Task = NUMBERS) -> keras.Model:
    """Return a net from two named inputs to two named outputs."""
    left = h = keras.Input(task.shape, name="left")
    right = keras.Input((3,), name="right")
    for layer in task.first_layers():
        h = layer(h)
    h = keras.layers.Concatenate()([h, keras.layers.Dense(2, "tanh")(right)])
    h = keras.layers.Dropout(0.25, seed=1)(AddsLoss()(h))
    outputs = {"value": keras.layers.Dense(1, name="value")(h), "kind": keras.layers.Dense(3, name="kind")(h)}
    return keras.Model({"left": left, "right": right}, outputs)


def masked() -> keras.Model:
    """Return a net that labels each token of padded sequences."""
    x = keras.Input((5,), dtype="int32")
    h = keras.layers.Embedding(7, 4, mask_zero=True)(x)
    return keras.Model(x, keras.layers.Dense(3, name="hidden")(h))


class Teacher(keras.Model):
    """Predicts three classes from inputs of any kind, and for each token of a sequence."""

    def call(self, x: Any) -> tf.Tensor:
        tensors = tf.nest.flatten(x)
        if len(tensors) == 1 and not tensors[0].dtype.is_floating:
            score = tf.cast(tensors[0], tf.float32)[..., None]
        else:
            rows = [tf.reshape(tf.cast(tensor, tf.float32), (tf.shape(tensor)[0], -1)) for tensor in tensors]
            score = tf.add_n([tf.reduce_sum(each, axis=1, keepdims=True) for each in rows])
        return tf.nn.softmax(tf.sin(score + tf.constant([0.0, 1.0, 2.0])))


def teacher() -> keras.Model:
    """Return what `distillation` is shown with."""
    model = Teacher()
    model.compile(loss="categorical_crossentropy")
    model(X[:1])
    return model


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


def two_tasks(**arguments) -> keras.Model:
    """Return a = w . left and b = w . right for one w of two numbers, which starts at zero."""
    left, right = keras.Input((2,), name="left"), keras.Input((2,), name="right")
    layer = keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros", **arguments)
    named = {"a": keras.layers.Activation("linear", name="a"), "b": keras.layers.Activation("linear", name="b")}
    outputs = {name: named[name](layer(x)) for name, x in (("a", left), ("b", right))}
    return keras.Model({"left": left, "right": right}, outputs)


def two_weights(first: float, second: float) -> tuple[keras.Model, np.ndarray, np.ndarray]:
    """Return y = w1 x1 + w2 x2 with these weights, and a batch on which its mean squared error is (w1^2 + 4 w2^2) / 2.

    So the gradient is (w1, 4 w2): the smallest case in which that at other weights has another direction.
    """
    initial = keras.initializers.Constant([[first], [second]])
    layer = keras.layers.Dense(1, use_bias=False, kernel_initializer=initial)
    x = np.array([[1.0, 0.0], [0.0, 2.0]], "float32")
    return keras.Sequential([keras.Input((2,)), layer]), x, np.zeros((2, 1), "float32")


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
IMAGES = numbers(EXAMPLES, 4, 4, 2, seed=3)
ONE_HOT = np.eye(3, dtype="float32")[classes(EXAMPLES)]


def multi_workload(task: Task = NUMBERS) -> Workload:
    """Return dicts of inputs and outputs; the classes are numbers, unless the task has one-hot ones."""
    one_hot = task.classes or task.outputs
    losses = keras.losses
    cross_entropy = losses.CategoricalCrossentropy if one_hot else losses.SparseCategoricalCrossentropy

    def compile() -> dict[str, Any]:
        return {
            "optimizer": sgd(),
            "loss": {"value": "mse", "kind": cross_entropy(from_logits=True)},
            "loss_weights": {"value": 0.5, "kind": 2.0},
            "metrics": {"value": ["mae"], "kind": ["accuracy"]},
        }

    x = {"left": task.x, "right": numbers(EXAMPLES, 3, seed=2)}
    y = {"value": Y, "kind": ONE_HOT if one_hot else classes(EXAMPLES)}
    return Workload(partial(multi, task), x, y, compile)


def workload_for(
    build: Callable[[Task], keras.Model], task: Task = NUMBERS, fit: Any = None, **compiled: Any
) -> Workload:
    """Return `build` for `task`, compiled with SGD and its loss; a callable optimizer is made anew each time."""
    optimizer = compiled.pop("optimizer", sgd)
    return Workload(
        partial(build, task),
        task.x,
        task.y,
        lambda: {"optimizer": optimizer(), "loss": task.loss, **compiled},
        fit or {},
    )


def kinds(task: Task = NUMBERS) -> dict[str, Workload]:
    """Return one workload for each kind of Keras model."""
    found = {"functional": functional, "sequential": sequential, "subclassed": Subclassed}
    if task.outputs:
        del found["sequential"]  # Keras has none.
    return {
        **{kind: workload_for(build, task) for kind, build in found.items()},
        "without training argument": workload_for(WithoutTrainingArgument, task),
        "dicts of inputs and outputs": multi_workload(task),
    }


KINDS = kinds()
MULTI = multi_workload()
MULTI_X, MULTI_Y, multi_compile = MULTI.x, MULTI.y, MULTI.compile
