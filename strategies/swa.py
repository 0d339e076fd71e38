"""Stochastic weight averaging (SWA): judge the model by the mean of its weights along the way.

    average = mean of w after the updates start, start + period, start + 2 period, ...

One copy of the weights is kept, and one pass over them made in each period. Training itself is as without it:
`evaluate`, validation, `predict` and `export` take the mean, by option, as soon as there is one. Batch-norm statistics
are estimated anew, as in the paper, by `trainstep.reestimate_batch_norm`; or averaged, or those of the weights.

Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", UAI 2018, algorithm 1,
https://arxiv.org/abs/1803.05407
"""

import contextlib
from collections.abc import Sequence
from typing import Literal

import tensorflow as tf
from pydantic import Field

from trainstep import _seam
from trainstep.declaration import Cost, Declaration, Slot, Stage, StrategyOptions
from trainstep.registry import register
from trainstep.replicas import assign, conditional
from trainstep.state import has_state
from trainstep.step import Strategy, Update
from trainstep.strategies._averages import (
    BatchNorm,
    average_for_evaluation,
    batch_norm_option,
    keep_estimated,
    move_average,
    move_statistics,
    statistics_slots,
)


class SwaOptions(StrategyOptions):
    """When averaging begins, how often the mean takes in the weights, and what it is for."""

    start: int = Field(default=1, ge=1, lt=2**31, description="The update after which the mean begins.")
    period: int = Field(default=1, ge=1, lt=2**31, description="Updates between two weights of the mean.")
    evaluate_with: Literal["average", "weights"] = Field(
        default="average", description="What `evaluate`, validation and `predict` take."
    )
    batch_norm: BatchNorm = batch_norm_option("reestimate")


@register
class Swa(Strategy):
    """Acts after the optimizer, and counts updates, not batches."""

    declaration = Declaration(
        name="swa",
        stage=Stage.AVERAGING,
        summary="Judge the model by the mean of its weights along the way.",
        reference="Izmailov et al., UAI 2018, https://arxiv.org/abs/1803.05407",
        options=SwaOptions,
        why_not_neutral="Training is as without it, to the bit, whatever the options: only what is judged differs.",
        replaces={"use_ema": "Drop the optimizer's argument, whose average would take the place of the weights."},
        notes={"gradient_accumulation": "start and period count updates, which are windows"},
        cost=lambda options: Cost(
            memory="one copy of the trainable weights",
            batch_norm=f"none in training; the mean is judged with: {options.batch_norm}",
        ),
        state=lambda options: {
            "average": Slot(per_weight=True),
            "updates": Slot(dtype="int32"),
            "averaged": Slot(dtype="int32"),
            **statistics_slots(options.batch_norm),
        },
    )

    def update_weights(self, update: Update) -> None:
        super().update_weights(update)
        options, state = self.strategy_options["swa"], self.strategy_state["swa"]
        count, averaged = [tf.convert_to_tensor(state[name]) for name in ("updates", "averaged")]
        count += 1
        assign([(state["updates"], count)])

        def take_in() -> None:
            share = 1 / tf.cast(averaged + 1, tf.float32)
            move_average(state["average"], self.trainable_variables, share)
            if options.batch_norm == "average":
                move_statistics(state["statistics"], _seam.statistics_of(self), share)
            assign([(state["averaged"], averaged + 1)])

        def wait() -> None:
            pass

        due = (count >= options.start) & ((count - options.start) % options.period == 0)
        conditional(due, take_in, wait, ())

    def evaluation_weights(self) -> contextlib.AbstractContextManager[None]:
        if not self._is_judged_by_the_mean():
            return super().evaluation_weights()
        return average_for_evaluation(self, self.strategy_state["swa"])

    def keep_statistics(self, statistics: Sequence[tf.Tensor]) -> None:
        if not self._is_judged_by_the_mean():
            super().keep_statistics(statistics)
            return
        keep_estimated("swa", self.strategy_state["swa"], statistics)

    def _is_judged_by_the_mean(self) -> bool:
        if self.strategy_options["swa"].evaluate_with == "weights" or not has_state(self):
            return False
        return int(self.strategy_state["swa"]["averaged"].numpy()) > 0
