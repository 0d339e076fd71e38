"""R-Drop: let two passes of one batch, with different masks of dropout, agree on what they predict.

    loss = 1/2 (L(y, p1) + L(y, p2)) + alpha/4 (KL(p1 || p2) + KL(p2 || p1))       mean over the examples

Half of what the paper minimizes, L(y, p1) + L(y, p2) + alpha/2 (...): so that `alpha` is the paper's, and the learning
rate and the regularizers those of a plain step. (Its authors' code has both, the sum and the mean.)

As in the paper the batch is repeated and passes once, at twice its size: from the first layer on that draws random
numbers, where the net is a graph of Keras's own layers up to there, and else from the input. So a step costs between
one plain one and two, and so many more activations are kept. Batch-norm statistics are updated once, by both halves;
before any dropout they are those of the batch itself. Regularizers count once. Predictions and metrics are of the
first half.

Wu et al., "R-Drop: Regularized Dropout for Neural Networks", NeurIPS 2021, equations 2 to 4 and algorithm 1,
https://arxiv.org/abs/2106.14448
"""

from typing import Annotated, Any

import keras
import tensorflow as tf
from pydantic import Field

from trainstep import _seam
from trainstep.declaration import Cost, Declaration, Stage, StrategyOptions
from trainstep.errors import ModelConflictError
from trainstep.registry import register
from trainstep.schedules import Scheduled, Within, is_always, value_at
from trainstep.step import Batch, Objective, Strategy
from trainstep.strategies._classes import mean_divergence, weighed


class RDropOptions(StrategyOptions):
    """How much the two passes are to agree."""

    alpha: Annotated[Scheduled, Within(ge=0)] = Field(
        default=1.0, description="Weight of the divergence, in loss per nat, or a schedule of it; 0: one pass."
    )


@register
class RDrop(Strategy):
    """Passes the batch repeated, and compares the halves of what comes out."""

    declaration = Declaration(
        name="r_drop",
        stage=Stage.OBJECTIVE,
        summary="R-Drop: two passes with different masks of dropout are to predict the same.",
        reference="Wu et al., NeurIPS 2021, https://arxiv.org/abs/2106.14448",
        options=RDropOptions,
        neutral={"alpha": 0.0},
        needs=("classes",),
        notes={
            "confidence_penalty": "the entropy is that of the first half",
            "sam": "the ascent is along the gradient of both passes",
        },
        passes_through=lambda options: ("compute_objective",) if is_always(options.alpha, 0) else (),
        cost=lambda options: (
            Cost()
            if is_always(options.alpha, 0)
            else Cost(
                forward=1,
                backward=1,
                time=2.0,
                memory="activations of twice the batch, from the first random layer on",
                batch_norm="statistics are updated once per step, by the batch and its repetition",
            )
        ),
    )

    def compute_objective(self, batch: Batch) -> Objective:
        alpha = self.strategy_options["r_drop"].alpha
        if is_always(alpha, 0):
            return super().compute_objective(batch)
        _check_keeps_no_state(self)
        # Of a sum that of both passes is their mean with halved weights.
        weights = weighed(self, batch, 0.5) if _seam.sums_its_loss(self) else batch.sample_weight
        twice = batch._replace(
            x=tf.nest.map_structure(_seam.repeated, batch.x),
            y=tf.nest.map_structure(_seam.repeated, batch.y),
            sample_weight=tf.nest.map_structure(_seam.repeated, weights),
            extra=tf.nest.map_structure(_seam.repeated, dict(batch.extra)),
        )
        objective = super().compute_objective(twice)
        first, second = (_half(objective.y_pred, which) for which in (0, 1))
        both = mean_divergence("r_drop", self, first, second, batch.sample_weight)
        both += mean_divergence("r_drop", self, second, first, batch.sample_weight)
        penalty = value_at(alpha, self.optimizer.iterations) / 4 * both
        return Objective(objective.loss + tf.cast(penalty, objective.loss.dtype), first)


def _half(y_pred: Any, which: int) -> Any:
    """Return the first or the second half of the examples, with their masks."""

    def of(output: Any) -> Any:
        if output is None:
            return None
        count = tf.shape(output)[0] // 2
        return _seam.with_mask(output[which * count :][:count], of(_seam.mask_of(output)))

    return tf.nest.map_structure(of, y_pred)


def _check_keeps_no_state(model: Any) -> None:
    for layer in _seam.layers_of(model):
        if isinstance(layer, keras.layers.RNN) and layer.stateful:
            raise ModelConflictError(
                f"r_drop passes a batch of twice the size, and the layer {layer.name!r} keeps a state for each example "
                "of one. Make it with stateful=False."
            )
