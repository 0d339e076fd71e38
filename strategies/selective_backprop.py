"""Selective backprop: train on the part of a batch whose loss is high.

    p_i ~ F(L_i)^beta,  beta = 1 / keep - 1        F(L_i): the share of the batch whose loss is not above L_i

so that an example is kept with probability `keep` on average. Kept are ceil(keep * n) examples of n: drawn with these
odds, without replacement, or those of the highest loss. Their losses are from an extra forward pass in inference mode,
which leaves batch-norm statistics, metrics and dropout as they are; forward and backward pass of the step itself are
those of the examples that are kept. So a step takes (1 + 3 keep) / 3 of a plain one: less, with `keep` below 2/3.

The loss of an example is the mean over its entries, weighted by its sample weight and, of several outputs, by
`loss_weights`. One that is not finite is always kept: what is wrong with it is to be seen. Replicas choose from the
whole batch, as one device would, and share what is kept equally: they send each other their examples.

Jiang et al., "Accelerating Deep Learning by Focusing on the Biggest Losers", 2019, section 3.1,
https://arxiv.org/abs/1910.00762. There F is over the last losses seen, and each example is kept or not by itself; with
F over a batch, and a fixed number of examples, it is that of Composer.
"""

from typing import Any, Literal

import tensorflow as tf
from pydantic import Field, model_validator

from trainstep import _seam
from trainstep.declaration import Cost, Declaration, Slot, Stage, StrategyOptions
from trainstep.errors import UnsupportedInputError
from trainstep.registry import register
from trainstep.replicas import gather_over_replicas
from trainstep.step import Batch, Strategy
from trainstep.strategies._losses import losses_of_examples
from trainstep.strategies._mixing import can_be_taken, examples_at, seeds_of_step


class SelectiveBackpropOptions(StrategyOptions):
    """How much is trained on, how it is chosen, and when."""

    keep: float = Field(default=0.5, gt=0, le=1, description="Share of a batch that is trained on; 1: all of it.")
    choose: Literal["sample", "top"] = Field(
        default="sample", description="Draw with odds by the rank of the loss, or take the highest losses."
    )
    start: int = Field(default=0, ge=0, lt=2**31, description="Update from which it chooses; all is kept before.")
    end: int | None = Field(
        default=None, ge=1, lt=2**31, description="Update from which all is kept again; None: never."
    )
    interrupt: int = Field(
        default=0, ge=0, lt=2**31, description="Of so many updates the last keeps all; 0: none does."
    )
    seed: int = Field(default=0, ge=0, lt=2**31, description="Seed of what is drawn.")

    @model_validator(mode="after")
    def _ordered(self) -> "SelectiveBackpropOptions":
        if self.end is not None and self.end <= self.start:
            raise ValueError(f"`end` should be after `start`, and {self.end} is not after {self.start}")
        return self

    @property
    def chooses(self) -> bool:
        """Whether any update does."""
        return self.keep < 1 and self.interrupt != 1

    @property
    def always(self) -> bool:
        """Whether every update does."""
        return self.start == self.interrupt == 0 and self.end is None


def chosen(losses: tf.Tensor, count: tf.Tensor, options: SelectiveBackpropOptions, seed: tf.Tensor) -> tf.Tensor:
    """Return the places of `count` of the examples that have these `losses`, in their order: int32 (count,).

    Args:
        losses: float32 (n,); one that is not finite is the highest.
        count: how many are kept, an int32 scalar.
        options: `choose`, and `keep` for the odds.
        seed: of what is drawn: int32 (2,).
    """
    losses = tf.where(tf.math.is_finite(losses), losses, float("inf"))
    keys = losses
    if options.choose == "sample":
        # The largest of logarithms of odds with Gumbel noise are a draw without replacement (Efraimidis and Spirakis).
        ranks = tf.cast(tf.argsort(tf.argsort(losses, stable=True)), tf.float32)
        log_odds = (1 / options.keep - 1) * tf.math.log((ranks + 0.5) / tf.cast(tf.size(losses), tf.float32))
        noise = -tf.math.log(-tf.math.log(tf.random.stateless_uniform(tf.shape(losses), seed)))
        keys = tf.where(losses == float("inf"), losses, log_odds + noise)
    return tf.sort(tf.argsort(keys, direction="DESCENDING", stable=True)[:count])


