"""PCGrad (gradient surgery): take out of each task's gradient what works against another task.

    for each task i, for the others j in random order:   g_i = g_i - (g_i . g_j) / ||g_j||^2 g_j   where g_i . g_j < 0
    g = rest + sum_i g_i

A task is an output with a loss, g_i the whole gradient of its part of the loss, over all weights, with the
`loss_weights` of `compile`; each g_j on the right is the task's own, as it was. What is part of no output's loss,
regularizers for example, is `rest`, and stays. Where no two gradients conflict it is plain training, bit for bit.

One backward pass more for each task, from the one forward pass: batch norm and dropout see the batch once. One copy
of the gradients is kept for each task. The projections are those of the whole batch, summed over replicas.

Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020, algorithm 1, https://arxiv.org/abs/2001.06782
"""

from typing import Any

import tensorflow as tf
from pydantic import Field

from trainstep import _seam
from trainstep.declaration import Cost, Declaration, Report, Slot, Stage, StrategyOptions
from trainstep.gradients import dense
from trainstep.registry import register
from trainstep.step import Batch, Evaluation, Strategy, summed_gradients
from trainstep.strategies._seeds import next_seed
from trainstep.strategies._tasks import evaluated_by_task, inner_products


class PcgradOptions(StrategyOptions):
    """The order of the projections: of the rest the paper leaves nothing to choose."""

    seed: int = Field(
        default=0, ge=0, lt=2**31, description="Seed of the order of the projections; with two tasks there is one."
    )


def surgery(products: tf.Tensor, orders: tf.Tensor) -> tf.Tensor:
    """Return how often each task's gradient is in the sum of the projected ones: float32 (tasks,), 1 without conflicts.

    Whatever is projected stays a sum of the tasks' gradients, so that their inner products are all it takes.

    Args:
        products: of each two gradients, float32 (tasks, tasks).
        orders: the order in which each task, a row, is projected on others; itself is passed over. int32 (tasks, tasks)
    """
    tasks: Any = products.shape[0]
    shares = tf.eye(tasks)  # Row i: how often each gradient is in the projected one of task i.
    for step in range(tasks):
        others = orders[:, step]
        along = tf.reduce_sum(shares * tf.gather(products, others), axis=1)
        conflicts = (along < 0) & (others != tf.range(tasks))
        lengths = tf.gather(tf.linalg.diag_part(products), others)
        taken = tf.where(conflicts, tf.math.divide_no_nan(along, lengths), 0.0)
        shares -= taken[:, tf.newaxis] * tf.one_hot(others, tasks)
    return tf.reduce_sum(shares, axis=0)


def conflicting(products: tf.Tensor) -> tf.Tensor:
    """Return the share of conflicts among all pairs of tasks, a float32 scalar; `products` as in `surgery`."""
    tasks: Any = products.shape[0]
    return tf.reduce_sum(tf.cast(products < 0, tf.float32)) / (tasks * (tasks - 1))


@register
class Pcgrad(Strategy):
    """Takes the gradients apart, task by task, and changes the sum by what the projections change."""

    declaration = Declaration(
        name="pcgrad",
        stage=Stage.ASCENT,
        summary="PCGrad: project each task's gradient off those of the tasks it conflicts with.",
        reference="Yu et al., NeurIPS 2020, https://arxiv.org/abs/2001.06782",
        options=PcgradOptions,
        why_not_neutral="it changes nothing where no two gradients conflict, and of itself has nothing to switch off",
        notes={
            "gradient_accumulation": "projects the gradients of each batch, not those of the window",
            "micro_batches": "projects the gradients of each part of the batch",
        },
        needs=("outputs",),
        cost=lambda options: Cost(backward=2, time=7 / 3, memory="one copy of the gradients for each output"),
        state=lambda options: {"draws": Slot(dtype="int32")},
        reports=lambda options: {"conflicting_tasks": Report()},
    )

    def compute_gradients(self, batch: Batch) -> Evaluation:
        _seam.ensure_built(self, batch.x)
        if not self.trainable_variables:
            return super().compute_gradients(batch)
        evaluation, _, tasks = evaluated_by_task("pcgrad", self, super().compute_gradients, batch)
        count = len(self.trainable_variables)
        everywhere = summed_gradients(self, batch, evaluation._replace(gradients=[g for task in tasks for g in task]))
        products = inner_products([everywhere[start : start + count] for start in range(0, len(everywhere), count)])
        self.record("conflicting_tasks", lambda: conflicting(products))
        seed = next_seed("pcgrad", self)
        orders = tf.argsort(tf.random.stateless_uniform((len(tasks), len(tasks)), seed), axis=1)
        changes = tf.unstack(surgery(products, orders) - 1)  # The rest is in the whole once: add what differs.
        gradients = []
        for whole, *parts in zip(evaluation.gradients, *tasks, strict=True):
            total = dense(whole)
            for change, part in zip(changes, parts, strict=True):
                total = total if part is None else total + tf.cast(change, part.dtype) * part
            gradients.append(total)
        return evaluation._replace(gradients=gradients)
