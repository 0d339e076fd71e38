"""Label smoothing: train a classifier for labels that leave some probability to every class.

    y' = (1 - smoothing) * y + smoothing / K        K: the number of classes; of a binary output, 2 for each unit
    loss = L(y')                                    for a cross-entropy (1 - smoothing) * L(y) + smoothing * mean_k L(k)

The loss alone sees y': metrics are those of the labels as they are. Class numbers are smoothed too, which Keras's
`label_smoothing` cannot. One cross-entropy more of the predictions; no extra evaluation, and nothing that concerns
batch norm or dropout. Outputs that are no classes, and what layers add to the loss, are left as they are.

Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", CVPR 2016, section 7,
https://arxiv.org/abs/1512.00567
"""

from typing import Annotated, Any

import keras
import tensorflow as tf
from pydantic import Field

from trainstep import _seam
from trainstep.declaration import Declaration, Stage, StrategyOptions
from trainstep.errors import ModelConflictError
from trainstep.registry import register
from trainstep.schedules import Scheduled, Within, is_always, value_at
from trainstep.step import Batch, Objective, Strategy
from trainstep.strategies._classes import class_outputs, share_of_loss


class LabelSmoothingOptions(StrategyOptions):
    """How far the labels are from certain."""

    smoothing: Annotated[Scheduled, Within(ge=0, lt=1)] = Field(
        default=0.1, description="Probability that is spread evenly over all classes, or a schedule of it; 0: none."
    )


def smoothed(labels: tf.Tensor, smoothing: float | tf.Tensor, num_classes: int) -> tf.Tensor:
    """Return `labels`, which are probabilities, drawn towards `1 / num_classes`."""
    return (1 - smoothing) * labels + smoothing / num_classes


@register
class LabelSmoothing(Strategy):
    """Adds to the loss what the smoothed labels change about it, so that all else in it stays."""

    declaration = Declaration(
        name="label_smoothing",
        stage=Stage.LABELS,
        summary="Leave some probability to every class in the labels of a classifier.",
        reference="Szegedy et al., CVPR 2016, https://arxiv.org/abs/1512.00567",
        options=LabelSmoothingOptions,
        neutral={"smoothing": 0.0},
        needs=("classes",),
        passes_through=lambda options: ("compute_objective",) if is_always(options.smoothing, 0) else (),
    )

    def compute_objective(self, batch: Batch) -> Objective:
        smoothing = self.strategy_options["label_smoothing"].smoothing
        objective = super().compute_objective(batch)
        if is_always(smoothing, 0):
            return objective
        amount = value_at(smoothing, self.optimizer.iterations)
        outputs, labels = tf.nest.flatten(objective.y_pred), tf.nest.flatten(batch.y)
        losses = _seam.losses_of_outputs(self, objective.y_pred)
        changes = {}
        for output in class_outputs("label_smoothing", self, objective.y_pred):
            index, y_pred, loss = output.place, outputs[output.place], losses[output.place]
            _check(loss)
            if output.kind == "sparse":
                loss = keras.losses.CategoricalCrossentropy(from_logits=output.from_logits)
                y = output.targets(batch.y, objective.y_pred)
            else:
                y = tf.cast(labels[index], tf.float32)
            smooth = smoothed(y, amount, 2 if output.kind == "binary" else y_pred.shape[-1])
            values = _seam.losses_of_entries(loss, smooth, y_pred) - _seam.losses_of_entries(loss, y, y_pred)
            changes[index] = tf.cast(values, tf.float32)
        change = share_of_loss(self, objective.y_pred, batch.sample_weight, changes)
        return objective._replace(loss=objective.loss + tf.cast(change, objective.loss.dtype))


def _check(loss: Any) -> None:
    """Raise `ModelConflictError` where `loss` smooths labels by itself."""
    settings = loss.get_config() if isinstance(loss, keras.losses.Loss) else {}
    if settings.get("label_smoothing"):
        raise ModelConflictError(
            f"The loss {loss.name!r} has label_smoothing={settings['label_smoothing']}, and the model the strategy "
            "'label_smoothing': it would be done twice. Leave the setting of the loss at 0."
        )
