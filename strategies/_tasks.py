"""Outputs as tasks: the gradient of each output's part of the loss, from one forward pass.

    g_i = (dy_i/dw)^T dL/dy_i        dL/dy_i with all other outputs held fixed

so that it holds for any loss of the outputs, the user's own `compute_loss` too, and where one output is made from
another. What is part of the loss and of no output, regularizers for example, is part of no g_i.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from trainstep import _seam
from trainstep.errors import ModelConflictError
from trainstep.gradients import Gradients, dense, scale
from trainstep.step import Batch, Evaluation


class ByTask(NamedTuple):
    """An evaluation, and the gradients of each task of it: a replica's shares, as those of the evaluation are."""

    evaluation: Evaluation
    outputs: list[int]
    """The place of each task among the flattened outputs."""
    gradients: list[Gradients]
    """For each task one list, aligned with the trainable weights; all dense."""


def evaluated_by_task(
    strategy: str,
    model: Any,
    compute_gradients: Callable[[Batch], Evaluation],
    batch: Batch,
    change: Callable[[int, tf.Tensor], tf.Tensor] | None = None,
) -> ByTask:
    """Return what `compute_gradients` makes of `batch`, and of it the gradients of each output with a loss.

    Args:
        strategy: which asks for it, for the message.
        model: with trainable weights.
        compute_gradients: evaluates the model; the hook of what is inside of the strategy.
        batch: to train on.
        change: maps the place of an output, and the output, to what the loss is to see in its place; the gradients of
            the tasks are those without it, and those of the evaluation those with it.

    Raises:
        ModelConflictError: the loss depends on fewer than two outputs.
    """
    passes: list[tuple[list[tf.Tensor], list[tf.Tensor]]] = []
    with tf.GradientTape(persistent=True) as tape:

        def through(y_pred: Any) -> Any:
            y_pred = y_pred if batch.through is None else batch.through(y_pred)
            made, seen = tf.nest.flatten(y_pred), []
            for index, output in enumerate(made):
                changed = output if change is None else change(index, output)
                # A tensor of its own: what the loss makes of it, and what other outputs do not.
                seen.append(_seam.with_mask(tf.identity(changed), _seam.mask_of(output)))
            passes.append((made, seen))
            return tf.nest.pack_sequence_as(y_pred, seen)

        evaluation = compute_gradients(batch._replace(through=through))
    factor = model.loss_scale()
    seed = None if factor is None else tf.cast(factor, evaluation.loss.dtype)
    pulls: list[Any] = [tape.gradient(evaluation.loss, seen, output_gradients=seed) for _, seen in passes]
    outputs, gradients = [], []
    for index in range(max((len(made) for made, _ in passes), default=0)):
        pairs = [(made[index], pull[index]) for (made, _), pull in zip(passes, pulls, strict=True)]
        pairs = [(output, pull) for output, pull in pairs if pull is not None]
        if pairs:
            targets, upstream = [output for output, _ in pairs], [pull for _, pull in pairs]
            found = tape.gradient(targets, model.trainable_variables, output_gradients=upstream)
            found = [dense(gradient) for gradient in found]
            outputs.append(index)
            gradients.append(found if factor is None else scale(found, 1 / factor))
    if len(outputs) < 2:
        raise ModelConflictError(
            f"{strategy} is for models of several tasks, and the loss of this one depends on {len(outputs)} of its "
            "outputs. Give the model two outputs or more, each with a loss: "
            "compile(loss={'kind': 'categorical_crossentropy', 'size': 'mse'})."
        )
    return ByTask(evaluation, outputs, gradients)


def inner_products(gradients: Sequence[Gradients]) -> tf.Tensor:
    """Return the inner product of the whole gradients of each two tasks, float32 (tasks, tasks); a None is zero."""
    products = [[_product(one, other) for other in gradients[: place + 1]] for place, one in enumerate(gradients)]
    count = range(len(gradients))
    return tf.stack([tf.stack([products[max(i, j)][min(i, j)] for j in count]) for i in count])


def _product(one: Gradients, other: Gradients) -> tf.Tensor:
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    return tf.add_n([tf.zeros(()), *(tf.reduce_sum(tf.cast(a, tf.float32) * tf.cast(b, tf.float32)) for a, b in pairs)])


def backward_weighted(output: tf.Tensor, weight: tf.Tensor) -> tf.Tensor:
    """Return `output`, the gradient through which is `weight`, a scalar, times what it would be."""

    @tf.custom_gradient
    def pass_through(values: tf.Tensor) -> Any:
        def pulled(upstream: tf.Tensor) -> tf.Tensor:
            return upstream * tf.cast(weight, upstream.dtype)

        return tf.identity(values), pulled

    return pass_through(output)
