"""The state of strategies: declared as `Slot`s, kept in the optimizer's variables, like the slots it makes itself.

So it is saved, restored and distributed as they are, and a model compiled with a new optimizer starts anew.
"""

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from trainstep import _seam
from trainstep.declaration import Slot
from trainstep.definition import strategies_of
from trainstep.errors import ModelConflictError, NotCompiledError, OptimizerConflictError

_STATES: "weakref.WeakKeyDictionary[Any, _State]" = weakref.WeakKeyDictionary()


def state_of(model: Any, *, frozen: bool = False) -> dict[str, dict[str, Any]]:
    """Return the state variables by strategy name and slot name; created, in the optimizer, when first needed.

    Args:
        model: with strategies, compiled.
        frozen: whether slots hold variables of weights as well that were frozen since.

    Raises:
        NotCompiledError: there is no optimizer.
        ModelConflictError: the optimizer holds state, and it is that of other weights.
    """
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None:
        raise NotCompiledError("State is kept in the optimizer, and the model has none yet. Compile it first.")
    known = _STATES.get(optimizer)
    if known is None:
        known = _STATES[optimizer] = _State(list(model.trainable_variables), {})
    if not known.holds(slots_of(type(model))):
        with tf.init_scope():
            _create_missing(model, known)
    of_trained = known.of(model.trainable_variables)
    return known.variables if frozen else of_trained


class _State(NamedTuple):
    """State variables by strategy name and slot name, and the weights they were made for."""

    weights: list[Any]
    variables: dict[str, dict[str, Any]]

    def holds(self, slots: Mapping[str, Mapping[str, Slot]]) -> bool:
        """Tell whether there is a variable for each of `slots`, by strategy name and slot name."""
        return all(name in self.variables and slots[name].keys() <= self.variables[name].keys() for name in slots)

    def of(self, weights: list[Any]) -> dict[str, dict[str, Any]]:
        """Return the variables for `weights`: all there were at first, or fewer where layers were frozen since."""
        keys, known = [[_seam.key_of(weight) for weight in each] for each in (weights, self.weights)]
        if keys == known:
            return self.variables
        if not set(keys) <= set(known):
            raise ModelConflictError(
                "The optimizer was made for other weights: layers were unfrozen since, or it belongs to another model. "
                "Compile the model with a new optimizer."
            )
        chosen = [known.index(key) for key in keys]

        def select(slot: Any) -> Any:
            return [slot[place] for place in chosen] if isinstance(slot, list) else slot

        return {name: {key: select(slot) for key, slot in slots.items()} for name, slots in self.variables.items()}


def has_state(model: Any) -> bool:
    """Tell whether the state of the strategies of `model` is there: a model that never trained may have none yet."""
    known = None if getattr(model, "optimizer", None) is None else _STATES.get(model.optimizer)
    return known is not None and known.holds(slots_of(type(model)))


def slots_of(cls: Any) -> dict[str, Mapping[str, Slot]]:
    """Return the slots that the strategies of the model class `cls` declare, by strategy name."""
    return {
        strategy.declaration.name: strategy.declaration.state(cls.strategy_options[strategy.declaration.name])
        for strategy in strategies_of(cls)
    }


def check_holds_state(model: Any) -> None:
    """Raise `OptimizerConflictError` where a strategy of `model` keeps state and its optimizer can hold none."""
    if model.optimizer is None or _seam.holds_state(model.optimizer):
        return
    keeping = [name for name, slots in slots_of(type(model)).items() if slots]
    if keeping:
        raise OptimizerConflictError(
            f"The optimizer {type(model.optimizer).__name__} cannot hold the state of "
            f"{', '.join(map(repr, keeping))}: it has neither `add_variable_from_reference` nor `add_slot`. "
            "Compile with a keras.optimizers.Optimizer."
        )


def _create_missing(model: Any, state: _State) -> None:
    optimizer = model.optimizer
    _seam.build_optimizer(optimizer, state.weights)
    for name, slots in slots_of(type(model)).items():
        present = state.variables.setdefault(name, {})
        for key, slot in slots.items():
            if key in present:
                continue
            if slot.per_weight:
                present[key] = _seam.add_optimizer_slots(optimizer, state.weights, f"{name}_{key}")
            elif slot.per_statistic:
                present[key] = tuple(_seam.add_optimizer_slots(optimizer, _seam.statistics_of(model), f"{name}_{key}"))
            else:
                present[key] = _seam.add_optimizer_variable(optimizer, f"{name}_{key}", slot)


def reset_state(model: Any) -> None:
    """Give the state of the model's strategies its initial values, where its optimizer holds some of theirs already."""
    known = None if getattr(model, "optimizer", None) is None else _STATES.get(model.optimizer)
    if known is None:
        return
    for name, slots in slots_of(type(model)).items():
        for key, slot in slots.items():
            for variable in _listed(known.variables.get(name, {}).get(key)):
                variable.assign(tf.cast(tf.fill(variable.shape, slot.initial), variable.dtype))


def _listed(slot: Any) -> Sequence[Any]:
    return slot if isinstance(slot, (list, tuple)) else [] if slot is None else [slot]
