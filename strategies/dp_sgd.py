"""Differentially private SGD: no example changes an update by much, and noise hides what it does.

    g_i = grad of the loss of example i          its sample weight included
    g = (sum_i g_i / max(1, ||g_i|| / l2_norm_clip) + normal(0, (noise_multiplier * l2_norm_clip)^2)) / n

||g_i|| is over all weights together, n the number of examples of the update. The noise is added once for each update,
over all replicas and micro-batches; what comes after it in a step sees nothing else. Regularizers depend on no example:
their gradient is added as it is, neither clipped nor counted.

Where all layers with weights are dense, convolutions or embeddings, the norm of each example comes from one forward and
one backward pass (ghost norms): about twice a plain step. Any other model is evaluated one example after the other,
which takes many times as long. Batch norm, which mixes examples, is refused; dropout draws for each example.

Abadi et al., "Deep Learning with Differential Privacy", CCS 2016, algorithm 1, https://arxiv.org/abs/1607.00133
"""

import math
from typing import Any

import tensorflow as tf
from pydantic import Field, model_validator

from trainstep import _seam
from trainstep.declaration import Cost, Declaration, Report, Slot, Stage, StrategyOptions
from trainstep.definition import hooks_used, strategies_of
from trainstep.errors import ModelConflictError
from trainstep.gradients import scale
from trainstep.registry import register
from trainstep.replicas import assign
from trainstep.step import Batch, Evaluation, Strategy, Update, num_loss_terms
from trainstep.strategies import _accountant, _ghost_norms, _per_example
from trainstep.strategies._updates import add_noise


class DpSgdOptions(StrategyOptions):
    """How much an example may do, how much noise hides it, and what is to be said of that."""

    l2_norm_clip: float = Field(
        default=1.0, gt=0, description="Largest L2 norm of an example's gradient; infinity clips nothing."
    )
    noise_multiplier: float = Field(
        default=1.0, ge=0, allow_inf_nan=False, description="Standard deviation of the noise, in l2_norm_clip; 0: none."
    )
    ghost: bool = Field(default=True, description="Take norms without a pass for each example, where that is exact.")
    num_examples: int | None = Field(
        default=None, ge=1, description="Examples of the training data, to log epsilon by; None: not logged."
    )
    delta: float = Field(default=1e-5, gt=0, lt=1, description="Probability that the bound epsilon does not hold.")
    seed: int = Field(default=0, ge=0, lt=2**31, description="Seed of the noise; a secret, where privacy is meant.")

    @model_validator(mode="after")
    def _accountable(self) -> "DpSgdOptions":
        if self.noise_multiplier and math.isinf(self.l2_norm_clip):
            raise ValueError(f"noise is in units of l2_norm_clip, which must be finite then, not {self.l2_norm_clip}")
        if self.num_examples and not self.noise_multiplier:
            raise ValueError(
                f"num_examples, {self.num_examples} here, is to log epsilon by, which is infinite without noise"
            )
        if self.num_examples and self.delta * self.num_examples >= 1:
            raise ValueError(
                f"delta must be below 1 / num_examples = {1 / self.num_examples:g}, not {self.delta:g}: to publish one "
                "example of them has that delta"
            )
        return self

    @property
    def is_plain(self) -> bool:
        """Whether it changes nothing."""
        return math.isinf(self.l2_norm_clip)


epsilon = _accountant.epsilon


def why_one_by_one(model: Any) -> str | None:
    """Return why `model`, which is compiled, is evaluated one example after the other; None where it need not be."""
    inside = False
    for strategy in strategies_of(type(model)):
        name = strategy.declaration.name
        used = hooks_used(strategy, model.strategy_options[name])
        if "compute_objective" in used or (inside and "compute_gradients" in used):
            return f"what {name!r} makes of the loss is known to be of one example alone only where there is one"
        inside = inside or name == "dp_sgd"
    return _ghost_norms.obstacle(model)


_OF_TASKS = "it goes by the gradients of tasks over all examples, which are neither clipped one by one nor have noise."


