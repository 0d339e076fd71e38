"""A small transformer encoder that classifies sequences of token ids, or images cut into patches.

    x = embedding + position
    x = x + dropout(attention(norm(x)))        as many times as there are layers
    x = x + dropout(dense(gelu(dense(norm(x)))))
    softmax(dense(mean over positions of norm(x)))

Every position takes part, token id 0 included: there is no padding mask.

Vaswani et al., "Attention Is All You Need", NeurIPS 2017, https://arxiv.org/abs/1706.03762;
Dosovitskiy et al. (patches), ICLR 2021, https://arxiv.org/abs/2010.11929
"""

from typing import Any

import keras
import tensorflow as tf
from pydantic import Field, model_validator

from trainstep.errors import InvalidOptionsError
from trainstep.models._options import ClassCounts, ModelOptions, Seeds, probabilities


class TransformerOptions(ModelOptions):
    """What the input is, and the size of the encoder."""

    vocabulary: int | None = Field(
        default=None,
        ge=2,
        description="Number of token ids, for input of shape (length,); None: the input is an image.",
    )
    patch_size: int = Field(default=4, ge=1, description="Height and width of a patch of an image, in pixels.")
    width: int = Field(default=32, ge=1, description="Length of the vector at each position.")
    heads: int = Field(default=4, ge=1, description="Heads of the attention; must divide the width.")
    layers: int = Field(default=2, ge=1, le=24, description="Encoder layers.")
    expansion: int = Field(default=2, ge=1, description="Units of a feed-forward layer, in widths.")
    dropout: float = Field(
        default=0.1, ge=0, lt=1, description="Share dropped of embeddings, attention and each branch."
    )

    @model_validator(mode="after")
    def _divisible(self) -> "TransformerOptions":
        if self.width % self.heads:
            raise ValueError(f"heads must divide width, and {self.heads} does not divide {self.width}")
        return self


