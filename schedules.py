"""Options that vary over training: a number, or a schedule in updates.

    value(t) = start + (end - start) * f((t - first) / updates)      t: updates done; f(p) = p, or (1 - cos(pi p)) / 2

before `first` it is `start`, and after `updates` more it is `end`. The updates are those the optimizer counts
(`optimizer.iterations`): windows, where there is accumulation; one that is skipped does not count.
"""

import math
from typing import Annotated, Any, Literal

import tensorflow as tf
from pydantic import AfterValidator, Discriminator, Field, FiniteFloat, GetCoreSchemaHandler, Tag

from trainstep.declaration import TAGS, StrategyOptions


class Schedule(StrategyOptions):
    """From one value to another, over a number of updates."""

    start: FiniteFloat = Field(description="Value at first, until more than `first` updates are done.")
    end: FiniteFloat = Field(description="Value in the end, once `first` + `updates` updates are done.")
    updates: int = Field(ge=1, lt=2**31, description="Updates that it takes to get from `start` to `end`.")
    first: int = Field(default=0, ge=0, lt=2**31, description="Updates done before it leaves `start`.")
    curve: Literal["linear", "cosine"] = Field(
        default="linear", description="How it gets there: evenly, or slowly at both ends."
    )


Scheduled = float | Schedule
"""The type of such an option; `Annotated[Scheduled, Within(ge=0)]` gives its bounds."""


class Within:
    """Bounds of an option that is a number or a schedule: `ge`, `gt`, `le`, `lt`, of every value it takes."""

    def __init__(self, **bounds: float) -> None:
        self._bounds: dict[str, Any] = bounds

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> Any:
        """Return the schema of one or the other, told apart by what is given, so that an error is of what was meant."""
        del source
        number, schedule = TAGS

        def kind(value: Any) -> str:
            return schedule if isinstance(value, (dict, Schedule)) else number

        within: Any = Annotated[
            Annotated[float, Field(allow_inf_nan=False, **self._bounds), Tag(number)]
            | Annotated[Schedule, AfterValidator(self._checked), Tag(schedule)],
            Discriminator(kind),
        ]
        return handler.generate_schema(within)

    def _checked(self, schedule: Schedule) -> Schedule:
        for value in (schedule.start, schedule.end):
            for bound, (holds, words) in _BOUNDS.items():
                if bound in self._bounds and not holds(value, self._bounds[bound]):
                    limit = self._bounds[bound]
                    raise ValueError(f"every value of a schedule should be {words} {limit:g}, not {value:g}")
        return schedule


_BOUNDS = {
    "ge": (lambda value, bound: value >= bound, "at least"),
    "gt": (lambda value, bound: value > bound, "above"),
    "le": (lambda value, bound: value <= bound, "at most"),
    "lt": (lambda value, bound: value < bound, "below"),
}


def is_always(option: Scheduled, value: float) -> bool:
    """Tell whether `option` has this one value, whatever the update."""
    return option == value if not isinstance(option, Schedule) else option.start == option.end == value


def highest(option: Scheduled) -> float:
    """Return the highest value of `option`."""
    return max(option.start, option.end) if isinstance(option, Schedule) else option


def lowest(option: Scheduled) -> float:
    """Return the lowest value of `option`."""
    return min(option.start, option.end) if isinstance(option, Schedule) else option


def value_at(option: Scheduled, updates: Any) -> float | tf.Tensor:
    """Return the value of `option` after so many updates: itself, or of a schedule a float32 scalar tensor.

    Args:
        option: a number or a schedule.
        updates: done so far: an integer, or a scalar tensor or variable, such as `model.optimizer.iterations`.
    """
    if not isinstance(option, Schedule):
        return option
    passed = tf.cast(tf.convert_to_tensor(updates), tf.float32) - option.first
    share = tf.clip_by_value(passed / option.updates, 0.0, 1.0)
    if option.curve == "cosine":
        share = (1 - tf.cos(math.pi * share)) / 2
    return (1 - share) * option.start + share * option.end
