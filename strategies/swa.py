"""Stochastic weight averaging (SWA): judge the model by the mean of its weights along the way.

    average = mean of w after the updates start, start + period, start + 2 period, ...

One copy of the weights is kept, and one pass over them made in each period. Training itself is as without it:
`evaluate`, validation and `predict` take the mean, by option, as soon as there is one. Batch-norm statistics are
those of the weights, not of the mean; the paper makes a pass over the data for them.

Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", UAI 2018, algorithm 1,
https://arxiv.org/abs/1803.05407
"""

import contextlib
from typing import Literal

import tensorflow as tf
from pydantic import Field

from trainstep.declaration import Cost, Declaration, Slot, Stage, StrategyOptions
from trainstep.registry import register
from trainstep.replicas import assign, conditional
from trainstep.state import has_state
from trainstep.step import Strategy, Update
from trainstep.strategies._averages import exchanged, move_average


class SwaOptions(StrategyOptions):
    """When averaging begins, how often the mean takes in the weights, and what it is for."""

    start: int = Field(default=1, ge=1, lt=2**31, description="The update after which the mean begins.")
    period: int = Field(default=1, ge=1, lt=2**31, description="Updates between two weights of the mean.")
    evaluate_with: Literal["average", "weights"] = Field(
        default="average", description="What `evaluate`, validation and `predict` take."
    )


@register
class Swa(Strategy):
    """Acts after the optimizer, and counts updates, not batches."""

    declaration = Declaration(
        name="swa",
        stage=Stage.AVERAGING,
        summary="Judge the model by the mean of its weights along the way.",
        reference="Izmailov et al., UAI 2018, https://arxiv.org/abs/1803.05407",
        options=SwaOptions,
        neutral={"evaluate_with": "weights"},
        notes={"gradient_accumulation": "start and period count updates, which are windows"},
        passes_through=lambda options: ("update_weights",) if options.evaluate_with == "weights" else (),
        cost=lambda options: Cost(
            memory="one copy of the trainable weights",
            batch_norm="none: the mean is judged with the statistics of the weights",
        ),
        state=lambda options: {
            "average": Slot(per_weight=True),
            "updates": Slot(dtype="int32"),
            "averaged": Slot(dtype="int32"),
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
            assign([(state["averaged"], averaged + 1)])

        def wait() -> None:
            pass

        due = (count >= options.start) & ((count - options.start) % options.period == 0)
        conditional(due, take_in, wait, ())

    def evaluation_weights(self) -> contextlib.AbstractContextManager[None]:
        if self.strategy_options["swa"].evaluate_with == "weights" or not has_state(self):
            return super().evaluation_weights()
        state = self.strategy_state["swa"]
        if int(state["averaged"].numpy()) == 0:
            return super().evaluation_weights()
        return exchanged(self.trainable_variables, state["average"])
