"""Everything that can be wrong with a request, each as a class of its own.

All derive from `TrainstepError`, itself a `ValueError`, so that both
`except ValueError` and a precise `except` work.
"""

import difflib
import re
from collections.abc import Iterable


class TrainstepError(ValueError):
    """The common parent of every error this package raises on purpose."""

    # That of `Exception` itself, from which autograph knows it may make the error anew around a traceback of its own;
    # others it turns into a `StagingError` when they come from a step that is being traced.
    __init__ = Exception.__init__


class UnknownStrategyError(TrainstepError):
    """No strategy is registered under the name that was given."""


class UnknownModelError(TrainstepError):
    """There is no reference model of the name that was given."""


class InvalidOptionsError(TrainstepError):
    """An option is unknown, has the wrong type, or is out of bounds."""


class InvalidSpecError(TrainstepError):
    """The description of the strategies is neither a name, a list of names nor a mapping."""


class RepeatedStrategyError(TrainstepError):
    """One strategy is asked for twice in one composition."""


class StrategyConflictError(TrainstepError):
    """Two strategies of one composition cannot work together; the message says why."""


class DuplicateStrategyError(TrainstepError):
    """A strategy is registered under a name that is taken, a built-in one for example."""


class StrategyDefinitionError(TrainstepError, TypeError):
    """A strategy class, or a model class with strategies among its bases, is ill-formed."""


class NotAModelError(TrainstepError, TypeError):
    """Strategies apply to a `keras.Model` and to nothing else."""


class AlreadyAppliedError(TrainstepError):
    """The model has strategies already."""


class NotAppliedError(TrainstepError):
    """The model has no strategies."""


class NotCompiledError(TrainstepError):
    """The model is not compiled for training: it has no optimizer, or no loss."""


class ModelConflictError(TrainstepError):
    """Strategies cannot train this model as it is: its class, layers, loss or distribution stand in the way."""


class OptimizerConflictError(TrainstepError):
    """The optimizer does already what a strategy does, or cannot hold what a strategy keeps."""


class UnsupportedInputError(TrainstepError):
    """A strategy cannot use the data, integer inputs for an attack for example, or is told of an input there is not."""


class SavingError(TrainstepError):
    """A file cannot hold the strategies of a model, or holds what this version cannot read."""


class NonFiniteGradientError(TrainstepError):
    """Too many steps in a row had a gradient that is infinite or not a number."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the closest of `allowed`, or an empty string."""
    names = {each.casefold(): each for each in allowed}
    if name.casefold() in names:
        return f" Did you mean {names[name.casefold()]!r}?"
    matches = [names[each] for each in difflib.get_close_matches(name.casefold(), names, n=3, cutoff=0.5)]
    if not matches:
        return ""
    return " Did you mean " + " or ".join(repr(match) for match in matches) + "?"


def first_line(error: BaseException) -> str:
    """Return the class of `error` and the line of its message that says what happened."""
    text = re.sub(r"\x1b\[\d+m", "", str(error))  # Keras prints some messages in bold.
    text = re.sub(r"\{\{function_node \S+\}\} |\s*\[Op:\w+\]( name:)?", "", text)  # Where in TensorFlow it was.
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    nodes = [index for index, line in enumerate(lines) if line.startswith("[[{{node")]
    if nodes and nodes[0] > 0:  # TensorFlow puts the message after the stack of the operation, before its name.
        lines = lines[nodes[0] - 1 :]
    elif lines and lines[0].startswith("in user code"):  # Autograph quotes the code, then the error it re-raises.
        lines = [line.split(": ", 1)[1] for line in lines if re.match(r"\w+(\.\w+)*Error: ", line)] or lines
    elif len(lines) > 1 and lines[0].startswith(("Exception encountered when calling", "Graph execution error")):
        lines = lines[1:]
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__
