"""MART (misclassification-aware adversarial training): adversarial examples, more of it where the model is wrong.

    loss = BCE(p(x'), y) + beta * KL(p(x) || p(x')) * (1 - p_y(x))      p: what the model predicts
    BCE(p, y) = -log p_y - log(1 - max_{k != y} p_k)
    x' = argmax over ||x' - x|| <= epsilon of L(w, x', y), approximately, by `steps` of ascent

The first term of the boosted cross-entropy BCE is the model's own loss at x'; the others are added to it. With n steps
a training step costs (6 + 2 n) / 3 of a plain one: n forward passes with a backward pass to the input, and forward and
backward passes on x and on x'. One copy of the batch and the activations of both are kept. The attack is in inference
mode and leaves no trace; both passes that are trained on are in training mode, and batch norm counts both, in turn. On
Keras 3 these have the same dropout masks; on Keras 2, where the state of dropout cannot be reached, each draws its own.

Wang et al., "Improving Adversarial Robustness Requires Revisiting Misclassified Examples", ICLR 2020, algorithm 1,
https://openreview.net/forum?id=rklOg6EFwS
"""

from typing import Annotated, Any

import tensorflow as tf
from pydantic import Field

from trainstep import _seam
from trainstep.declaration import Cost, Declaration, Slot, Stage
from trainstep.registry import register
from trainstep.schedules import Scheduled, Within, value_at
from trainstep.step import Batch, Objective, Strategy
from trainstep.strategies._adversaries import PgdOptions, other_attacks, pgd
from trainstep.strategies._attacks import check_inputs
from trainstep.strategies._classes import class_outputs, divergence, share_of_loss


class MartOptions(PgdOptions):
    """The attack, and what its divergence weighs."""

    beta: Annotated[Scheduled, Within(ge=0)] = Field(
        default=6.0,
        description="Weight of the divergence, lambda in the paper, in loss per nat, or a schedule of it; 0: none.",
    )


def margin_loss(log_q: tf.Tensor, target: tf.Tensor) -> tf.Tensor:
    """Return -log(1 - max_{k != y} q_k) of each entry, the second term of the boosted cross-entropy: (batch, ...).

    Args:
        log_q: logarithms of probabilities: (batch, ..., classes).
        target: the class y, one-hot, of the same shape.
    """
    lowest = log_q.dtype.min
    others = tf.where(target > 0, lowest, log_q)
    rival = tf.one_hot(tf.argmax(others, axis=-1), log_q.shape[-1])
    # 1 - q_k is the sum of all others: what would be left of it in float32 where q_k is near 1 has no digits.
    return -tf.reduce_logsumexp(tf.where(rival > 0, lowest, log_q), axis=-1)


def weighted_divergence(log_p: tf.Tensor, log_q: tf.Tensor, target: tf.Tensor) -> tf.Tensor:
    """Return KL(p || q) * (1 - p_y) of each entry, arguments as those of `margin_loss`: (batch, ...)."""
    log_p_of_target = tf.reduce_sum(target * log_p, axis=-1)
    return divergence(log_p, log_q) * -tf.math.expm1(log_p_of_target)


@register
class Mart(Strategy):
    """Makes the examples once, outside of the objective; adds to the model's loss there what is MART's own."""

    declaration = Declaration(
        name="mart",
        stage=Stage.ATTACK,
        summary="MART: adversarial training that weighs examples by how wrong the model is.",
        reference="Wang et al., ICLR 2020, https://openreview.net/forum?id=rklOg6EFwS",
        options=MartOptions,
        why_not_neutral="with epsilon=0 and beta=0 the boosted cross-entropy of clean examples is left, which is not "
        "the model's loss.",
        conflicts=other_attacks("mart"),
        notes={
            "micro_batches": "the attack is on the whole batch, and takes the memory of one",
            "mixed_precision": "the attack's passes run in 16 bits too; divergences are computed in float32",
            "sam": "the examples are made once, at the weights, and seen by both evaluations",
        },
        needs=("classes", "float inputs"),
        passes_through=lambda options: () if options.attacks else ("transform_batch",),
        cost=lambda options: Cost(
            forward=options.steps * options.attacks + 1,
            backward=options.steps * options.attacks + 1,
            time=(6 + 2 * options.steps * options.attacks) / 3,
            memory="one copy of the batch, activations of a second pass",
            batch_norm="statistics of clean and of perturbed examples in turn",
        ),
        state=lambda options: {"draws": Slot(dtype="int32")} if options.attacks else {},
    )

    def check_model(self) -> None:
        super().check_model()
        check_inputs("mart", self)

    def transform_batch(self, batch: Batch) -> Batch:
        if self.strategy_options["mart"].attacks:
            _seam.ensure_built(self, batch.x)

            def loss_at(x: Any) -> tf.Tensor:
                return _seam.probe(self, x, batch.y, batch.sample_weight, training=False)

            batch = batch._replace(extra={**batch.extra, "mart": pgd("mart", self, batch, loss_at)})
        return super().transform_batch(batch)

    def compute_objective(self, batch: Batch) -> Objective:
        beta = value_at(self.strategy_options["mart"].beta, self.optimizer.iterations)
        _seam.ensure_built(self, batch.x)  # There is no random state before.
        random_state = _seam.random_state(self)
        objective = super().compute_objective(batch._replace(x=batch.extra.get("mart", batch.x)))
        with _seam.same_masks(random_state):
            clean = _seam.forward(self, batch.x, training=True)
        added = {}
        for output in class_outputs("mart", self, clean):
            log_p, log_q, labels = (
                output.by_question(values)
                for values in (
                    output.log_probabilities(clean),
                    output.log_probabilities(objective.y_pred),
                    output.targets(batch.y, clean),
                )
            )
            target = tf.one_hot(tf.argmax(labels, axis=-1), labels.shape[-1])
            values = margin_loss(log_q, target) + beta * weighted_divergence(log_p, log_q, target)
            added[output.place] = tf.reduce_mean(values, axis=-1)
        share = share_of_loss(self, clean, batch.sample_weight, added)
        return objective._replace(loss=objective.loss + tf.cast(share, objective.loss.dtype))