def _cost(options: SelectiveBackpropOptions) -> Cost:
    if not options.chooses:
        return Cost()
    time = (1 + 3 * options.keep) / 3
    return Cost(
        forward=1,
        time=time,
        memory="on several replicas, the batch of all of them",
        batch_norm="statistics of the examples that are kept",
        saves=f"{options.keep:g} of the batch is trained on" if time < 1 else "",
    )


@register
class SelectiveBackprop(Strategy):
    """Chooses before anything else is done with the batch; what follows in the step, metrics too, sees what is kept."""

    declaration = Declaration(
        name="selective_backprop",
        stage=Stage.SELECTION,
        summary="Train on the part of a batch whose loss is high.",
        reference="Jiang et al., 2019, https://arxiv.org/abs/1910.00762",
        options=SelectiveBackpropOptions,
        neutral={"keep": 1.0},
        needs=("compiled loss", "dense inputs"),
        conflicts={
            "dp_sgd": "whether an example is trained on depends on the losses of all others, which have no noise, so "
            "that each changes the gradients of all, however they are clipped."
        },
        notes={
            "adversarial": "chosen are clean examples of a high loss, and only these are attacked",
            "cutmix": "what is chosen is pasted: what is pasted is not chosen by its loss",
            "gradient_accumulation": "chooses from each batch of a window",
            "mixup": "what is chosen is mixed: mixtures are not chosen by their loss",
        },
        passes_through=lambda options: () if options.chooses else ("transform_batch",),
        cost=_cost,
        state=lambda options: {"draws": Slot(dtype="int32")} if options.chooses else {},
        without_xla=lambda options: (
            "how many examples are kept changes with the updates, and XLA needs one number for all. Leave `start`, "
            "`end` and `interrupt` at their defaults"
            if options.chooses and not options.always
            else ""
        ),
    )

    def transform_batch(self, batch: Batch) -> Batch:
        if self.strategy_options["selective_backprop"].chooses:
            batch = self._kept(batch)
        return super().transform_batch(batch)

    def _kept(self, batch: Batch) -> Batch:
        options = self.strategy_options["selective_backprop"]
        replicas = self.distribute_strategy.num_replicas_in_sync
        if not all(can_be_taken(tensor, replicas) for tensor in tf.nest.flatten(batch[:3]) if tensor is not None):
            raise UnsupportedInputError(
                "selective_backprop chooses examples of dense tensors, and on one replica of ragged ones, not of "
                "others. Make sparse tensors dense in the data pipeline (tf.sparse.to_dense)."
            )
        _seam.ensure_built(self, batch.x)  # There is no state of ours before.
        if not self.trainable_variables:
            return batch

        def losses() -> tf.Tensor:
            def of_examples() -> tf.Tensor:
                return losses_of_examples(
                    "selective_backprop", self, batch, _seam.forward(self, batch.x, training=False)
                )

            return _seam.without_trace(self, of_examples, training=False)

        [seed] = seeds_of_step("selective_backprop", self, 1)
        if options.always:
            choosing, here = tf.constant(True), losses()
        else:
            choosing = _chooses_at(options, tf.cast(tf.convert_to_tensor(self.optimizer.iterations), tf.int32))
            examples = _seam.num_examples(batch.x)
            here = tf.cond(choosing, losses, lambda: tf.zeros([examples]))
        [everywhere] = gather_over_replicas([here])
        of_all = tf.size(everywhere)
        # Less what rounding adds: 0.55 * 100 is above 55.
        count = tf.cast(tf.math.ceil(options.keep * tf.cast(of_all, tf.float64) - 1e-6), tf.int32)
        places = chosen(everywhere, tf.where(choosing, count, of_all) if not options.always else count, options, seed)
        if replicas > 1:
            mine = tf.distribute.get_replica_context().replica_id_in_sync_group
            kept = tf.size(places)
            places = places[mine * kept // replicas : (mine + 1) * kept // replicas]
        return examples_at(batch, places)._replace(extra=batch.extra)


def _chooses_at(options: SelectiveBackpropOptions, update: Any) -> tf.Tensor:
    """Tell whether the update of this number, from 0, is one that chooses: a boolean scalar."""
    chooses = update >= options.start
    if options.end is not None:
        chooses &= update < options.end
    if options.interrupt:
        chooses &= (update + 1) % options.interrupt != 0
    return chooses