@register
class DpSgd(Strategy):
    """Clips each example where gradients are taken, and adds the noise to what an update is made of."""

    declaration = Declaration(
        name="dp_sgd",
        stage=Stage.PRIVACY,
        summary="DP-SGD: clip the gradient of each example, and add noise to their sum.",
        reference="Abadi et al., CCS 2016, https://arxiv.org/abs/1607.00133",
        options=DpSgdOptions,
        neutral={"l2_norm_clip": math.inf, "noise_multiplier": 0.0},
        conflicts={
            "sam": "sam ascends along the gradient of all examples, without noise, so that each changes the gradients "
            "of all others, however they are clipped.",
            "pcgrad": _OF_TASKS,
            "gradnorm": _OF_TASKS,
        },
        notes={
            "adversarial": "an attack on an example depends on no other, and its gradient is clipped",
            "diagnostics": "gradient_norm is that with the noise; the loss and the metrics of Keras have none",
            "gradient_accumulation": "one noise for a window, whose examples are all clipped: a large batch",
            "gradient_clipping": "clips what has the noise already, which costs no privacy",
            "micro_batches": "one noise for all parts; the memory is that of the examples of a part",
            "mixed_precision": "whether a gradient is finite is told without noise",
            "skip_nonfinite": "whether a gradient is finite is told without noise",
        },
        needs=("separate examples", "dense inputs"),
        passes_through=lambda options: (
            ["compute_gradients"] * options.is_plain + ["update_weights"] * (not options.noise_multiplier)
        ),
        cost=lambda options: (
            Cost()
            if options.is_plain
            else Cost(time=2.0, memory="patches of layers' inputs; gradients of examples", batch_norm="refused")
        ),
        state=lambda options: {"updates": Slot(dtype="int32"), "largest": Slot()} if options.noise_multiplier else {},
        reports=lambda options: {"epsilon": Report(over="last")} if options.num_examples else {},
        collects_reports=True,
    )

    def check_model(self) -> None:
        super().check_model()
        options = self.strategy_options["dp_sgd"]
        if options.num_examples:
            _accountant.check_installed()
        accumulation: Any = self.strategy_options.get("gradient_accumulation")
        means = accumulation is None or (accumulation.weighting, accumulation.reduction) == ("samples", "mean")
        if not options.is_plain and accumulation is not None and not means:
            raise ModelConflictError(
                "dp_sgd adds the noise of a mean over the examples of a window, and gradient_accumulation has "
                f"weighting={accumulation.weighting!r} and reduction={accumulation.reduction!r}. Leave them at "
                "'samples' and 'mean'."
            )
        if not options.is_plain:
            _per_example.check_layers(self)

    def compute_gradients(self, batch: Batch) -> Evaluation:
        options = self.strategy_options["dp_sgd"]
        if options.is_plain:
            return super().compute_gradients(batch)
        _seam.ensure_built(self, batch.x)
        _per_example.check_layers(self)
        if not self.trainable_variables:
            return super().compute_gradients(batch)
        if _seam.sums_its_loss(self):
            raise ModelConflictError(
                "dp_sgd takes the mean over examples, and the loss is a sum (reduction='sum'). Compile with a loss "
                "that is a mean, and a learning rate times the size of a batch."
            )
        regularized, clip = _per_example.of_regularization(self), options.l2_norm_clip
        ragged = _per_example.has_ragged(batch)  # And nothing sparse.
        if options.ghost and not ragged and why_one_by_one(self) is None:
            evaluation, clipped = _ghost_norms.in_one_pass(self, batch, clip)
        else:
            evaluation, clipped = _per_example.one_by_one(super().compute_gradients, batch, regularized, clip)
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        share = tf.math.divide_no_nan(1.0, replicas * num_loss_terms(batch, evaluation.y_pred))
        gradients = _per_example.added(scale(clipped, share), scale(regularized, 1 / replicas))
        return evaluation._replace(gradients=gradients)

    def update_weights(self, update: Update) -> None:
        options = self.strategy_options["dp_sgd"]
        if not options.noise_multiplier:
            super().update_weights(update)
            return
        state, terms = self.strategy_state["dp_sgd"], update.terms
        count, largest = tf.convert_to_tensor(state["updates"]), tf.convert_to_tensor(state["largest"])
        stddev = tf.math.divide_no_nan(options.noise_multiplier * options.l2_norm_clip, terms)
        # Negative, as no other count of updates is: other noise of the same seed must not be this once more.
        gradients = add_noise(update.gradients, stddev, tf.stack([options.seed, -1 - count]))
        assign([(state["updates"], count + 1), (state["largest"], tf.maximum(largest, terms))])
        super().update_weights(update._replace(gradients=gradients))

    def finish_epoch(self) -> None:
        super().finish_epoch()
        options = self.strategy_options["dp_sgd"]
        if options.num_examples:
            spent = tf.constant(_accountant.spent_by(self, num_examples=options.num_examples, delta=options.delta))
            self.record("epsilon", lambda: spent)
