"""Lookahead: every k updates, go a part of the way that the optimizer has gone.

    every k updates:   slow = slow + alpha * (w - slow),   w = slow

One copy of the weights is kept, the slow ones; a pass over them every k updates. They start as the weights before the
first update.

Zhang et al., "Lookahead Optimizer: k steps forward, 1 step back", NeurIPS 2019, algorithm 1,
https://arxiv.org/abs/1907.08610
"""

import tensorflow as tf
from pydantic import Field

from trainstep.declaration import Cost, Declaration, Slot, Stage, StrategyOptions
from trainstep.registry import register
from trainstep.replicas import assign, conditional
from trainstep.step import Strategy, Update


class LookaheadOptions(StrategyOptions):
    """How often the slow weights move, and how far."""

    k: int = Field(default=6, ge=1, le=1_000_000, description="Updates between two moves of the slow weights.")
    alpha: float = Field(default=0.5, ge=0, le=1, description="Part of the way the slow weights go; 1: all of it.")


@register
class Lookahead(Strategy):
    """Acts after the optimizer, and counts updates, not batches."""

    declaration = Declaration(
        name="lookahead",
        stage=Stage.SLOW_WEIGHTS,
        summary="Every k updates, go only a part of the way that the optimizer has gone.",
        reference="Zhang et al., NeurIPS 2019, https://arxiv.org/abs/1907.08610",
        options=LookaheadOptions,
        neutral={"alpha": 1.0},
        notes={
            "gradient_accumulation": "k counts updates, which are windows",
            "layer_freezing": "what is frozen stays, though the slow weights may move towards it",
        },
        passes_through=lambda options: ("update_weights",) if options.alpha == 1 else (),
        cost=lambda options: Cost(time=1.0, memory="one copy of the trainable weights"),
        state=lambda options: (
            {} if options.alpha == 1 else {"slow": Slot(per_weight=True), "updates": Slot(dtype="int32")}
        ),
    )

    def update_weights(self, update: Update) -> None:
        options = self.strategy_options["lookahead"]
        if options.alpha == 1:
            super().update_weights(update)
            return
        state, weights = self.strategy_state["lookahead"], self.trainable_variables

        def begin() -> None:
            assign([(slow, tf.convert_to_tensor(w)) for slow, w in zip(state["slow"], weights, strict=True)])

        def wait() -> None:
            pass

        def synchronize() -> None:
            pairs = [
                (tf.convert_to_tensor(a), tf.convert_to_tensor(b)) for a, b in zip(state["slow"], weights, strict=True)
            ]
            moved = [slow + options.alpha * (fast - slow) for slow, fast in pairs]
            assign([*zip(state["slow"], moved, strict=True), *zip(weights, moved, strict=True)])

        count = tf.convert_to_tensor(state["updates"])
        conditional(count == 0, begin, wait, ())
        super().update_weights(update)
        count += 1
        assign([(state["updates"], count)])
        conditional(count % options.k == 0, synchronize, wait, ())
