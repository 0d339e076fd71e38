"""Attacks on the input: what strategies that train on adversarial examples, and evaluation, have in common.

Pure functions of tensors; balls and directions are in `_balls.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import tensorflow as tf
from pydantic import AfterValidator, Field, FiniteFloat

from trainstep.errors import UnsupportedInputError, nearest
from trainstep.strategies._balls import (
    Length,
    Norm,
    as_dtype,
    ascent_direction,
    normal_delta,
    perturbed,
    project,
    random_delta,
)


def _ordered(value: tuple[float, float] | None) -> tuple[float, float] | None:
    if value is not None and not value[0] < value[1]:
        raise ValueError(f"the lower end must be below the upper, not {value}")
    return value


ClipRange = Annotated[
    tuple[FiniteFloat, FiniteFloat] | None,
    Field(strict=False, description="Lowest and highest value of an input, (0, 1) for images; None: no limits."),
    AfterValidator(_ordered),
]
"""The option of attacks, wherever they have one."""

_UNROLLED = 10
"""Steps up to which an attack is traced step by step: on a processor with AVX512-BF16, a pass within a loop of
TensorFlow takes 1.37 times as long, as oneDNN lays out its tensors anew in each."""


def ascend(
    input_gradients: Callable[[list[tf.Tensor]], Sequence[tf.Tensor | None]],
    inputs: list[tf.Tensor],
    deltas: list[tf.Tensor],
    *,
    epsilon: Length,
    norm: Norm,
    steps: int,
    step_size: Length,
    clip_range: tuple[float, float] | None,
) -> list[tf.Tensor]:
    """Return `inputs` moved by `steps` projected steps of gradient ascent, from `inputs + deltas`.

    Args:
        input_gradients: maps the moved inputs to the gradients of the loss; None counts as zero.
        inputs: tensors of shape (batch, ...), of a floating dtype.
        deltas: where to start from, of the same shapes; zeros, or `random_delta`.
        epsilon: radius of the ball, in the units of the inputs.
        norm: "linf" or "l2".
        steps: number of gradients taken.
        step_size: length of one step in `norm`, in the units of the inputs.
        clip_range: lowest and highest allowed value of an input, or None.
    """

    def moved(deltas: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        sums = [x + delta for x, delta in zip(inputs, deltas, strict=True)]
        return sums if clip_range is None else [tf.clip_by_value(each, *clip_range) for each in sums]

    def step(*deltas: tf.Tensor) -> list[tf.Tensor]:
        ends = []
        for delta, gradient in zip(deltas, input_gradients(moved(deltas)), strict=True):
            change = 0.0 if gradient is None else as_dtype(delta.dtype, step_size) * ascent_direction(gradient, norm)
            ends.append(project(delta + change, epsilon, norm))
        return ends

    if steps <= _UNROLLED:
        for _ in range(steps):
            deltas = step(*deltas)
    else:
        loop = (tf.constant(0), *deltas)
        _, *deltas = tf.while_loop(
            lambda i, *_: i < steps, lambda i, *each: (i + 1, *step(*each)), loop, maximum_iterations=steps
        )
    return [
        tf.stop_gradient(perturbed(x, delta, epsilon, norm, clip_range))
        for x, delta in zip(inputs, deltas, strict=True)
    ]


def movable(x: Any, able: Sequence[bool]) -> tuple[list[tf.Tensor], Callable[[Sequence[tf.Tensor]], Any]]:
    """Return the tensors of the structure `x` that are to be moved, and what puts others in their place.

    Args:
        x: a tensor, or nested tensors, of shape (batch, ...).
        able: for each tensor of the flattened `x`, whether to move it; see `attackable`.
    """
    tensors = tf.nest.flatten(x)
    chosen = [position for position, ok in enumerate(able) if ok]

    def with_moved(moved: Sequence[tf.Tensor]) -> Any:
        replaced = dict(zip(chosen, moved, strict=True))
        return tf.nest.pack_sequence_as(x, [replaced.get(i, tensor) for i, tensor in enumerate(tensors)])

    # Half precision could not tell neighbouring points of a small ball apart.
    half = (tf.float16, tf.bfloat16)
    return [tf.cast(t, tf.float32) if t.dtype in half else t for t in (tensors[i] for i in chosen)], with_moved


def attack(
    x: Any,
    able: Sequence[bool],
    loss_at: Callable[[Any], tf.Tensor],
    differentiate: Callable[[tf.GradientTape, tf.Tensor, list[tf.Tensor]], Any],
    *,
    seed: tf.Tensor | None,
    stddev: float | None = None,
    **ball: Any,
) -> Any:
    """Return the structure `x` with some of its tensors moved to where the loss is high.

    Args:
        x: a tensor, or nested tensors, of shape (batch, ...).
        able: for each tensor of the flattened `x`, whether to move it; see `attackable`.
        loss_at: maps a structure like `x` to a scalar loss, without a trace in the model's state.
        differentiate: maps a tape, a loss and tensors to gradients.
        seed: of the point to start from, an int32 tensor of shape (2,); None starts at `x` itself.
        stddev: of a normal distribution around `x` to start from; None: anywhere in the ball.
        **ball: `epsilon`, `norm`, `steps`, `step_size` and `clip_range`, see `ascend`.
    """
    originals, with_moved = movable(x, able)

    def start(index: int, original: tf.Tensor) -> tf.Tensor:
        if seed is None:
            return tf.zeros_like(original)
        own = seed + tf.constant([index, 0])
        if stddev is None:
            return random_delta(original, ball["epsilon"], ball["norm"], own)
        return project(stddev * normal_delta(original, own), ball["epsilon"], ball["norm"])

    def input_gradients(moved: list[tf.Tensor]) -> Sequence[tf.Tensor | None]:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(moved)
            loss = loss_at(with_moved(moved))
        return differentiate(tape, loss, moved)

    deltas = [start(index, original) for index, original in enumerate(originals)]
    return with_moved(ascend(input_gradients, originals, deltas, **ball))


def check_inputs(strategy: str, model: Any) -> None:
    """Refuse names, in the option `inputs` of `strategy`, that are of no input of `model`, where it knows its own.

    A functional model does.

    Args:
        strategy: by its name.
        model: with it.

    Raises:
        UnsupportedInputError: a name is unknown.
    """
    tensors, given = getattr(model, "inputs", None), getattr(model, "input", None)
    if not tensors:
        return
    names = [*(given if isinstance(given, Mapping) else ()), *(tensor.name for tensor in tensors)]
    _check_known(f"{strategy}: there", [*dict.fromkeys(names)], model.strategy_options[strategy].inputs)


def _check_known(there: str, names: Sequence[str], chosen: Sequence[str] | None) -> None:
    for name in chosen or ():
        if name not in names:
            raise UnsupportedInputError(
                f"{there} is no input {name!r}.{nearest(name, names)} Inputs: {', '.join(map(repr, names))}."
            )


def check_range(x: Any, clip_range: tuple[float, float] | None) -> None:
    """Refuse inputs that an attack within `clip_range` could not move as it should.

    Args:
        x: a tensor, or nested tensors, of shape (batch, ...), with values.
        clip_range: lowest and highest allowed value of an input, or None.

    Raises:
        UnsupportedInputError: some are outside of the range, infinite, or not a number.
    """
    for tensor in filter(_can_be_moved, tf.nest.flatten(x)):
        low, high = float(tf.reduce_min(tensor)), float(tf.reduce_max(tensor))
        if not np.isfinite(tf.reduce_sum(tf.cast(tensor, tf.float64)).numpy()):
            raise UnsupportedInputError("The inputs have entries that are infinite, or not a number.")
        if clip_range is not None and not clip_range[0] <= low <= high <= clip_range[1]:
            raise UnsupportedInputError(
                f"The inputs go from {low:.4g} to {high:.4g}, outside of clip_range={clip_range}. Attacks are cut off "
                "there, and any model looks robust. Scale the inputs, or give their range."
            )


def attackable(x: Any, model: Any, chosen: Sequence[str] | None) -> list[bool]:
    """Tell for each tensor in the flattened structure `x` whether an attack may change it.

    Args:
        x: a tensor, or a list, tuple or dict of tensors.
        model: gives the names of its inputs, where it knows them.
        chosen: names of inputs: the keys of a dict, else the names of the model's inputs, or where it knows none
            their positions; None stands for all of a floating dtype.

    Raises:
        UnsupportedInputError: a name is unknown, or there is no dense floating input to change.
    """
    tensors, names = tf.nest.flatten(x), _input_names(x, model)
    _check_known("There", names, chosen)
    able = list(map(_can_be_moved, tensors))
    unable = [name for name, ok in zip(names, able, strict=True) if not ok and name in (chosen or ())]
    if unable or not any(able):
        found = [f"{name}: {_kind(tensor)}" for name, tensor in zip(names, tensors, strict=True)]
        kinds = ", ".join(found[:8]) + (", ..." if len(found) > 8 else "")
        raise UnsupportedInputError(
            f"Dense inputs of a floating dtype are moved, or have a gradient, and {unable or 'no input'} "
            f"{'is not' if unable else 'is'} one ({kinds}). Cast images to float32, and make sparse and ragged "
            "tensors dense, before `fit`; for tokens, attack the output of an embedding instead, as the input of a "
            "model of its own."
        )
    return [ok and (not chosen or name in chosen) for name, ok in zip(names, able, strict=True)]


def _can_be_moved(value: Any) -> bool:
    return isinstance(value, tf.Tensor) and value.dtype.is_floating


def _kind(value: Any) -> str:
    dtype = getattr(getattr(value, "dtype", None), "name", "")
    return dtype if isinstance(value, tf.Tensor) else f"{type(value).__name__} {dtype}".rstrip()


def _input_names(x: Any, model: Any) -> list[str]:
    if isinstance(x, Mapping):
        return [str(name) for name in sorted(x) for _ in tf.nest.flatten(x[name])]  # All that is under one key.
    known = [tensor.name for tensor in getattr(model, "inputs", None) or []]
    count = len(tf.nest.flatten(x))
    return known if len(known) == count else [str(position) for position in range(count)]
