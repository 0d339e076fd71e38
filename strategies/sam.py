"""Sharpness-aware minimization (SAM): descend the gradient of the worst point near the weights.

    e = rho * g / ||g||                  g = dL(w)/dw
    adaptive (ASAM):                     e = rho * T^2 g / ||T g||,   T = |w| + eta, entry by entry
    descended is dL(w + e)/dw, taken at w

Two evaluations a step, twice the time of a plain one; with `interval` = k a fraction 1/k more. One copy of the
weights is kept during the second. Loss, predictions, metrics and batch-norm statistics are those of the first, at w.
On Keras 3 both evaluations have the same dropout masks; on Keras 2, where the state of dropout cannot be reached,
each draws its own. The ascent is along the gradient of the whole batch, summed over replicas, neither clipped nor
accumulated: with `gradient_accumulation` there is one for each micro-batch.

Foret et al., "Sharpness-Aware Minimization", ICLR 2021, equation 2, https://arxiv.org/abs/2010.01412; Kwon et al.,
"ASAM", ICML 2021, equation 7, https://arxiv.org/abs/2102.11600
"""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf
from pydantic import Field

from trainstep import _seam
from trainstep.declaration import Cost, Declaration, Slot, Stage, StrategyOptions
from trainstep.errors import ModelConflictError
from trainstep.gradients import Gradients, dense
from trainstep.registry import register
from trainstep.replicas import assign
from trainstep.schedules import is_always, scheduled, value_at
from trainstep.step import Batch, Evaluation, Strategy, summed_gradients
from trainstep.strategies._ascent import along, gradients_after


class SamOptions(StrategyOptions):
    """How far the ascent goes, and how often."""

    rho: scheduled(ge=0) = Field(
        default=0.05, description="Length of the ascent, in units of the weights, or a schedule of it; 0: none."
    )
    adaptive: bool = Field(default=False, description="Measure the length relative to each weight's size: ASAM.")
    eta: float = Field(
        default=0.01, ge=0, allow_inf_nan=False, description="Added to each weight's size, for those near 0; ASAM only."
    )
    interval: int = Field(default=1, ge=1, le=1_000_000, description="Steps, of which the first ascends.")

    @property
    def ascends(self) -> bool:
        """Whether any step does."""
        return not is_always(self.rho, 0)


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
        stage=Stage.ASCENT,
        summary="SAM and ASAM: descend the gradient of the worst point near the weights.",
        reference="Foret et al., ICLR 2021, https://arxiv.org/abs/2010.01412",
        options=SamOptions,
        neutral={"rho": 0.0},
        notes={
            "adversarial": "the examples are made once, at the weights, and seen by both evaluations",
            "gradient_accumulation": "ascends for each micro-batch",
            "gradient_clipping": "what is clipped is the gradient that is descended, never the ascent",
            "micro_batches": "ascends for each part of the batch",
        },
        passes_through=lambda options: () if options.ascends else ("compute_gradients",),
        cost=lambda options: (
            Cost(forward=1, backward=1, time=1 + 1 / options.interval, memory="one copy of the trainable weights")
            if options.ascends
            else Cost()
        ),
        state=lambda options: {"steps": Slot(dtype="int32")} if options.ascends and options.interval > 1 else {},
    )

    def check_model(self) -> None:
        super().check_model()
        options = self.strategy_options["sam"]
        replicas = self.distribute_strategy.num_replicas_in_sync
        if options.ascends and options.interval > 1 and replicas > 1:
            raise ModelConflictError(
                f"sam: interval={options.interval} needs one replica, and there are {replicas}: TensorFlow cannot "
                "sum over replicas in some steps only. Leave interval at 1."
            )

    def compute_gradients(self, batch: Batch) -> Evaluation:
        options = self.strategy_options["sam"]
        if not options.ascends:
            return super().compute_gradients(batch)
        _seam.ensure_built(self, batch.x)  # There are no weights, no random state and no state of ours before.
        if not self.trainable_variables:
            return super().compute_gradients(batch)
        random_state = _seam.random_state(self)
        evaluation = super().compute_gradients(batch)
        present = [index for index, gradient in enumerate(evaluation.gradients) if gradient is not None]

        def ascended() -> list[tf.Tensor]:
            found = self._gradients_nearby(batch, evaluation, random_state)
            return [dense(found[index]) for index in present]

        def plain() -> list[tf.Tensor]:
            return [dense(evaluation.gradients[index]) for index in present]

        if options.interval == 1:
            chosen = ascended()
        else:
            steps = self.strategy_state["sam"]["steps"]
            count = tf.convert_to_tensor(steps)
            assign([(steps, count + 1)])
            chosen = tf.cond(count % options.interval == 0, ascended, plain)
        gradients: Gradients = [None] * len(evaluation.gradients)
        for index, gradient in zip(present, chosen, strict=True):
            gradients[index] = gradient
        return evaluation._replace(gradients=gradients)

    def _gradients_nearby(self, batch: Batch, evaluation: Evaluation, random_state: Any) -> Gradients:
        options, objective = self.strategy_options["sam"], super().compute_objective
        everywhere = summed_gradients(self, batch, evaluation)
        rho = value_at(options.rho, self.optimizer.iterations)
        steps = ascent(self.trainable_variables, everywhere, rho, options)

        def loss_nearby() -> tf.Tensor:
            return objective(batch).loss

        return gradients_after(self, steps, loss_nearby, random_state)
