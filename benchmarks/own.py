"""What users bring themselves: models, data, optimizers and metrics."""

import functools
import hashlib
import importlib
import inspect
import json
import re
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from trainstep import _seam
from trainstep.benchmarks import datasets
from trainstep.benchmarks.data import Split, checked
from trainstep.benchmarks.errors import InvalidComparisonError, InvalidDataError, InvalidModelError
from trainstep.composition import applied
from trainstep.errors import NotAModelError, TrainstepError, first_line, nearest


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
    except Exception as error:
        raise InvalidComparisonError(f"{module} cannot be imported: {first_line(error)}.") from error
    if not callable(getattr(found, name, None)):
        known = sorted(key for key, value in vars(found).items() if callable(value) and key[0] != "_")
        raise InvalidComparisonError(
            f"There is no function {name!r} in {module}.{nearest(name, known)} Functions: {', '.join(known) or 'none'}."
        )
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
    try:
        pair = load()
    except TrainstepError:
        raise
    except Exception as error:
        raise InvalidDataError(f"The function of the data failed: {first_line(error)}.") from error
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
    asked = _asked(model)
    takes_seed = "seed" in inspect.signature(model).parameters
    if asked - {"seed"}:
        raise InvalidModelError(
            f"`model` is a function without arguments, or with one called seed; this one asks for "
            f"{', '.join(sorted(asked))}. Wrap it: model=lambda: {getattr(model, '__name__', 'build')}(...)."
        )

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


