"""Putting strategies together, and onto a model."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import keras

from trainstep import _seam, registry, saving
from trainstep.declaration import Declaration, StrategyOptions, validated_options
from trainstep.definition import (
    check_composition,
    check_losses,
    check_model_class,
    check_optimizer,
    check_xla,
    in_order,
    strategies_of,
)
from trainstep.errors import (
    AlreadyAppliedError,
    InvalidSpecError,
    NotAModelError,
    NotAppliedError,
    RepeatedStrategyError,
)
from trainstep.replicas import forget_traces
from trainstep.state import check_holds_state, reset_state
from trainstep.step import Strategy

Spec = str | Sequence[str] | Mapping[str, Mapping[str, Any] | StrategyOptions | None]
"""A name, several names, or a mapping from names to options; None stands for the defaults."""

Composition = dict[type[Strategy], StrategyOptions]
"""Strategies with their checked options, outermost first."""

ModelT = TypeVar("ModelT")

_classes: dict[type, dict[tuple[Any, ...], type]] = {}
"""Generated classes by base and composition, kept for good: each holds its base, and Keras the name of each."""


def compose(spec: Spec, /, **options: Any) -> Composition:
    """Resolve `spec` into strategies with checked options, in the order in which they act.

    Args:
        spec: a name; or a list of names, with default options; or a mapping from names to options.
        **options: options of the one strategy, where `spec` is a name.

    Returns:
        Options by strategy class, outermost strategy first.

    Raises:
        UnknownStrategyError: a name is not registered.
        InvalidOptionsError: an option is unknown, of the wrong type or out of bounds.
        RepeatedStrategyError: a name is listed twice.
        StrategyConflictError: two strategies cannot work together.
        InvalidSpecError: `spec` is of another form, or empty.
    """
    if isinstance(spec, str):
        given: dict[str, Any] = {spec: options}
    elif options:
        raise InvalidSpecError(
            f"Options as keywords ({', '.join(options)}) go with a single name. "
            'With several strategies, write {"name": {"option": value}, ...}.'
        )
    elif isinstance(spec, Mapping):
        given = dict(spec)
    elif isinstance(spec, Sequence) and all(isinstance(name, str) for name in spec):
        repeated = sorted({name for name in spec if list(spec).count(name) > 1})
        if repeated:
            raise RepeatedStrategyError(f"{repeated[0]!r} is listed more than once. A strategy acts once per step.")
        given = {name: {} for name in spec}
    else:
        raise InvalidSpecError(
            f"Strategies are given as a name, a list of names, or a mapping from names to options, not {spec!r}."
        )
    if not given:
        raise InvalidSpecError('No strategy given. The plain training step is called "standard".')
    chosen = [registry.get(name) for name in given]
    composition = {
        strategy: _checked(strategy.declaration, options)
        for strategy, options in zip(chosen, given.values(), strict=True)
    }
    check_composition(composition)
    return in_order(composition)


def _checked(declaration: Declaration, options: Any) -> StrategyOptions:
    return validated_options(declaration.name, declaration.options, options, declaration.example)


def model_class(base: type[ModelT], spec: Spec, /, **options: Any) -> type[ModelT]:
    """Return a subclass of `base` that trains by the strategies of `spec`.

    Args:
        base: `keras.Model` or a subclass, which must not override `train_step`.
        spec: see `compose`.
        **options: see `compose`.

    Returns:
        The class, a new one at each call.

    Raises:
        NotAModelError: `base` is no class of models.
        AlreadyAppliedError: it has strategies already.
        ModelConflictError: it overrides `train_step`, or has something of the name of a hook.
        The errors of `compose`.
    """
    if not (isinstance(base, type) and issubclass(base, keras.Model)):
        raise NotAModelError(f"`model_class` takes keras.Model or a subclass, not {base!r}.")
    _refuse_second(base)
    check_model_class(base)
    return _new_class(base, compose(spec, **options))


def _new_class(base: type[ModelT], composition: Composition) -> type[ModelT]:
    namespace = {
        "strategy_options": {strategy.declaration.name: choice for strategy, choice in composition.items()},
        "__doc__": base.__doc__,
        # That of the class a file is loaded by, so that where there is no trainstep, Keras's error names it.
        "__module__": saving.__name__,
        "__qualname__": base.__qualname__,
    }
    bases: tuple[Any, ...] = (*composition, saving.Saved, base)
    new_class: Any = type(base.__name__, bases, namespace)
    saving.share_name(new_class)
    return new_class


def _known_class(base: type[ModelT], spec: Spec, **options: Any) -> type[ModelT]:
    """Return what `model_class` does, one and the same class for equal arguments.

    Not for others to inherit from or to call: called with inputs and outputs, a class of `keras.Model` has its bases
    exchanged by Keras, and those of all that inherit from it.
    """
    _refuse_second(base)
    check_model_class(base)
    composition = compose(spec, **options)
    key = tuple((strategy, choice.model_dump_json()) for strategy, choice in composition.items())
    known = _classes.setdefault(base, {})
    if key not in known or base not in known[key].__bases__:
        known[key] = _new_class(base, composition)
    return known[key]


def apply(model: ModelT, spec: Spec, /, **options: Any) -> ModelT:
    """Let `model` train by the strategies of `spec`; everything else about it stays.

    `model` may be of any kind, built or not, compiled or not. Its weights, layers, names and
    identity stay; only its class changes, to a subclass of what it was.

    Args:
        model: the model, changed in place.
        spec: a name, a list of names, or a mapping from names to options.
        **options: options of the one strategy, where `spec` is a name.

    Returns:
        `model` itself.

    Raises:
        NotAModelError: `model` is no `keras.Model`.
        AlreadyAppliedError: it has strategies already.
        ModelConflictError, OptimizerConflictError: the model, or the optimizer it is compiled
            with, does what a strategy does, or cannot be trained by one.
        UnsupportedInputError: options name an input that the model has not, whatever else they say.
        UnknownStrategyError, InvalidOptionsError, RepeatedStrategyError, StrategyConflictError,
            InvalidSpecError: `spec` is wrong.
    """
    if not isinstance(model, keras.Model):
        hint = " Pass an instance of it, or use `model_class`." if isinstance(model, type) else ""
        raise NotAModelError(f"Strategies apply to a keras.Model, not to {type(model).__name__} {model!r}.{hint}")
    plain = type(model)
    composed = _known_class(plain, spec, **options)
    if getattr(model, "optimizer", None) is not None:
        check_optimizer(composed, model.optimizer)
    model.__class__ = composed
    try:
        model.check_model()
        if getattr(model, "optimizer", None) is not None:
            check_holds_state(model)
            _seam.check_steps_per_execution(model)
            check_xla(composed, model.jit_compile)
            check_losses(model)
        model.attach_strategies()
    except Exception:
        model.detach_strategies()  # What was changed before it failed.
        model.__class__ = plain
        raise
    reset_state(model)
    _forget_steps(model)
    return model


def remove(model: ModelT, /) -> ModelT:
    """Give `model` back its plain training step; weights and everything else stay.

    Raises:
        NotAppliedError: it has no strategies, or has them by its own definition.
    """
    if not isinstance(model, Strategy):
        raise NotAppliedError(f"There are no strategies to remove from {getattr(model, 'name', model)!r}.")
    if not saving.is_generated(type(model)):
        raise NotAppliedError(
            f"{type(model).__name__} has its strategies among its bases, so they cannot be removed. "
            "Only what `apply` added can."
        )
    model.detach_strategies()
    model.__class__ = saving.without_strategies(model)
    _forget_steps(model)
    return model


def applied(model: Any, /) -> dict[str, StrategyOptions]:
    """Return the strategies of `model` with their options by name, outermost first; empty for a plain model."""
    return dict(model.strategy_options) if isinstance(model, Strategy) else {}


def _refuse_second(model_type: type) -> None:
    if issubclass(model_type, Strategy):
        present = [strategy.declaration.name for strategy in strategies_of(model_type)]
        if not saving.is_generated(model_type):
            raise AlreadyAppliedError(
                f"{model_type.__name__} has strategies among its bases already: {', '.join(present)}. Add the others "
                "there: model_class(keras.Model, [...])."
            )
        raise AlreadyAppliedError(
            f"The model has strategies already: {', '.join(present)}. To change them, call trainstep.remove(model), "
            "then apply all of them at once: apply(model, {"
            + "".join(f'"{name}": ..., ' for name in present)
            + '"another": ...}).'
        )


def _forget_steps(model: Any) -> None:
    forget_traces(model)
    model.train_function = model.test_function = model.predict_function = None
