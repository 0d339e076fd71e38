"""The registry: which strategies there are, by name.

Built-in strategies register themselves on import. Third parties use the `register` decorator, or
publish a class under the entry-point group `trainstep.strategies`, loaded at the first look-up:

    [project.entry-points."trainstep.strategies"]
    my_strategy = "my_package.my_module:MyStrategy"
"""

import importlib.metadata
import re
import typing
import warnings
from typing import TypeVar

from trainstep.errors import DuplicateStrategyError, StrategyDefinitionError, UnknownStrategyError, nearest
from trainstep.step import Strategy

ENTRY_POINT_GROUP = "trainstep.strategies"

_strategies: dict[str, type[Strategy]] = {}
_failures: dict[str, str] = {}
_plugins_loaded = False

StrategyClass = TypeVar("StrategyClass", bound=type[Strategy])


def register(strategy: StrategyClass) -> StrategyClass:
    """Make `strategy` available under the name it declares; for use as a class decorator.

    Raises:
        DuplicateStrategyError: the name is taken, by a built-in strategy for example.
        StrategyDefinitionError: it is not a subclass of `Strategy`.
    """
    if not (isinstance(strategy, type) and issubclass(strategy, Strategy) and "declaration" in vars(strategy)):
        raise StrategyDefinitionError(f"Only a subclass of trainstep.Strategy can be registered, not {strategy!r}.")
    name = strategy.declaration.name
    taken = _strategies.get(name)
    if taken is not None and not _is_made_anew(taken, strategy):
        raise DuplicateStrategyError(
            f"The name {name!r} of {strategy.__module__}.{strategy.__qualname__} is taken by "
            f"{taken.__module__}.{taken.__qualname__}. Choose another; no strategy replaces another."
        )
    _strategies[name] = strategy
    return strategy


def _is_made_anew(taken: type[Strategy], strategy: type[Strategy]) -> bool:
    # The cell of a notebook that was run again, or a module that was reloaded: the same class by its full name.
    return (taken.__module__, taken.__qualname__) == (strategy.__module__, strategy.__qualname__)


def get(name: str) -> type[Strategy]:
    """Return the strategy class registered as `name`.

    Raises:
        UnknownStrategyError: there is none; the message names the nearest and all there are.
    """
    _load_plugins()
    if not isinstance(name, str):
        hint = f" Write {name.declaration.name!r}." if isinstance(name, type) and name in _strategies.values() else ""
        raise UnknownStrategyError(
            f"A strategy is called by its name, not {name!r}.{hint} Names: {', '.join(names())}."
        )
    if name in _strategies:
        return _strategies[name]
    hint = _how_to_write(name) or nearest(str(name), _strategies)
    failure = f" The plugin {name!r} could not be loaded: {_failures[name]}." if name in _failures else ""
    raise UnknownStrategyError(f"Unknown strategy {name!r}.{failure}{hint} Registered: {', '.join(names())}.")


def names() -> list[str]:
    """Return the names of all registered strategies, sorted."""
    _load_plugins()
    return sorted(_strategies)


def _how_to_write(name: str) -> str:
    """Return what to write instead of `name`, where it is several names in one, or that of an option."""
    parts = [part for part in re.split(r"[\s,+]+", name) if part]
    if len(parts) > 1 and all(part in _strategies for part in parts):
        return f" Several strategies are a list: {parts!r}; on the command line {'+'.join(parts)}."
    if parts and all(part.split(":")[0] in _strategies for part in parts):
        return " Options in a string are for the command line and for experiments: write {'name': {'option': value}}."
    owners = [owner for owner in sorted(_strategies) if name in _strategies[owner].declaration.options.model_fields]
    if owners:
        return f" It is an option of {' and '.join(owners)}: write {{{owners[0]!r}: {{{name!r}: ...}}}}."
    for owner in sorted(_strategies):
        for option, field in _strategies[owner].declaration.options.model_fields.items():
            if name.casefold() in typing.get_args(field.annotation):
                return f" It is a choice of {owner}: write {{{owner!r}: {{{option!r}: {name.casefold()!r}}}}}."
    if name.casefold() in _strategies:
        return f" Did you mean {name.casefold()!r}?"
    words = {owner: re.findall(r"[a-z0-9]+", _strategies[owner].declaration.summary.casefold()) for owner in names()}
    if known := [owner for owner in words if re.sub(r"[^a-z0-9]", "", name.casefold()) in words[owner]]:
        return f" Did you mean {' or '.join(map(repr, known))}?"
    return ""


def _load_plugins() -> None:
    global _plugins_loaded
    if _plugins_loaded:
        return
    _plugins_loaded = True
    for entry_point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        try:
            register(entry_point.load())
        except Exception as error:  # noqa: BLE001  Whatever a plugin raises must not take the others with it.
            _failures[entry_point.name] = f"{type(error).__name__}: {error}"
            warnings.warn(
                f"The plugin {entry_point.name!r} ({entry_point.value}) of trainstep could not be loaded: "
                f"{_failures[entry_point.name]}. All other strategies are available.",
                stacklevel=3,
            )
