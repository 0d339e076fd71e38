"""The plain training step of Keras.

    w = w - learning_rate * g(w)        with g the gradient, and the optimizer's own rule for the rest

One forward and one backward pass per step, nothing kept. This is the control every other strategy
is compared with, and its weights are those of plain `fit`, bit for bit.

Source: `keras.Model.train_step`.
"""

from trainstep.declaration import Declaration, Stage
from trainstep.registry import register
from trainstep.step import Strategy


@register
class Standard(Strategy):
    """Changes nothing."""

    declaration = Declaration(
        name="standard",
        stage=Stage.REPORT,
        summary="The plain training step of Keras: the control.",
        reference="keras.Model.train_step",
        neutral={},
    )
