"""GSAM: descend the loss of the worst point near the weights, and what it exceeds the loss at the weights by.

    e = rho * g / ||g||                      g = dL(w)/dw
    g_p = dL(w + e)/dw,  g_t = g - (g . g_p / ||g_p||^2) * g_p      g_t: the part of g orthogonal to g_p
    descended is g_p - alpha * g_t, taken at w

The step along g_t leaves L(w + e) as it is, to first order, and raises L(w): the surrogate gap L(w + e) - L(w), a
measure of sharpness, closes. Two evaluations a step, twice the time of a plain one; one copy of the weights is kept
during the second. Loss, predictions, metrics and batch-norm statistics are those of the first, at w. On Keras 3 both
evaluations have the same dropout masks; on Keras 2, where the state of dropout cannot be reached, each draws its own.

Zhuang et al., "Surrogate Gap Minimization Improves Sharpness-Aware Training", ICLR 2022, algorithm 1,
https://arxiv.org/abs/2203.08065
"""

import tensorflow as tf
from pydantic import Field

from trainstep import _seam
from trainstep.declaration import Cost, Declaration, Stage
from trainstep.gradients import Gradients
from trainstep.registry import register
from trainstep.schedules import value_at
from trainstep.step import Batch, Evaluation, Strategy, summed_gradients
from trainstep.strategies._ascent import (
    NOISELESS,
    TWO_ASCENTS,
    AscentOptions,
    all_dense,
    along,
    beginning,
    gradients_after,
    projection,
)


class GsamOptions(AscentOptions):
    """How far the ascent goes, and how much the surrogate gap counts."""

    alpha: float = Field(
        default=0.4, ge=0, allow_inf_nan=False, description="Weight of the orthogonal part, as a factor; 0: SAM."
    )


def closing_the_gap(gradients: Gradients, ascended: Gradients, along_ascended: tf.Tensor, alpha: float) -> Gradients:
    """Return `ascended - alpha * t`, where t is `gradients` less their part along `ascended`.

    Args:
        gradients: at the weights; dense, and None where those of `ascended` are.
        ascended: at the worst point near them.
        along_ascended: the part of `gradients` along `ascended`, see `projection`.
        alpha: as in the paper.
    """
    # Linear in both, so that shares of gradients may stand for their sum.
    pairs, factor = zip(gradients, ascended, strict=True), 1 + alpha * along_ascended
    return [None if g_p is None else tf.cast(factor, g_p.dtype) * g_p - alpha * g for g, g_p in pairs]


@register
class Gsam(Strategy):
    """Evaluates at the weights, and once more where the loss is worst near them; and puts the two together."""

    declaration = Declaration(
        name="gsam",
        stage=Stage.OUTER_ASCENT,
        summary="GSAM: SAM that also closes the gap between the worst loss nearby and that at the weights.",
        reference="Zhuang et al., ICLR 2022, https://arxiv.org/abs/2203.08065",
        options=GsamOptions,
        neutral={"rho": 0.0},
        conflicts={"sam": TWO_ASCENTS, "look_sam": TWO_ASCENTS, "dp_sgd": NOISELESS},
        notes={
            "adversarial": "the examples are made once, at the weights, and seen by both evaluations",
            "gradient_accumulation": "ascends for each of the batches",
            "gradient_clipping": "what is clipped is what is descended, never the ascent",
            "micro_batches": "ascends along the gradient of the whole batch, of which both evaluations are in parts",
        },
        passes_through=lambda options: () if options.ascends else ("compute_gradients",),
        cost=lambda options: (
            Cost(forward=1, backward=1, time=2.0, memory="two copies of the trainable weights")
            if options.ascends
            else Cost()
        ),
    )

    def compute_gradients(self, batch: Batch) -> Evaluation:
        options, evaluate = self.strategy_options["gsam"], super().compute_gradients
        if not options.ascends:
            return super().compute_gradients(batch)
        _seam.ensure_built(self, batch.x)  # There are no weights and no random state before.
        if not self.trainable_variables:
            return super().compute_gradients(batch)
        start = beginning(self)
        evaluation = super().compute_gradients(batch)

        everywhere = summed_gradients(self, batch, evaluation)
        steps = along(everywhere, value_at(options.rho, self.optimizer.iterations))
        ascended = evaluation._replace(gradients=gradients_after(self, batch, steps, evaluate, start))
        factor = projection(all_dense(everywhere), all_dense(summed_gradients(self, batch, ascended)))
        gradients = closing_the_gap(
            all_dense(evaluation.gradients), all_dense(ascended.gradients), factor, options.alpha
        )
        return evaluation._replace(gradients=gradients)
