"""Batch-norm statistics, estimated anew: for weights that no batch was trained with, such as an average."""

import contextlib
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from trainstep import _seam
from trainstep.errors import ModelConflictError, NotCompiledError, UnsupportedInputError
from trainstep.step import Strategy


def reestimate_batch_norm(model: keras.Model, data: Any, *, batch_size: int = 32) -> None:
    """Set batch-norm statistics to their means over the batches of `data`, for the weights `model` is judged by.

    As `update_bn` of PyTorch. It takes one forward pass over the data, in training mode. Without strategies, and with
    those that judge the model by its own weights, these are the statistics of the model; an average of weights, under
    `batch_norm="reestimate"`, keeps them for itself until its next update.

    Args:
        model: built.
        data: inputs as arrays of shape (examples, ...), in the structure the model takes; or a `tf.data.Dataset` of
            batches, of which it passes over labels and weights.
        batch_size: examples at a time, where `data` is arrays.

    Raises:
        NotCompiledError: the model is not built.
        ModelConflictError: it is on several replicas; or it is judged by an average that keeps no such statistics.
        UnsupportedInputError: there are no examples in `data`.
    """
    if not model.built:
        raise NotCompiledError("The model has no statistics before it is built: call it, or fit it.")
    replicas = model.distribute_strategy.num_replicas_in_sync
    if replicas > 1:
        raise ModelConflictError(
            f"Batch-norm statistics are estimated on one device, and the model is on {replicas} replicas: load its "
            "saved file outside of the scope of the distribution, and estimate them there."
        )
    judged = model.evaluation_weights() if isinstance(model, Strategy) else contextlib.nullcontext()
    with judged:
        estimated = _means(model, _batches(data, batch_size))
    if isinstance(model, Strategy):
        model.keep_statistics(estimated)
    else:
        for variable, value in zip(_seam.statistics_of(model), estimated, strict=True):
            variable.assign(value)


def _batches(data: Any, batch_size: int) -> Any:
    if isinstance(data, tf.data.Dataset):
        return data.map(lambda *batch: keras.utils.unpack_x_y_sample_weight(batch[0] if len(batch) == 1 else batch)[0])
    return tf.data.Dataset.from_tensor_slices(tf.nest.map_structure(np.asarray, data)).batch(batch_size)


def _means(model: Any, batches: tf.data.Dataset) -> list[tf.Tensor]:
    """Return the mean of each statistic of `model` over `batches`, weighted by examples, and leave all as it was."""
    statistics = _seam.statistics_of(model)
    before = [(variable, tf.convert_to_tensor(variable)) for variable in [*statistics, *_seam.random_variables(model)]]
    layers = [layer for layer in _seam.layers_of(model) if _seam.is_batch_norm(layer)]
    momenta = [layer.momentum for layer in layers]

    @tf.function
    def pass_through(x: Any) -> tf.Tensor:
        _seam.forward(model, x, training=True)
        return _seam.num_examples(x)

    totals, examples = [tf.zeros(variable.shape, tf.float32) for variable in statistics], 0
    try:
        for layer in layers:
            layer.momentum = 0.0  # So that what a pass leaves are the statistics of its batch.
        for x in batches:
            count = int(pass_through(x))
            totals = [
                total + count * tf.cast(tf.convert_to_tensor(variable), tf.float32)
                for total, variable in zip(totals, statistics, strict=True)
            ]
            examples += count
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for variable, value in before:
            variable.assign(value)
    if not examples:
        raise UnsupportedInputError("There are no examples to estimate batch-norm statistics from.")
    estimated = {id(variable) for layer in layers for variable in (layer.moving_mean, layer.moving_variance)}
    return [
        tf.cast(total / examples, variable.dtype) if id(variable) in estimated else tf.convert_to_tensor(variable)
        for variable, total in zip(statistics, totals, strict=True)
    ]
