"""Layerwise learning rates: let some weights go a part, or a multiple, of the way the optimizer takes them.

    w = w + m * (w' - w)        w': where the optimizer takes w; m: the multiplier of that weight
    m = decay^(L - l)           l: the layer, from 1 at the input to L at the output; a pattern's multiplier replaces it

The same as another learning rate for any optimizer whose step is proportional to it, weight decay included; scaling
the gradient would do nothing under Adam. One pass over the weights with a multiplier other than 1, which are copied
for it.

A layer is every innermost one with trainable weights, in the order of these: from the input on in a functional or
Sequential model, in that of attributes in a subclassed one. A norm layer is one of its own, and so is each projection
of an attention. The paper's 1/2.6 is for a net of few layers: in a deep one it leaves nearly all unmoved (2.6^-20 =
5e-9), and 0.9 to 0.95 is the choice for some dozens.

Howard and Ruder, "Universal Language Model Fine-tuning for Text Classification", ACL 2018, section 3.2
(discriminative fine-tuning, where each layer has 1/2.6 of the rate of the next), https://arxiv.org/abs/1801.06146
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import tensorflow as tf
from pydantic import Field

from trainstep import _seam
from trainstep.declaration import Cost, Declaration, Stage, StrategyOptions
from trainstep.registry import register
from trainstep.replicas import assign
from trainstep.step import Strategy, Update
from trainstep.strategies._weights import check_names, matching

Multiplier = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class LayerwiseLearningRatesOptions(StrategyOptions):
    """By depth, and by name."""

    decay: float = Field(
        default=1 / 2.6, gt=0, le=1, description="Learning rate of a layer over that of the next; 1: all alike."
    )
    multipliers: Mapping[str, Multiplier] = Field(
        default={}, description="Multipliers by name or pattern of weights, in place of that of the depth."
    )


def depths(weights: Sequence[Any]) -> list[int]:
    """Return for each weight how many layers with weights come after its own: 0 for the last."""
    layers = [_seam.path_of(weight).rpartition("/")[0] for weight in weights]
    order = list(dict.fromkeys(layers))
    return [len(order) - 1 - order.index(layer) for layer in layers]


@register
class LayerwiseLearningRates(Strategy):
    """Acts around the optimizer: it sees the weights before and after."""

    declaration = Declaration(
        name="layerwise_learning_rates",
        stage=Stage.STEP_SIZE,
        summary="A learning rate of its own for each layer, by depth or by name.",
        reference="Howard and Ruder, ACL 2018, https://arxiv.org/abs/1801.06146",
        options=LayerwiseLearningRatesOptions,
        neutral={"decay": 1.0},
        passes_through=lambda options: ("update_weights",) if options.decay == 1 and not options.multipliers else (),
        cost=lambda options: Cost(memory="one copy, within the step, of the weights with a multiplier other than 1"),
    )

    def check_model(self) -> None:
        super().check_model()
        check_names("layerwise_learning_rates", self, self.strategy_options["layerwise_learning_rates"].multipliers)

    def update_weights(self, update: Update) -> None:
        options, weights = self.strategy_options["layerwise_learning_rates"], self.trainable_variables
        if options.decay == 1 and not options.multipliers:
            super().update_weights(update)
            return
        by_name: list[Any] = matching("layerwise_learning_rates", weights, options.multipliers, otherwise=None)
        by_depth = [options.decay**depth for depth in depths(weights)]
        chosen = [m if name is None else name for name, m in zip(by_name, by_depth, strict=True)]
        slowed = [(w, tf.identity(tf.convert_to_tensor(w)), m) for w, m in zip(weights, chosen, strict=True) if m != 1]
        super().update_weights(update)
        assign([(w, before + m * (tf.convert_to_tensor(w) - before)) for w, before, m in slowed])
