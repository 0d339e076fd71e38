"""Robust accuracy: accuracy where an attack may move each input within a ball.

    robust accuracy = share of examples classified rightly both as they are and at the point
    projected gradient ascent on the loss ends at, from a random point of the ball

A short attack finds less than a long one, so the number is an upper bound of the true robust
accuracy, and means nothing without its budget.

Madry et al., ICLR 2018, https://arxiv.org/abs/1706.06083
"""

import functools
from typing import Any

import tensorflow as tf
from pydantic import Field

from trainstep import _seam
from trainstep.declaration import StrategyOptions
from trainstep.errors import UnsupportedInputError
from trainstep.gradients import differentiate
from trainstep.strategies._attacks import ClipRange, attackable, check_range
from trainstep.strategies._attacks import attack as run_attack
from trainstep.strategies._balls import Norm, step_length

_BATCH = 256
"""Examples attacked at once."""


class Attack(StrategyOptions):
    """The budget of the attack on the validation examples; all lengths in units of the input."""

    epsilon: float = Field(gt=0, allow_inf_nan=False, description="Radius of the ball, in units of the input.")
    norm: Norm = Field(default="linf", description="The ball's norm, over each example by itself.")
    steps: int = Field(default=10, ge=1, description="Gradients taken; a step is 2.5 epsilon / steps long.")
    clip_range: ClipRange = None
    examples: int = Field(
        default=512, ge=1, description="How many validation examples are attacked at most, from the first."
    )
    seed: int = Field(default=0, ge=0, lt=2**31, description="Seed of the random start, the same for every model.")

    def __str__(self) -> str:
        values = "" if self.clip_range is None else f", inputs within [{self.clip_range[0]:g}, {self.clip_range[1]:g}]"
        return (
            f"PGD, {self.norm} epsilon {self.epsilon:.4g}, {self.steps} steps, random start{values}, "
            f"first {self.examples} validation examples at most"
        )


def robust_accuracy(attacked: Any, batches: tf.data.Dataset, attack: Attack) -> float:
    """Return the robust accuracy of a model in inference mode, from 0 to 1.

    Args:
        attacked: what `compiled_attack` returned for the model.
        batches: (x, y) or (x, y, sample_weight); y are class ids, (batch,) or (batch, 1), or one-hot.
        attack: the budget.

    Raises:
        UnsupportedInputError: no input is of a floating dtype, the inputs are outside of the range, or the output is
            not one score per class.
    """
    examples = _examples(batches, attack)
    # For batches of any size: the last one, which is short, is not traced anew.
    example: Any = examples.element_spec
    attacked = attacked.get_concrete_function(*example, tf.TensorSpec([2], tf.int32))
    hits = []
    for index, (x, y) in enumerate(examples):
        check_range(x, attack.clip_range)
        # Two numbers a batch: the start in an L2 ball takes a second.
        hits.append(attacked(x, y, tf.constant([attack.seed, 2 * index])))
    return float(tf.reduce_mean(tf.cast(tf.concat(hits, axis=0), tf.float32)))


def check_examples(batches: tf.data.Dataset, attack: Attack) -> None:
    """Refuse examples that are not within the range of `attack`.

    Raises:
        UnsupportedInputError: some are outside of it, infinite, or not a number.
    """
    for x, _ in _examples(batches, attack):
        check_range(x, attack.clip_range)


def _examples(batches: tf.data.Dataset, attack: Attack) -> tf.data.Dataset:
    return batches.map(lambda x, y, *_: (x, y)).unbatch().take(attack.examples).batch(_BATCH)


def compiled_attack(model: Any, attack: Attack) -> Any:
    """Return a `tf.function` (x, y, seed) -> bool (batch,): which examples withstand `attack`.

    Args:
        model: with strategies applied, and compiled; its loss is what the attack climbs, through the loss scale where
            there is one, its output one score for each class, (batch, classes).
        attack: the budget.
    """

    def attacked(x: Any, y: Any, seed: tf.Tensor) -> tf.Tensor:
        moved = run_attack(
            x,
            attackable(x, model, None),
            lambda moved: _seam.probe(model, moved, y, None, training=False),
            functools.partial(differentiate, model),
            seed=seed,
            epsilon=attack.epsilon,
            norm=attack.norm,
            steps=attack.steps,
            step_size=step_length(attack.epsilon, attack.steps),
            clip_range=attack.clip_range,
        )
        clean = _hits(y, _seam.forward(model, x, training=False))
        return clean & _hits(y, _seam.forward(model, moved, training=False))

    return tf.function(attacked, autograph=False)  # Which would put its own words around errors.


def _hits(y: Any, scores: Any) -> tf.Tensor:
    if not (isinstance(scores, tf.Tensor) and len(scores.shape) == 2 and (scores.shape[1] or 0) > 1):
        raise UnsupportedInputError(
            "Robust accuracy needs a model with one score for each class as its only output, of shape "
            f"(batch, classes), not {getattr(scores, 'shape', type(scores).__name__)}."
        )
    y = tf.convert_to_tensor(y)
    one_hot = len(y.shape) == 2 and y.shape[1] == scores.shape[1]
    classes = tf.argmax(y, axis=1) if one_hot else tf.cast(tf.reshape(y, [-1]), tf.int64)
    return tf.argmax(scores, axis=1) == classes
