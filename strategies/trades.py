"""TRADES: be right on the examples, and say the same around them.

    loss = L(w, x, y) + beta * KL(p(x) || p(x'))       p: what the model predicts; gradients go through both
    x' = argmax over ||x' - x|| <= epsilon of KL(p(x) || p(x')), approximately, by `steps` of ascent

The attack needs no labels. With n steps a training step costs (7 + 2 n) / 3 of a plain one: a forward pass for p(x), n
forward passes with a backward pass to the input, and forward and backward passes on x and on x'. One copy of the batch
and the activations of both are kept. The attack is in inference mode and leaves no trace; both passes that are trained
on are in training mode, and batch norm counts both, in turn. On Keras 3 these have the same dropout masks, so that what
differs is the input alone; on Keras 2, where the state of dropout cannot be reached, each draws its own.

Zhang et al., "Theoretically Principled Trade-off between Robustness and Accuracy", ICML 2019, algorithm 1,
https://arxiv.org/abs/1901.08573
"""

from typing import Annotated, Any

import tensorflow as tf
from pydantic import Field

from trainstep import _seam
from trainstep.declaration import Cost, Declaration, Slot, Stage
from trainstep.registry import register
from trainstep.schedules import Scheduled, Within, is_always, value_at
from trainstep.step import Batch, Objective, Strategy
from trainstep.strategies._adversaries import PgdOptions, other_attacks, pgd
from trainstep.strategies._attacks import check_inputs
from trainstep.strategies._classes import mean_divergence


class TradesOptions(PgdOptions):
    """The attack, and what its divergence weighs."""

    beta: Annotated[Scheduled, Within(ge=0)] = Field(
        default=6.0, description="Weight of the divergence, in loss per nat, or a schedule of it; 0: none."
    )

    @property
    def acts(self) -> bool:
        """Whether any step differs from a plain one: the divergence of an example from itself is none."""
        return self.attacks and not is_always(self.beta, 0)


def _cost(options: TradesOptions) -> Cost:
    if not options.acts:
        return Cost()
    return Cost(
        forward=options.steps + 2,
        backward=options.steps + 1,
        time=(7 + 2 * options.steps) / 3,
        memory="one copy of the batch, activations of a second pass",
        batch_norm="statistics of clean and of perturbed examples in turn",
    )


@register
class Trades(Strategy):
    """Makes the examples once, outside of the objective; adds to the loss how far predictions there are off."""

    declaration = Declaration(
        name="trades",
        stage=Stage.ATTACK,
        summary="TRADES: the loss of clean examples, and the divergence of predictions near them.",
        reference="Zhang et al., ICML 2019, https://arxiv.org/abs/1901.08573",
        options=TradesOptions,
        neutral={"beta": 0.0},
        conflicts=other_attacks("trades"),
        notes={
            "micro_batches": "the attack is on the whole batch, and takes the memory of one",
            "mixed_precision": "the attack's passes run in 16 bits too; divergences are computed in float32",
            "sam": "the examples are made once, at the weights, and seen by both evaluations",
        },
        needs=("classes", "float inputs"),
        passes_through=lambda options: () if options.acts else ("transform_batch", "compute_objective"),
        cost=_cost,
        state=lambda options: {"draws": Slot(dtype="int32")} if options.acts else {},
    )

    def check_model(self) -> None:
        super().check_model()
        check_inputs("trades", self)

    def transform_batch(self, batch: Batch) -> Batch:
        if self.strategy_options["trades"].acts:
            batch = batch._replace(extra={**batch.extra, "trades": self._worst_examples(batch)})
        return super().transform_batch(batch)

    def compute_objective(self, batch: Batch) -> Objective:
        if "trades" not in batch.extra:
            return super().compute_objective(batch)
        random_state = _seam.random_state(self)
        objective = super().compute_objective(batch)
        with _seam.same_masks(random_state):
            moved = _seam.forward(self, batch.extra["trades"], training=True)
        robust = mean_divergence("trades", self, objective.y_pred, moved, batch.sample_weight)
        beta = value_at(self.strategy_options["trades"].beta, self.optimizer.iterations)
        return objective._replace(loss=objective.loss + tf.cast(beta * robust, objective.loss.dtype))

    def _worst_examples(self, batch: Batch) -> Any:
        _seam.ensure_built(self, batch.x)

        def predicted() -> Any:
            return _seam.forward(self, batch.x, training=False)

        clean = _seam.without_trace(self, predicted, training=False)

        def divergence_at(x: Any) -> tf.Tensor:
            def divergence() -> tf.Tensor:
                moved = _seam.forward(self, x, training=False)
                return mean_divergence("trades", self, clean, moved, None, fixed=True)

            return _seam.without_trace(self, divergence, training=False)

        return pgd("trades", self, batch, divergence_at)
