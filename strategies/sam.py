"""Sharpness-aware minimization (SAM): descend the gradient of the worst point near the weights.

    e = rho * g / ||g||                  g = dL(w)/dw
    adaptive (ASAM):                     e = rho * T^2 g / ||T g||,   T = |w| + eta, entry by entry
    descended is dL(w + e)/dw, taken at w

Two evaluations a step, twice the time of a plain one; with `interval` = k a fraction 1/k more. One copy of the
weights is kept during the second. Loss, predictions, metrics and batch-norm statistics are those of the first, at w.
On Keras 3 both evaluations have the same dropout masks; on Keras 2, where the state of dropout cannot be reached,
each draws its own. The ascent is along the gradient of the batch, summed over replicas, neither clipped nor
accumulated. Where `micro_batches` cuts the batch there is one ascent for each part (the paper's m-sharpness), or with
`per="window"` one along the gradient of all of them.

With `adaptive` all weights are scaled by their size, biases too. The authors' code leaves biases as they are (T = 1).

Foret et al., "Sharpness-Aware Minimization", ICLR 2021, equation 2, https://arxiv.org/abs/2010.01412; Kwon et al.,
"ASAM", ICML 2021, equation 7, https://arxiv.org/abs/2102.11600
"""

from collections.abc import Sequence
from typing import Any, Literal

import tensorflow as tf
from pydantic import Field

from trainstep import _seam
from trainstep.declaration import Cost, Declaration, Slot, Stage
from trainstep.gradients import Gradients, dense
from trainstep.registry import register
from trainstep.replicas import assign, choose
from trainstep.schedules import value_at
from trainstep.step import Batch, Evaluation, Strategy, summed_gradients
from trainstep.strategies._ascent import AscentOptions, Beginning, along, beginning, gradients_after, with_gradients

_INSIDE = (
    "both take a step's gradients apart, and SAM would ascend along a part of them. With per='window' it evaluates "
    "what PCGrad makes of a batch, at the weights and where it ascends to."
)
_WINDOW = (
    "an ascent along the gradient of a whole window (per='window') would need its batches twice, and they are gone "
    "by then. Take the window as one batch, and cut it with 'micro_batches'."
)
_CONFLICTS = {"batch": {"pcgrad": _INSIDE}, "window": {"gradient_accumulation": _WINDOW}}


class SamOptions(AscentOptions):
    """How far the ascent goes, and how often."""

    adaptive: bool = Field(default=False, description="Measure the length relative to each weight's size: ASAM.")
    eta: float = Field(
        default=0.01, ge=0, allow_inf_nan=False, description="Added to each weight's size, for those near 0; ASAM only."
    )
    interval: int = Field(default=1, ge=1, le=1_000_000, description="Steps, of which the first ascends.")
    per: Literal["batch", "window"] = Field(
        default="batch",
        description="What an ascent is for, where a batch is cut in parts: each part, or all of them together.",
    )


def ascent(weights: Sequence[Any], gradients: Gradients, rho: float | tf.Tensor, options: SamOptions) -> Gradients:
    """Return what is to be added to each weight; None where it has no gradient."""
    if not options.adaptive:
        return along(gradients, rho)
    sizes = [tf.abs(tf.convert_to_tensor(weight)) + options.eta for weight in weights]

    def times_sizes(values: Gradients) -> Gradients:
        return [None if v is None else dense(v) * tf.cast(size, v.dtype) for v, size in zip(values, sizes, strict=True)]

    return times_sizes(along(times_sizes(gradients), rho))


@register
class Sam(Strategy):
    """Evaluates at the weights, and once more where the loss is worst near them."""

    declaration = Declaration(
        name="sam",
        stage=lambda options: Stage.OUTER_ASCENT if options.per == "window" else Stage.ASCENT,
        summary="SAM and ASAM: descend the gradient of the worst point near the weights.",
        reference="Foret et al., ICLR 2021, https://arxiv.org/abs/2010.01412",
        options=SamOptions,
        neutral={"rho": 0.0},
        conflicts=lambda options: {**_CONFLICTS[options.per]} if options.ascends else {},
        notes={
            "adversarial": "the examples are made once, at the weights, and seen by both evaluations",
            "gradient_accumulation": "ascends for each of the batches",
            "gradient_clipping": "what is clipped is the gradient that is descended, never the ascent",
            "micro_batches": "ascends for each part of the batch, or along the gradient of the whole: per='window'",
        },
        passes_through=lambda options: () if options.ascends else ("compute_gradients",),
        cost=lambda options: (
            Cost(forward=1, backward=1, time=1 + 1 / options.interval, memory="one copy of the trainable weights")
            if options.ascends
            else Cost()
        ),
        state=lambda options: {"steps": Slot(dtype="int32")} if options.ascends and options.interval > 1 else {},
    )

    def compute_gradients(self, batch: Batch) -> Evaluation:
        options, evaluate = self.strategy_options["sam"], super().compute_gradients
        if not options.ascends:
            return super().compute_gradients(batch)
        _seam.ensure_built(self, batch.x)  # There are no weights, no random state and no state of ours before.
        if not self.trainable_variables:
            return super().compute_gradients(batch)
        start = beginning(self)
        evaluation = super().compute_gradients(batch)
        present = [index for index, gradient in enumerate(evaluation.gradients) if gradient is not None]

        # What differs between replicas is an argument, see `choose`.
        def ascended(batch: Batch, evaluation: Evaluation, start: Beginning) -> list[tf.Tensor]:
            everywhere = summed_gradients(self, batch, evaluation)
            rho = value_at(options.rho, self.optimizer.iterations)
            steps = ascent(self.trainable_variables, everywhere, rho, options)

            found = gradients_after(self, batch, steps, evaluate, start)
            return [dense(found[index]) for index in present]

        def plain(_batch: Batch, evaluation: Evaluation, _start: Beginning) -> list[tf.Tensor]:
            return [dense(evaluation.gradients[index]) for index in present]

        batch = batch._replace(extra=dict(batch.extra))  # TensorFlow cannot take a read-only mapping apart.
        if options.interval == 1:
            chosen = ascended(batch, evaluation, start)
        else:
            steps = self.strategy_state["sam"]["steps"]
            count = tf.convert_to_tensor(steps)
            assign([(steps, count + 1)])
            chosen = choose(count % options.interval == 0, ascended, plain, (batch, evaluation, start))
        gradients = with_gradients(chosen, present, len(evaluation.gradients))
        return evaluation._replace(gradients=gradients)
