"""A multi-layer perceptron: the input flattened, dense layers with rectifiers, softmax."""

import keras
from pydantic import Field

from trainstep.models._options import ClassCounts, ModelOptions, Seeds, Width, probabilities


class MlpOptions(ModelOptions):
    """Sizes of the hidden layers, and dropout after each."""

    units: tuple[Width, ...] = Field(
        default=(128, 128), strict=False, description="Units of each hidden layer, from the input on; empty for none."
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Share of units dropped after each hidden layer.")


def build(input_shape: tuple[int, ...], classes: ClassCounts, seeds: Seeds, options: MlpOptions) -> keras.Model:
    """Return the network; float32 (batch, *input_shape) to probabilities (batch, classes)."""
    x = inputs = keras.Input(input_shape, name="inputs")
    if len(input_shape) > 1:
        x = keras.layers.Flatten(name="flatten")(x)
    for index, units in enumerate(options.units, start=1):
        x = keras.layers.Dense(units, "relu", kernel_initializer=seeds.glorot(), name=f"dense_{index}")(x)
        if options.dropout:
            x = keras.layers.Dropout(options.dropout, seed=seeds.next(), name=f"dropout_{index}")(x)
    return keras.Model(inputs, probabilities(x, classes, seeds), name="mlp")