@keras.utils.register_keras_serializable("trainstep")
class SelfAttention(keras.layers.Layer):
    """Dot-product attention of a sequence to itself, in several heads.

    Keras's own `MultiHeadAttention` would give one seed to the kernels of queries, keys and values,
    which then start out equal.
    """

    def __init__(self, heads: int, width: int, dropout: float, seeds: list[int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.heads, self.width, self.dropout, self.seeds = heads, width, dropout, list(seeds)
        initializers: list[Any] = [keras.initializers.GlorotUniform(seed) for seed in self.seeds[:4]]
        self.projections = [
            keras.layers.Dense(width, kernel_initializer=initializer, name=name)
            for name, initializer in zip(("query", "key", "value", "output"), initializers, strict=True)
        ]
        self.drop = keras.layers.Dropout(dropout, seed=self.seeds[4], name="dropout")

    def build(self, input_shape: Any) -> None:
        """Build the four projections, each of a kernel (width, width) and a bias."""
        for projection in self.projections:
            projection.build(input_shape)
        super().build(input_shape)

    def call(self, x: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        """Map (batch, length, width) to the same shape."""
        length = x.shape[1]
        query, key, value = (
            tf.reshape(projection(x), [-1, length, self.heads, self.width // self.heads])
            for projection in self.projections[:3]
        )
        scores = tf.einsum("bqhd,bkhd->bhqk", query, key) * (self.width // self.heads) ** -0.5
        attention = self.drop(tf.nn.softmax(scores), training=training)
        mixed = tf.einsum("bhqk,bkhd->bqhd", attention, value)
        return self.projections[3](tf.reshape(mixed, [-1, length, self.width]))

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return the shape of the input."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Return what `__init__` needs to make the layer again."""
        arguments = {"heads": self.heads, "width": self.width, "dropout": self.dropout, "seeds": self.seeds}
        return {**super().get_config(), **arguments}


@keras.utils.register_keras_serializable("trainstep")
class Positions(keras.layers.Layer):
    """Adds a learned vector to each position of a sequence (batch, length, width)."""

    def __init__(self, seed: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.seed = seed

    def build(self, input_shape: Any) -> None:
        """Make the one weight, of shape (length, width)."""
        initializer = keras.initializers.RandomNormal(stddev=0.02, seed=self.seed)
        self.positions = self.add_weight(name="positions", shape=tuple(input_shape[1:]), initializer=initializer)
        super().build(input_shape)

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """Return the sum, of the shape of `x`."""
        return x + tf.cast(tf.convert_to_tensor(self.positions), x.dtype)

    def get_config(self) -> dict[str, Any]:
        """Return what `__init__` needs to make the layer again."""
        return {**super().get_config(), "seed": self.seed}


def build(input_shape: tuple[int, ...], classes: ClassCounts, seeds: Seeds, options: TransformerOptions) -> keras.Model:
    """Return the network; int32 ids (batch, length) or float32 images to probabilities (batch, classes)."""
    _check_shape(input_shape, options)
    width, dropout = options.width, options.dropout

    def dense(units: int, activation: str | None, name: str) -> Any:
        return keras.layers.Dense(units, activation, kernel_initializer=seeds.glorot(), name=name)

    def drop(x: Any, name: str) -> Any:
        return keras.layers.Dropout(dropout, seed=seeds.next(), name=name)(x) if dropout else x

    if options.vocabulary is not None:
        inputs = keras.Input(input_shape, dtype="int32", name="inputs")
        embedding = keras.layers.Embedding(
            options.vocabulary, width, embeddings_initializer=seeds.normal(0.02), name="embedding"
        )
        x = embedding(inputs)
    else:
        inputs = keras.Input(input_shape, name="inputs")
        size = options.patch_size
        x = keras.layers.Conv2D(width, size, size, kernel_initializer=seeds.glorot(), name="patches")(inputs)
        x = keras.layers.Reshape((-1, width), name="sequence")(x)
    x = drop(Positions(seeds.next(), name="positions")(x), "embedding_dropout")
    for index in range(1, options.layers + 1):
        y = keras.layers.LayerNormalization(name=f"layer_{index}_norm_1")(x)
        attention_seeds = [seeds.next() for _ in range(5)]
        y = SelfAttention(options.heads, width, dropout, attention_seeds, name=f"layer_{index}_attention")(y)
        x = keras.layers.Add(name=f"layer_{index}_add_1")([x, drop(y, f"layer_{index}_dropout_1")])
        y = keras.layers.LayerNormalization(name=f"layer_{index}_norm_2")(x)
        y = dense(options.expansion * width, "gelu", f"layer_{index}_expand")(y)
        y = dense(width, None, f"layer_{index}_contract")(y)
        x = keras.layers.Add(name=f"layer_{index}_add_2")([x, drop(y, f"layer_{index}_dropout_2")])
    x = keras.layers.LayerNormalization(name="norm")(x)
    x = keras.layers.GlobalAveragePooling1D(name="pool")(x)
    return keras.Model(inputs, probabilities(x, classes, seeds), name="transformer")


def _check_shape(input_shape: tuple[int, ...], options: TransformerOptions) -> None:
    if options.vocabulary is not None:
        if len(input_shape) != 1:
            raise InvalidOptionsError(
                f"transformer: with a vocabulary the input is token ids of shape (length,), not {input_shape}."
            )
        return
    if len(input_shape) != 3:
        raise InvalidOptionsError(
            f"transformer: without a vocabulary the input is an image of shape (height, width, channels), "
            f"not {input_shape}. For token ids give vocabulary=."
        )
    if input_shape[0] % options.patch_size or input_shape[1] % options.patch_size:
        raise InvalidOptionsError(
            f"transformer: patch_size {options.patch_size} does not divide the image, {input_shape[0]} x "
            f"{input_shape[1]} pixels."
        )
