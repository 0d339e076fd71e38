"""Gradient clipping: bound the gradient the optimizer sees.

    global_clipnorm c:   g = g * c / max(||g||, c)        ||g|| over all weights together
    clipnorm c:          g = g * c / max(||g||, c)        ||g|| of each weight by itself
    clipvalue c:         g = min(max(g, -c), c)           entry by entry

One pass over the gradients, nothing kept. What is clipped is the gradient of the whole batch: summed
over replicas, accumulated, and free of any loss scale. Where it is not finite it stays so, for the
loss scale or the user to notice.

Pascanu et al., "On the difficulty of training recurrent neural networks", ICML 2013,
https://arxiv.org/abs/1211.5063; names and meaning as in `keras.optimizers.Optimizer`.
"""

import math

import tensorflow as tf
from pydantic import Field, model_validator

from trainstep.declaration import Cost, Declaration, Report, Stage, StrategyOptions
from trainstep.gradients import Gradients, dense
from trainstep.registry import register
from trainstep.step import Strategy, Update
from trainstep.strategies._updates import clip_by_norm, differs

_BOUND = "Largest {} after clipping, in units of the gradient; infinity clips nothing."
_ADVICE = "Keep the strategy and drop the optimizer's argument: only the strategy clips the summed, unscaled gradient."


class GradientClippingOptions(StrategyOptions):
    """Exactly one bound; with none given, `global_clipnorm=1.0`."""

    global_clipnorm: float | None = Field(
        default=None, gt=0, description=_BOUND.format("L2 norm of all gradients together")
    )
    clipnorm: float | None = Field(default=None, gt=0, description=_BOUND.format("L2 norm of each weight's gradient"))
    clipvalue: float | None = Field(default=None, gt=0, description=_BOUND.format("absolute value of each entry"))

    @model_validator(mode="before")
    @classmethod
    def _default(cls, given: dict) -> dict:
        return given if any(value is not None for value in given.values()) else {**given, "global_clipnorm": 1.0}

    @model_validator(mode="after")
    def _one(self) -> "GradientClippingOptions":
        given = {name: value for name, value in self if value is not None}
        if len(given) != 1:
            raise ValueError(f"give exactly one of global_clipnorm, clipnorm and clipvalue, not {sorted(given)}")
        return self


def bound_of(options: GradientClippingOptions) -> tuple[str, float]:
    """Return the name and the value of the one bound that is given."""
    [bound] = [(name, value) for name, value in options if value is not None]
    return bound


def clip_by_value(gradient: tf.Tensor, clipvalue: float) -> tf.Tensor:
    """Clip each finite entry of `gradient` to [-clipvalue, clipvalue]; leave the others."""
    return tf.where(tf.math.is_finite(gradient), tf.clip_by_value(gradient, -clipvalue, clipvalue), gradient)


def clip(gradients: Gradients, options: GradientClippingOptions) -> Gradients:
    """Return `gradients` clipped as `options` say; a None stays None."""
    kind, bound = bound_of(options)
    if math.isinf(bound):
        return gradients
    gradients = [dense(gradient) for gradient in gradients]
    if kind == "global_clipnorm":
        return clip_by_norm(gradients, bound)
    if kind == "clipnorm":
        return [clip_by_norm([gradient], bound)[0] for gradient in gradients]
    return [None if gradient is None else clip_by_value(gradient, bound) for gradient in gradients]


@register
class GradientClipping(Strategy):
    """Clips just before the optimizer, so that neither accumulation nor an ascent sees a clipped gradient."""

    declaration = Declaration(
        name="gradient_clipping",
        stage=Stage.CLIPPING,
        summary="Bound the norm or the entries of the gradient before each update.",
        reference="Pascanu et al., ICML 2013, https://arxiv.org/abs/1211.5063",
        options=GradientClippingOptions,
        neutral={"global_clipnorm": math.inf},
        replaces=dict.fromkeys(("global_clipnorm", "clipnorm", "clipvalue"), _ADVICE),
        notes={
            "gradient_accumulation": "clips the mean over the window, once per update",
            "mixed_precision": "clips the unscaled gradient, and only where it is finite",
        },
        passes_through=lambda options: ("update_weights",) if math.isinf(bound_of(options)[1]) else (),
        cost=lambda options: Cost(time=1.0, memory="none: one pass over the gradients"),
        reports=lambda options: (
            {} if math.isinf(bound_of(options)[1]) else {"clipped_gradient_norm": Report(), "clipped": Report()}
        ),
    )

    def update_weights(self, update: Update) -> None:
        options = self.strategy_options["gradient_clipping"]
        clipped = clip(update.gradients, options)
        if not math.isinf(bound_of(options)[1]):
            self.record("clipped_gradient_norm", lambda: tf.linalg.global_norm(clipped))
            self.record("clipped", lambda: differs(clipped, update.gradients))
        super().update_weights(update._replace(gradients=clipped))
