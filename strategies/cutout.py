"""Cutout: hide a square of each image.

    x' = x outside of a square of side `length`, and `fill` inside; its centre is anywhere in the image

A square near the border sticks out, and hides less. Labels stay. One pass over the images; no extra evaluation. Dropout
is as without it, and batch norm sees the images with their holes.

DeVries and Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout", 2017, section 3,
https://arxiv.org/abs/1708.04552
"""

from typing import Any, Literal

import tensorflow as tf
from pydantic import Field

from trainstep import _seam
from trainstep.declaration import Cost, Declaration, Slot, Stage, StrategyOptions
from trainstep.registry import register
from trainstep.step import Batch, Strategy
from trainstep.strategies._images import box_mask, images_among, size_of
from trainstep.strategies._mixing import rows_of, seeds_of_step


class CutoutOptions(StrategyOptions):
    """How much is hidden, and behind what."""

    length: float = Field(
        default=0.5, ge=0, le=1, description="Side of the square, as a share of the shorter side of the image; 0: none."
    )
    fill: Literal["zero", "mean"] = Field(
        default="zero", description="What is seen in its place: 0, or the mean of the image, channel by channel."
    )
    seed: int = Field(default=0, ge=0, lt=2**31, description="Seed of the centres.")


def without_square(images: tf.Tensor, centre: tf.Tensor, length: float, fill: str = "zero") -> tf.Tensor:
    """Return `images` with a square hidden in each.

    Args:
        images: (batch, height, width, channels), of any dtype of numbers.
        centre: of the square, as shares of height and width from 0 to below 1: float32 (batch, 2).
        length: its side, as a share of the shorter side of the image, rounded to pixels.
        fill: "zero" or "mean".
    """
    size = size_of(images)
    side = tf.cast(tf.round(length * tf.cast(tf.reduce_min(size), tf.float32)), tf.int32)
    hidden = box_mask(size, centre, tf.fill(tf.shape(centre), side))
    hidden = tf.expand_dims(hidden, -1)
    if fill == "zero":
        return tf.where(hidden, tf.zeros_like(images), images)
    means = tf.reduce_mean(tf.cast(images, tf.float32), axis=(1, 2), keepdims=True)
    return tf.where(hidden, tf.cast(means, images.dtype), images)


@register
class Cutout(Strategy):
    """Hides a square of each image; what follows in the step, metrics too, sees the rest."""

    declaration = Declaration(
        name="cutout",
        stage=Stage.BATCH,
        summary="Hide a square of each image.",
        reference="DeVries and Taylor, 2017, https://arxiv.org/abs/1708.04552",
        options=CutoutOptions,
        neutral={"length": 0.0},
        needs=("images",),
        notes={
            "adversarial": "the attack starts from images with their squares hidden, and may change what is in these",
            "cutmix": "squares are hidden in what has been pasted together",
        },
        passes_through=lambda options: ("transform_batch",) if options.length == 0 else (),
        cost=lambda options: (
            Cost(memory="one copy of the images", batch_norm="statistics of images with a square hidden")
            if options.length
            else Cost()
        ),
        state=lambda options: {"draws": Slot(dtype="int32")} if options.length else {},
    )

    def transform_batch(self, batch: Batch) -> Batch:
        if self.strategy_options["cutout"].length:
            batch = batch._replace(x=self._with_holes(batch.x))
        return super().transform_batch(batch)

    def _with_holes(self, x: Any) -> Any:
        options, places = self.strategy_options["cutout"], images_among("cutout", x)
        _seam.ensure_built(self, x)  # There is no state of ours before.
        if not self.trainable_variables:
            return x
        rows, tensors = rows_of(x), tf.nest.flatten(x)
        for place, seed in zip(places, seeds_of_step("cutout", self, len(places)), strict=True):
            centre = rows.of(tf.random.stateless_uniform([rows.of_all, 2], seed))
            tensors[place] = without_square(tensors[place], centre, options.length, options.fill)
        return tf.nest.pack_sequence_as(x, tensors)
