"""Which weights lead to one output, for strategies that are about them: the axes of a kernel that are its outputs.

Neither the rank nor the shape of a kernel tells. Layers of Keras keep their outputs on different axes:

    Dense, Conv, recurrent, pointwise             (..., in, out)                      the last
    DepthwiseConv, depthwise of SeparableConv     (..., channels, multiplier)         the last two
    ConvTranspose                                 (..., out, in)                      the last but one
    EinsumDense, and so each part of attention    the letters of its equation         those that its result has

By the last axis alone, all channels of a depthwise kernel would be one unit, the units of a transposed convolution its
inputs, and those of a query the same entry of all its heads. So it goes by the kind of the layer.
"""

import math
from collections.abc import Iterable
from typing import Any

import keras

from trainstep import _seam

Outputs = tuple[int, ...] | None
"""The axes that are outputs; None for what is no kernel: a bias, or a scale."""

_DEPTHWISE = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)
_SEPARABLE = (keras.layers.SeparableConv1D, keras.layers.SeparableConv2D)
_TRANSPOSED = (keras.layers.Conv1DTranspose, keras.layers.Conv2DTranspose, keras.layers.Conv3DTranspose)


def outputs_of(model: Any) -> list[Outputs]:
    """Return for each trainable weight of `model` the axes of its outputs: the last one, but for layers known better.

    Vectors have none, and so have biases of any rank, such as those of attention (heads, entries) or of a GRU (2, ...),
    and kernels that scale, one number for each output, as the vector of a normalization does.
    """
    known = {_seam.key_of(weight): axes for layer in _seam.layers_of(model) for weight, axes in _known(layer)}
    return [
        known.get(_seam.key_of(weight), (-1,)) if len(weight.shape) > 1 else None
        for weight in model.trainable_variables
    ]


def axes_within(outputs: Outputs, rank: int) -> list[int]:
    """Return the axes that a unit of a tensor of `rank` extends over: all that are not among `outputs`."""
    apart = {axis % rank for axis in outputs or ()}
    return [axis for axis in range(rank) if axis not in apart]


def einsum_outputs(equation: str) -> tuple[int, tuple[int, ...]]:
    """Return the rank of the kernel of an `EinsumDense`, and its axes that are not summed over.

    They are 3 and (1, 2) for "abc,cde->abde".
    """
    kernel, result = equation.split(",")[1].split("->")
    return len(kernel), tuple(axis for axis, letter in enumerate(kernel) if letter in result)


def _known(layer: Any) -> list[tuple[Any, Outputs]]:
    """Return the weights of `layer` itself that are not to be taken by their last axis."""
    weights, outputs = _kernels(layer)
    kernels = [weight for weight in weights if len(weight.shape) > 1]
    known = [(kernel, None if _scales(kernel.shape, outputs) else outputs) for kernel in kernels]
    return [*known, (getattr(layer, "bias", None), None)]


def _kernels(layer: Any) -> tuple[Iterable[Any], tuple[int, ...]]:
    if isinstance(layer, _DEPTHWISE):
        return layer.trainable_weights, (-2, -1)
    if isinstance(layer, _SEPARABLE):
        return [layer.depthwise_kernel], (-2, -1)
    if isinstance(layer, _TRANSPOSED):
        return layer.trainable_weights, (-2,)
    if isinstance(layer, keras.layers.EinsumDense):
        rank, outputs = einsum_outputs(layer.equation)
        # Of those that LoRA adds, one has the rank of the kernel, and its outputs; the other is taken by its last axis.
        return [weight for weight in layer.trainable_weights if len(weight.shape) == rank], outputs
    return [], ()


def _scales(shape: Any, outputs: tuple[int, ...]) -> bool:
    return math.prod(shape[axis] for axis in axes_within(outputs, len(shape))) == 1
