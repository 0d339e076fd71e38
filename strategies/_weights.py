"""Weights by name: patterns such as "hidden/*" or "*/kernel", for options that are about some of the weights."""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from trainstep import _seam
from trainstep.errors import ModelConflictError, nearest

Value = TypeVar("Value")


def check_names(strategy: str, model: Any, patterns: Iterable[str]) -> None:
    """Raise `ModelConflictError` where a pattern matches no weight of `model`, if it has them all already."""
    if _seam.is_built(model) and model.trainable_variables:
        matching(strategy, model.trainable_variables, dict.fromkeys(patterns), otherwise=None)


def matching(strategy: str, weights: Sequence[Any], patterns: Mapping[str, Value], otherwise: Value) -> list[Value]:
    """Return for each of `weights` the value of the last pattern its path matches; `otherwise` where none does.

    Args:
        strategy: whose option it is, for the message.
        weights: of the model.
        patterns: as in the names of files: `*` stands for anything, `?` for one letter. A name of a layer alone, such
            as "hidden", stands for all its weights.
        otherwise: the value of the others.

    Raises:
        ModelConflictError: a pattern matches no weight.
    """
    paths = [_seam.path_of(weight) for weight in weights]
    values, unused = [otherwise] * len(paths), set(patterns)
    for pattern, value in patterns.items():
        for index, path in enumerate(paths):
            if fnmatchcase(path, pattern) or fnmatchcase(path, f"{pattern}/*") or fnmatchcase(path, f"*/{pattern}/*"):
                values[index] = value
                unused.discard(pattern)
    if unused:
        pattern = sorted(unused)[0]
        parts = {part for path in paths for part in path.split("/")}
        hint = f" Did you mean '*/{pattern}'?" if pattern in parts else nearest(pattern, [*parts, *paths])
        raise ModelConflictError(
            f"{strategy}: no trainable weight is called {pattern!r}, nor is a layer.{hint} Weights: {', '.join(paths)}."
        )
    return values
