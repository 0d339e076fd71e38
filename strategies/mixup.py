"""mixup: train on mixtures of two examples, and of their labels.

    x' = lambda x_i + (1 - lambda) x_j        lambda ~ Beta(alpha, alpha); j: a random permutation of the batch
    y' = lambda y_i + (1 - lambda) y_j

One lambda for a batch, as in the authors' code, or one for each example. One copy of the batch; no extra evaluation.
Dropout is as without it, and batch norm sees the mixtures. Sample weights: for a loss that is linear in its labels, as
cross-entropy is, each of both labels counts as much as its example does, lambda w_i L(y_i) + (1 - lambda) w_j L(y_j).
Replicas mix with examples of one another, as one device would, and send each other theirs.

Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018, equation 2, https://arxiv.org/abs/1710.09412
"""

from typing import Any, Literal

import tensorflow as tf
from pydantic import Field

from trainstep import _seam
from trainstep.declaration import Cost, Declaration, Slot, Stage, StrategyOptions
from trainstep.errors import UnsupportedInputError
from trainstep.registry import register
from trainstep.step import Batch, Strategy
from trainstep.strategies._mixing import (
    check_labels,
    mixed,
    partners,
    rows_of,
    seeds_of_step,
    symmetric_beta,
    with_mixed_labels,
)


class MixupOptions(StrategyOptions):
    """How strong the mixtures are."""

    alpha: float = Field(
        default=0.2,
        ge=0,
        allow_inf_nan=False,
        description="Both parameters of the Beta distribution of lambda: near 0 nearly all of one example, 1 uniform, "
        "more near halves; 0: no mixtures.",
    )
    per: Literal["batch", "example"] = Field(default="batch", description="What each has a lambda of its own.")
    seed: int = Field(default=0, ge=0, lt=2**31, description="Seed of lambda and of the permutation.")


def mixtures(batch: Batch, others: Batch, share: tf.Tensor) -> Batch:
    """Return mixtures of each example of `batch` with its partner.

    Args:
        batch: the examples; an input of another dtype than a floating one, or a sparse one, stays as it is.
        others: the partner of each.
        share: lambda, the share of the example itself: float32 (batch,).
    """

    def mix(x: Any, other: Any) -> Any:
        return mixed(x, other, share) if _can_be_mixed(x) else x

    flat = zip(tf.nest.flatten(batch.x), tf.nest.flatten(others.x), strict=True)
    x = tf.nest.pack_sequence_as(batch.x, [mix(*pair) for pair in flat])
    return with_mixed_labels(batch, others, share)._replace(x=x)


def _can_be_mixed(x: Any) -> bool:
    return isinstance(x, tf.Tensor) and x.dtype.is_floating


@register
class Mixup(Strategy):
    """Mixes the batch with itself; what follows in the step, metrics too, sees the mixtures."""

    declaration = Declaration(
        name="mixup",
        stage=Stage.BATCH,
        summary="Train on mixtures of two examples, and of their labels.",
        reference="Zhang et al., ICLR 2018, https://arxiv.org/abs/1710.09412",
        options=MixupOptions,
        neutral={"alpha": 0.0},
        needs=("one-hot labels", "float inputs"),
        conflicts={
            "dp_sgd": "each example is part of two that are trained on, so that it moves the weights twice as far as "
            "the clipped gradient of one, and more privacy is lost than is counted."
        },
        notes={"adversarial": "the attack starts from the mixtures, and keeps to their labels"},
        passes_through=lambda options: ("transform_batch",) if options.alpha == 0 else (),
        cost=lambda options: (
            Cost(memory="one copy of the batch", batch_norm="statistics of the mixtures") if options.alpha else Cost()
        ),
        state=lambda options: {"draws": Slot(dtype="int32")} if options.alpha else {},
    )

    def transform_batch(self, batch: Batch) -> Batch:
        if self.strategy_options["mixup"].alpha:
            batch = self._mixtures(batch)
        return super().transform_batch(batch)

    def _mixtures(self, batch: Batch) -> Batch:
        options = self.strategy_options["mixup"]
        inputs = tf.nest.flatten(batch.x)
        if not any(_can_be_mixed(x) for x in inputs):
            given = ", ".join(f"{type(x).__name__} of {x.dtype.name}" for x in inputs)
            raise UnsupportedInputError(
                f"mixup mixes dense inputs of a floating dtype, and there are none ({given}). Cast images to float32, "
                "and make sparse tensors dense, before `fit`; for tokens, mix the output of an embedding instead, as "
                "the input of a model of its own."
            )
        check_labels("mixup", batch.y)
        _seam.ensure_built(self, batch.x)  # There is no state of ours before.
        if not self.trainable_variables:
            return batch
        rows, (for_shares, for_partners) = rows_of(batch.x), seeds_of_step("mixup", self, 2)
        if options.per == "example":
            share = rows.of(symmetric_beta(options.alpha, [rows.of_all], for_shares))
        else:
            share = tf.repeat(symmetric_beta(options.alpha, [1], for_shares), rows.here)
        return mixtures(batch, partners(batch, rows, for_partners), share)
