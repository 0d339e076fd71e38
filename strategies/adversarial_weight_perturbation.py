"""Adversarial weight perturbation (AWP): descend at weights moved, each tensor by its size, to where the loss is high.

    v_l = gamma * ||w_l|| * g_l / ||g_l||      g_l = dL(w)/dw_l, for each tensor l of two dimensions or more
    descended is dL(w + v)/dw, taken at w

L is the loss of whatever is trained on: with adversarial training that of the adversarial examples, so that both the
input and the weights are at their worst. Tensors of fewer dimensions, biases and the scales of batch norm, stay, as in
the authors' code. Two evaluations a step, twice the time of a plain one; one copy of the weights is kept during the
second. Loss, predictions, metrics and batch-norm statistics are those of the first, at w. On Keras 3 both evaluations
have the same dropout masks; on Keras 2, where the state of dropout cannot be reached, each draws its own.

Wu, Xia and Wang, "Adversarial Weight Perturbation Helps Robust Generalization", NeurIPS 2020, equation 10 in one step,
https://arxiv.org/abs/2004.05884
"""

from collections.abc import Sequence
from typing import Annotated, Any

import tensorflow as tf
from pydantic import Field

from trainstep import _seam
from trainstep.declaration import Cost, Declaration, Stage, StrategyOptions
from trainstep.errors import ModelConflictError
from trainstep.gradients import Gradients, dense
from trainstep.registry import register
from trainstep.schedules import Scheduled, Within, is_always, value_at
from trainstep.step import Batch, Evaluation, Strategy, summed_gradients
from trainstep.strategies._ascent import NOISELESS, TWO_ASCENTS, beginning, gradients_after

_TINY = 1e-20
"""What the authors add to the norm of a gradient."""


class AdversarialWeightPerturbationOptions(StrategyOptions):
    """How far the weights are moved."""

    gamma: Annotated[Scheduled, Within(ge=0)] = Field(
        default=0.01,
        description="Length of each tensor's move, as a part of its own length, or a schedule of it; 0: none.",
    )

    @property
    def moves(self) -> bool:
        """Whether any step does."""
        return not is_always(self.gamma, 0)


def perturbation(weights: Sequence[Any], gradients: Gradients, gamma: float | tf.Tensor) -> Gradients:
    """Return what is to be added to each weight; None where it has no gradient, or fewer than two dimensions."""

    def move(weight: Any, gradient: Any) -> tf.Tensor | None:
        if gradient is None or len(weight.shape) < 2:
            return None
        gradient, weight = dense(gradient), tf.convert_to_tensor(weight)
        length = tf.cast(gamma, weight.dtype) * tf.norm(weight)
        return length * gradient / (tf.norm(gradient) + _TINY)

    return [move(weight, gradient) for weight, gradient in zip(weights, gradients, strict=True)]


@register
class AdversarialWeightPerturbation(Strategy):
    """Evaluates at the weights, and once more where the loss is high, relative to the size of each tensor."""

    declaration = Declaration(
        name="adversarial_weight_perturbation",
        stage=Stage.OUTER_ASCENT,
        summary="AWP: descend at weights moved, each tensor by its size, to where the loss is high.",
        reference="Wu et al., NeurIPS 2020, https://arxiv.org/abs/2004.05884",
        options=AdversarialWeightPerturbationOptions,
        neutral={"gamma": 0.0},
        conflicts={"sam": TWO_ASCENTS, "gsam": TWO_ASCENTS, "look_sam": TWO_ASCENTS, "dp_sgd": NOISELESS},
        notes={
            "adversarial": "AT-AWP: the examples are made once, at the weights, and seen by both evaluations",
            "gradient_accumulation": "moves the weights for each of the batches",
            "gradient_clipping": "what is clipped is the gradient that is descended, never the move",
            "mart": "the examples are made once, at the weights, and seen by both evaluations",
            "micro_batches": "moves along the gradient of the whole batch, of which both evaluations are in parts",
            "trades": "TRADES-AWP, with gamma=0.005 in the paper: the examples are made once, at the weights",
        },
        passes_through=lambda options: () if options.moves else ("compute_gradients",),
        cost=lambda options: (
            Cost(forward=1, backward=1, time=2.0, memory="one copy of the trainable weights")
            if options.moves
            else Cost()
        ),
    )

    def compute_gradients(self, batch: Batch) -> Evaluation:
        options, evaluate = self.strategy_options["adversarial_weight_perturbation"], super().compute_gradients
        if not options.moves:
            return super().compute_gradients(batch)
        _seam.ensure_built(self, batch.x)  # There are no weights and no random state before.
        if not self.trainable_variables:
            return super().compute_gradients(batch)
        start = beginning(self)
        evaluation = super().compute_gradients(batch)

        gamma = value_at(options.gamma, self.optimizer.iterations)
        steps = perturbation(self.trainable_variables, summed_gradients(self, batch, evaluation), gamma)
        if all(step is None for step in steps):
            raise ModelConflictError(
                "adversarial_weight_perturbation moves weights of two dimensions or more, kernels and embeddings, and "
                f"the loss depends on none: {', '.join(map(_seam.path_of, self.trainable_variables))}. Unfreeze one, "
                "or leave the strategy out."
            )
        return evaluation._replace(gradients=gradients_after(self, batch, steps, evaluate, start))
