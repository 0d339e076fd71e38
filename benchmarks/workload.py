"""Workloads by name: a model, data, and how it is trained, so that results can be set side by side."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np

from trainstep import models
from trainstep.benchmarks.attack import Attack
from trainstep.benchmarks.data import Split
from trainstep.benchmarks.errors import MissingDataError, UnknownWorkloadError
from trainstep.errors import nearest


@dataclass(frozen=True)
class Workload:
    """What is trained, all but the strategy and the seed."""

    name: str
    summary: str
    model: str
    """One of `trainstep.models.names()`."""
    input_shape: tuple[int, ...]
    classes: int
    load: Callable[[], Split]
    """Reads the data: x float32 in [0, 1], y int class ids."""
    batch_size: int
    epochs: int
    attack: Attack | None
    model_options: Mapping[str, Any] = field(default_factory=dict)
    optimizer: str = "adam"
    learning_rate: float = 1e-3
    loss: str = "sparse_categorical_crossentropy"
    metric: str = "accuracy"

    def build(self, seed: int) -> keras.Model:
        """Return a new model whose initial weights `seed` decides."""
        return models.build(
            self.model, input_shape=self.input_shape, classes=self.classes, seed=seed, **self.model_options
        )

    def make_optimizer(self) -> keras.optimizers.Optimizer:
        """Return a new optimizer."""
        optimizer: Any = keras.optimizers.get(self.optimizer)
        optimizer.learning_rate = self.learning_rate
        return optimizer


def names() -> list[str]:
    """Return the names of all workloads, sorted."""
    return sorted(_workloads)


def get(name: str) -> Workload:
    """Return the workload called `name`.

    Raises:
        UnknownWorkloadError: there is none; the message names the nearest and all there are.
    """
    if name not in _workloads:
        hint = nearest(str(name), names())
        raise UnknownWorkloadError(f"Unknown workload {name!r}.{hint} Workloads: {', '.join(names())}.")
    return _workloads[name]


def load_digits() -> Split:
    """Return 1,437 and 360 handwritten digits: x float32 (examples, 8, 8, 1) in [0, 1], y int64 (examples,).

    They come with scikit-learn. The split is fixed and has each class in proportion.
    """
    from sklearn.datasets import load_digits as embedded  # noqa: PLC0415  Takes a second, and only this needs it.
    from sklearn.model_selection import train_test_split  # noqa: PLC0415

    x, y = embedded(return_X_y=True)
    images = (x / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    x_train, x_validation, y_train, y_validation = train_test_split(
        images, y.astype(np.int64), test_size=360, random_state=0, stratify=y
    )
    return Split((x_train, y_train), (x_validation, y_validation))


def load_fashion_mnist() -> Split:
    """Return 60,000 and 10,000 pictures of clothes: x float32 (examples, 28, 28, 1) in [0, 1], y int64 (examples,).

    Keras downloads 30 MB on first use and keeps them in its folder of datasets.

    Raises:
        MissingDataError: they are not there and cannot be downloaded.
    """
    try:
        train, validation = keras.datasets.fashion_mnist.load_data()
    except Exception as error:  # Keras raises a bare `Exception` where a download fails.
        raise MissingDataError(
            f"Fashion-MNIST could not be had: {error}. It is downloaded once from storage.googleapis.com; without "
            "a network, put its four files into ~/.keras/datasets/fashion-mnist/, or take a workload whose data "
            "come with scikit-learn: digits_cnn or digits_mlp."
        ) from error
    return Split(_scaled(*train), _scaled(*validation))


def _scaled(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return (x / 255).astype(np.float32)[..., np.newaxis], y.astype(np.int64)


_workloads = {
    workload.name: workload
    for workload in (
        Workload(
            name="digits_cnn",
            summary="8 x 8 digits of scikit-learn, the small convolutional net",
            model="cnn",
            input_shape=(8, 8, 1),
            classes=10,
            load=load_digits,
            batch_size=64,
            epochs=6,
            learning_rate=2e-3,
            attack=Attack(epsilon=0.1, clip_range=(0.0, 1.0)),
        ),
        Workload(
            name="digits_mlp",
            summary="8 x 8 digits of scikit-learn, two hidden layers",
            model="mlp",
            input_shape=(8, 8, 1),
            classes=10,
            load=load_digits,
            batch_size=64,
            epochs=12,
            attack=Attack(epsilon=0.1, clip_range=(0.0, 1.0)),
        ),
        Workload(
            name="fashion_cnn",
            summary="Fashion-MNIST, the small convolutional net",
            model="cnn",
            input_shape=(28, 28, 1),
            classes=10,
            load=load_fashion_mnist,
            batch_size=128,
            epochs=5,
            attack=Attack(epsilon=0.1, clip_range=(0.0, 1.0)),
        ),
    )
}
