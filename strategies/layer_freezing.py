"""Layer freezing: leave weights as they are during some updates, by name and by a schedule, without compiling anew.

    during the updates from start to before stop:   g = 0, and w stays, weight decay or momentum or not

A mask on the gradient, and a copy of the weights that may be frozen, put back where they are. One step is traced for
the whole schedule. The optimizer's slots see a gradient of zero meanwhile, and fade; gradients are computed all the
same, so it saves no time: where layers are frozen for good, `layer.trainable = False` does.

Brock et al., "FreezeOut: Accelerate Training by Progressively Freezing Layers", 2017,
https://arxiv.org/abs/1706.04983; gradual unfreezing: Howard and Ruder, ACL 2018, section 3.3,
https://arxiv.org/abs/1801.06146
"""

from collections.abc import Mapping
from typing import Annotated, Any

import tensorflow as tf
from pydantic import AfterValidator, Field

from trainstep.declaration import Cost, Declaration, Slot, Stage, StrategyOptions
from trainstep.gradients import dense
from trainstep.registry import register
from trainstep.replicas import assign
from trainstep.step import Strategy, Update
from trainstep.strategies._weights import check_names, matching


def _ordered(span: tuple[int, int | None]) -> tuple[int, int | None]:
    start, stop = span
    if start < 0 or (stop is not None and stop <= start):
        raise ValueError(f"updates go from 0 on, the first of a span before its end, not {span}")
    return span


Span = Annotated[tuple[int, int | None], Field(strict=False), AfterValidator(_ordered)]


class LayerFreezingOptions(StrategyOptions):
    """What is frozen, and when."""

    frozen: Mapping[str, Span] = Field(
        description="By name or pattern of weights: the updates (start, stop) in which they stay; stop None: for good.",
    )


def is_within(count: tf.Tensor, span: tuple[int, int | None]) -> tf.Tensor:
    """Return whether update number `count`, an int32 scalar, is within `span`, a boolean scalar."""
    start, stop = span
    return (count >= start) if stop is None else (count >= start) & (count < stop)


@register
class LayerFreezing(Strategy):
    """Acts around the optimizer: it sees the weights before and after."""

    declaration = Declaration(
        name="layer_freezing",
        stage=Stage.MASKING,
        summary="Leave weights as they are during some updates, by name and schedule.",
        reference="Brock et al., 2017, https://arxiv.org/abs/1706.04983",
        options=LayerFreezingOptions,
        example={"frozen": {"*/kernel": (1, 3)}},
        neutral={"frozen": {}},
        notes={"gradient_accumulation": "counts updates, which are windows"},
        passes_through=lambda options: () if options.frozen else ("update_weights",),
        cost=lambda options: Cost(
            memory="one copy, within the step, of the weights that may be frozen" if options.frozen else "none"
        ),
        state=lambda options: {"updates": Slot(dtype="int32")} if options.frozen else {},
    )

    def check_model(self) -> None:
        super().check_model()
        check_names("layer_freezing", self, self.strategy_options["layer_freezing"].frozen)

    def update_weights(self, update: Update) -> None:
        spans = self.strategy_options["layer_freezing"].frozen
        if not spans:
            super().update_weights(update)
            return
        weights, updates = self.trainable_variables, self.strategy_state["layer_freezing"]["updates"]
        chosen: list[Any] = matching("layer_freezing", weights, spans, otherwise=None)
        count = tf.convert_to_tensor(updates)
        kept = [
            (w, tf.identity(tf.convert_to_tensor(w)), is_within(count, span))
            for w, span in zip(weights, chosen, strict=True)
            if span is not None
        ]
        gradients = [
            gradient if span is None or gradient is None else _masked(dense(gradient), is_within(count, span))
            for gradient, span in zip(update.gradients, chosen, strict=True)
        ]
        assign([(updates, count + 1)])
        super().update_weights(update._replace(gradients=gradients))
        assign([(w, tf.where(frozen, before, tf.convert_to_tensor(w))) for w, before, frozen in kept])


def _masked(gradient: tf.Tensor, frozen: tf.Tensor) -> tf.Tensor:
    return tf.where(frozen, tf.zeros_like(gradient), gradient)
