"""Free adversarial training: each batch several times over, each backward pass used for the weights and the input.

    m times for each batch:   g = dL(w, x + d, y)/dw,  h = dL(w, x + d, y)/dx       one backward pass for both
                              w = w - learning_rate * g
                              d = clip(d + epsilon * sign(h), -epsilon, epsilon)

A step makes m updates and takes m times as long as a plain one: for as many updates divide the epochs by m, as the
paper does. One copy of the batch is kept. Batch norm and dropout see each replay as a batch of its own. The paper keeps
d from one batch to the next; here it begins anew with each, for it has the shape of a batch, which need not be the same
for all: at zero, or uniform in the ball, which is nearer to the paper, where d was made for other examples.

Shafahi et al., "Adversarial Training for Free!", NeurIPS 2019, algorithm 1, https://arxiv.org/abs/1904.12843
"""

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal

import tensorflow as tf
from pydantic import Field

from trainstep import _seam
from trainstep.declaration import Cost, Declaration, Slot, Stage, StrategyOptions
from trainstep.gradients import dense
from trainstep.registry import register
from trainstep.schedules import is_always, value_at
from trainstep.step import Batch, Evaluation, Objective, Strategy
from trainstep.strategies._adversaries import Epsilon, Inputs, checked, other_attacks, seed_of_start
from trainstep.strategies._ascent import is_elsewhere
from trainstep.strategies._attacks import ClipRange, attackable, check_inputs, movable
from trainstep.strategies._balls import Length, ascent_direction, perturbed, project, random_delta

_PER_EXAMPLE = "dp_sgd may use each example once for an update, and takes its gradient to the weights by itself."


class FreeAdversarialOptions(StrategyOptions):
    """How often a batch is used, and how far its examples may move meanwhile."""

    epsilon: Epsilon = 8 / 255
    replays: int = Field(default=4, ge=1, description="Updates made of each batch, m in the paper.")
    start: Literal["zero", "uniform"] = Field(
        default="uniform",
        description="Where a batch begins: at its examples, or anywhere in the ball around each.",
    )
    clip_range: ClipRange = None
    inputs: Inputs = None
    seed: int = Field(default=0, ge=0, lt=2**31, description="Seed of the uniform start.")

    @property
    def moves(self) -> bool:
        """Whether any example is moved."""
        return not is_always(self.epsilon, 0) and (self.replays > 1 or self.start == "uniform")

    @property
    def draws(self) -> bool:
        """Whether random numbers are drawn."""
        return self.moves and self.start == "uniform"


def with_gradient_noted(x: tf.Tensor, anchor: tf.Tensor, note: Callable[[tf.Tensor], None]) -> tf.Tensor:
    """Return `x`; whoever takes a gradient with respect to `anchor`, `note` is told that with respect to `x`.

    A tape follows what depends on what it watches. So `x`, which no tape watches, is made to depend on `anchor`, a
    weight for example, which gets no gradient of it.
    """

    @tf.custom_gradient
    def same(x: tf.Tensor, anchor: tf.Tensor) -> Any:
        del anchor

        def pulled(upstream: tf.Tensor) -> Any:
            note(upstream)
            return upstream, None

        return tf.identity(x), pulled

    return same(x, anchor)


def next_delta(delta: tf.Tensor, gradient: tf.Tensor, epsilon: Length) -> tf.Tensor:
    """Return where the perturbation `delta` is after a step of `epsilon` along the signs of `gradient`, in the ball."""
    return project(delta + tf.cast(epsilon, delta.dtype) * ascent_direction(gradient, "linf"), epsilon, "linf")


class InputGradients:
    """The gradients to the input that were noted in one replay, part by part where others cut the batch."""

    def __init__(self) -> None:
        self._parts: list[tuple[tf.Tensor, dict[int, tf.Tensor]]] = []

    def of_examples(self, indices: tf.Tensor) -> Callable[[int, tf.Tensor], Any]:
        """Return what takes note of the gradients to the examples at `indices`, input by input."""
        gradients: dict[int, tf.Tensor] = {}
        self._parts.append((indices, gradients))
        return gradients.setdefault  # The first is of the whole loss; others may be of its parts.

    def of_input(self, place: int, like: tf.Tensor) -> tf.Tensor:
        """Return the gradient to the input at `place`, but for a positive factor for each part; zero: none noted."""
        total = tf.zeros_like(like)
        for indices, gradients in self._parts:
            if place in gradients:
                found = tf.cast(dense(gradients[place]), like.dtype)
                total = tf.tensor_scatter_nd_update(total, indices[:, tf.newaxis], found)
        return total


