"""Micro-batches: the gradient of a batch, computed in parts that fit into memory.

    g = sum_i n_i * g_i / sum_i n_i        g_i the mean gradient of part i, n_i its examples
    w = w - learning_rate * g              after every batch, as without it

One step of `fit` stays one update: schedules, callbacks and metrics are those of the whole batch; the
activations are those of one part at a time. Costs one sum of the gradients, and as many traces of the
model as there are parts. Batch norm normalizes each part by itself and updates its averages `count` times.

Huang et al., "GPipe: Efficient Training of Giant Neural Networks using Pipeline Parallelism",
NeurIPS 2019, https://arxiv.org/abs/1811.06965 (section 2.2: micro-batches and their accumulated gradient)
"""

import itertools
from collections.abc import Sequence
from typing import Any

import tensorflow as tf
from pydantic import Field

from trainstep import _seam
from trainstep.declaration import Cost, Declaration, Stage, StrategyOptions
from trainstep.errors import ModelConflictError, UnsupportedInputError
from trainstep.gradients import Gradients, dense, scale
from trainstep.registry import register
from trainstep.step import Batch, Evaluation, Strategy, num_loss_terms


class MicroBatchesOptions(StrategyOptions):
    """Into how many parts a batch is cut."""

    count: int = Field(default=4, ge=1, description="Parts of a batch, as equal as can be; 1 cuts nothing.")


def part_of(batch: Batch, start: tf.Tensor, stop: tf.Tensor) -> Batch:
    """Return the examples of `batch` from `start` to before `stop`: int32 scalars.

    Raises:
        UnsupportedInputError: a tensor is sparse.
    """

    def cut_one(tensor: Any) -> Any:
        if isinstance(tensor, tf.SparseTensor):
            raise UnsupportedInputError(
                "micro_batches cuts dense and ragged tensors, not sparse ones. Make them dense in the data pipeline "
                "(tf.sparse.to_dense), or feed smaller batches and use 'gradient_accumulation'."
            )
        return None if tensor is None else tensor[start:stop]

    def cut(tensors: Any) -> Any:
        return tf.nest.map_structure(cut_one, tensors)

    examples = {"x": cut(batch.x), "y": cut(batch.y), "sample_weight": cut(batch.sample_weight)}
    return batch._replace(**examples, extra=cut(dict(batch.extra)))


def joined(parts: Sequence[tf.Tensor], sizes: Sequence[tf.Tensor]) -> tf.Tensor:
    """Return the first examples of each part, as many as `sizes` says, one part after the other; masks as well."""

    def join(tensors: Sequence[Any]) -> Any:
        return tf.concat([tensor[:size] for tensor, size in zip(tensors, sizes, strict=True)], axis=0)

    masks = [_seam.mask_of(part) for part in parts]
    return _seam.with_mask(join(parts), None if masks[0] is None else join(masks))


def weighted_sum(totals: Gradients, gradients: Gradients, weight: tf.Tensor) -> Gradients:
    """Return `totals + weight * gradients`; where only one of both is not None, that one."""

    def add(total: Any, gradient: Any) -> Any:
        if gradient is None:
            return total
        # A part of weight zero may have no finite gradient: the mean over masked entries alone.
        weighted = tf.math.multiply_no_nan(dense(gradient), tf.cast(weight, gradient.dtype))
        return weighted if total is None else total + weighted

    return [add(total, gradient) for total, gradient in zip(totals, gradients, strict=True)]


@register
class MicroBatches(Strategy):
    """Evaluates one part after the other; each waits for the one before, or all would be in memory at once."""

    declaration = Declaration(
        name="micro_batches",
        stage=Stage.GRADIENT,
        summary="The gradient of a batch from parts of it: the memory of a part, one update per batch.",
        reference="Huang et al., NeurIPS 2019, https://arxiv.org/abs/1811.06965",
        options=MicroBatchesOptions,
        neutral={"count": 1},
        needs=("dense inputs",),
        notes={
            "adversarial": "an attack is on the whole batch, and takes the memory of one",
            "gradient_accumulation": "several batches, each in parts: the window counts batches",
        },
        passes_through=lambda options: ("compute_gradients",) if options.count == 1 else (),
        cost=lambda options: (
            Cost(
                memory="activations of one part of the batch; one copy of the trainable weights",
                batch_norm="normalizes each part by itself; moving averages move once per part",
            )
            if options.count > 1
            else Cost()
        ),
    )

    def compute_gradients(self, batch: Batch) -> Evaluation:
        count = self.strategy_options["micro_batches"].count
        if count == 1:
            return super().compute_gradients(batch)
        if _seam.sums_its_loss(self):
            raise ModelConflictError(
                "micro_batches takes the mean over the parts of a batch, and the loss is a sum (reduction='sum'). "
                "Compile with a loss that is a mean, and a learning rate times the size of a batch."
            )
        bounds = [index * _seam.num_examples(batch.x) // count for index in range(count + 1)]
        sizes = [stop - start for start, stop in itertools.pairwise(bounds)]
        evaluations: list[Evaluation] = []
        gradients, loss, terms = None, tf.zeros(()), tf.zeros(())
        for start, size in zip(bounds, sizes, strict=False):
            # Some parts are empty where there are fewer examples than parts: these take an example that counts
            # for nothing. The start waits for the part before, so that there is one at a time in memory.
            with tf.control_dependencies([loss, *(total for total in gradients or [] if total is not None)]):
                part = part_of(batch, tf.identity(start), start + tf.maximum(size, 1))
            evaluation = super().compute_gradients(part)
            weight = tf.where(size > 0, num_loss_terms(part, evaluation.y_pred), 0.0)
            gradients = weighted_sum(gradients or [None] * len(evaluation.gradients), evaluation.gradients, weight)
            loss += tf.math.multiply_no_nan(tf.cast(evaluation.loss, tf.float32), weight)
            terms += weight
            evaluations.append(evaluation)
        share = tf.math.divide_no_nan(1.0, terms)
        y_pred = tf.nest.map_structure(lambda *parts: joined(parts, sizes), *(each.y_pred for each in evaluations))
        return Evaluation(tf.cast(loss * share, evaluations[0].loss.dtype), y_pred, scale(gradients or [], share))
