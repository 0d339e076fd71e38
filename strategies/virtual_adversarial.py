"""Virtual adversarial training (VAT): say the same around each example, labelled or not.

    loss = L + alpha * mean_i LDS(x_i),   LDS(x) = KL(p(x) || p(x + r))       p(x) a constant: no gradient through it
    d = g / ||g||,  g = d/dr KL(p(x) || p(x + r)) at r = xi * d,  `iterations` times from a random d
    r = epsilon * d                                                           ||.|| the L2 norm, of each example

With k iterations a step costs (6 + 2 k) / 3 of a plain one: k forward passes with a backward pass to the input, and a
forward and backward pass at x + r, whose activations are kept besides; p(x) is of the pass there is anyway. The added
passes are in training mode, as the authors' are, and leave no trace: batch norm normalizes by their batch and keeps
statistics of the examples alone. On Keras 3 all passes have the same dropout masks; on Keras 2, where the state of
dropout cannot be reached, each draws its own.

Miyato et al., "Virtual Adversarial Training: A Regularization Method for Supervised and Semi-Supervised Learning", IEEE
TPAMI 2018, algorithm 1, https://arxiv.org/abs/1704.03976
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import tensorflow as tf
from pydantic import Field

from trainstep import _seam
from trainstep.declaration import Cost, Declaration, Slot, Stage, StrategyOptions
from trainstep.gradients import differentiate
from trainstep.registry import register
from trainstep.schedules import Scheduled, Within, is_always, value_at
from trainstep.step import Batch, Objective, Strategy
from trainstep.strategies._adversaries import Inputs, checked, seed_of_start
from trainstep.strategies._attacks import ClipRange, attackable, check_inputs, movable
from trainstep.strategies._balls import ascent_direction, normal_delta, perturbed
from trainstep.strategies._classes import class_outputs, mean_divergence


class VirtualAdversarialOptions(StrategyOptions):
    """How far predictions are compared, how that direction is found, and what a difference weighs."""

    alpha: Annotated[Scheduled, Within(ge=0)] = Field(
        default=1.0, description="Weight of the divergence, in loss per nat, or a schedule of it; 0: none."
    )
    epsilon: Annotated[Scheduled, Within(ge=0)] = Field(
        default=2.0,
        description="L2 norm of the perturbation of each example and input, or a schedule of it; 0: none.",
    )
    xi: float = Field(
        default=0.1,
        gt=0,
        allow_inf_nan=False,
        description="L2 norm of the step by which the direction is found, in units of the input.",
    )
    iterations: int = Field(default=1, ge=1, description="Gradients taken to find the direction.")
    clip_range: ClipRange = None
    inputs: Inputs = None
    seed: int = Field(default=0, ge=0, lt=2**31, description="Seed of the directions it starts from.")

    @property
    def acts(self) -> bool:
        """Whether any step differs from a plain one."""
        return not is_always(self.alpha, 0) and not is_always(self.epsilon, 0)


def worst_directions(
    gradients_at: Callable[[list[tf.Tensor]], Sequence[tf.Tensor | None]],
    directions: Sequence[tf.Tensor],
    xi: float,
    iterations: int,
) -> list[tf.Tensor]:
    """Return the directions, of L2 norm 1 for each example, in which a divergence grows most: power iteration.

    Args:
        gradients_at: maps perturbations to the gradients of the divergence, 0 at no perturbation; None counts as zero.
        directions: to start from, of any length: (batch, ...).
        xi: L2 norm of the perturbations.
        iterations: number of gradients taken.
    """
    found = [ascent_direction(direction, "l2") for direction in directions]
    for _ in range(iterations):
        gradients = gradients_at([xi * direction for direction in found])
        found = [
            tf.zeros_like(direction) if gradient is None else ascent_direction(gradient, "l2")
            for direction, gradient in zip(found, gradients, strict=True)
        ]
    return [tf.stop_gradient(direction) for direction in found]


@register
class VirtualAdversarial(Strategy):
    """Draws directions for the batch; adds to the loss how far predictions along the worst ones are off."""

    declaration = Declaration(
        name="virtual_adversarial",
        stage=Stage.OBJECTIVE,
        summary="VAT: the same predictions around each example, labelled or not.",
        reference="Miyato et al., TPAMI 2018, https://arxiv.org/abs/1704.03976",
        options=VirtualAdversarialOptions,
        neutral={"alpha": 0.0},
        notes={
            "adversarial": "it is around the examples the attack made that predictions are kept the same",
            "mixed_precision": "its passes run in 16 bits too, where xi should be larger; divergences are in float32",
            "trades": "both keep predictions the same around the clean examples, each in its own ball: the sum counts",
        },
        needs=("classes", "float inputs"),
        passes_through=lambda options: () if options.acts else ("transform_batch", "compute_objective"),
        cost=lambda options: (
            Cost(
                forward=options.iterations + 1,
                backward=options.iterations + 1,
                time=(6 + 2 * options.iterations) / 3,
                memory="one copy of the batch, activations of a second pass",
                batch_norm="none: statistics are those of the examples, the added passes leave none",
            )
            if options.acts
            else Cost()
        ),
        state=lambda options: {"draws": Slot(dtype="int32")} if options.acts else {},
    )

    def check_model(self) -> None:
        super().check_model()
        check_inputs("virtual_adversarial", self)

    def transform_batch(self, batch: Batch) -> Batch:
        options = self.strategy_options["virtual_adversarial"]
        if options.acts:
            _seam.ensure_built(self, batch.x)
            x, able = checked("virtual_adversarial", self, batch.x, options)
            seed = seed_of_start("virtual_adversarial", self)
            originals, _ = movable(x, able)
            draws = [normal_delta(original, seed + tf.constant([i, 0])) for i, original in enumerate(originals)]
            batch = batch._replace(x=x, extra={**batch.extra, "virtual_adversarial": draws})
        return super().transform_batch(batch)

    def compute_objective(self, batch: Batch) -> Objective:
        options = self.strategy_options["virtual_adversarial"]
        if not options.acts:
            return super().compute_objective(batch)
        random_state = _seam.random_state(self)
        objective = super().compute_objective(self._labelled(batch))
        originals, with_moved = movable(batch.x, attackable(batch.x, self, options.inputs))

        def divergence_at(moved: Sequence[tf.Tensor]) -> tf.Tensor:
            def divergence() -> tf.Tensor:
                y_pred = _seam.forward(self, with_moved(moved), training=True)
                return mean_divergence("virtual_adversarial", self, objective.y_pred, y_pred, None, fixed=True)

            return _seam.without_trace(self, divergence, training=True, random_state=random_state)

        def gradients_at(deltas: list[tf.Tensor]) -> Sequence[tf.Tensor | None]:
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(deltas)
                value = divergence_at([x + delta for x, delta in zip(originals, deltas, strict=True)])
            return differentiate(self, tape, value, deltas)

        draws = batch.extra["virtual_adversarial"]
        directions = worst_directions(gradients_at, draws, options.xi, options.iterations)
        epsilon, alpha = (value_at(option, self.optimizer.iterations) for option in (options.epsilon, options.alpha))
        worst = [
            perturbed(x, tf.cast(epsilon, x.dtype) * direction, epsilon, "l2", options.clip_range)
            for x, direction in zip(originals, directions, strict=True)
        ]
        added = alpha * divergence_at(worst)
        return objective._replace(loss=objective.loss + tf.cast(added, objective.loss.dtype))

    def _labelled(self, batch: Batch) -> Batch:
        """Return `batch` with labels: where it has none, some of weight zero."""
        if batch.y is not None:
            return batch

        def predicted() -> Any:
            return _seam.forward(self, batch.x, training=False)

        outputs = _seam.without_trace(self, predicted, training=False)
        kinds = {each.place: each.kind for each in class_outputs("virtual_adversarial", self, outputs)}
        flat = tf.nest.flatten(outputs)
        labels = [tf.zeros_like(o[..., 0] if kinds.get(i) == "sparse" else o) for i, o in enumerate(flat)]
        nothing = tf.zeros([_seam.num_examples(batch.x)])
        return batch._replace(
            y=tf.nest.pack_sequence_as(outputs, labels),
            sample_weight=tf.nest.map_structure(lambda output: nothing, outputs),
        )
