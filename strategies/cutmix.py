"""CutMix: paste a box of another image into each, and mix the labels by its area.

    x' = (1 - M) x_i + M x_j        M: 1 in a box of H sqrt(1 - lambda) by W sqrt(1 - lambda), 0 elsewhere
    y' = a y_i + (1 - a) y_j        a: the share of pixels that are x_i's

lambda ~ Beta(alpha, alpha), and j is from a random permutation of the batch. The centre of the box is anywhere in the
image; what sticks out of it is cut off, which `a` knows of and `lambda` does not. One box for a batch, as in the
authors' code, or one for each example. One copy of the batch; no extra evaluation. Dropout is as without it, and batch
norm sees what is pasted. Sample weights: each of both labels counts as much as its example does, as with mixup.
Replicas paste from one another, as one device would, and send each other their examples.

Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features", ICCV 2019,
equations 1 and 2, https://arxiv.org/abs/1905.04899
"""

from typing import Literal

import tensorflow as tf
from pydantic import Field

from trainstep import _seam
from trainstep.declaration import Cost, Declaration, Slot, Stage, StrategyOptions
from trainstep.registry import register
from trainstep.step import Batch, Strategy
from trainstep.strategies._images import box_mask, images_among, size_of
from trainstep.strategies._mixing import (
    check_labels,
    partners,
    rows_of,
    seeds_of_step,
    symmetric_beta,
    with_mixed_labels,
)


class CutmixOptions(StrategyOptions):
    """How much is pasted, and how often."""

    alpha: float = Field(
        default=1.0,
        ge=0,
        allow_inf_nan=False,
        description="Both parameters of the Beta distribution of lambda, the share that stays: 1 uniform; 0: no boxes.",
    )
    cutmix_prob: float = Field(default=1.0, ge=0, le=1, description="Probability of a box; 0: none.")
    per: Literal["batch", "example"] = Field(default="batch", description="What each has a box of its own.")
    seed: int = Field(default=0, ge=0, lt=2**31, description="Seed of boxes and of the permutation.")

    @property
    def pastes(self) -> bool:
        """Whether there are any boxes."""
        return self.alpha > 0 and self.cutmix_prob > 0


def pasted(images: tf.Tensor, others: tf.Tensor, share: tf.Tensor, centre: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Return `images` with a box of `others` in each, and the share of its pixels that are still its own.

    Args:
        images: (batch, height, width, channels).
        others: the same.
        share: lambda, the share that would stay if no box were cut off: float32 (batch,).
        centre: of the box, as shares of height and width from 0 to below 1: float32 (batch, 2).
    """
    size = size_of(images)
    sides = tf.cast(tf.cast(size, tf.float32) * tf.sqrt(1 - share)[:, None], tf.int32)
    box = box_mask(size, centre, sides)
    return tf.where(tf.expand_dims(box, -1), others, images), 1 - tf.reduce_mean(tf.cast(box, tf.float32), axis=(1, 2))


@register
class Cutmix(Strategy):
    """Pastes the batch into itself; what follows in the step, metrics too, sees what it made."""

    declaration = Declaration(
        name="cutmix",
        stage=Stage.BATCH,
        summary="Paste a box of another image into each, and mix the labels by its area.",
        reference="Yun et al., ICCV 2019, https://arxiv.org/abs/1905.04899",
        options=CutmixOptions,
        neutral={"alpha": 0.0},
        needs=("images", "one-hot labels"),
        conflicts={
            "dp_sgd": "each example is part of two that are trained on, so that it moves the weights twice as far as "
            "the clipped gradient of one, and more privacy is lost than is counted."
        },
        notes={
            "adversarial": "the attack starts from what is pasted, and keeps to its labels",
            "mixup": "what is pasted is mixed once more: an example is made of up to four",
        },
        passes_through=lambda options: () if options.pastes else ("transform_batch",),
        cost=lambda options: (
            Cost(memory="one copy of the batch", batch_norm="statistics of pasted images") if options.pastes else Cost()
        ),
        state=lambda options: {"draws": Slot(dtype="int32")} if options.pastes else {},
    )

    def transform_batch(self, batch: Batch) -> Batch:
        if self.strategy_options["cutmix"].pastes:
            batch = self._pasted(batch)
        return super().transform_batch(batch)

    def _pasted(self, batch: Batch) -> Batch:
        options, places = self.strategy_options["cutmix"], images_among("cutmix", batch.x)
        check_labels("cutmix", batch.y)
        _seam.ensure_built(self, batch.x)  # There is no state of ours before.
        if not self.trainable_variables:
            return batch
        rows, seeds = rows_of(batch.x), seeds_of_step("cutmix", self, 4)
        count = rows.of_all if options.per == "example" else 1
        share = symmetric_beta(options.alpha, [count], seeds[0])
        share = tf.where(tf.random.stateless_uniform([count], seeds[1]) < options.cutmix_prob, share, 1.0)
        centre = tf.random.stateless_uniform([count, 2], seeds[2])
        if options.per == "example":
            share, centre = rows.of(share), rows.of(centre)
        else:
            share, centre = tf.repeat(share, rows.here), tf.repeat(centre, rows.here, axis=0)
        others = partners(batch, rows, seeds[3])
        tensors, pool, kept = tf.nest.flatten(batch.x), tf.nest.flatten(others.x), []
        for place in places:
            tensors[place], left = pasted(tensors[place], pool[place], share, centre)
            kept.append(left)
        labelled = with_mixed_labels(batch, others, tf.add_n(kept) / len(kept))
        return labelled._replace(x=tf.nest.pack_sequence_as(batch.x, tensors))
