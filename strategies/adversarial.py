"""Adversarial training: train on the worst point near each example.

    x' = argmax over ||x' - x|| <= epsilon of L(w, x', y)      approximately, by `steps` of ascent
    loss = clean_weight * L(w, x, y) + (1 - clean_weight) * L(w, x', y)

    fgsm:                          x' = x + epsilon * sign(dL/dx)               Goodfellow et al.
    fgsm with random_start:        one step of 1.25 epsilon from a random point  Wong et al., "Fast"
    pgd:                           projected steps from a random point           Madry et al.

Each step of the attack costs a forward pass and a backward pass to the input: with n of them a step
takes (3 + 2 n) / 3 of a plain one, and 1 more where both clean and perturbed examples are trained on.
One copy of the batch is kept. The passes of the attack leave batch-norm statistics, metrics and
dropout as they are; on Keras 2 with `attack_mode="training"` they draw dropout masks of their own.

Goodfellow et al., ICLR 2015, https://arxiv.org/abs/1412.6572; Madry et al., ICLR 2018,
https://arxiv.org/abs/1706.06083; Wong et al., ICLR 2020, https://arxiv.org/abs/2001.03994
"""

import functools
from typing import Any, Literal

from pydantic import Field, model_validator

from trainstep import _seam
from trainstep.declaration import Cost, Declaration, Slot, Stage, StrategyOptions
from trainstep.gradients import differentiate
from trainstep.registry import register
from trainstep.schedules import highest, is_always, value_at
from trainstep.step import Batch, Objective, Strategy
from trainstep.strategies._adversaries import (
    Epsilon,
    Inputs,
    NormOfBall,
    checked,
    seed_of_start,
)
from trainstep.strategies._attacks import ClipRange, attack, check_inputs
from trainstep.strategies._balls import step_length


class AdversarialOptions(StrategyOptions):
    """The attack, its budget, and the share of clean examples."""

    attack: Literal["fgsm", "pgd"] = Field(default="fgsm", description="One step, or several with projection.")
    epsilon: Epsilon = 8 / 255
    norm: NormOfBall = "linf"
    steps: int | None = Field(default=None, ge=1, description="Gradients taken; None: 1 for fgsm, 7 for pgd.")
    step_size: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Length of one step; None: epsilon for fgsm, 1.25 epsilon from a random start, "
        "2.5 epsilon / steps for pgd.",
    )
    random_start: bool | None = Field(
        default=None, description="Start anywhere in the ball; None: no for fgsm, yes for pgd."
    )
    clean_weight: float = Field(default=0.0, ge=0, le=1, description="Weight of the loss of the clean examples.")
    clip_range: ClipRange = None
    attack_mode: Literal["inference", "training"] = Field(
        default="inference", description="Mode of dropout and batch norm while the attack looks for its example."
    )
    inputs: Inputs = None
    seed: int = Field(default=0, ge=0, lt=2**31, description="Seed of the random start.")

    @model_validator(mode="after")
    def _one_step(self) -> "AdversarialOptions":
        if self.attack == "fgsm" and self.steps not in (None, 1):
            raise ValueError(f"fgsm takes one step, not {self.steps}; use attack='pgd' for more")
        return self

    @property
    def num_steps(self) -> int:
        """Gradients the attack takes: none where it could change nothing."""
        if is_always(self.epsilon, 0) or self.clean_weight == 1:
            return 0
        return self.steps or (7 if self.attack == "pgd" else 1)

    @property
    def mixes(self) -> bool:
        """Whether clean and adversarial examples are both trained on."""
        return self.num_steps > 0 and self.clean_weight > 0

    @property
    def starts_at_random(self) -> bool:
        """Whether the attack starts from a random point of the ball."""
        return self.attack == "pgd" if self.random_start is None else self.random_start

    @property
    def length(self) -> float:
        """Length of one step of the attack, in units of the input; the longest, where epsilon is on a schedule."""
        return self.length_at(highest(self.epsilon))

    def length_at(self, epsilon: Any) -> Any:
        """Return the length of one step where the ball has the radius `epsilon`, a number or a scalar tensor."""
        if self.step_size is not None:
            return self.step_size
        if self.attack == "pgd":
            return step_length(epsilon, max(self.num_steps, 1))
        return 1.25 * epsilon if self.starts_at_random else epsilon


def _cost(options: AdversarialOptions) -> Cost:
    if not options.num_steps:
        return Cost()
    passes = options.num_steps + options.mixes
    trained_on = "of clean and of perturbed examples in turn" if options.mixes else "of the perturbed examples only"
    return Cost(
        forward=passes,
        backward=passes,
        time=(3 + 2 * options.num_steps + 3 * options.mixes) / 3,
        memory="one copy of the batch" + ", activations of a second pass" * options.mixes,
        batch_norm=f"statistics {trained_on}",
    )


@register
class Adversarial(Strategy):
    """Perturbs the batch once; what follows in the step sees the examples it made."""

    declaration = Declaration(
        name="adversarial",
        stage=Stage.ATTACK,
        summary="Train on adversarial examples: FGSM, Fast (R+FGSM) or PGD.",
        reference="Madry et al., ICLR 2018, https://arxiv.org/abs/1706.06083",
        options=AdversarialOptions,
        neutral={"epsilon": 0.0},
        needs=("float inputs",),
        notes={"mixed_precision": "the attack's passes run in 16 bits too; half-precision inputs are moved in float32"},
        passes_through=lambda options: (
            ["transform_batch"] * (options.num_steps == 0) + ["compute_objective"] * (not options.mixes)
        ),
        cost=_cost,
        state=lambda options: {"draws": Slot(dtype="int32")} if options.num_steps and options.starts_at_random else {},
    )

    def check_model(self) -> None:
        super().check_model()
        check_inputs("adversarial", self)

    def transform_batch(self, batch: Batch) -> Batch:
        options = self.strategy_options["adversarial"]
        if options.num_steps:
            examples = self._adversarial_examples(batch)
            if options.mixes:
                batch = batch._replace(extra={**batch.extra, "adversarial": examples})
            else:
                batch = batch._replace(x=examples)
        return super().transform_batch(batch)

    def compute_objective(self, batch: Batch) -> Objective:
        if "adversarial" not in batch.extra:
            return super().compute_objective(batch)
        weight = self.strategy_options["adversarial"].clean_weight
        clean = super().compute_objective(batch)
        attacked = super().compute_objective(batch._replace(x=batch.extra["adversarial"]))
        return clean._replace(loss=weight * clean.loss + (1 - weight) * attacked.loss)

    def _adversarial_examples(self, batch: Batch) -> Any:
        options = self.strategy_options["adversarial"]
        _seam.ensure_built(self, batch.x)
        x, able = checked("adversarial", self, batch.x, options)
        epsilon = value_at(options.epsilon, self.optimizer.iterations)

        def loss_at(x: Any) -> Any:
            return _seam.probe(self, x, batch.y, batch.sample_weight, training=options.attack_mode == "training")

        return attack(
            *(x, able, loss_at, functools.partial(differentiate, self)),
            seed=seed_of_start("adversarial", self) if options.starts_at_random else None,
            epsilon=epsilon,
            norm=options.norm,
            steps=options.num_steps,
            step_size=options.length_at(epsilon),
            clip_range=options.clip_range,
        )
