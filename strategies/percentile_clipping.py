"""Percentile clipping (AutoClip): bound the gradient by what its norm usually is.

    c = percentile of ||g|| over the last `history` updates, this one included
    g = g * c / max(||g||, c)

One pass over the gradients and a sort of `history` numbers; those are kept. The norm is that of the gradient of the
whole batch: summed over replicas, accumulated, and free of any loss scale. A norm that is not finite does not enter
the history, and makes the gradient NaN, for the loss scale or the user to notice.

Seetharaman et al., "AutoClip: Adaptive gradient clipping for source separation networks", MLSP 2020, algorithm 1,
https://arxiv.org/abs/2007.14469; there the history is never forgotten.
"""

import tensorflow as tf
from pydantic import Field

from trainstep.declaration import Cost, Declaration, Report, Slot, Stage, StrategyOptions
from trainstep.gradients import dense
from trainstep.registry import register
from trainstep.replicas import assign
from trainstep.step import Strategy, Update
from trainstep.strategies._updates import clip_by_norm, differs


class PercentileClippingOptions(StrategyOptions):
    """The percentile, and how far back it looks."""

    percentile: float = Field(default=10.0, ge=0, le=100, description="Percentile of the norms; 100 clips nothing.")
    history: int = Field(default=1000, ge=2, le=1_000_000, description="Updates whose norms are looked at.")


def percentile_of(values: tf.Tensor, count: tf.Tensor, percentile: float) -> tf.Tensor:
    """Return the percentile of the first `count` of `values`, a vector, linear between its neighbours as in NumPy.

    The other values must be infinite.
    """
    ordered = tf.sort(values)
    place = percentile / 100 * tf.cast(count - 1, values.dtype)
    below = tf.cast(tf.floor(place), tf.int32)
    low, high = ordered[below], ordered[tf.minimum(below + 1, count - 1)]
    return low + (place - tf.floor(place)) * (high - low)


@register
class PercentileClipping(Strategy):
    """Clips just before the optimizer, and remembers the norms of the updates that were finite."""

    declaration = Declaration(
        name="percentile_clipping",
        stage=Stage.CLIPPING,
        summary="AutoClip: bound the norm of the gradient by a percentile of those before.",
        reference="Seetharaman et al., MLSP 2020, https://arxiv.org/abs/2007.14469",
        options=PercentileClippingOptions,
        neutral={"percentile": 100.0},
        conflicts={"gradient_clipping": "both clip by a norm: one after the other is neither. Take one of them."},
        replaces=dict.fromkeys(("global_clipnorm", "clipnorm", "clipvalue"), "Drop the optimizer's argument."),
        notes={"gradient_accumulation": "the norms are those of windows, one for each update"},
        passes_through=lambda options: ("update_weights",) if options.percentile == 100 else (),
        cost=lambda options: Cost(time=1.0, memory="one number for each update of the history"),
        state=lambda options: (
            {}
            if options.percentile == 100
            else {"norms": Slot(initial=float("inf"), shape=(options.history,)), "count": Slot(dtype="int32")}
        ),
        reports=lambda options: (
            {} if options.percentile == 100 else {"clipped_gradient_norm": Report(), "clipped": Report()}
        ),
    )

    def update_weights(self, update: Update) -> None:
        options = self.strategy_options["percentile_clipping"]
        if options.percentile == 100:
            super().update_weights(update)
            return
        state = self.strategy_state["percentile_clipping"]
        gradients = [dense(gradient) for gradient in update.gradients]
        norm, count = tf.linalg.global_norm(gradients), tf.convert_to_tensor(state["count"])
        known = tf.math.is_finite(norm)
        here = tf.reshape(count % options.history, [1, 1])
        entered = tf.tensor_scatter_nd_update(tf.convert_to_tensor(state["norms"]), here, [norm])
        norms = tf.where(known, entered, tf.convert_to_tensor(state["norms"]))
        count += tf.cast(known, tf.int32)
        seen = tf.maximum(tf.minimum(count, options.history), 1)
        bound = percentile_of(norms, seen, options.percentile)
        assign([(state["norms"], norms), (state["count"], count)])
        # Where no finite norm has been seen yet there is nothing to clip by, and this one is not finite either.
        clipped = clip_by_norm(gradients, bound)
        self.record("clipped_gradient_norm", lambda: tf.linalg.global_norm(clipped))
        self.record("clipped", lambda: differs(clipped, update.gradients))
        super().update_weights(update._replace(gradients=clipped))
