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

import tensorflow as tf
from pydantic import Field, FiniteFloat, field_validator, model_validator

from trainstep import _seam
from trainstep.declaration import Cost, Declaration, Slot, Stage, StrategyOptions
from trainstep.errors import UnsupportedInputError
from trainstep.gradients import differentiate
from trainstep.registry import register
from trainstep.replicas import assign
from trainstep.step import Batch, Objective, Strategy, require
from trainstep.strategies._attacks import Norm, attack, attackable, in_range

_OUT_OF_RANGE = """adversarial: inputs lie outside of clip_range={}, where none is moved. Give the range of your data, \
(0, 255) for images as they are stored, or scale them."""


class AdversarialOptions(StrategyOptions):
    """The attack, its budget, and the share of clean examples."""

    attack: Literal["fgsm", "pgd"] = Field(default="fgsm", description="One step, or several with projection.")
    epsilon: float = Field(
        default=8 / 255,
        ge=0,
        allow_inf_nan=False,
        description="Radius of the ball, in units of the input.",
    )
    norm: Norm = Field(default="linf", description="The ball's norm, over each example and input by itself.")
    steps: int | None = Field(default=None, ge=1, description="Gradients taken; None: 1 for fgsm, 7 for pgd.")
    step_size: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Length of one step; None: epsilon for fgsm, 1.25 of it from a random start, 2.5 / steps for pgd.",
    )
    random_start: bool | None = Field(
        default=None, description="Start anywhere in the ball; None: no for fgsm, yes for pgd."
    )
    clean_weight: float = Field(default=0.0, ge=0, le=1, description="Weight of the loss of the clean examples.")
    clip_range: tuple[FiniteFloat, FiniteFloat] | None = Field(
        default=None,
        strict=False,
        description="Lowest and highest value of an input, (0, 1) for images; None: no limits.",
    )
    attack_mode: Literal["inference", "training"] = Field(
        default="inference", description="Mode of dropout and batch norm while the attack looks for its example."
    )
    inputs: tuple[str, ...] | None = Field(
        default=None,
        strict=False,
        min_length=1,
        description="Names of the inputs to perturb; None: all of a floating dtype.",
    )
    seed: int = Field(default=0, ge=0, lt=2**31, description="Seed of the random start.")

    @field_validator("clip_range")
    @classmethod
    def _ordered(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not value[0] < value[1]:
            raise ValueError(f"the lower end must be below the upper, not {value}")
        return value

    @model_validator(mode="after")
    def _one_step(self) -> "AdversarialOptions":
        if self.attack == "fgsm" and self.steps not in (None, 1):
            raise ValueError(f"fgsm takes one step, not {self.steps}; use attack='pgd' for more")
        return self

    @property
    def num_steps(self) -> int:
        """Gradients the attack takes: none where it could change nothing."""
        if self.epsilon == 0 or self.clean_weight == 1:
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
        """Length of one step of the attack, in units of the input."""
        if self.step_size is not None:
            return self.step_size
        if self.attack == "pgd":
            return 2.5 * self.epsilon / max(self.num_steps, 1)
        return 1.25 * self.epsilon if self.starts_at_random else self.epsilon


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
        able = attackable(batch.x, self, options.inputs)
        if options.clip_range is not None:
            moved = [x for x, ok in zip(tf.nest.flatten(batch.x), able, strict=True) if ok]
            within = tf.reduce_all([in_range(x, options.clip_range) for x in moved])
            message = _OUT_OF_RANGE.format(options.clip_range)
            with tf.control_dependencies([require(within, message, UnsupportedInputError)]):
                batch = batch._replace(x=tf.nest.map_structure(tf.identity, batch.x))
        seed = None
        if options.starts_at_random:
            draws = self.strategy_state["adversarial"]["draws"]
            draw = tf.convert_to_tensor(draws)
            seed = tf.stack([options.seed, 2 * draw])  # Two numbers a draw: the L2 ball takes a second.
            assign([(draws, draw + 1)])

        def loss_at(x: Any) -> tf.Tensor:
            return _seam.probe(self, x, batch.y, batch.sample_weight, training=options.attack_mode == "training")

        return attack(
            *(batch.x, able, loss_at, functools.partial(differentiate, self)),
            seed=seed,
            epsilon=options.epsilon,
            norm=options.norm,
            steps=options.num_steps,
            step_size=options.length,
            clip_range=options.clip_range,
        )
