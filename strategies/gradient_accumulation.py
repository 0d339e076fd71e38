"""Gradient accumulation: one update from the gradients of several batches.

    G = sum_i n_i * g_i / sum_i n_i        g_i the mean gradient of micro-batch i, n_i its examples
    w = w - learning_rate * G              after every `steps` micro-batches

K micro-batches give the update of the one batch they make up, unequal ones too. Each costs a plain
step less the optimizer's part; one copy of the weights is kept. Batch norm sees micro-batches: it
normalizes with the statistics of each and updates its moving averages `steps` times per update.

Ott et al., "Scaling Neural Machine Translation", WMT 2018, https://arxiv.org/abs/1806.00187 (section 3.2)
"""

import weakref
from collections.abc import Callable
from typing import Any, Literal

import tensorflow as tf
from pydantic import Field

from trainstep import _seam
from trainstep.declaration import Cost, Declaration, Slot, Stage, StrategyOptions
from trainstep.errors import ModelConflictError
from trainstep.gradients import dense, scale
from trainstep.registry import register
from trainstep.replicas import add_scaled, assign, assign_add, conditional, run_in_replicas
from trainstep.state import state_of
from trainstep.step import Strategy, Update


class GradientAccumulationOptions(StrategyOptions):
    """How many micro-batches make an update, and how they are weighed."""

    steps: int = Field(default=4, ge=1, description="Micro-batches per update; 1 accumulates nothing.")
    weighting: Literal["samples", "batches"] = Field(
        default="samples",
        description="What weighs the same: every example (every unmasked entry of a masked output), or every batch.",
    )
    reduction: Literal["mean", "sum"] = Field(
        default="mean", description="The mean over the window, or that times the number of micro-batches taken."
    )
    last_window: Literal["apply", "carry"] = Field(
        default="apply",
        description="A window not full when an epoch of `fit` ends: update from what is there, or carry it on.",
    )


_present: weakref.WeakKeyDictionary[Any, list[bool]] = weakref.WeakKeyDictionary()
"""Which weights had a gradient in the step traced last: one without must not be decayed at the end of an epoch."""


@register
class GradientAccumulation(Strategy):
    """Keeps gradients from the optimizer until the window is full: its slots, schedules and count do not move."""

    declaration = Declaration(
        name="gradient_accumulation",
        stage=Stage.ACCUMULATION,
        summary="One update from several batches: the gradient of a batch too large for memory.",
        reference="Ott et al., WMT 2018, https://arxiv.org/abs/1806.00187",
        options=GradientAccumulationOptions,
        neutral={"steps": 1},
        replaces={
            "gradient_accumulation_steps": "Keep the strategy and drop the optimizer's argument: the optimizer's own "
            "loses the last window, and counts micro-batches in its schedules."
        },
        notes={
            "mixed_precision": "the loss scale moves between windows; a gradient that is not finite drops its window"
        },
        passes_through=lambda options: ("update_weights",) if options.steps == 1 else (),
        cost=lambda options: (
            Cost(
                memory="one copy of the trainable weights",
                batch_norm="normalizes each micro-batch by itself; moving averages move once per micro-batch",
            )
            if options.steps > 1
            else Cost()
        ),
        state=lambda options: (
            {}
            if options.steps == 1
            else {
                "gradients": Slot(per_weight=True),
                "samples": Slot(),
                "count": Slot(dtype="int32"),
            }
        ),
    )

    def update_weights(self, update: Update) -> None:
        options = self.strategy_options["gradient_accumulation"]
        if options.steps == 1:
            super().update_weights(update)
            return
        if options.weighting == "samples" and _seam.sums_its_loss(self):
            raise ModelConflictError(
                "gradient_accumulation takes the mean over the examples of a window, and the loss is a sum "
                "(reduction='sum'). Use weighting='batches', reduction='sum', which adds up."
            )
        state, hand_on = self.strategy_state["gradient_accumulation"], super().update_weights
        weight = update.terms if options.weighting == "samples" else tf.ones(())  # Summed: samples, or count.
        present = _present[self] = [gradient is not None for gradient in update.gradients]
        pairs = zip(state["gradients"], update.gradients, strict=True)
        add_scaled([(total, dense(gradient)) for total, gradient in pairs if gradient is not None], weight)
        assign_add([(state["samples"], update.terms), (state["count"], 1)])

        # Functions with names: AutoGraph, which Keras 2 uses, cannot tell two lambdas in one line apart.
        def apply() -> None:
            self._apply_window(present, hand_on)

        def wait() -> None:
            pass  # Not an ellipsis, which AutoGraph cannot take.

        conditional(tf.convert_to_tensor(state["count"]) >= options.steps, apply, wait, ())

    def finish_epoch(self) -> None:
        options, hand_on = self.strategy_options["gradient_accumulation"], super().update_weights
        if options.steps > 1 and options.last_window == "apply":
            state = self.strategy_state["gradient_accumulation"]
            if int(state["count"].numpy()) > 0:
                present = _present.get(self, [True] * len(state["gradients"]))
                run_in_replicas(self, "last_window", lambda: self._apply_window(present, hand_on))
        super().finish_epoch()  # What is inside has its last update of the epoch only now.

    def _apply_window(self, present: list[bool], hand_on: Callable[[Update], None]) -> None:
        options, state = self.strategy_options["gradient_accumulation"], self.strategy_state["gradient_accumulation"]
        samples, count = tf.convert_to_tensor(state["samples"]), tf.convert_to_tensor(state["count"])
        batches = tf.cast(count, tf.float32)
        # A window may hold nothing but masked entries.
        factor = tf.math.divide_no_nan(1.0, samples if options.weighting == "samples" else batches)
        if options.reduction == "sum":
            factor *= batches
        sums = [
            tf.convert_to_tensor(total) if there else None
            for total, there in zip(state["gradients"], present, strict=True)
        ]
        # Those of weights frozen since, too: what they had of this window must not be left for a later one.
        sums_of_all = state_of(self, frozen=True)["gradient_accumulation"]["gradients"]
        everything = [*sums_of_all, state["samples"], state["count"]]
        assign([(variable, tf.zeros(variable.shape, variable.dtype)) for variable in everything])
        # Scaled only when the accumulators hold zeros: then nobody else holds the sums, and they are scaled in place.
        with tf.control_dependencies([tf.convert_to_tensor(total) for total in state["gradients"]]):
            mean = scale(sums, factor)
        hand_on(Update(mean, samples))
