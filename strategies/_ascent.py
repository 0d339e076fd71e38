"""Gradients at other weights than the model's own: what SAM and its kind have in common."""

import threading
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple

import tensorflow as tf
from pydantic import Field

from trainstep import _seam
from trainstep.declaration import StrategyOptions
from trainstep.gradients import Gradients, dense
from trainstep.replicas import assign
from trainstep.schedules import Scheduled, Within, is_always
from trainstep.step import Batch, Evaluation

TWO_ASCENTS = "both take the gradient at other weights, and one inside of the other is neither. Take one of them."

NOISELESS = (
    "the weights are moved along the gradient of all examples, without noise, so that each changes the gradients of "
    "all others, however they are clipped."
)


_local = threading.local()  # Replicas are traced in a thread each.


def is_elsewhere() -> bool:
    """Tell whether what is evaluated now is so at other weights than those of the model, see `gradients_after`."""
    return getattr(_local, "elsewhere", False)


def all_dense(gradients: Gradients) -> Gradients:
    """Return `gradients`, those of embeddings dense as well."""
    return [dense(gradient) for gradient in gradients]


class AscentOptions(StrategyOptions):
    """How far an ascent goes."""

    rho: Annotated[Scheduled, Within(ge=0)] = Field(
        default=0.05, description="Length of the ascent, in units of the weights, or a schedule of it; 0: none."
    )

    @property
    def ascends(self) -> bool:
        """Whether any step does."""
        return not is_always(self.rho, 0)


def along(gradients: Gradients, length: float | tf.Tensor) -> Gradients:
    """Return the step of L2 norm `length`, over all together, along `gradients`; zero where all are zero."""
    gradients = all_dense(gradients)
    factor = length / (tf.linalg.global_norm(gradients) + 1e-12)
    return [None if gradient is None else gradient * tf.cast(factor, gradient.dtype) for gradient in gradients]


def projection(vectors: Gradients, direction: Gradients) -> tf.Tensor:
    """Return by what to multiply `direction` for the part of `vectors` along it, over all together: a scalar.

    Both are dense, and None where the other is.
    """
    present = [(vector, onto) for vector, onto in zip(vectors, direction, strict=True) if onto is not None]
    product = tf.add_n([tf.reduce_sum(vector * onto) for vector, onto in present])
    square = tf.add_n([tf.reduce_sum(tf.square(onto)) for _, onto in present])
    return tf.math.divide_no_nan(product, square)


def orthogonal_part(vectors: Gradients, direction: Gradients) -> Gradients:
    """Return `vectors` less their part along `direction`, over all together; see `projection`."""
    factor = projection(vectors, direction)
    pairs = zip(vectors, direction, strict=True)
    return [None if onto is None else vector - tf.cast(factor, onto.dtype) * onto for vector, onto in pairs]


class Beginning(NamedTuple):
    """What an evaluation starts from, for another to draw the same: pairs of a variable and its value."""

    random_state: list[tuple[Any, tf.Tensor]]
    """Of dropout; on Keras 2 none, where it cannot be reached."""
    draws: list[tuple[Any, tf.Tensor]]
    """State of strategies that is not of weights: what they count their draws of random numbers by."""


def beginning(model: Any) -> Beginning:
    """Return what the next evaluation of `model`, which is built, will start from."""
    kept = [slot for slots in model.strategy_state.values() for slot in slots.values()]
    slots = [slot for slot in kept if not isinstance(slot, (list, tuple))]
    return Beginning(_seam.random_state(model), [(slot, tf.identity(slot)) for slot in slots])


def gradients_after(
    model: Any, batch: Batch, steps: Gradients, evaluate: Callable[[Batch], Evaluation], start: Beginning
) -> Gradients:
    """Return the gradients where `steps` lead, and leave the weights where they were, to the bit.

    Args:
        model: whose `trainable_variables` they are.
        batch: of which the gradients are.
        steps: what is added to each weight, the same on every replica; None for one that stays.
        evaluate: evaluates the batch at the weights that the model has then, the hook of what is inside of a strategy;
            it leaves no trace in metrics, batch-norm statistics and what is drawn next.
        start: what `beginning` returned before the evaluation at the weights, for this one to draw the same.
    """
    weights = model.trainable_variables
    before = [(weight, tf.identity(weight)) for weight in weights]  # A copy: to add and subtract leaves rounding error.
    before += [(slot, tf.identity(slot)) for slot, _ in start.draws]
    steps_of = zip(weights, before[: len(weights)], steps, strict=True)
    moved = [(w, at + tf.cast(step, at.dtype)) for w, (_, at), step in steps_of if step is not None]
    assign([*moved, *start.draws])

    def gradients_there() -> Gradients:
        _local.elsewhere = True
        try:
            return evaluate(batch).gradients
        finally:
            _local.elsewhere = False

    gradients = _seam.without_trace(model, gradients_there, training=True, random_state=start.random_state)
    assign(before)
    return gradients


def with_gradients(gradients: Gradients, present: Sequence[int], count: int) -> Gradients:
    """Return the `gradients` of the weights at the places `present`, and None for the others of `count`."""
    found: Gradients = [None] * count
    for index, gradient in zip(present, gradients, strict=True):
        found[index] = gradient
    return found
