"""The residual net for small images: three stages of n blocks, depth 6 n + 2, batch norm throughout.

    block(x) = relu(x + norm(conv(relu(norm(conv(x))))))

Widths are `width`, 2 and 4 times that; each stage but the first halves the image. Where a block
changes the shape, its shortcut is a 1 x 1 convolution with batch norm (option B of the paper, which
uses A, zero padding, on CIFAR).

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2,
https://arxiv.org/abs/1512.03385
"""

from typing import Any, Literal

import keras
from pydantic import Field

from trainstep.errors import InvalidOptionsError
from trainstep.models._options import ClassCounts, ModelOptions, Seeds, probabilities


class ResnetOptions(ModelOptions):
    """Depth and width."""

    depth: Literal[8, 14, 20] = Field(
        default=8, description="Weight layers from input to output: 6 n + 2 for n blocks a stage."
    )
    width: int = Field(
        default=16, ge=1, description="Filters of the first stage; the others have 2 and 4 times as many."
    )


def build(input_shape: tuple[int, ...], classes: ClassCounts, seeds: Seeds, options: ResnetOptions) -> keras.Model:
    """Return the network; float32 images (batch, height, width, channels) to probabilities (batch, classes)."""
    if len(input_shape) != 3:
        raise InvalidOptionsError(f"resnet: input_shape must be (height, width, channels), not {input_shape}.")
    inputs = keras.Input(input_shape, name="inputs")
    x = _convolution(inputs, options.width, 3, 1, seeds=seeds, name="stem")
    x = keras.layers.ReLU(name="stem_relu")(x)
    for stage in range(3):
        for block in range((options.depth - 2) // 6):
            stride = 2 if stage > 0 and block == 0 else 1
            x = _block(x, options.width * 2**stage, stride, seeds, f"stage_{stage + 1}_block_{block + 1}")
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(inputs, probabilities(x, classes, seeds), name=f"resnet_{options.depth}")


def _block(x: Any, filters: int, stride: int, seeds: Seeds, name: str) -> Any:
    shortcut = x
    x = _convolution(x, filters, 3, stride, seeds=seeds, name=f"{name}_1")
    x = keras.layers.ReLU(name=f"{name}_1_relu")(x)
    x = _convolution(x, filters, 3, 1, seeds=seeds, name=f"{name}_2")
    if stride != 1:
        shortcut = _convolution(shortcut, filters, 1, stride, seeds=seeds, name=f"{name}_shortcut")
    x = keras.layers.Add(name=f"{name}_add")([x, shortcut])
    return keras.layers.ReLU(name=f"{name}_relu")(x)


def _convolution(x: Any, filters: int, size: int, stride: int, *, seeds: Seeds, name: str) -> Any:
    x = keras.layers.Conv2D(
        filters, size, stride, padding="same", use_bias=False, kernel_initializer=seeds.he(), name=f"{name}_conv"
    )(x)
    return keras.layers.BatchNormalization(name=f"{name}_norm")(x)
