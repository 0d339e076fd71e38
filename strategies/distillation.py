"""Distillation: train on what a larger model, the teacher, predicts for the batch, besides the labels.

    loss = (1 - alpha) * L(y, p) + alpha * T^2 * KL(q_T || p_T)        q: the teacher's probabilities; p: the model's
    q_T = softmax(z / T),   z: logits, or logarithms of probabilities  p_T likewise

T^2 keeps the size of the gradient of the second term, which falls as 1 / T^2. It differs from the cross-entropy of the
paper by the entropy of q_T, which has no gradient. Regularizers and `add_loss` count once, whatever `alpha`.

One forward pass of the teacher a step, in inference mode: its batch-norm statistics and dropout stay as they are. It
sees the batch that the model sees, after whatever has changed it. It is no part of the model, which saves its name.

Hinton et al., "Distilling the Knowledge in a Neural Network", NeurIPS 2014 workshop, section 2,
https://arxiv.org/abs/1503.02531
"""

from typing import Annotated, Any

import keras
import tensorflow as tf
from pydantic import Field, field_validator

from trainstep.declaration import Cost, Declaration, Stage, StrategyOptions
from trainstep.registry import register
from trainstep.schedules import Scheduled, Within, is_always, value_at
from trainstep.step import Batch, Objective, Strategy
from trainstep.strategies._classes import class_outputs, divergence, share_of_loss, weighed
from trainstep.strategies._teachers import (
    gives_logits,
    name_of,
    output_like,
    predicted_by,
    provide,
    teacher_of,
    withdraw,
)

__all__ = ["Distillation", "DistillationOptions", "provide", "withdraw"]


class DistillationOptions(StrategyOptions):
    """The teacher, and how much it is listened to."""

    teacher: str = Field(
        min_length=1,
        description="Path of a saved model, or name under which one is provided; a model is provided under its own.",
    )
    temperature: float = Field(
        default=4.0, gt=0, allow_inf_nan=False, description="T, by which logits are divided before the softmax."
    )
    alpha: Annotated[Scheduled, Within(ge=0, le=1)] = Field(
        default=0.9, description="Share of the teacher in the loss, the rest is the labels'; 0: plain training."
    )
    from_logits: bool | None = Field(
        default=None,
        description="Whether the teacher gives logits; None: as its compiled loss, or its last activation, tells.",
    )

    @field_validator("teacher", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return name_of(value) if isinstance(value, keras.Model) else value


def softened(log_p: tf.Tensor, temperature: float) -> tf.Tensor:
    """Return the logarithms of the probabilities at `temperature`, from those at 1: (..., classes)."""
    return tf.nn.log_softmax(log_p / temperature, axis=-1)


@register
class Distillation(Strategy):
    """Weighs the labels less, and adds the divergence from the teacher."""

    declaration = Declaration(
        name="distillation",
        stage=Stage.TEACHER,
        summary="Train a small model on what a larger one predicts.",
        reference="Hinton et al., 2015, https://arxiv.org/abs/1503.02531",
        options=DistillationOptions,
        neutral={"teacher": "teacher.keras", "alpha": 0.0},
        needs=("classes",),
        example={"teacher": "teacher.keras"},
        notes={
            "adversarial": "the teacher, too, sees the examples the attack made",
            "gradient_penalty": "what is penalized is the gradient of the whole loss, the teacher's part included",
            "label_smoothing": "smoothed are the labels, and so with them in the share that they have",
            "r_drop": "the teacher is compared with both passes",
            "sam": "the teacher is evaluated twice, as the model is",
        },
        passes_through=lambda options: ("compute_objective",) if is_always(options.alpha, 0) else (),
        cost=lambda options: (
            Cost()
            if is_always(options.alpha, 0)
            else Cost(forward=1, time=4 / 3, memory="the teacher, and in eager execution its activations")
        ),
    )

    def compute_objective(self, batch: Batch) -> Objective:
        options = self.strategy_options["distillation"]
        if is_always(options.alpha, 0):
            return super().compute_objective(batch)
        alpha = value_at(options.alpha, self.optimizer.iterations)
        taught = class_outputs("distillation", self, batch.y)
        weights = weighed(self, batch, 1 - alpha, [output.place for output in taught])
        objective = super().compute_objective(batch._replace(sample_weight=weights))
        teacher = teacher_of(options.teacher, self)
        predicted = predicted_by(options.teacher, teacher, batch.x)
        values_of = {}
        for output in taught:
            place, values = output_like(options.teacher, predicted, objective.y_pred, output, len(taught))
            from_logits = options.from_logits
            if from_logits is None:
                from_logits = gives_logits(options.teacher, teacher, predicted, place)
            log_q = output._replace(place=0, from_logits=from_logits).log_probabilities(values)
            log_p = output.log_probabilities(objective.y_pred)
            log_q, log_p = output.by_question(log_q), output.by_question(log_p)
            between = divergence(softened(log_q, options.temperature), softened(log_p, options.temperature))
            values_of[output.place] = tf.reduce_mean(between, axis=-1)
        share = share_of_loss(self, objective.y_pred, batch.sample_weight, values_of)
        divergences = alpha * options.temperature**2 * share
        return objective._replace(loss=objective.loss + tf.cast(divergences, objective.loss.dtype))
