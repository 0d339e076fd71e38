"""The small convolutional net on which the cost of a step is measured.

    conv 32, pool, conv 64, pool, dense 128, dense classes

Convolutions are 3 x 3 and keep the size of the image, so that 8 x 8 digits survive both pools.
"""

import keras
from pydantic import Field

from trainstep.errors import InvalidOptionsError
from trainstep.models._options import ClassCounts, ModelOptions, Seeds, Width, probabilities


class CnnOptions(ModelOptions):
    """Widths of the four layers, and dropout before the last."""

    filters: tuple[Width, Width] = Field(default=(32, 64), strict=False, description="Filters of the two convolutions.")
    kernel_size: int = Field(default=3, ge=1, le=11, description="Height and width of a convolution, in pixels.")
    units: int = Field(default=128, ge=1, description="Units of the dense layer before the last.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Share of these units dropped in training.")


def build(input_shape: tuple[int, ...], classes: ClassCounts, seeds: Seeds, options: CnnOptions) -> keras.Model:
    """Return the network; float32 images (batch, height, width, channels) to probabilities (batch, classes)."""
    if len(input_shape) != 3 or min(input_shape[:2]) < 4:
        raise InvalidOptionsError(
            f"cnn: input_shape must be (height, width, channels) with at least 4 x 4 pixels, which two pools "
            f"halve twice, not {input_shape}."
        )
    x = inputs = keras.Input(input_shape, name="inputs")
    for index, filters in enumerate(options.filters, start=1):
        x = keras.layers.Conv2D(
            filters,
            options.kernel_size,
            padding="same",
            activation="relu",
            kernel_initializer=seeds.glorot(),
            name=f"conv_{index}",
        )(x)
        x = keras.layers.MaxPooling2D(name=f"pool_{index}")(x)
    x = keras.layers.Flatten(name="flatten")(x)
    x = keras.layers.Dense(options.units, "relu", kernel_initializer=seeds.glorot(), name="dense")(x)
    if options.dropout:
        x = keras.layers.Dropout(options.dropout, seed=seeds.next(), name="dropout")(x)
    return keras.Model(inputs, probabilities(x, classes, seeds), name="cnn")
