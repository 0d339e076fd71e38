"""What all reference models share: the base of their options, and seeds for their layers."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import keras
import numpy as np
from pydantic import BaseModel, Field

from trainstep.declaration import StrategyOptions

ClassCounts = int | Mapping[str, int]
"""How many classes there are; or, of a model with several outputs, by the name of each."""

Width = Annotated[int, Field(ge=1)]
"""How many units or filters a layer has."""


class ModelOptions(BaseModel):
    """Base of the options of a reference model: immutable, strictly typed, and closed to names it does not know."""

    model_config = StrategyOptions.model_config


class Seeds:
    """Hands out one seed after the other, all derived from one, so that no layer asks the global state."""

    def __init__(self, seed: int) -> None:
        self._seeds = self._draw(seed)

    @staticmethod
    def _draw(seed: int) -> Iterator[int]:
        generator = np.random.default_rng(seed)
        while True:
            yield int(generator.integers(2**31 - 1))

    def next(self) -> int:
        """Return the next seed, from 0 to 2**31 - 2."""
        return next(self._seeds)

    def glorot(self) -> Any:
        """Return Keras's default initializer of kernels, with a seed of its own."""
        return keras.initializers.GlorotUniform(seed=self.next())

    def he(self) -> Any:
        """Return the initializer of He et al. for layers before a rectifier, with a seed of its own."""
        return keras.initializers.HeNormal(seed=self.next())

    def normal(self, stddev: float) -> Any:
        """Return a normal initializer around 0, with a seed of its own."""
        return keras.initializers.RandomNormal(stddev=stddev, seed=self.next())


def probabilities(x: Any, classes: ClassCounts, seeds: Seeds) -> Any:
    """Return probabilities, (batch, classes), from `x`, (batch, features); of several outputs by name."""
    if not isinstance(classes, Mapping):
        return _head(x, classes, seeds, "probabilities")
    return {name: _head(x, count, seeds, name) for name, count in classes.items()}


def _head(x: Any, classes: int, seeds: Seeds, name: str) -> Any:
    return keras.layers.Dense(classes, "softmax", kernel_initializer=seeds.glorot(), name=name)(x)
