"""What makes a class a strategy, and a model class one that strategies can train: checked when the class is made."""

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import keras

from trainstep import _seam
from trainstep.declaration import Declaration, Report, validated_options
from trainstep.errors import (
    ModelConflictError,
    OptimizerConflictError,
    StrategyConflictError,
    StrategyDefinitionError,
    nearest,
)

HOOKS = (
    "transform_batch",
    "train_batch",
    "compute_objective",
    "compute_gradients",
    "update_weights",
    "report_metrics",
)
HOST_HOOKS = (
    *("attach_strategies", "detach_strategies", "finish_epoch", "check_progress", "loss_scale", "check_model"),
    *("evaluation_weights", "keep_statistics"),
)
RESERVED = (
    *(*HOOKS, *HOST_HOOKS, "strategy_options", "strategy_state", "acts_on_updates", "composes_objectives"),
    *("record", "declared_reports", "collects_reports"),
)
OWNED_BY_THE_ROOT = (
    *(
        "train_step",
        "fit",
        "train_on_batch",
        "evaluate",
        "predict",
        "export",
        "reset_metrics",
        "compile",
        "compile_from_config",
        "make_train_function",
    ),
    *("metrics", "record", "strategy_state", "__init__", "__new__"),
)

_OWN_TRAIN_STEP = (
    "{} overrides `train_step`, which strategies replace: its code would never run. Move what is special in it to "
    "`compute_loss(x, y, y_pred, sample_weight)`, `compute_metrics` or `call`, which strategies use, or register it "
    "as a strategy."
)


