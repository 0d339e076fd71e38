"""What users bring themselves: models, data, optimizers and metrics."""

import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from trainstep.benchmarks import datasets
from trainstep.benchmarks.data import Split, checked
from trainstep.benchmarks.errors import InvalidComparisonError, InvalidDataError
from trainstep.composition import applied
from trainstep.errors import NotAModelError


def imported(text: str, what: str) -> Callable[..., Any]:
    """Return the function `package.module:name`, from the current folder too.

    Raises:
        InvalidComparisonError: there is none; or importing it failed, with the reason.
    """
    module, colon, name = text.partition(":")
    if not (module and colon and name):
        raise InvalidComparisonError(f"`{what}` is written package.module:function, not {text!r}.")
    if str(Path.cwd()) not in sys.path and "" not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise InvalidComparisonError(
            f"{module} cannot be imported: {error}. It is looked for in the current folder too."
        ) from error
    if not callable(getattr(found, name, None)):
        known = ", ".join(sorted(key for key, value in vars(found).items() if callable(value) and key[0] != "_"))
        raise InvalidComparisonError(f"There is no function {name!r} in {module}. Functions: {known or 'none'}.")
    return getattr(found, name)


def is_loader(train: Any) -> bool:
    """Return whether `train` is a function that returns data, rather than data."""
    return callable(train) and not isinstance(train, tf.data.Dataset)


def loaded(load: Callable[[], Any], noise: float) -> Split:
    """Return the data that a user's function returns, with a share of the training labels made wrong.

    Raises:
        InvalidDataError: they are not (train, validation), or one of these is of another form.
        InvalidComparisonError: the labels cannot be made wrong.
    """
    pair = load()
    if not (isinstance(pair, tuple) and len(pair) == 2 and not hasattr(pair[0], "shape")):
        raise InvalidDataError(
            f"The function of the data must return (train, validation), not {type(pair).__name__}. Each is (x, y), "
            "(x, y, sample_weight) or a batched tf.data.Dataset."
        )
    split = Split(checked(pair[0], "train"), checked(pair[1], "validation"))
    if noise and isinstance(split.train, tf.data.Dataset):
        raise InvalidComparisonError("Label noise needs arrays; put it into your tf.data.Dataset yourself.")
    return datasets.with_noise(split, noise)


def builder(model: Any) -> Callable[[int], Any]:
    """Return a function from a seed to a new model, which checks what the user's function returns.

    Raises:
        NotAModelError: `model` is no function. What is returned raises it where that returns no new, plain model.
    """
    if isinstance(model, keras.Model) or not callable(model):
        raise NotAModelError(
            f"`model` is a function that returns a new model for each run, not {type(model).__name__}: write "
            "model=lambda: keras.Sequential([...])."
        )
    takes_seed = "seed" in inspect.signature(model).parameters

    def build(seed: int) -> Any:
        built = model(seed=seed) if takes_seed else model()
        if isinstance(built, keras.Model) and applied(built):
            raise NotAModelError(
                f"`model` must return a new, plain model for each run, and {built.name!r} has strategies already: "
                f"{', '.join(applied(built))}. Build it inside the function; `strategies` says how it is trained."
            )
        if not isinstance(built, keras.Model):
            raise NotAModelError(f"`model` must return a keras.Model, not {type(built).__name__} {built!r}.")
        return built

    return build


def maker(given: Any, by_name: Callable[[str], Any]) -> Callable[[], Any]:
    """Return a function that makes a new object, so that no two models share the state of one."""
    if isinstance(given, str):
        return functools.partial(by_name, given)
    if hasattr(given, "from_config") and hasattr(given, "get_config") and not isinstance(given, type):
        return lambda: type(given).from_config(given.get_config())
    if callable(given):
        return given
    raise InvalidComparisonError(f"Give a name, an object of Keras, or a function that returns one, not {given!r}.")


def name(thing: Any) -> str:
    """Return what a loss or a metric, or its name, is called."""
    return thing if isinstance(thing, str) else getattr(thing, "name", None) or getattr(thing, "__name__", repr(thing))
