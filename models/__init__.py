"""Reference models by name: small, well known, and the same weights for the same seed.

trainstep.models.build("cnn", input_shape=(28, 28, 1), classes=10, seed=0)

All end in a softmax, so that `loss="sparse_categorical_crossentropy"` goes with them. Building one
neither reads nor changes any global random state.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras

from trainstep.declaration import validated_options
from trainstep.errors import InvalidOptionsError, UnknownModelError, nearest
from trainstep.models import cnn, mlp, resnet, transformer
from trainstep.models._options import ClassCounts, ModelOptions, Seeds

__all__ = ["ClassCounts", "build", "describe", "names", "validate"]


@dataclass(frozen=True)
class _Reference:
    name: str
    options: type[ModelOptions]
    build: Callable[[tuple[int, ...], ClassCounts, Seeds, Any], keras.Model]


_models = {
    reference.name: reference
    for reference in (
        _Reference("cnn", cnn.CnnOptions, cnn.build),
        _Reference("mlp", mlp.MlpOptions, mlp.build),
        _Reference("resnet", resnet.ResnetOptions, resnet.build),
        _Reference("transformer", transformer.TransformerOptions, transformer.build),
    )
}


def names() -> list[str]:
    """Return the names of all reference models, sorted."""
    return sorted(_models)


def describe(name: str, /) -> dict[str, Any]:
    """Return the JSON schema of the options of the model `name`: types, defaults, bounds and a sentence each.

    Raises:
        UnknownModelError: there is no model of that name.
    """
    return _get(name).options.model_json_schema()


def validate(name: str, /, **options: Any) -> ModelOptions:
    """Return `options` checked against the schema of the model `name`, defaults filled in.

    Raises:
        UnknownModelError: there is no model of that name.
        InvalidOptionsError: an option is unknown, has the wrong type, or is out of bounds.
    """
    return validated_options(name, _get(name).options, options)


def build(
    name: str, /, *, input_shape: Sequence[int], classes: ClassCounts, seed: int = 0, **options: Any
) -> keras.Model:
    """Return a new, built and uncompiled model.

    Args:
        name: one of `names()`.
        input_shape: shape of one example: (features,), (height, width, channels), or (length,) for tokens.
        classes: number of classes, 2 at least; the output has shape (batch, classes) and sums to 1. For several outputs
            {name: classes}: the model returns them by name, and so do labels come.
        seed: decides all initial weights and the dropout; from 0 to 2**31 - 1.
        **options: the model's own, see `describe`.

    Raises:
        UnknownModelError: there is no model of that name.
        InvalidOptionsError: an option is unknown, has the wrong type or is out of bounds, or the model
            cannot take inputs of this shape.
    """
    reference, checked = _get(name), validate(name, **options)
    shape = tuple(input_shape)
    if not shape or not all(isinstance(size, int) and size > 0 for size in shape):
        raise InvalidOptionsError(f"{name}: input_shape must be positive integers, not {input_shape!r}.")
    counts = list(classes.values()) if isinstance(classes, Mapping) else [classes]
    if not (counts and all(isinstance(count, int) and count >= 2 for count in counts)):
        raise InvalidOptionsError(
            f"{name}: classes must be an integer of 2 or more, or one for each output by its name, not {classes!r}."
        )
    _check_names(name, classes)
    if not (isinstance(seed, int) and 0 <= seed < 2**31):
        raise InvalidOptionsError(f"{name}: seed must be an integer from 0 to 2**31 - 1, not {seed!r}.")
    return reference.build(shape, classes, Seeds(seed), checked)


def _check_names(name: str, classes: ClassCounts) -> None:
    for output in classes if isinstance(classes, Mapping) else ():
        if not (isinstance(output, str) and re.fullmatch(r"\w[\w.-]*", output)):
            raise InvalidOptionsError(
                f"{name}: the name of an output is of letters, digits, _, . and -, as that of a layer, not {output!r}."
            )


def _get(name: str) -> Any:
    if name not in _models:
        raise UnknownModelError(f"Unknown model {name!r}.{nearest(str(name), names())} Models: {', '.join(names())}.")
    return _models[name]
