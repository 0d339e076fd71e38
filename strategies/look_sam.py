"""LookSAM: SAM in every k-th step, and in those between the gradient turned the way SAM turned it last.

    e = rho * g / ||g||,  g_s = dL(w + e)/dw        g = dL(w)/dw
    g_v = g_s - (g_s . g / ||g||^2) * g             the part of g_s orthogonal to g, which changes slowly
    descended is g_s in the first of k steps, and g + alpha * (||g|| / ||g_v||) * g_v in those between, taken at w

A fraction 1 / k of the steps takes twice the time of a plain one. One copy of the weights is kept, and another during
the second evaluation. Loss, predictions, metrics and batch-norm statistics are those of the first, at w. On Keras 3
both evaluations have the same dropout masks; on Keras 2, where the state of dropout cannot be reached, each draws its
own. A g_v that is not finite is not kept, and one that is nothing but rounding counts as none.

Liu et al., "Towards Efficient and Scalable Sharpness-Aware Minimization", CVPR 2022, algorithm 1,
https://arxiv.org/abs/2203.02714
"""

import tensorflow as tf
from pydantic import Field

from trainstep import _seam
from trainstep.declaration import Cost, Declaration, Slot, Stage
from trainstep.gradients import Gradients, all_finite, dense
from trainstep.registry import register
from trainstep.replicas import assign, choose
from trainstep.schedules import value_at
from trainstep.step import Batch, Evaluation, Strategy, summed_gradients
from trainstep.strategies._ascent import (
    NOISELESS,
    TWO_ASCENTS,
    AscentOptions,
    Beginning,
    all_dense,
    along,
    beginning,
    gradients_after,
    orthogonal_part,
    with_gradients,
)

_ROUNDING = 1e-6
"""A g_v that is a smaller part of g_s than this is what rounding leaves of parallel gradients: float32 has 6e-8."""


class LookSamOptions(AscentOptions):
    """How far the ascent goes, how often, and how much of it the steps between keep."""

    interval: int = Field(
        default=5, ge=1, le=1_000_000, description="Steps, of which the first ascends: the paper's k."
    )
    alpha: float = Field(
        default=0.7,
        ge=0,
        allow_inf_nan=False,
        description="Length of what is added in the steps between, as a factor of that of the gradient.",
    )


def turn(gradients: Gradients, ascended: Gradients) -> Gradients:
    """Return the part of `ascended` orthogonal to `gradients`, over all together; zeros for nothing but rounding."""
    part = orthogonal_part(ascended, gradients)
    counts = tf.linalg.global_norm(part) > _ROUNDING * tf.linalg.global_norm(ascended)
    return [None if g_v is None else tf.where(counts, g_v, tf.zeros_like(g_v)) for g_v in part]


def turned(gradients: Gradients, turn: Gradients, alpha: float) -> Gradients:
    """Return what to add to `gradients`: `turn`, of `alpha` times their length; zeros where it has none."""
    factor = alpha * tf.math.divide_no_nan(tf.linalg.global_norm(gradients), tf.linalg.global_norm(turn))
    return [None if g is None else tf.cast(factor, g.dtype) * g_v for g, g_v in zip(gradients, turn, strict=True)]


@register
class LookSam(Strategy):
    """Evaluates once more, where the loss is worst near the weights, in some steps only."""

    declaration = Declaration(
        name="look_sam",
        stage=Stage.OUTER_ASCENT,
        summary="LookSAM: SAM in every k-th step, whose turn of the gradient is kept for those between.",
        reference="Liu et al., CVPR 2022, https://arxiv.org/abs/2203.02714",
        options=LookSamOptions,
        neutral={"rho": 0.0},
        conflicts={"sam": TWO_ASCENTS, "gsam": TWO_ASCENTS, "dp_sgd": NOISELESS},
        notes={
            "adversarial": "the examples are made once, at the weights, and seen by both evaluations",
            "gradient_accumulation": "an interval counts batches, not windows",
            "gradient_clipping": "what is clipped is what is descended, never the ascent",
            "micro_batches": "ascends along the gradient of the whole batch, of which both evaluations are in parts",
        },
        passes_through=lambda options: () if options.ascends else ("compute_gradients",),
        cost=lambda options: (
            Cost(forward=1, backward=1, time=1 + 1 / options.interval, memory="two copies of the trainable weights")
            if options.ascends
            else Cost()
        ),
        state=lambda options: (
            {"turn": Slot(per_weight=True), "steps": Slot(dtype="int32")}
            if options.ascends and options.interval > 1
            else {}
        ),
    )

    def compute_gradients(self, batch: Batch) -> Evaluation:
        options, evaluate = self.strategy_options["look_sam"], super().compute_gradients
        if not options.ascends:
            return super().compute_gradients(batch)
        _seam.ensure_built(self, batch.x)  # There are no weights, no random state and no state of ours before.
        if not self.trainable_variables:
            return super().compute_gradients(batch)
        start = beginning(self)
        evaluation = super().compute_gradients(batch)
        everywhere = all_dense(summed_gradients(self, batch, evaluation))
        present = [index for index, gradient in enumerate(everywhere) if gradient is not None]
        state = self.strategy_state["look_sam"]

        # What differs between replicas is an argument, see `choose`.
        def ascended(batch: Batch, evaluation: Evaluation, everywhere: Gradients, start: Beginning) -> list[tf.Tensor]:
            steps = along(everywhere, value_at(options.rho, self.optimizer.iterations))
            found = evaluation._replace(gradients=gradients_after(self, batch, steps, evaluate, start))
            if state:
                found_everywhere = all_dense(summed_gradients(self, batch, found))
                new, kept = turn(everywhere, found_everywhere), state["turn"]
                # Not that of a bad batch, which would spoil the steps up to the next ascent.
                finite = all_finite([*everywhere, *found_everywhere])
                assign([(kept[index], tf.where(finite, new[index], tf.identity(kept[index]))) for index in present])
            return [dense(found.gradients[index]) for index in present]

        def between(_: Batch, evaluation: Evaluation, everywhere: Gradients, _start: Beginning) -> list[tf.Tensor]:
            added = turned(everywhere, [tf.convert_to_tensor(kept) for kept in state["turn"]], options.alpha)
            # The sum over replicas, each with its share of the examples, adds up to all of it.
            share = 1 / tf.distribute.get_strategy().num_replicas_in_sync
            return [dense(evaluation.gradients[index]) + share * added[index] for index in present]

        args = (batch._replace(extra=dict(batch.extra)), evaluation, everywhere, start)
        if state:
            count = tf.convert_to_tensor(state["steps"])
            assign([(state["steps"], count + 1)])
            chosen = choose(count % options.interval == 0, ascended, between, args)
        else:
            chosen = ascended(*args)
        return evaluation._replace(gradients=with_gradients(chosen, present, len(everywhere)))
