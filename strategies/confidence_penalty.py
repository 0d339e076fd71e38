"""Confidence penalty: keep a classifier from putting all its probability on one class.

    loss = L - beta * min(H(p), threshold),   H(p) = -sum_c p_c log p_c      p: what the model predicts for an example

Up to a constant that is the paper's hinge, L + beta * max(0, threshold - H(p)), and without a threshold its equation 3.

One pass over the predictions; no extra evaluation. The entropy of an output is weighed as its loss is; of several
units with a loss of two classes each it is the mean, as the loss is. An output that is no class is left as it is.

Pereyra et al., "Regularizing Neural Networks by Penalizing Confident Output Distributions", ICLR 2017 workshop,
equation 3 and section 3.2, https://arxiv.org/abs/1701.06548
"""

from typing import Annotated

import tensorflow as tf
from pydantic import Field

from trainstep.declaration import Declaration, Stage, StrategyOptions
from trainstep.registry import register
from trainstep.schedules import Scheduled, Within, is_always, value_at
from trainstep.step import Batch, Objective, Strategy
from trainstep.strategies._classes import class_outputs, entropy, share_of_loss


class ConfidencePenaltyOptions(StrategyOptions):
    """How much of it there is."""

    beta: Annotated[Scheduled, Within(ge=0)] = Field(
        default=0.1, description="Weight of the entropy, in loss per nat, or a schedule of it; 0: none."
    )
    threshold: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Entropy in nats from which on a prediction is rewarded no further; None: no limit.",
    )


def capped_entropy(log_p: tf.Tensor, threshold: float | None) -> tf.Tensor:
    """Return the entropy, at most `threshold`, of logarithms of probabilities (..., classes), in nats: (...)."""
    values = entropy(log_p)
    return values if threshold is None else tf.minimum(values, threshold)


@register
class ConfidencePenalty(Strategy):
    """Adds to the loss what the predictions behind it make of it."""

    declaration = Declaration(
        name="confidence_penalty",
        stage=Stage.OBJECTIVE,
        summary="Reward a classifier for the entropy of what it predicts.",
        reference="Pereyra et al., ICLR 2017 workshop, https://arxiv.org/abs/1701.06548",
        options=ConfidencePenaltyOptions,
        neutral={"beta": 0.0},
        needs=("classes",),
        passes_through=lambda options: ("compute_objective",) if is_always(options.beta, 0) else (),
    )

    def compute_objective(self, batch: Batch) -> Objective:
        options = self.strategy_options["confidence_penalty"]
        objective = super().compute_objective(batch)
        if is_always(options.beta, 0):
            return objective
        values = {}
        for output in class_outputs("confidence_penalty", self, objective.y_pred):
            log_p = output.by_question(output.log_probabilities(objective.y_pred))
            values[output.place] = tf.reduce_mean(capped_entropy(log_p, options.threshold), axis=-1)
        reward = share_of_loss(self, objective.y_pred, batch.sample_weight, values)
        penalty = value_at(options.beta, self.optimizer.iterations) * reward
        return objective._replace(loss=objective.loss - tf.cast(penalty, objective.loss.dtype))
