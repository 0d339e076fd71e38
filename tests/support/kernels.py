"""Layers whose outputs are not all on the last axis of their kernel, and what one step does to it."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from nets import sgd

import trainstep

layers = keras.layers
ALIKE = np.array([[[3, 3], [4, 4]]], "float32")  # Two places of two channels.
APART = np.array([[[3, 4]]], "float32")  # One place.
KINDS = {
    "depthwise": (lambda: layers.DepthwiseConv1D(2, use_bias=False), ALIKE, lambda rows: rows.T[..., np.newaxis]),
    "transposed": (lambda: layers.Conv1DTranspose(2, 1, use_bias=False), APART, lambda rows: rows[np.newaxis]),
    "query": (lambda: layers.EinsumDense("abc,cde->abde", (1, 2, 1)), APART, lambda rows: rows.T[..., np.newaxis]),
}
"""Layers of two outputs with two weights each, an input of which each output sees (3, 4), and the kernel by outputs."""


def taken(spec: Any, layer: keras.layers.Layer, x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Return what one step of SGD(1) takes from the kernel of `layer`, for the loss 10 a + 0.01 b of its outputs."""
    model = trainstep.apply(keras.Sequential([keras.Input(x.shape[1:]), layer]), spec)
    model.compile(sgd(1.0), lambda y, output: tf.reduce_sum(y * output, axis=list(range(1, len(output.shape)))))
    model.set_weights([kernel])
    model.train_on_batch(x, np.reshape([10, 0.01], [1, *model.output_shape[1:]]))
    return kernel - model.get_weights()[0]
