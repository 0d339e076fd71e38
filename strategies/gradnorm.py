"""GradNorm: learn the weights of the tasks, so that all of them train at a similar rate.

    L = sum_i w_i L_i                                   w_i = 1 at first
    G_i = ||d(w_i L_i)/dW||,   r_i = (L_i / L_i(0)) / mean_j (L_j / L_j(0))
    w_i = w_i - learning_rate * d/dw_i sum_j |G_j - mean(G) r_j^alpha|        the targets mean(G) r^alpha held fixed
        = w_i - learning_rate * sign(G_i - mean(G) r_i^alpha) * G_i / w_i
    then all w_i times one factor, so that they sum to the number of tasks

A task is an output with a loss, L_i its loss times its weight among the `loss_weights` of `compile`, W the weights that
tasks share. A step descends the loss with the w_i of before. The loss that is reported is that of `compile`: with all
w_i at 1. A w_i that would fall below 0, where its task would be unlearned, is 0. A batch of which a loss or a norm is
not finite leaves the w_i as they are, and so does every batch while what the tasks share is frozen.

One backward pass more for each task, from the one forward pass, down to the lowest of the shared weights that are
looked at: batch norm and dropout see the batch once. Norms and losses are those of the whole batch, over all replicas.

Chen et al., "GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep Multitask Networks", ICML 2018,
equations 1 and 2, algorithm 1, https://arxiv.org/abs/1711.02257
"""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf
from pydantic import Field

from trainstep import _seam
from trainstep.declaration import Cost, Declaration, Report, Slot, Stage, StrategyOptions
from trainstep.errors import ModelConflictError
from trainstep.registry import register
from trainstep.replicas import assign
from trainstep.step import Batch, Evaluation, Strategy, summed_gradients
from trainstep.strategies._classes import share_of_mean
from trainstep.strategies._tasks import ByTask, backward_weighted, evaluated_by_task
from trainstep.strategies._weights import check_names, matching

_MOST = 64
"""Outputs a model may have: state is made before it is known how many there are."""


class GradnormOptions(StrategyOptions):
    """How closely the tasks are held together, how fast, and by which weights."""

    alpha: float = Field(
        default=1.5,
        ge=0,
        allow_inf_nan=False,
        description="Power of a task's relative rate: how much larger the gradient of one that lags is to be; 0: no.",
    )
    learning_rate: float = Field(
        default=0.025,
        ge=0,
        allow_inf_nan=False,
        description="Step of the tasks' weights, per unit of a gradient's norm; 0: they stay at 1.",
    )
    shared: str | None = Field(
        default=None,
        min_length=1,
        description='Name or pattern of the weights whose gradients are compared, such as "trunk/*"; None: all that '
        "more than one task has a gradient for.",
    )


def next_weights(
    weights: tf.Tensor, norms: tf.Tensor, losses: tf.Tensor, initial: tf.Tensor, options: GradnormOptions
) -> tf.Tensor:
    """Return the weights of the tasks for the next step; all tensors are float32 (tasks,).

    Args:
        weights: of this step.
        norms: of the gradient of each task's loss, without its weight.
        losses: of this step.
        initial: losses of the first one.
        options: how closely, and how fast.
    """
    ratios = tf.math.divide_no_nan(losses, initial)
    rates = tf.math.divide_no_nan(ratios, tf.reduce_mean(ratios))
    weighted = weights * norms
    targets = tf.reduce_mean(weighted) * rates**options.alpha
    moved = tf.maximum(weights - options.learning_rate * tf.sign(weighted - targets) * norms, 0.0)
    total = tf.reduce_sum(moved)
    usable = tf.reduce_all(tf.math.is_finite(moved)) & tf.math.is_finite(total) & (total > 0)
    return tf.where(usable, moved * (tf.cast(tf.size(weights), tf.float32) / total), weights)