_replay = threading.local()  # Replicas are traced in a thread each.


@register
class FreeAdversarial(Strategy):
    """Trains on a batch several times, and notes in which direction its loss grows."""

    declaration = Declaration(
        name="free_adversarial",
        stage=Stage.ATTACK,
        summary="Free adversarial training: several updates of a batch, whose gradients move the input too.",
        reference="Shafahi et al., NeurIPS 2019, https://arxiv.org/abs/1904.12843",
        options=FreeAdversarialOptions,
        neutral={"replays": 1, "epsilon": 0.0},
        conflicts={**other_attacks("free_adversarial"), "dp_sgd": _PER_EXAMPLE},
        notes={
            "gradient_accumulation": "a replay is a batch of the window, so a window may end within a batch",
            "micro_batches": "each replay cuts the batch; what is moved is the whole",
            "sam": "examples are moved along the gradient at the weights, not where SAM ascends to",
        },
        needs=("float inputs",),
        passes_through=lambda options: (
            ["train_batch"] * (options.replays == 1 and not options.moves)
            + ["compute_objective"] * (options.replays == 1 or not options.moves)
        ),
        cost=lambda options: Cost(
            forward=options.replays - 1,
            backward=options.replays - 1,
            time=float(options.replays),
            memory="one copy of the batch" if options.moves else "none",
            batch_norm="statistics are updated once per replay, of the perturbed examples",
        ),
        state=lambda options: {"draws": Slot(dtype="int32")} if options.draws else {},
        updates=lambda options: options.replays,
    )

    def check_model(self) -> None:
        super().check_model()
        check_inputs("free_adversarial", self)

    def train_batch(self, batch: Batch) -> Evaluation:
        options = self.strategy_options["free_adversarial"]
        if not options.moves:
            evaluation = super().train_batch(batch)
            for _ in range(options.replays - 1):
                evaluation = super().train_batch(batch)
            return evaluation
        _seam.ensure_built(self, batch.x)
        x, able = checked("free_adversarial", self, batch.x, options)
        originals, with_moved = movable(x, able)
        epsilon = value_at(options.epsilon, self.optimizer.iterations)
        deltas = [tf.zeros_like(original) for original in originals]
        if options.draws:
            seed = seed_of_start("free_adversarial", self)
            deltas = [random_delta(d, epsilon, "linf", seed + tf.constant([i, 0])) for i, d in enumerate(deltas)]

        def moved_batch(deltas: Sequence[tf.Tensor]) -> Batch:
            pairs = zip(originals, deltas, strict=True)
            moved = [perturbed(tensor, delta, epsilon, "linf", options.clip_range) for tensor, delta in pairs]
            return batch._replace(x=with_moved([tf.stop_gradient(tensor) for tensor in moved]))

        indices = tf.range(_seam.num_examples(x))
        for _ in range(options.replays - 1):
            moved, gradients = moved_batch(deltas), InputGradients()
            _replay.gradients = gradients
            super().train_batch(moved._replace(extra={**batch.extra, "free_adversarial": indices}))
            deltas = [next_delta(delta, gradients.of_input(i, delta), epsilon) for i, delta in enumerate(deltas)]
            _replay.gradients = None  # It holds tensors of a graph.
        return super().train_batch(moved_batch(deltas))  # Where its examples should go next nobody will ask.

    def compute_objective(self, batch: Batch) -> Objective:
        indices = batch.extra.get("free_adversarial")
        if indices is None or not self.trainable_variables or is_elsewhere():
            return super().compute_objective(batch)
        note = _replay.gradients.of_examples(indices)
        anchor = tf.convert_to_tensor(self.trainable_variables[0])
        able = attackable(batch.x, self, self.strategy_options["free_adversarial"].inputs)
        tensors, with_moved = movable(batch.x, able)
        watched = [with_gradient_noted(tensor, anchor, functools.partial(note, i)) for i, tensor in enumerate(tensors)]
        return super().compute_objective(batch._replace(x=with_moved(watched)))
