"""Checking what `compare` is asked for, before any data are read."""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from trainstep import registry
from trainstep.benchmarks.attack import Attack
from trainstep.benchmarks.data import Source, checked
from trainstep.benchmarks.errors import InvalidComparisonError
from trainstep.benchmarks.result import Settings
from trainstep.benchmarks.runner import Task
from trainstep.benchmarks.workload import Workload
from trainstep.composition import Composition, Spec, applied, compose
from trainstep.declaration import validated_options
from trainstep.errors import InvalidSpecError, NotAModelError, UnknownStrategyError

CONTROL = "standard"


def compositions(strategies: Mapping[str, Spec] | Sequence[str]) -> tuple[dict[str, Composition], str]:
    """Return the compositions by label, the control first where it was missing, and the control's label.

    Raises:
        InvalidSpecError: `strategies` is of another form, or another strategy is labelled "standard".
        The errors of `trainstep.composition.compose`.
    """
    if isinstance(strategies, str):
        raise InvalidSpecError(f"`strategies` is a list or a mapping: write [{strategies!r}].")
    if isinstance(strategies, Mapping):
        given = dict(strategies)
    elif isinstance(strategies, Sequence) and all(isinstance(name, str) for name in strategies):
        given = {name: name for name in strategies}
    else:
        raise InvalidSpecError(
            "`strategies` is a list of names, or a mapping from labels to a name, a list of names or "
            f"{{name: options}}, not {strategies!r}."
        )
    composed = {str(label): _composed(label, spec) for label, spec in given.items()}
    control_class = registry.get(CONTROL)
    control = next((label for label, composition in composed.items() if list(composition) == [control_class]), None)
    if control is None:
        if CONTROL in composed:
            raise InvalidSpecError(
                f'The label "{CONTROL}" is for the control, the plain training step. Choose another.'
            )
        control, composed = CONTROL, {CONTROL: compose(CONTROL), **composed}
    return composed, control


def _composed(label: Any, spec: Any) -> Composition:
    try:
        return compose(spec)
    except UnknownStrategyError as error:
        if isinstance(spec, Mapping) and label in registry.names() and not set(spec) & set(registry.names()):
            raise InvalidSpecError(
                f"`strategies` maps labels to compositions: write {{{label!r}: {{{label!r}: {dict(spec)!r}}}}}."
            ) from error
        raise


def seeds(given: int | Sequence[int]) -> list[int]:
    """Return the seeds: as many as asked for, from 0 on, or those given."""
    chosen = list(range(given)) if isinstance(given, int) else list(given) if isinstance(given, Iterable) else []
    if not chosen or len(set(chosen)) < len(chosen) or not all(isinstance(s, int) and 0 <= s < 2**31 for s in chosen):
        raise InvalidComparisonError(
            f"`seeds` is how many, at least 1, or different integers from 0 to 2**31 - 1, not {given!r}."
        )
    return chosen


def changes(
    *, epochs: Any, batch_size: Any, optimizer: Any, loss: Any, metric: Any, attack: Attack | Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return what the user set himself, by the name of its field in `Task`."""
    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        if value is not None and not (isinstance(value, int) and value > 0):
            raise InvalidComparisonError(f"`{name}` must be a positive integer, not {value!r}.")
    given: dict[str, Any] = {"epochs": epochs, "batch_size": batch_size, "loss": loss}
    if attack is not None:
        given["attack"] = validated_options("attack", Attack, attack)
    if optimizer is not None:
        given["make_optimizer"] = _maker(optimizer, keras.optimizers.get)
        given["make_optimizer"]()
    if metric is not None:
        given["make_metric"] = _maker(metric, lambda name: name)
    return {name: value for name, value in given.items() if value is not None}


def task_of_workload(workload: Workload, given: Mapping[str, Any]) -> Task:
    """Return the task of `workload` with the changes `given`; reads its data."""
    split = workload.load()
    defaults = {
        "epochs": workload.epochs,
        "batch_size": workload.batch_size,
        "make_optimizer": workload.make_optimizer,
        "loss": workload.loss,
        "make_metric": lambda: workload.metric,
        "attack": workload.attack,
    }
    train, validation = checked(split.train, "train"), checked(split.validation, "validation")
    # The reference models draw at random in training only for dropout, which on Keras 2 nobody can set back.
    reusable = "dropout" not in workload.model_options and "make_optimizer" not in given
    return Task(build=workload.build, train=train, validation=validation, reusable=reusable, **{**defaults, **given})


def task_of_user(model: Any, train: Source, validation: Source, given: Mapping[str, Any]) -> Task:
    """Return the task of a user's own builder and data.

    Raises:
        NotAModelError: `model` is not a function, or what it returns is not a `keras.Model`.
        InvalidDataError: the data are of another form.
    """
    defaults = {
        "epochs": 10,
        "batch_size": 32,
        "make_optimizer": functools.partial(keras.optimizers.get, "adam"),
        "loss": "sparse_categorical_crossentropy",
        "make_metric": lambda: "accuracy",
        "attack": None,
    }
    train, validation = checked(train, "train"), checked(validation, "validation")
    return Task(build=_builder(model), train=train, validation=validation, **{**defaults, **given})


def settings(name: str, task: Task) -> Settings:
    """Return the record of what all cells share."""
    optimizer, metric = task.make_optimizer(), task.make_metric()
    config = {key: value for key, value in optimizer.get_config().items() if isinstance(value, str | int | float)}
    return Settings(
        workload=name,
        epochs=task.epochs,
        batch_size=None if isinstance(task.train, tf.data.Dataset) else task.batch_size,
        optimizer={"class": type(optimizer).__name__, **config},
        loss=_name(task.loss),
        metric=_name(metric),
        attack=None if task.attack is None else task.attack.model_dump(mode="json"),
    )


def _builder(model: Any) -> Callable[[int], Any]:
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


def _maker(given: Any, by_name: Callable[[str], Any]) -> Callable[[], Any]:
    """Return a function that makes a new object, so that no two models share the state of one."""
    if isinstance(given, str):
        return functools.partial(by_name, given)
    if hasattr(given, "from_config") and hasattr(given, "get_config") and not isinstance(given, type):
        return lambda: type(given).from_config(given.get_config())
    if callable(given):
        return given
    raise InvalidComparisonError(f"Give a name, an object of Keras, or a function that returns one, not {given!r}.")


def _name(thing: Any) -> str:
    return thing if isinstance(thing, str) else getattr(thing, "name", None) or getattr(thing, "__name__", repr(thing))