class Declared:
    """What strategies, and models with strategies, say of themselves as classes."""

    declaration: ClassVar[Declaration]
    strategy_options: Mapping[str, Any] = MappingProxyType({})
    """Validated options by strategy name, outermost strategy first."""
    acts_on_updates: ClassVar[bool] = False
    """Whether a strategy stands between the gradients and the optimizer."""
    composes_objectives: ClassVar[bool] = False
    """Whether a strategy may put the loss together from several calls of `compute_loss`."""
    declared_reports: ClassVar[Mapping[str, Report]] = MappingProxyType({})
    """The numbers the strategies report, by name."""
    collects_reports: ClassVar[bool] = False
    """Whether a strategy collects them."""

    def __init_subclass__(cls, *, root: bool = False, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if issubclass(cls, keras.Model):
            _define_model(cls)
        elif not root and _checked:
            _define_strategy(cls)


_checked = True


@contextlib.contextmanager
def unpickled_by_value() -> Iterator[None]:
    """Leave strategies unchecked where cloudpickle makes those of `__main__` anew: empty, and filled afterwards.

    They were checked when they were defined.
    """
    global _checked
    _checked = False
    try:
        yield
    finally:
        _checked = True


def strategies_of(model_class: type) -> list[Any]:
    """Return the strategies among the bases of `model_class`, outermost first."""
    return [base for base in model_class.__mro__ if issubclass(base, Declared) and "declaration" in vars(base)]


def check_optimizer(model_class: type, optimizer: Any) -> None:
    """Raise `OptimizerConflictError` where a setting of `optimizer` does the job of a strategy of the class again."""
    check_optimizer_with(strategies_of(model_class), optimizer)


def check_optimizer_with(strategies: Iterable[Any], optimizer: Any) -> None:
    """Raise `OptimizerConflictError` where a setting of `optimizer` does the job of one of `strategies` again."""
    settings = _seam.optimizer_settings(optimizer)
    for strategy in strategies:
        for setting, advice in strategy.declaration.replaces.items():
            if setting in settings:
                raise OptimizerConflictError(
                    f"The optimizer has {setting}={settings[setting]!r} and the model the strategy "
                    f"{strategy.declaration.name!r}, which does the same: it would be done twice. {advice}"
                )


def why_without_xla(model_class: Any) -> str:
    """Return why XLA cannot compile a step of `model_class`; empty where it can."""
    for strategy in strategies_of(model_class):
        name = strategy.declaration.name
        if reason := strategy.declaration.without_xla(model_class.strategy_options[name]):
            return f"{name}: {reason}"
    return ""


def check_xla(model_class: Any, jit_compile: Any) -> None:
    """Raise `ModelConflictError` where a step of `model_class` is to be compiled by XLA, and cannot."""
    reason = why_without_xla(model_class)
    if reason and jit_compile is True:
        raise ModelConflictError(f"XLA cannot compile this step. {reason}. Or compile with jit_compile=False.")


def check_losses(model: Any) -> None:
    """Raise `ModelConflictError` where `model` is not compiled with a loss of the kind that a strategy needs."""
    losses = _seam.compiled_losses(model)
    kinds = [described[0] for described in map(_seam.cross_entropy, losses) if described is not None]
    for strategy in strategies_of(type(model)):
        name, needs = strategy.declaration.name, strategy.declaration.needs
        if not hooks_used(strategy, model.strategy_options[name]):
            continue
        if "classes" in needs and not kinds:
            raise without_classes(name, losses)
        if "one-hot labels" in needs and "sparse" in kinds:
            raise ModelConflictError(
                f"{name} mixes labels, which class numbers cannot be. Turn them into one-hot labels, "
                "keras.utils.to_categorical(y), and compile with 'categorical_crossentropy'."
            )


def without_classes(strategy: str, losses: Iterable[Any]) -> ModelConflictError:
    """Return the error of a `strategy` that looks at classes, where none of `losses` is one of theirs."""
    given = ", ".join(str(getattr(loss, "name", None) or getattr(loss, "__name__", loss)) for loss in losses)
    return ModelConflictError(
        f"{strategy} needs an output of classes, trained by one of Keras's cross-entropies, and the model is "
        f"trained by {given if given != 'None' else 'no loss'}. Compile it with 'categorical_crossentropy', "
        "'sparse_categorical_crossentropy' or 'binary_crossentropy', or one of their classes."
    )


def check_composition(composition: Mapping[Any, Any]) -> None:
    """Raise `StrategyConflictError` where two strategies declare that, with their options, they cannot work together.

    Args:
        composition: options by strategy.
    """
    names = {strategy.declaration.name for strategy in composition}
    for strategy, options in composition.items():
        for other, reason in strategy.declaration.conflicts_with(options).items():
            if other in names:
                raise StrategyConflictError(f"{strategy.declaration.name!r} and {other!r} cannot be combined: {reason}")


def hooks_used(strategy: Any, options: Any) -> list[str]:
    """Return the hooks in which `strategy` does something, with these options."""
    passed_through = strategy.declaration.passes_through(options)
    unknown = sorted(set(passed_through) - set(HOOKS))
    if unknown:
        raise StrategyDefinitionError(
            f"{strategy.__name__} passes through {unknown[0]!r}, and there is no such hook."
            f"{nearest(unknown[0], HOOKS)} Hooks: {', '.join(HOOKS)}."
        )
    return [hook for hook in HOOKS if hook in vars(strategy) and hook not in passed_through]


def in_order(composition: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return options by strategy, outermost first: by stage, and by name within one, so that listing never matters."""

    def place(item: tuple[Any, Any]) -> tuple[int, str]:
        strategy, options = item
        return strategy.declaration.stage_with(options), strategy.declaration.name

    return dict(sorted(composition.items(), key=place))


def check_model_class(model_class: type) -> None:
    """Raise `ModelConflictError` where the user's class and the strategies want the same name."""
    for base in model_class.__mro__:
        if issubclass(base, Declared) or base.__module__.split(".")[0] in ("keras", "tensorflow", "builtins"):
            continue
        if "train_step" in vars(base):
            raise ModelConflictError(_OWN_TRAIN_STEP.format(base.__name__))
        for name in RESERVED:
            if name in vars(base) and not (name == "strategy_options" and issubclass(model_class, Declared)):
                raise ModelConflictError(
                    f"{base.__name__} defines `{name}`, which is the name of a hook of trainstep. Rename it."
                )


def check_attributes(model: Any) -> None:
    """Raise `ModelConflictError` where an attribute of `model` hides a hook of its strategies."""
    if "train_step" in vars(model):
        raise ModelConflictError(_OWN_TRAIN_STEP.format(f"An attribute of the model {model.name!r}"))
    for name in RESERVED:
        if name in vars(model):
            raise ModelConflictError(
                f"The model has an attribute `{name}`, which is the name of a hook of trainstep. Rename it."
            )


def _define_strategy(cls: Any) -> None:
    if not isinstance(vars(cls).get("declaration"), Declaration):
        raise StrategyDefinitionError(f"{cls.__name__} must have a class attribute `declaration = Declaration(...)`.")
    owned = [name for name in OWNED_BY_THE_ROOT if name in vars(cls)]
    if owned:
        raise StrategyDefinitionError(
            f"{cls.__name__} defines {owned[0]!r}, which belongs to the root of all strategies. "
            f"Override a hook instead: {', '.join(HOOKS)}."
        )
    for name, value in vars(cls).items():
        known = name in RESERVED or name.startswith("_") or hasattr(keras.Model, name)
        if inspect.isfunction(value) and not known:
            raise StrategyDefinitionError(
                f"{cls.__name__} defines `{name}`, and there is no such hook.{nearest(name, RESERVED)} Hooks: "
                f"{', '.join(HOOKS)}. The name of a helper starts with an underscore."
            )
    unknown = sorted(set(cls.declaration.replaces) - set(_seam.OPTIMIZER_SETTINGS))
    if unknown:
        raise StrategyDefinitionError(
            f"{cls.__name__} replaces {unknown[0]!r}, which no optimizer has."
            f"{nearest(unknown[0], _seam.OPTIMIZER_SETTINGS)} Settings: {', '.join(_seam.OPTIMIZER_SETTINGS)}."
        )
    if cls.declaration.neutral is None and not cls.declaration.why_not_neutral:
        raise StrategyDefinitionError(
            f"{cls.__name__} declares no `neutral` options: give those under which it equals 'standard', "
            "or say in `why_not_neutral` why there are none."
        )


def _define_model(cls: Any) -> None:
    strategies = strategies_of(cls)
    check_model_class(cls)
    given = cls.strategy_options
    names = [strategy.declaration.name for strategy in strategies]
    unknown = set(given) - set(names)
    if unknown:
        raise StrategyDefinitionError(
            f"`strategy_options` of {cls.__name__} names {sorted(unknown)}, not among its bases: {names}."
        )
    composition = {
        strategy: validated_options(name, strategy.declaration.options, given.get(name), strategy.declaration.example)
        for name, strategy in zip(names, strategies, strict=True)
    }
    check_composition(composition)
    expected = list(in_order(composition))
    owner = next(base for base in cls.__mro__ if "train_step" in vars(base))
    if owner is cls:
        raise ModelConflictError(_OWN_TRAIN_STEP.format(cls.__name__))
    root_steps = issubclass(owner, Declared) and not issubclass(owner, keras.Model)
    if strategies != expected or not root_steps:  # A Keras class comes before the strategies, and its step wins.
        raise StrategyDefinitionError(
            f"The strategies of {cls.__name__} act in the order of its bases, which must be "
            f"({', '.join(strategy.__name__ for strategy in expected)}, ..., keras.Model)."
        )
    cls.strategy_options = MappingProxyType(dict(zip(names, composition.values(), strict=True)))
    for strategy, options in composition.items():
        for hook in hooks_used(strategy, options):
            cls.acts_on_updates |= hook == "update_weights"
            cls.composes_objectives |= hook in ("train_batch", "compute_objective", "compute_gradients")
    cls.collects_reports = any(strategy.declaration.collects_reports for strategy in strategies)
    cls.declared_reports = MappingProxyType(_reports_of(cls, strategies))


def _reports_of(cls: Any, strategies: list[Any]) -> dict[str, Report]:
    found: dict[str, Report] = {}
    for strategy in strategies:
        name = strategy.declaration.name
        for key, report in strategy.declaration.reports(cls.strategy_options[name]).items():
            if found.setdefault(key, report) != report:
                raise StrategyDefinitionError(
                    f"{name!r} reports {key!r} over {report.over!r}, and another strategy of {cls.__name__} over "
                    f"{found[key].over!r}: one of them needs another name for it."
                )
    return found
