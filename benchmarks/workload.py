"""Workloads by name: a model, data, and how it is trained, so that results can be set side by side."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras

from trainstep import models
from trainstep.benchmarks import datasets
from trainstep.benchmarks.attack import Attack
from trainstep.benchmarks.data import Split
from trainstep.benchmarks.errors import InvalidComparisonError, InvalidDataError, UnknownWorkloadError
from trainstep.benchmarks.records import Target
from trainstep.errors import nearest


@dataclass(frozen=True)
class Workload:
    """What is trained, all but the strategy and the seed."""

    name: str
    summary: str
    model: str
    """One of `trainstep.models.names()`."""
    input_shape: tuple[int, ...]
    classes: models.ClassCounts
    """How many; by name where the model has several outputs."""
    load: Callable[[Path | None], Split]
    """Reads the data, from a folder where one is given: see `trainstep.benchmarks.datasets`."""
    examples: int
    """For training."""
    batch_size: int
    epochs: int
    target: Target
    attack: Attack | None = None
    model_options: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Mapping[str, Any] = field(default_factory=lambda: {"name": "adam"})
    """As `trainstep.benchmarks.optimizers` takes it."""
    loss: str = "sparse_categorical_crossentropy"
    metrics: tuple[str, ...] = ("accuracy",)
    noise: float = 0.0
    """Share of training labels replaced by wrong ones, which are the same for all seeds and strategies."""

    @property
    def label(self) -> str:
        """Name, and noise where there is some."""
        return f"{self.name} noise={self.noise:g}" if self.noise else self.name

    @property
    def draws_while_training(self) -> bool:
        """Whether the model draws at random in training, which of the reference models only those with dropout do."""
        return bool(getattr(models.validate(self.model, **self.model_options), "dropout", 0))

    def build(self, seed: int) -> keras.Model:
        """Return a new model whose initial weights `seed` decides."""
        return models.build(
            self.model, input_shape=self.input_shape, classes=self.classes, seed=seed, **self.model_options
        )

    def read(self, folder: Path | None = None) -> Split:
        """Return the data, with the noise of the workload.

        Raises:
            MissingDataError: they are not there and cannot be fetched; the message says how to put them there.
            InvalidDataError: those that are there are others.
        """
        split = self.load(folder)
        shape = split.train[0].shape
        if shape != (self.examples, *self.input_shape):
            raise InvalidDataError(
                f"The data of {self.name} should be of shape {(self.examples, *self.input_shape)}, and those found are "
                f"of {shape}: results would not be those of this workload."
            )
        return datasets.with_noise(split, self.noise)

    def read_one_hot(self, folder: Path | None = None) -> Split:
        """Return what `read` does, with one-hot labels: for losses, and strategies, that take probabilities.

        Raises:
            The errors of `read`.
        """
        return datasets.one_hot(self.read(folder), self.classes)

    def with_noise(self, noise: float) -> "Workload":
        """Return the variant in which the share `noise` of the training labels is wrong.

        Raises:
            InvalidComparisonError: it is no share.
        """
        check_noise(noise)
        return dataclasses.replace(self, noise=float(noise))


def names() -> list[str]:
    """Return the names of all workloads, sorted."""
    return sorted(_workloads)


def get(name: str, noise: float = 0.0) -> Workload:
    """Return the workload called `name`, or its variant with label noise.

    Raises:
        UnknownWorkloadError: there is none; the message names the nearest and all there are.
        InvalidComparisonError: the noise is no share.
    """
    if name not in _workloads:
        hint = nearest(str(name), names())
        raise UnknownWorkloadError(f"Unknown workload {name!r}.{hint} Workloads: {', '.join(names())}.")
    return _workloads[name].with_noise(noise)


def check_noise(noise: Any) -> None:
    """Raise `InvalidComparisonError` where `noise` is no share of labels."""
    if isinstance(noise, bool) or not isinstance(noise, int | float) or not 0 <= noise <= 1:
        raise InvalidComparisonError(f"`noise` is the share of training labels made wrong, from 0 to 1, not {noise!r}.")


_accuracy = functools.partial(Target, metric="accuracy")
_IN_UNIT = Attack(epsilon=0.1, clip_range=(0.0, 1.0))

_digits = functools.partial(
    Workload,
    input_shape=(8, 8, 1),
    classes=10,
    load=datasets.load_digits,
    examples=1437,
    batch_size=64,
    attack=_IN_UNIT,
)
_fashion = functools.partial(
    Workload,
    input_shape=(28, 28, 1),
    classes=10,
    load=datasets.load_fashion_mnist,
    examples=60_000,
    batch_size=128,
    epochs=5,
    attack=_IN_UNIT,
    target=_accuracy(value=0.88),
)

_workloads = {
    workload.name: workload
    for workload in (
        Workload(
            name="blobs_mlp",
            summary="points of four overlapping normal distributions, one hidden layer; seconds for a whole comparison",
            model="mlp",
            model_options={"units": (32,)},
            input_shape=(8,),
            classes=4,
            load=datasets.make_blobs,
            examples=512,
            batch_size=32,
            epochs=8,
            optimizer={"name": "adam", "learning_rate": 5e-3},
            attack=Attack(epsilon=0.5, norm="l2"),
            target=_accuracy(value=0.85),
        ),
        Workload(
            name="cifar10_resnet",
            summary="CIFAR-10, the residual net of 20 layers",
            model="resnet",
            model_options={"depth": 20},
            input_shape=(32, 32, 3),
            classes=10,
            load=datasets.load_cifar10,
            examples=50_000,
            batch_size=128,
            epochs=20,
            optimizer={
                "name": "sgd",
                "learning_rate": 0.1,
                "momentum": 0.9,
                "weight_decay": 5e-4,
                "schedule": {"name": "cosine"},
            },
            attack=Attack(epsilon=8 / 255, clip_range=(0.0, 1.0)),
            target=_accuracy(value=0.8),
        ),
        _digits(
            name="digits_cnn",
            summary="8 x 8 digits of scikit-learn, the small convolutional net",
            model="cnn",
            epochs=6,
            optimizer={"name": "adam", "learning_rate": 2e-3},
            target=_accuracy(value=0.95),
        ),
        _digits(
            name="digits_deep_mlp",
            summary="8 x 8 digits of scikit-learn, twenty hidden layers, which are hard to train",
            model="mlp",
            model_options={"units": (50,) * 20},
            epochs=20,
            optimizer={"name": "sgd", "learning_rate": 0.05},
            target=_accuracy(value=0.8),
        ),
        _digits(
            name="digits_dropout_mlp",
            summary="8 x 8 digits of scikit-learn, two hidden layers with dropout",
            model="mlp",
            model_options={"dropout": 0.3},
            epochs=20,
            target=_accuracy(value=0.95),
        ),
        _digits(
            name="digits_mlp",
            summary="8 x 8 digits of scikit-learn, two hidden layers",
            model="mlp",
            epochs=12,
            target=_accuracy(value=0.95),
        ),
        Workload(
            name="digits_pair_cnn",
            summary="two overlapping 8 x 8 digits, one output for each, the small convolutional net",
            model="cnn",
            input_shape=(8, 12, 1),
            classes={"left": 10, "right": 10},
            load=datasets.make_pairs,
            examples=2874,
            batch_size=64,
            epochs=10,
            optimizer={"name": "adam", "learning_rate": 2e-3},
            target=_accuracy(value=0.9),
        ),
        _fashion(
            name="fashion_cnn",
            summary="Fashion-MNIST, the small convolutional net",
            model="cnn",
        ),
        _fashion(
            name="fashion_resnet",
            summary="Fashion-MNIST, the residual net of 8 layers",
            model="resnet",
        ),
        Workload(
            name="markov_transformer",
            summary="sequences of tokens from four Markov chains, told apart by order alone; a small transformer",
            model="transformer",
            model_options={"vocabulary": datasets.SYMBOLS, "dropout": 0.0},
            input_shape=(datasets.LENGTH,),
            classes=datasets.CHAINS,
            load=datasets.make_sequences,
            examples=4096,
            batch_size=64,
            epochs=5,
            optimizer={"name": "adam", "learning_rate": 3e-3},
            target=_accuracy(value=0.8),
        ),
    )
}
