"""Recompute (gradient checkpointing): keep what goes into some layers, and compute their inside again when needed.

    forward:    y = f(x)        x is kept, nothing of the inside of f
    backward:   f(x) again, with the same masks of dropout; then dL/dx and dL/dw as ever

The gradients are those without it. A step takes one more forward pass of these layers, in a backward pass; their
activations are in memory one layer at a time. Batch norm moves its averages once. What saves memory is a layer with
much inside: attention, a block of layers, a nested model. The inside of a single dense layer is little more than its
output, which the next layer keeps. On Keras 2 layers that draw random numbers, such as dropout, cannot draw the same
ones again, and are refused.

Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016, section 4, https://arxiv.org/abs/1604.06174
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from pydantic import Field

from trainstep import _seam
from trainstep.declaration import Cost, Declaration, Stage, StrategyOptions
from trainstep.errors import ModelConflictError, nearest
from trainstep.registry import register
from trainstep.step import Batch, Objective, Strategy


class RecomputeOptions(StrategyOptions):
    """Which layers are computed twice."""

    layers: tuple[str, ...] = Field(
        strict=False,
        description="Names of layers, or patterns such as 'block_*', at any depth; of nested ones the outermost.",
    )


def chosen_layers(model: Any, patterns: Sequence[str]) -> list[Any]:
    """Return the layers inside of `model` whose names match one of `patterns`, none inside of another.

    Raises:
        ModelConflictError: a pattern matches no layer, or a layer cannot be called twice.
    """
    inside = [layer for layer in _seam.layers_of(model) if layer is not model]
    names, chosen, covered = [layer.name for layer in inside], [], set()
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ModelConflictError(
                f"recompute: no layer is called {pattern!r}.{nearest(pattern, names)} Layers: {', '.join(names)}."
            )
    for layer in inside:  # An outer one comes before those inside of it.
        if id(layer) not in covered and any(fnmatchcase(layer.name, pattern) for pattern in patterns):
            chosen.append(layer)
            covered |= {id(each) for each in _seam.layers_of(layer)}
    for layer in chosen:
        _seam.check_repeatable(layer)
    return chosen


@register
class Recompute(Strategy):
    """Innermost, so that it is in every evaluation of the loss that is differentiated, whoever asks for it."""

    declaration = Declaration(
        name="recompute",
        stage=Stage.REPORT,
        summary="Gradient checkpointing: compute the inside of some layers again, to keep less of it.",
        reference="Chen et al., 2016, https://arxiv.org/abs/1604.06174",
        options=RecomputeOptions,
        example={"layers": ("hidden*",)},
        neutral={"layers": ()},
        conflicts={
            "gradient_penalty": "gradient_penalty differentiates a gradient, and TensorFlow cannot "
            "differentiate one of what was computed again."
        },
        notes={
            "adversarial": "the passes of the attack keep what they need, as without it",
            "micro_batches": "both save activations: the parts of a batch those of all layers, for less time",
        },
        passes_through=lambda options: () if options.layers else ("compute_objective",),
        cost=lambda options: (
            Cost(forward=1, time=4 / 3, memory="less: no activations inside of these layers")
            if options.layers
            else Cost()
        ),
    )

    def check_model(self) -> None:
        super().check_model()
        if _seam.is_built(self):
            chosen_layers(self, self.strategy_options["recompute"].layers)

    def compute_objective(self, batch: Batch) -> Objective:
        patterns = self.strategy_options["recompute"].layers
        if not patterns:
            return super().compute_objective(batch)
        _seam.ensure_built(self, batch.x)
        with _seam.with_repeated_calls(chosen_layers(self, patterns)):
            return super().compute_objective(batch)
