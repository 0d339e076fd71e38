"""Gradient centralization: take the mean out of what each output's weights are told.

    g_j = g_j - mean(g_j)        g_j: the gradient of all weights that lead to output j

One pass over the gradients, nothing kept. Which weights lead to an output goes by the kind of the layer, see
`_units.py`. Vectors and biases are left alone, and so is the table of an embedding: its rows are not the inputs of
anything. What is centralized is the gradient of the whole batch, summed over replicas, accumulated, and free of any
loss scale; clipping sees it centralized.

Yong et al., "Gradient Centralization", ECCV 2020, equation 1, https://arxiv.org/abs/2004.01461
"""

from typing import Any, Literal

import keras
import tensorflow as tf
from pydantic import Field

from trainstep import _seam
from trainstep.declaration import Cost, Declaration, Stage, StrategyOptions
from trainstep.gradients import dense
from trainstep.registry import register
from trainstep.step import Strategy, Update
from trainstep.strategies._units import Outputs, axes_within, outputs_of

_LOWEST_RANK = {"all": 2, "convolution": 3}


class GradientCentralizationOptions(StrategyOptions):
    """Which kernels are centralized."""

    kernels: Literal["all", "convolution"] = Field(
        default="all", description="All kernels, or those of rank 3 and more, which convolutions have."
    )


def centralize(gradient: Any, lowest_rank: int = 2, outputs: Outputs = (-1,)) -> Any:
    """Return `gradient` less its mean over all axes but `outputs`; as it is below `lowest_rank` or without any."""
    if gradient is None or outputs is None or gradient.shape.rank < lowest_rank:
        return gradient
    gradient = dense(gradient)  # That of a kernel is sparse where the inputs are.
    return gradient - tf.reduce_mean(gradient, axis=axes_within(outputs, gradient.shape.rank), keepdims=True)


@register
class GradientCentralization(Strategy):
    """Centralizes before the gradient is clipped, once for each update."""

    declaration = Declaration(
        name="gradient_centralization",
        stage=Stage.CENTRALIZATION,
        summary="Take the mean out of the gradient of each output's weights.",
        reference="Yong et al., ECCV 2020, https://arxiv.org/abs/2004.01461",
        options=GradientCentralizationOptions,
        why_not_neutral="It has no strength that could be 0: whoever does not want it leaves it out.",
        notes={
            "gradient_accumulation": "centralizes the mean over the window, which is the mean of the centralized",
            "gradient_clipping": "is clipped after it is centralized",
        },
        cost=lambda options: Cost(time=1.0, memory="none: one pass over the gradients"),
    )

    def update_weights(self, update: Update) -> None:
        lowest_rank = _LOWEST_RANK[self.strategy_options["gradient_centralization"].kernels]
        tables = {
            _seam.key_of(weight)
            for layer in _seam.layers_of(self)
            if isinstance(layer, keras.layers.Embedding)
            for weight in layer.weights
        }
        given = zip(update.gradients, self.trainable_variables, outputs_of(self), strict=True)
        gradients = [
            gradient if _seam.key_of(weight) in tables else centralize(gradient, lowest_rank, outputs)
            for gradient, weight, outputs in given
        ]
        super().update_weights(update._replace(gradients=gradients))
