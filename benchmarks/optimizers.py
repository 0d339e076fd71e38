"""Optimizers, and schedules of the learning rate, from what can be written in a file.

    {name: adam, learning_rate: 0.001, schedule: {name: cosine, decay_steps: 1000}}

Names and options are those of `keras.optimizers` and `keras.optimizers.schedules`, the names in any of the forms
CosineDecay, cosine_decay and cosine. Time in a schedule is counted in updates. A schedule starts at `learning_rate`,
and ends with the budget where it has `decay_steps` and they are not given.
"""

import inspect
import math
import numbers
import re
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from trainstep.benchmarks.errors import InvalidComparisonError
from trainstep.benchmarks.spec import parse_spec
from trainstep.errors import nearest

_OUTER = ("Optimizer", "LossScaleOptimizer", "MultiOptimizer")
"""Not an optimizer by itself, and what needs others inside."""


def check(given: Any) -> dict[str, Any]:
    """Return `given`, a name or a mapping, as a mapping with its name, all names and options known to Keras.

    Raises:
        InvalidComparisonError: the message says which name or option is wrong, and what is allowed. Its argument
            `path` says where in `given`.
    """
    if isinstance(given, Mapping) and "class_name" in given:  # As Keras itself writes one.
        return dict(given)
    wanted = {"name": given} if isinstance(given, str) else given
    if not isinstance(wanted, Mapping) or not isinstance(wanted.get("name"), str):
        raise _misplaced(f"An optimizer is a name, or {{name: ..., option: ...}}, not {given!r}.", ())
    wanted = dict(wanted)
    optimizer = _class_of(wanted["name"], optimizers(), "optimizer", ("name",))
    options = {key: value for key, value in wanted.items() if key not in ("name", "schedule")}
    _check_options(wanted["name"], optimizer, options, (), also=("schedule",))
    _check_rate("learning_rate", options.get("learning_rate"), ())
    schedule = wanted.get("schedule")
    if schedule is None:
        wanted.pop("schedule", None)
        return wanted
    schedule = {"name": schedule} if isinstance(schedule, str) else schedule
    if not isinstance(schedule, Mapping) or not isinstance(schedule.get("name"), str):
        raise _misplaced(f"A schedule is a name, or {{name: ..., option: ...}}, not {schedule!r}.", ("schedule",))
    kind = _class_of(schedule["name"], schedules(), "schedule", ("schedule", "name"))
    _check_options(schedule["name"], kind, {k: v for k, v in schedule.items() if k != "name"}, ("schedule",))
    parameters = inspect.signature(kind.__init__).parameters
    if "learning_rate" in wanted and "initial_learning_rate" not in parameters:
        raise _misplaced(f"The schedule {schedule['name']!r} has all learning rates itself.", ("learning_rate",))
    if "learning_rate" in wanted and "initial_learning_rate" in schedule:
        raise _misplaced("Give learning_rate, or initial_learning_rate in the schedule, but not both.", ("schedule",))
    return {**wanted, "schedule": dict(schedule)}


def parse(text: str) -> dict[str, Any]:
    """Return what `check` does of a text such as `adam:learning_rate=0.01`.

    Raises:
        InvalidComparisonError: see `check`; or it is no such text.
    """
    spec = parse_spec(text)
    if len(spec) != 1:
        raise InvalidComparisonError(f"An optimizer is NAME or NAME:OPTION=VALUE,OPTION=VALUE, not {text!r}.")
    [(name, options)] = spec.items()
    return check({"name": name, **options})


def make(given: Any, updates: int | None) -> keras.optimizers.Optimizer:
    """Return a new optimizer.

    Args:
        given: as for `check`.
        updates: how many the budget has; None where it does not say.

    Raises:
        InvalidComparisonError: see `check`; or Keras refuses a value, or a schedule's duration is not known.
    """
    wanted = check(given)
    if "class_name" in wanted:
        return _called(str(wanted["class_name"]), keras.optimizers.get, {"identifier": wanted})
    name, schedule = wanted.pop("name"), wanted.pop("schedule", None)
    if schedule is not None:
        wanted["learning_rate"] = _make_schedule(schedule, wanted.pop("learning_rate", None), updates)
    return _called(name, optimizers()[_plain(name)], wanted)


