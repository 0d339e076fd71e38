"""Skip what is not finite: one bad batch costs its update, not the run.

    g finite:       w = w - learning_rate * g
    g not finite:   w = w, and the optimizer stays as it is; `max_consecutive` times in a row: an error

A batch-norm statistic that a batch made NaN or infinite goes back to what it was before that batch.
Costs one pass over the gradients and a copy of the statistics.

Micikevicius et al., "Mixed Precision Training", ICLR 2018, https://arxiv.org/abs/1710.03740: the
update is skipped where the gradient is not finite; here without a loss scale, for every dtype.
"""

from typing import Literal

import tensorflow as tf
from pydantic import Field

from trainstep import _seam
from trainstep.declaration import Cost, Declaration, Report, Slot, Stage, StrategyOptions
from trainstep.gradients import all_finite
from trainstep.registry import register
from trainstep.replicas import assign, conditional
from trainstep.step import Batch, Evaluation, Strategy, Update
from trainstep.strategies import _skips


class SkipNonfiniteOptions(StrategyOptions):
    """What to do about a gradient that is not finite."""

    action: Literal["skip", "raise"] = Field(
        default="skip", description="Leave the update out, or stop training at the first one."
    )
    max_consecutive: int = Field(default=50, ge=1, description="Skipped updates in a row that stop training.")

    @property
    def limit(self) -> int:
        """Skips in a row that stop training."""
        return 1 if self.action == "raise" else self.max_consecutive


def _explanation(options: SkipNonfiniteOptions) -> str:
    found = (
        "the gradient was not finite (action: raise)"
        if options.action == "raise"
        else f"the gradient was not finite {options.limit} updates in a row (max_consecutive)"
    )
    return (
        f"skip_nonfinite: {found}. The weights are those before it. Look for NaN or infinity in the data or the "
        "loss, or lower the learning rate."
    )


@register
class SkipNonfinite(Strategy):
    """Looks at what is about to reach the optimizer: of a whole window, where gradients are accumulated."""

    declaration = Declaration(
        name="skip_nonfinite",
        stage=Stage.LOSS_SCALING,
        summary="Leave out the update where the gradient is not finite; stop after too many.",
        reference="Micikevicius et al., ICLR 2018, https://arxiv.org/abs/1710.03740",
        options=SkipNonfiniteOptions,
        neutral=None,
        why_not_neutral="it reads each gradient, and TensorFlow then fuses what makes them in another way: rounding",
        notes={
            "gradient_accumulation": "one gradient that is not finite drops its window",
            "mixed_precision": "under float16 that skips already; this adds the batch-norm statistics",
        },
        cost=lambda options: Cost(
            time=1.0,
            memory="one copy of the batch-norm statistics",
            batch_norm="a statistic that a batch made NaN or infinite goes back to what it was before",
        ),
        state=lambda options: {"skips": Slot(dtype="int32")},
        reports=lambda options: {"skipped_updates": Report(over="sum")},
    )

    def compute_gradients(self, batch: Batch) -> Evaluation:
        _seam.ensure_built(self, batch.x)
        floating = [weight for weight in self.non_trainable_weights if tf.as_dtype(weight.dtype).is_floating]
        before = [tf.identity(weight) for weight in floating]
        evaluation = super().compute_gradients(batch)
        for weight, value in zip(floating, before, strict=True):
            weight.assign(tf.where(all_finite([tf.convert_to_tensor(weight)]), weight, value))
        return evaluation

    def update_weights(self, update: Update) -> None:
        options, skips = self.strategy_options["skip_nonfinite"], self.strategy_state["skip_nonfinite"]["skips"]
        hand_on = super().update_weights

        def apply(update: Update) -> None:
            hand_on(update)
            assign([(skips, _skips.after_update(skips, options.limit))])

        def skip(update: Update) -> None:
            del update
            self.record("skipped_updates", lambda: tf.ones(()))
            assign([(skips, _skips.after_skip(skips, options.limit, _explanation(options)))])

        conditional(all_finite(update.gradients), apply, skip, (update,))

    def check_progress(self) -> None:
        super().check_progress()
        options, state = self.strategy_options["skip_nonfinite"], self.strategy_state["skip_nonfinite"]
        _skips.check(state["skips"], options.limit, _explanation(options))
