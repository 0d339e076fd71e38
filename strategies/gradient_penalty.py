"""Gradient penalty (double backpropagation): keep the loss flat around each example.

    loss = L + weight * mean_i ||dl_i/dx_i||^2        l_i: the loss of example i; over all its floating inputs

The gradient to the input is taken once more for the gradient to the weights: a step costs about twice a plain one,
and the activations of both passes are kept. Under `mixed_precision` the inner gradient goes through the loss scale
too.

Drucker and LeCun, "Improving generalization performance using double backpropagation", IEEE Transactions on Neural
Networks 1992, https://doi.org/10.1109/72.165600
"""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf
from pydantic import Field

from trainstep import _seam
from trainstep.declaration import Cost, Declaration, Stage, StrategyOptions
from trainstep.gradients import differentiate
from trainstep.registry import register
from trainstep.step import Batch, Objective, Strategy
from trainstep.strategies._adversaries import Inputs
from trainstep.strategies._attacks import attackable, check_inputs


class GradientPenaltyOptions(StrategyOptions):
    """How much of it there is, and of which inputs."""

    weight: float = Field(
        default=0.1,
        ge=0,
        allow_inf_nan=False,
        description="Weight of the penalty, in units of the input squared; 0: none.",
    )
    inputs: Inputs = None


def squared_norms(gradients: Sequence[Any]) -> tf.Tensor:
    """Return for each example the squared L2 norm over all `gradients`, each (batch, ...); a None counts as zero.

    Returns:
        float32 (batch,); a zero where all are None.
    """
    present = [tf.cast(gradient, tf.float32) for gradient in gradients if gradient is not None]
    norms = [tf.reduce_sum(tf.square(g), axis=list(range(1, g.shape.rank))) for g in present]
    return tf.add_n(norms) if norms else tf.zeros((1,))  # The loss may depend on no input.


@register
class GradientPenalty(Strategy):
    """Adds to the loss what the batch, as it is to be trained on, makes of it."""

    declaration = Declaration(
        name="gradient_penalty",
        stage=Stage.OBJECTIVE,
        summary="Double backpropagation: penalize the gradient of the loss with respect to the input.",
        reference="Drucker and LeCun, IEEE TNN 1992, https://doi.org/10.1109/72.165600",
        options=GradientPenaltyOptions,
        neutral={"weight": 0.0},
        needs=("float inputs",),
        notes={"adversarial": "the gradient is that at the examples the attack made"},
        passes_through=lambda options: ("compute_objective",) if options.weight == 0 else (),
        cost=lambda options: (
            Cost(backward=1, time=2.0, memory="activations of two passes") if options.weight else Cost()
        ),
    )

    def check_model(self) -> None:
        super().check_model()
        check_inputs("gradient_penalty", self)

    def compute_objective(self, batch: Batch) -> Objective:
        options = self.strategy_options["gradient_penalty"]
        if options.weight == 0:
            return super().compute_objective(batch)
        _seam.ensure_built(self, batch.x)
        able = attackable(batch.x, self, options.inputs)
        tensors = tf.nest.flatten(batch.x)
        chosen = [tf.identity(tensor) for tensor, ok in zip(tensors, able, strict=True) if ok]
        # TensorFlow's graph optimizer sums in an order that depends on the names of operations: within one scope it is
        # the same whatever the model is called.
        with tf.name_scope("gradient_penalty"), tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(chosen)
            moving = iter(chosen)
            x = tf.nest.pack_sequence_as(
                batch.x, [next(moving) if ok else tensor for tensor, ok in zip(tensors, able, strict=True)]
            )
            objective = super().compute_objective(batch._replace(x=x))
        gradients = differentiate(self, tape, objective.loss, chosen)
        penalty = tf.reduce_sum(squared_norms(gradients))
        if not _seam.sums_its_loss(self):
            # The loss is this replica's share of a mean: (1 / examples) / replicas of the sum over its examples.
            examples = tf.cast(_seam.num_examples(batch.x), tf.float32)
            penalty *= tf.distribute.get_strategy().num_replicas_in_sync * examples
        return objective._replace(loss=objective.loss + tf.cast(options.weight * penalty, objective.loss.dtype))
