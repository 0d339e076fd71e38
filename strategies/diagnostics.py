"""Diagnostics: what the updates of an epoch were like, among its metrics.

    gradient_norm          ||g||, the L2 norm over all weights together, g as it comes from the batch: the mean
    effective_batch        examples (unmasked entries of a masked output) behind an update: the mean

The other numbers are what strategies of the model report, each only where one does:

    clipped_gradient_norm  ||g|| after clipping: the mean (gradient_clipping, percentile_clipping)
    clipped                share of updates that clipping changed (those two, adaptive_gradient_clipping)
    skipped_updates        updates left out because g was not finite: how many (skip_nonfinite, mixed_precision)
    loss_scale             the factor on the loss, as the last batch left it (mixed_precision)
    conflicting_tasks      share of pairs of tasks whose gradients conflict: the mean (pcgrad)
    smallest_task_weight   and largest_task_weight, as the last batch left them (gradnorm)
    epsilon                of the privacy spent since `compile`, when the epoch ends (dp_sgd)

The mean is over the updates of the epoch, never over micro-batches, but that of pcgrad, which looks at each. Costs one
pass over the gradients, and two scalars for each number. It changes no update, but for rounding.

The numbers are those that fairseq logs (gnorm, clip, loss_scale, bsz): Ott et al., "fairseq: A Fast, Extensible
Toolkit for Sequence Modeling", NAACL 2019, https://arxiv.org/abs/1904.01038
"""

import tensorflow as tf

from trainstep.declaration import Cost, Declaration, Report, Stage
from trainstep.gradients import dense
from trainstep.registry import register
from trainstep.step import Strategy, Update


@register
class Diagnostics(Strategy):
    """Inside of what decides whether there is an update, outside of what shapes it."""

    declaration = Declaration(
        name="diagnostics",
        stage=Stage.MEASURING,
        summary="Log what updates are like: gradient norm, share clipped, loss scale, skips, effective batch.",
        reference="Ott et al., NAACL 2019, https://arxiv.org/abs/1904.01038",
        neutral=None,
        why_not_neutral="it reads each gradient, and TensorFlow then fuses what makes them in another way: rounding",
        cost=lambda options: Cost(time=1.0, memory="two scalars for each number; one pass over the gradients"),
        reports=lambda options: {"gradient_norm": Report(), "effective_batch": Report()},
        collects_reports=True,
    )

    def update_weights(self, update: Update) -> None:
        self.record("gradient_norm", lambda: tf.linalg.global_norm([dense(gradient) for gradient in update.gradients]))
        self.record("effective_batch", lambda: update.terms)
        super().update_weights(update)