@register
class Gradnorm(Strategy):
    """Weighs the gradient that goes back through each output, and moves the weights after it."""

    declaration = Declaration(
        name="gradnorm",
        stage=Stage.ASCENT,
        summary="GradNorm: weigh the tasks so that all of them train at a similar rate.",
        reference="Chen et al., ICML 2018, https://arxiv.org/abs/1711.02257",
        options=GradnormOptions,
        neutral={"learning_rate": 0.0},
        notes={
            "gradient_accumulation": "moves the tasks' weights with each batch, and not with the window",
            "micro_batches": "moves the tasks' weights with each part of a batch",
            "pcgrad": "what is projected are the weighted gradients",
            "sam": "both evaluations are of the weighted loss; the norms are those of the first",
        },
        needs=("outputs",),
        passes_through=lambda options: () if options.learning_rate else ("compute_gradients",),
        cost=lambda options: Cost(backward=2, time=7 / 3) if options.learning_rate else Cost(),
        state=lambda options: (
            {"weights": Slot(1.0, shape=(_MOST,)), "initial": Slot(shape=(_MOST,)), "updates": Slot(dtype="int32")}
            if options.learning_rate
            else {}
        ),
        reports=lambda options: (
            {"smallest_task_weight": Report("last"), "largest_task_weight": Report("last")}
            if options.learning_rate
            else {}
        ),
    )

    def check_model(self) -> None:
        super().check_model()
        check_names("gradnorm", self, filter(None, [self.strategy_options["gradnorm"].shared]))

    def compute_gradients(self, batch: Batch) -> Evaluation:
        options = self.strategy_options["gradnorm"]
        if not options.learning_rate:
            return super().compute_gradients(batch)
        _seam.ensure_built(self, batch.x)
        if not self.trainable_variables:
            return super().compute_gradients(batch)
        weights = tf.convert_to_tensor(self.strategy_state["gradnorm"]["weights"])

        def weighted(index: int, output: tf.Tensor) -> tf.Tensor:
            if index >= _MOST:
                raise ModelConflictError(f"gradnorm takes {_MOST} outputs at most, and has to take number {index + 1}.")
            return backward_weighted(output, weights[index])

        found = evaluated_by_task("gradnorm", self, super().compute_gradients, batch, weighted)
        chosen = _shared(self, found, options.shared)
        if any(chosen):
            self._move_weights(batch, found, chosen)
        of_tasks = tf.gather(tf.convert_to_tensor(self.strategy_state["gradnorm"]["weights"]), found.outputs)
        self.record("smallest_task_weight", lambda: tf.reduce_min(of_tasks))
        self.record("largest_task_weight", lambda: tf.reduce_max(of_tasks))
        return found.evaluation

    def _move_weights(self, batch: Batch, found: ByTask, chosen: Sequence[bool]) -> None:
        """Let the weights of the tasks follow from the losses in `found`, and its gradients of the `chosen` weights."""
        options, slots = self.strategy_options["gradnorm"], self.strategy_state["gradnorm"]
        parts = [gradient for task in found.gradients for gradient, ok in zip(task, chosen, strict=True) if ok]
        shares = [*parts, *_losses(self, batch, found)]
        everywhere = summed_gradients(self, batch, found.evaluation._replace(gradients=shares))
        tasks, each = len(found.outputs), sum(chosen)
        norms = tf.stack([_norm(everywhere[task * each : (task + 1) * each]) for task in range(tasks)])
        losses = tf.stack(everywhere[tasks * each :])
        places = tf.constant(found.outputs)[:, tf.newaxis]
        weights, initial, updates = (tf.convert_to_tensor(slots[name]) for name in ("weights", "initial", "updates"))
        first = tf.where(updates == 0, losses, tf.gather_nd(initial, places))
        of_tasks = next_weights(tf.gather_nd(weights, places), norms, losses, first, options)
        usable = tf.reduce_all(tf.math.is_finite(losses)) & tf.reduce_all(tf.math.is_finite(norms))
        changes = (
            (slots["weights"], weights, tf.tensor_scatter_nd_update(weights, places, of_tasks)),
            (slots["initial"], initial, tf.tensor_scatter_nd_update(initial, places, first)),
            (slots["updates"], updates, updates + 1),
        )
        assign([(slot, tf.where(usable, new, old)) for slot, old, new in changes])


def _norm(gradients: Sequence[Any]) -> tf.Tensor:
    return tf.linalg.global_norm([tf.cast(gradient, tf.float32) for gradient in gradients if gradient is not None])


def _shared(model: Any, found: ByTask, pattern: str | None) -> list[bool]:
    """Return for each trainable weight whether the gradients with respect to it are compared.

    Of none, where layers are frozen and these are what the outputs share.

    Raises:
        ModelConflictError: the outputs share no weights at all, or do not all depend on those of `pattern`.
    """
    weights = model.trainable_variables
    counts = [sum(gradient is not None for gradient in of_weight) for of_weight in zip(*found.gradients, strict=True)]
    if pattern is None:
        chosen, what = [count > 1 for count in counts], "share no weights"
        if not any(chosen) and not all(layer.trainable for layer in _seam.layers_of(model)):
            return chosen
    else:
        chosen, what = matching("gradnorm", weights, {pattern: True}, False), f"do not all depend on {pattern!r}"
    for task in found.gradients:
        if all(gradient is None for gradient, ok in zip(task, chosen, strict=True) if ok):
            common = [_seam.path_of(w) for w, n in zip(weights, counts, strict=True) if n == len(found.outputs)]
            raise ModelConflictError(
                "gradnorm compares the gradients of all tasks with respect to the same weights, and the outputs "
                f"{what}. Weights that all outputs depend on: {', '.join(common) or 'none'}."
            )
    return chosen


def _losses(model: Any, batch: Batch, found: ByTask) -> list[tf.Tensor]:
    """Return this replica's share of the loss of each task, without its weights: float32 scalars."""
    y_pred = found.evaluation.y_pred
    outputs, given = tf.nest.flatten(y_pred), _seam.losses_of_outputs(model, y_pred)
    labels, weights = (_seam.for_each_output(model, each, y_pred) for each in (batch.y, batch.sample_weight))
    losses = []
    for index in found.outputs:
        if given[index] is None:
            raise ModelConflictError(
                f"gradnorm looks at the loss of each task, and `compile` was given none for the output {index}, which "
                "the whole loss depends on. Give each such output its loss in `compile`."
            )
        entries = tf.cast(_seam.losses_of_entries(given[index], labels[index], outputs[index]), tf.float32)
        losses.append(share_of_mean(given[index], entries, outputs[index], weights[index]))
    return losses
