"""Adaptive gradient clipping (AGC): bound the gradient of each output by the norm of its weights.

    g_j = g_j * min(1, clipping * max(||w_j||, eps) / ||g_j||)        j: an output, with all weights that lead to it

One pass over gradients and weights, nothing kept. Which weights lead to an output goes by the kind of the layer, see
`_units.py`; a bias, or any vector, is one unit by itself, as in the authors' code. What is clipped is the gradient of
the whole batch: summed over replicas, accumulated, and free of any loss scale. Where a norm is not finite the unit
becomes NaN, for the loss scale or the user to notice.

Brock et al., "High-Performance Large-Scale Image Recognition Without Normalization", ICML 2021, equation 3,
https://arxiv.org/abs/2102.06171
"""

import math
from typing import Any

import tensorflow as tf
from pydantic import Field

from trainstep.declaration import Cost, Declaration, Report, Stage, StrategyOptions
from trainstep.gradients import dense
from trainstep.registry import register
from trainstep.step import Strategy, Update
from trainstep.strategies._units import Outputs, axes_within, outputs_of
from trainstep.strategies._updates import differs
from trainstep.strategies._weights import check_names, matching

_REASON = "both clip: one after the other is neither. Take one of them."


class AdaptiveGradientClippingOptions(StrategyOptions):
    """The bound, relative to the weights, and which weights it is for."""

    clipping: float = Field(default=0.01, gt=0, description="Largest ratio of gradient to weights; infinity: none.")
    eps: float = Field(
        default=1e-3, gt=0, allow_inf_nan=False, description="Least norm of a unit's weights, so that zeros can grow."
    )
    exclude: tuple[str, ...] = Field(
        default=(), strict=False, description="Names or patterns of weights to leave alone, the last layer for example."
    )


def unit_norm(tensor: tf.Tensor, outputs: Outputs = (-1,)) -> tf.Tensor:
    """Return the L2 norm over all axes but `outputs`, kept as 1; of a vector, a scalar or a bias over all of it."""
    rank = tensor.shape.rank
    axes = axes_within(outputs if rank > 1 else None, rank)
    return tf.sqrt(tf.reduce_sum(tf.square(tensor), axis=axes, keepdims=True))


def clip_unitwise(gradient: Any, weight: Any, clipping: float, eps: float, outputs: Outputs = (-1,)) -> tf.Tensor:
    """Return `gradient` with each unit's norm at most `clipping` times that of `weight`; both of one shape."""
    gradient, weight = dense(gradient), tf.convert_to_tensor(weight)
    largest = clipping * tf.maximum(unit_norm(tf.cast(weight, gradient.dtype), outputs), eps)
    norm = unit_norm(gradient, outputs)
    factor = largest / tf.maximum(norm, largest)  # Exactly 1 where nothing is to be clipped.
    return gradient * tf.where(tf.math.is_finite(norm), factor, math.nan)


@register
class AdaptiveGradientClipping(Strategy):
    """Clips just before the optimizer, where the weights are those the gradient was taken at."""

    declaration = Declaration(
        name="adaptive_gradient_clipping",
        stage=Stage.CLIPPING,
        summary="AGC: bound the gradient of each output by the norm of its weights.",
        reference="Brock et al., ICML 2021, https://arxiv.org/abs/2102.06171",
        options=AdaptiveGradientClippingOptions,
        neutral={"clipping": math.inf},
        conflicts={"gradient_clipping": _REASON, "percentile_clipping": _REASON},
        replaces=dict.fromkeys(("global_clipnorm", "clipnorm", "clipvalue"), "Drop the optimizer's argument."),
        notes={"gradient_accumulation": "clips the mean over the window, once per update"},
        passes_through=lambda options: ("update_weights",) if math.isinf(options.clipping) else (),
        cost=lambda options: Cost(time=1.0, memory="none: one pass over gradients and weights"),
        reports=lambda options: {} if math.isinf(options.clipping) else {"clipped": Report()},
    )

    def check_model(self) -> None:
        super().check_model()
        check_names("adaptive_gradient_clipping", self, self.strategy_options["adaptive_gradient_clipping"].exclude)

    def update_weights(self, update: Update) -> None:
        options = self.strategy_options["adaptive_gradient_clipping"]
        if math.isinf(options.clipping):
            super().update_weights(update)
            return
        weights, excluded = self.trainable_variables, dict.fromkeys(options.exclude, True)
        left_alone = matching("adaptive_gradient_clipping", weights, excluded, otherwise=False)
        given = zip(update.gradients, weights, outputs_of(self), left_alone, strict=True)
        clipped = [
            gradient
            if gradient is None or alone
            else clip_unitwise(gradient, weight, options.clipping, options.eps, outputs)
            for gradient, weight, outputs, alone in given
        ]
        self.record("clipped", lambda: differs(clipped, update.gradients))
        super().update_weights(update._replace(gradients=clipped))