def settings_of(optimizer: Any) -> dict[str, Any]:
    """Return the class name of `optimizer`, and its settings where they are plain values, with its schedule's."""
    settings: dict[str, Any] = {"class": type(optimizer).__name__}
    for key, value in optimizer.get_config().items():
        if key == "name":  # Which Keras numbers.
            continue
        value = value.item() if isinstance(value, np.generic) else value  # noqa: PLW2901  Keras 2 gives NumPy's.
        if isinstance(value, Mapping) and "class_name" in value and isinstance(value.get("config"), Mapping):
            plain = {k: _short(v) for k, v in value["config"].items() if isinstance(v, str | int | float | list)}
            settings[key] = {"class": value["class_name"], **{k: v for k, v in plain.items() if k != "name"}}
        elif isinstance(value, str | int | float):
            settings[key] = _short(value)
    return settings


def optimizers() -> dict[str, type]:
    """Return Keras's optimizers, by name in small letters."""
    return {
        name.lower(): value
        for name, value in vars(keras.optimizers).items()
        if isinstance(value, type) and issubclass(value, keras.optimizers.Optimizer) and name not in _OUTER
    }


def schedules() -> dict[str, type]:
    """Return Keras's schedules, by name in small letters, without underscores and without `decay`."""
    base = keras.optimizers.schedules.LearningRateSchedule
    return {
        _plain(name): value
        for name, value in vars(keras.optimizers.schedules).items()
        if isinstance(value, type) and issubclass(value, base) and value is not base
    }


def _plain(name: str) -> str:
    return re.sub(r"decay|_|-", "", name.lower()) or name.lower()


def _class_of(name: str, known: Mapping[str, type], kind: str, path: tuple[str, ...]) -> type:
    if _plain(name) in known:
        return known[_plain(name)]
    shown = sorted({_snake(value.__name__) if kind == "schedule" else key for key, value in known.items()})
    raise _misplaced(f"Unknown {kind} {name!r}.{nearest(name.lower(), shown)} Known: {', '.join(shown)}.", path)


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def _check_options(
    name: str, kind: Any, options: Mapping[str, Any], path: tuple[str, ...], also: tuple[str, ...] = ()
) -> None:
    parameters = inspect.signature(kind.__init__).parameters
    known = [key for key in parameters if key not in ("self", "kwargs", "name")]
    for option in options:
        if option not in known:
            allowed = [*known, *also]
            raise _misplaced(
                f"{name}: unknown option {option!r}.{nearest(str(option), allowed)} Options: {', '.join(allowed)}.",
                (*path, str(option)),
            )


def _check_rate(name: str, rate: Any, path: tuple[str, ...]) -> None:
    if isinstance(rate, numbers.Real) and not (float(rate) >= 0 and math.isfinite(rate)):
        raise _misplaced(f"`{name}` must be a number from 0 on, not {rate!r}.", (*path, name))


def _make_schedule(schedule: Mapping[str, Any], learning_rate: float | None, updates: int | None) -> Any:
    options = {key: value for key, value in schedule.items() if key != "name"}
    kind: Any = schedules()[_plain(schedule["name"])]
    parameters = inspect.signature(kind.__init__).parameters
    if "initial_learning_rate" in parameters:
        options.setdefault("initial_learning_rate", 0.001 if learning_rate is None else learning_rate)
    if "decay_steps" in parameters and "decay_steps" not in options:
        if updates is None:
            raise InvalidComparisonError(
                f"The schedule {schedule['name']!r} needs decay_steps, in updates: a budget in seconds, or data that "
                "are not read yet, do not say how many there will be."
            )
        options["decay_steps"] = max(1, updates - options.get("warmup_steps", 0))
    return _called(schedule["name"], kind, options)


def _called(name: str, kind: Any, options: Mapping[str, Any]) -> Any:
    try:
        return kind(**options)
    except (TypeError, ValueError) as error:
        raise InvalidComparisonError(f"Keras refuses the options of {name!r}, {dict(options)}: {error}") from error


def _short(value: Any) -> Any:
    """Return a float32 as the shortest number that rounds to it: 0.001, not 0.0010000000474974513."""
    return float(str(np.float32(value))) if isinstance(value, float) and np.float32(value) == value else value


def _misplaced(message: str, path: tuple[str, ...]) -> InvalidComparisonError:
    error = InvalidComparisonError(message)
    error.path = path
    return error