def _asked(function: Callable[..., Any]) -> set[str]:
    """Return the names of the arguments that `function` cannot do without."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return {each.name for each in parameters if each.default is each.empty and each.kind not in kinds}


def optimizer_maker(given: Any) -> Callable[[], Any]:
    """Return a function that makes a new optimizer from one, or calls the function that does.

    Raises:
        InvalidComparisonError: it is neither, or the function returns something else, or one optimizer twice.
    """
    make = maker(given, keras.optimizers.get)
    one, other = (_made(make, "optimizer") for _ in range(2))
    if not isinstance(one, keras.optimizers.Optimizer):
        raise InvalidComparisonError(
            f"The function `optimizer` must return an optimizer of Keras, not {type(one).__name__} {one!r}."
        )
    _refuse_same("optimizer", one, other)
    return make


def metric_maker(given: Any) -> Callable[[], Any]:
    """Return a function that makes a new metric, or the name of one, which Keras makes.

    Raises:
        InvalidComparisonError: there is no such metric; or a function returns something else, or one metric twice.
    """
    if isinstance(given, str):
        check_metric(given)
    elif inspect.isfunction(given) and len(_asked(given)) >= 2:
        raise InvalidComparisonError(
            f"A metric is a name, an object of Keras, or a function without arguments that returns one; "
            f"{given.__name__!r} asks for {', '.join(inspect.signature(given).parameters)}. Wrap it: "
            f"metric=lambda: keras.metrics.MeanMetricWrapper({given.__name__})."
        )
    make = maker(given, _metric_called)
    one, other = (_made(make, "metric") for _ in range(2))
    if isinstance(one, str):
        check_metric(one)
    elif not isinstance(one, keras.metrics.Metric):
        raise InvalidComparisonError(
            f"The function `metric` must return a metric of Keras, not {type(one).__name__} {one!r}."
        )
    else:
        _refuse_same("metric", one, other)
    return make


def _metric_called(given: str) -> Any:
    """Return the metric of that name, called so; or the name, of those that Keras makes by itself and calls so."""
    found = None if given.lower() in _CHOSEN_BY_SHAPE else keras.metrics.get(given)
    if not isinstance(found, keras.metrics.Metric):
        return given
    # The two Kerases call one that is a class by different names, and count how many there are.
    return type(found).from_config({**found.get_config(), "name": given})


def check_metric(given: str) -> None:
    """Raise `InvalidComparisonError` where Keras has no metric called `given`, with the nearest names."""
    if given not in _CHOSEN_BY_SHAPE:
        _check_name("metric", given, keras.metrics, _CHOSEN_BY_SHAPE)


def check_loss(given: Any) -> None:
    """Raise `InvalidComparisonError` where `given` is no loss, no name of one, nor one or None for each output."""
    losses = list(given.values()) if isinstance(given, Mapping) else given
    if isinstance(losses, list | tuple) and not losses:
        raise InvalidComparisonError("`loss` by output is empty: leave it out, or give each output its own.")
    if isinstance(losses, list | tuple) and all(loss is None for loss in losses):
        raise InvalidComparisonError("No output has a loss: give at least one of them one.")
    for loss in losses if isinstance(losses, list | tuple) else [losses]:
        if isinstance(loss, str) and ":" in loss:
            raise InvalidComparisonError(
                f"Losses by output are given in Python or in a file, {{output: loss}}, and not as {loss!r}."
            )
        if isinstance(loss, str):
            _check_name("loss", loss, keras.losses, ())
        elif loss is not None and not callable(loss):
            raise InvalidComparisonError(f"`loss` is a name, an object of Keras or a function, not {loss!r}.")


def takes_one_hot(loss: Any) -> bool:
    """Return whether `loss`, or that of each output, is a cross-entropy of one-hot labels."""
    found = [keras.losses.get(one) if isinstance(one, str) else one for one in tf.nest.flatten(loss)]
    return all((_seam.cross_entropy(one) or [None])[0] == "categorical" for one in found)


_CHOSEN_BY_SHAPE = ("accuracy", "acc", "crossentropy", "ce")
"""Names for which Keras looks at output and labels."""


def _check_name(kind: str, given: str, module: Any, others: tuple[str, ...]) -> None:
    problem = _problem(module, given)
    if problem is None:
        return
    if hasattr(module, given) and isinstance(getattr(module, given), type):  # Such as MeanIoU, which needs options.
        raise InvalidComparisonError(f"The {kind} {given!r} cannot be made from its name alone: {problem}.")
    known = sorted({*_names(module), *others}, key=str.lower)
    hint = nearest(given, sorted(known, key=str.islower))  # Of two that differ by capitals alone, the last.
    raise InvalidComparisonError(f"Unknown {kind} {given!r}.{hint} Known: {', '.join(known)}.")


def _names(module: Any) -> list[str]:
    """Return the names that the function `get` of `module` takes: of functions, short ones, and of other classes."""
    taken = [name for name in (*vars(module), *_SHORT) if name[0] != "_" and not _problem(module, name)]
    functions = [name for name in taken if name.islower()]
    told = {name.replace("_", "") for name in functions}
    return [*functions, *(name for name in taken if name.lower() not in told)]


def _problem(module: Any, given: str) -> str | None:
    """Return why the function `get` of `module` does not take `given`; None where it does."""
    try:
        found = module.get(given)
    except Exception as error:  # noqa: BLE001  Keras has several.
        return first_line(error)
    return None if callable(found) and given not in _HELPERS else "it is none"


_SHORT = ("mse", "mae", "mape", "msle")
_HELPERS = ("deserialize", "serialize", "get", "Loss", "Metric")
"""What Keras takes for losses and metrics, as it is where these are."""


def _made(make: Callable[[], Any], what: str) -> Any:
    try:
        return make()
    except TrainstepError:
        raise
    except Exception as error:
        raise InvalidComparisonError(f"The function `{what}` failed: {first_line(error)}.") from error


def _refuse_same(what: str, one: Any, other: Any) -> None:
    if one is other:
        raise InvalidComparisonError(
            f"The function `{what}` must return a new one at each call, and returns the same: runs would share it."
        )


def maker(given: Any, by_name: Callable[[str], Any]) -> Callable[[], Any]:
    """Return a function that makes a new object, so that no two models share the state of one."""
    if isinstance(given, str):
        return functools.partial(by_name, given)
    if hasattr(given, "from_config") and hasattr(given, "get_config") and not isinstance(given, type):
        return lambda: type(given).from_config(given.get_config())
    if callable(given):
        return given
    raise InvalidComparisonError(f"Give a name, an object of Keras, or a function that returns one, not {given!r}.")


def details(thing: Any) -> Any:
    """Return what tells an object or a function of the user's from others of its name, as plain values; None of a name.

    An object is told by its options, a function by its code, and by what it holds on to.
    """
    if thing is None or isinstance(thing, str):
        return None
    if hasattr(thing, "get_config") and not isinstance(thing, type):
        config = {key: value for key, value in thing.get_config().items() if key != "name"}
        if isinstance(thing, keras.losses.Loss):  # Whose options are not all in the config, on Keras 3.
            config |= {key: value for key, value in vars(thing).items() if key != "name"}
        return {"class": type(thing).__name__, **json.loads(json.dumps(config, default=_without_address))}
    code = getattr(thing, "__code__", None)
    if code is None:
        return _without_address(thing)
    held = [cell.cell_contents for cell in thing.__closure__ or ()], thing.__defaults__
    return hashlib.sha256(f"{_code(code)} {_without_address(held)}".encode()).hexdigest()[:16]


def _code(code: types.CodeType) -> str:
    constants = [_code(each) if isinstance(each, types.CodeType) else repr(each) for each in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {constants}"


def _without_address(thing: Any) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", repr(thing))


def name(thing: Any) -> str:
    """Return what a loss or a metric, or its name, is called."""
    return thing if isinstance(thing, str) else getattr(thing, "name", None) or getattr(thing, "__name__", repr(thing))
