"""Gradient noise: add to the gradient normal noise that dies away.

    g = g + normal(0, eta / (1 + t)^gamma)        t: updates so far; eta / (1 + t)^gamma is the variance

One pass over the gradients, and as many random numbers as there are weights. The noise is added after clipping, once
for each update, and is the same on every replica; a weight that the loss does not depend on gets none.

Neelakantan et al., "Adding Gradient Noise Improves Learning for Very Deep Networks", 2015, equation 1,
https://arxiv.org/abs/1511.06807
"""

import tensorflow as tf
from pydantic import Field

from trainstep.declaration import Cost, Declaration, Slot, Stage, StrategyOptions
from trainstep.registry import register
from trainstep.replicas import assign
from trainstep.step import Strategy, Update
from trainstep.strategies._updates import add_noise


class GradientNoiseOptions(StrategyOptions):
    """How much noise there is at first, and how fast it dies away."""

    eta: float = Field(
        default=0.01, ge=0, allow_inf_nan=False, description="Variance of the noise at the first update; 0: none."
    )
    gamma: float = Field(
        default=0.55, ge=0, allow_inf_nan=False, description="Power of the number of updates that divides it."
    )
    seed: int = Field(default=0, ge=0, lt=2**31, description="Seed of the noise.")


@register
class GradientNoise(Strategy):
    """Adds noise where the gradient is ready for the optimizer."""

    declaration = Declaration(
        name="gradient_noise",
        stage=Stage.NOISE,
        summary="Add normal noise, which dies away, to the gradient of each update.",
        reference="Neelakantan et al., 2015, https://arxiv.org/abs/1511.06807",
        options=GradientNoiseOptions,
        neutral={"eta": 0.0},
        notes={"gradient_clipping": "noise is added after clipping, as in the paper, and is not clipped"},
        passes_through=lambda options: ("update_weights",) if options.eta == 0 else (),
        cost=lambda options: Cost(time=1.0, memory="none: one pass over the gradients"),
        state=lambda options: {"updates": Slot(dtype="int32")} if options.eta else {},
    )

    def update_weights(self, update: Update) -> None:
        options = self.strategy_options["gradient_noise"]
        if options.eta == 0:
            super().update_weights(update)
            return
        updates = self.strategy_state["gradient_noise"]["updates"]
        count = tf.convert_to_tensor(updates)
        stddev = tf.sqrt(options.eta / (1.0 + tf.cast(count, tf.float32)) ** options.gamma)
        stddev = tf.where(update.terms > 0, stddev, 0.0)  # An update from no examples moves nothing.
        gradients = add_noise(update.gradients, stddev, tf.stack([options.seed, count]))
        assign([(updates, count + 1)])
        super().update_weights(update._replace(gradients=gradients))
