"""Exponential moving average (EMA) of the weights: judge the model by a smoothed copy of them.

    average = d * average + (1 - d) * w        after every update
    d = decay, or 1/2 ** (1 / half_life)
    with `warmup`: d = min(d, (1 + t) / (10 + t)), t updates done before

One copy of the weights is kept, and one pass over them made after each update. Training itself is as without it:
`evaluate`, validation, `predict` and `export` take the average, by option. It starts as the weights before the first
update. Batch-norm statistics are averaged alike, or those of the weights, or estimated anew, by option.

Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", SIAM 1992,
https://doi.org/10.1137/0330046; the warm-up is that of `tf.train.ExponentialMovingAverage`.
"""

import contextlib
from collections.abc import Sequence
from typing import Literal

import tensorflow as tf
from pydantic import Field, model_validator

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
    begin_average,
    keep_estimated,
    move_average,
    move_statistics,
    statistics_slots,
)


class EmaOptions(StrategyOptions):
    """How long the average remembers, and what it is for."""

    decay: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="What is kept of the average in each update; None: 0.999 without half_life.",
    )
    half_life: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="Instead: updates after which half of the average is new."
    )
    warmup: bool = Field(default=True, description="Forget faster at first, when there is little to average.")
    evaluate_with: Literal["average", "weights"] = Field(
        default="average", description="What `evaluate`, validation and `predict` take."
    )
    batch_norm: BatchNorm = batch_norm_option("average")

    @model_validator(mode="after")
    def _one(self) -> "EmaOptions":
        if self.decay is not None and self.half_life is not None:
            raise ValueError(f"give decay or half_life, not both: {self.decay:g} and {self.half_life:g}")
        return self

    @property
    def kept(self) -> float:
        """What is kept of the average in each update, once warmed up."""
        if self.half_life is not None:
            return 0.5 ** (1 / self.half_life)
        return 0.999 if self.decay is None else self.decay


@register
class Ema(Strategy):
    """Acts after the optimizer, and counts updates, not batches."""

    declaration = Declaration(
        name="ema",
        stage=Stage.AVERAGING,
        summary="Judge the model by an exponential moving average of its weights.",
        reference="Polyak and Juditsky, SIAM 1992, https://doi.org/10.1137/0330046",
        options=EmaOptions,
        neutral={"decay": 0.0},
        conflicts={"swa": "both are averages of the weights, and a model is judged by one. Take one of them."},
        replaces={"use_ema": "Drop the optimizer's argument, whose average would take the place of the weights."},
        notes={"gradient_accumulation": "averages after updates, which are windows"},
        passes_through=lambda options: ("update_weights",) if options.kept == 0 else (),
        cost=lambda options: Cost(
            memory="one copy of the trainable weights" if options.kept else "none",
            batch_norm=f"none in training; the average is judged with: {options.batch_norm}"
            if options.kept
            else "none",
        ),
        state=lambda options: (
            {"average": Slot(per_weight=True), "updates": Slot(dtype="int32"), **statistics_slots(options.batch_norm)}
            if options.kept
            else {}
        ),
    )

    def update_weights(self, update: Update) -> None:
        options = self.strategy_options["ema"]
        if options.kept == 0:
            super().update_weights(update)
            return
        state, weights = self.strategy_state["ema"], self.trainable_variables

        averaged = options.batch_norm == "average"

        def begin() -> None:
            begin_average(state["average"], weights)
            if averaged:
                move_statistics(state["statistics"], _seam.statistics_of(self), tf.ones(()))

        def wait() -> None:
            pass

        count = tf.convert_to_tensor(state["updates"])
        conditional(count == 0, begin, wait, ())
        super().update_weights(update)
        kept, done = tf.constant(options.kept), tf.cast(count, tf.float32)
        if options.warmup:
            kept = tf.minimum(kept, (1 + done) / (10 + done))
        move_average(state["average"], weights, 1 - kept)
        if averaged:
            move_statistics(state["statistics"], _seam.statistics_of(self), 1 - kept)
        assign([(state["updates"], count + 1)])

    def evaluation_weights(self) -> contextlib.AbstractContextManager[None]:
        if not self._is_judged_by_the_average():
            return super().evaluation_weights()
        return average_for_evaluation(self, self.strategy_state["ema"])

    def keep_statistics(self, statistics: Sequence[tf.Tensor]) -> None:
        if not self._is_judged_by_the_average():
            super().keep_statistics(statistics)
            return
        keep_estimated("ema", self.strategy_state["ema"], statistics)

    def _is_judged_by_the_average(self) -> bool:
        options = self.strategy_options["ema"]
        if options.kept == 0 or options.evaluate_with == "weights" or not has_state(self):
            return False
        return int(self.strategy_state["ema"]["updates"].numpy()) > 0
