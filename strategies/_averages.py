"""Averages of weights: judging a model by them, while training goes on from the weights themselves."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf

from trainstep.replicas import assign


def begin_average(averages: Sequence[Any], weights: Sequence[Any]) -> None:
    """Let each average be its weight."""
    assign([(average, tf.convert_to_tensor(w)) for average, w in zip(averages, weights, strict=True)])


def move_average(averages: Sequence[Any], weights: Sequence[Any], share: tf.Tensor) -> None:
    """Let each average go `share`, a float32 scalar, of the way to its weight."""
    pairs = [(tf.convert_to_tensor(a), tf.convert_to_tensor(w)) for a, w in zip(averages, weights, strict=True)]
    moved = [average + tf.cast(share, average.dtype) * (w - average) for average, w in pairs]
    assign(list(zip(averages, moved, strict=True)))


@contextlib.contextmanager
def exchanged(weights: Sequence[Any], averages: Sequence[Any]) -> Iterator[None]:
    """Give `weights` the values of `averages`, and afterwards their own again, to the bit. Outside of a step."""
    before = [tf.convert_to_tensor(weight) for weight in weights]
    for weight, average in zip(weights, averages, strict=True):
        weight.assign(tf.convert_to_tensor(average))
    try:
        yield
    finally:
        for weight, value in zip(weights, before, strict=True):
            weight.assign(value)
