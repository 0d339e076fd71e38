"""What strategies that move the input have in common: their options, what they check, and what they draw."""

import functools
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import tensorflow as tf
from pydantic import Field

from trainstep.declaration import StrategyOptions
from trainstep.errors import UnsupportedInputError
from trainstep.gradients import differentiate
from trainstep.schedules import Scheduled, Within, is_always, value_at
from trainstep.step import Batch, require
from trainstep.strategies._attacks import ClipRange, attack, attackable
from trainstep.strategies._balls import Norm, in_range, step_length
from trainstep.strategies._seeds import next_seed

_OUT_OF_RANGE = """{}: inputs lie outside of clip_range={}, where none is moved. Give the range of your data, \
(0, 255) for images as they are stored, or scale them."""

_ONE_ATTACK = "each makes adversarial examples of the batch to train on, and one would attack what the other has made."


def other_attacks(name: str) -> Mapping[str, str]:
    """Return the strategies that make the examples to be trained on, as `name` does, and why there is one at a time."""
    makers = ("adversarial", "free_adversarial", "mart", "trades")
    return {maker: _ONE_ATTACK for maker in makers if maker != name}


# Options that mean the same in every strategy, each with its sentence; the default is the strategy's own.
Epsilon = Annotated[
    Scheduled,
    Within(ge=0),
    Field(description="Radius of the ball, in units of the input, or a schedule of it; 0: no attack."),
]
NormOfBall = Annotated[Norm, Field(description="The ball's norm, over each example and input by itself.")]
Inputs = Annotated[
    tuple[str, ...] | None,
    Field(strict=False, min_length=1, description="Names of the inputs it acts on; None: all of a floating dtype."),
]


class PgdOptions(StrategyOptions):
    """Projected gradient ascent from a point close to each example."""

    epsilon: Epsilon = 8 / 255
    norm: NormOfBall = "linf"
    steps: int = Field(default=10, ge=1, description="Gradients the attack takes.")
    step_size: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Length of one step, in units of the input; None: 2.5 epsilon / steps.",
    )
    clip_range: ClipRange = None
    inputs: Inputs = None
    seed: int = Field(default=0, ge=0, lt=2**31, description="Seed of the points the attack starts from.")

    @property
    def attacks(self) -> bool:
        """Whether any batch is attacked."""
        return not is_always(self.epsilon, 0)


def checked(name: str, model: Any, x: Any, options: Any) -> tuple[Any, list[bool]]:
    """Return `x`, which cannot be had where it is out of `options.clip_range`, and which of its tensors to move.

    Raises:
        UnsupportedInputError: see `attackable`.
    """
    able = attackable(x, model, options.inputs)
    if options.clip_range is None:
        return x, able
    moved = [tensor for tensor, ok in zip(tf.nest.flatten(x), able, strict=True) if ok]
    within = tf.reduce_all([in_range(tensor, options.clip_range) for tensor in moved])
    message = _OUT_OF_RANGE.format(name, options.clip_range)
    with tf.control_dependencies([require(within, message, UnsupportedInputError)]):
        return tf.nest.map_structure(tf.identity, x), able


def seed_of_start(name: str, model: Any) -> tf.Tensor:
    """Return the seed of the points this step starts from, int32 (2,), for the strategy `name`, see `next_seed`."""
    return next_seed(name, model, numbers=2)  # A ball of the L2 norm takes a second.


def pgd(name: str, model: Any, batch: Batch, loss_at: Callable[[Any], tf.Tensor]) -> Any:
    """Return the inputs of `batch` where `loss_at` them is high, by the `PgdOptions` of the strategy `name`.

    The attack starts where the authors of TRADES and MART have theirs start, 0.001 normal numbers away: at the
    example itself a divergence from it has no gradient.
    """
    options = model.strategy_options[name]
    x, able = checked(name, model, batch.x, options)
    epsilon = value_at(options.epsilon, model.optimizer.iterations)
    return attack(
        *(x, able, loss_at, functools.partial(differentiate, model)),
        seed=seed_of_start(name, model),
        stddev=0.001,
        epsilon=epsilon,
        norm=options.norm,
        steps=options.steps,
        step_size=options.step_size or step_length(epsilon, options.steps),
        clip_range=options.clip_range,
    )
