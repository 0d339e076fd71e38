"""What a strategy says of itself: data the rest of the package reads, so that it knows no strategy by name."""

import enum
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from trainstep.errors import InvalidOptionsError, StrategyDefinitionError, nearest


class Stage(enum.IntEnum):
    """Where a strategy sits: earlier stages act first on the batch and outermost on the update."""

    SELECTION = 5
    BATCH = 10
    ATTACK = 20
    OBJECTIVE = 30
    TEACHER = 32
    LABELS = 33
    OUTER_ASCENT = 35
    GRADIENT = 40
    ASCENT = 45
    ACCUMULATION = 50
    LOSS_SCALING = 60
    PRIVACY = 62
    MEASURING = 65
    CENTRALIZATION = 70
    CLIPPING = 80
    NOISE = 90
    AVERAGING = 100
    MASKING = 104
    SLOW_WEIGHTS = 107
    STEP_SIZE = 110
    REPORT = 120


class StrategyOptions(BaseModel):
    """Base of all options: immutable, strictly typed, and closed to names it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, ser_json_inf_nan="constants")


@dataclass(frozen=True)
class Cost:
    """What a strategy adds to a step.

    `time` is the ratio to a plain step at the limit, with one unit of three for each of: forward
    pass, backward pass to the inputs, backward pass to the weights.
    """

    forward: int = 0
    backward: int = 0
    time: float = 1.0
    memory: str = "none"
    batch_norm: str = "none: statistics are updated once per step, as without it"
    saves: str = ""
    """Why a step takes less than a plain one, where `time` is below 1."""

    def __post_init__(self) -> None:
        """Raise `StrategyDefinitionError` for time that is saved for no reason."""
        if self.time < 1 and not self.saves:
            raise StrategyDefinitionError(
                f"A step cannot take {self.time} of a plain one and do all that one does: say in `saves` what is less."
            )


@dataclass(frozen=True)
class Slot:
    """A state variable of `shape`, a scalar by default.

    With `per_weight` it is a list of one of zeros for each trainable variable; with `per_statistic` a tuple of one of
    zeros for each variable that a layer keeps and no optimizer trains, the moving averages of batch norm for example.
    """

    initial: float = 0.0
    dtype: str = "float32"
    per_weight: bool = False
    shape: tuple[int, ...] = ()
    per_statistic: bool = False

    def __post_init__(self) -> None:
        """Raise `StrategyDefinitionError` for what could not be had."""
        if (self.per_weight or self.per_statistic) and self.initial:
            raise StrategyDefinitionError(
                f"A slot for each weight starts at zeros, not at {self.initial}: optimizers make no others."
            )


@dataclass(frozen=True)
class Report:
    """A number a strategy reports with `Strategy.record`, and what a log shows of it.

    `over` is what is made of the numbers reported since the epoch began: their mean, their sum, or the last one.
    """

    over: Literal["mean", "sum", "last"] = "mean"

    def __post_init__(self) -> None:
        """Raise `StrategyDefinitionError` for another `over`."""
        if self.over not in ("mean", "sum", "last"):
            raise StrategyDefinitionError(f"A report is over 'mean', 'sum' or 'last', not {self.over!r}.")


NEEDS = {
    "classes": "an output trained by one of Keras's cross-entropies",
    "one-hot labels": "labels of a floating dtype, one-hot rather than class numbers",
    "images": "an input of shape (batch, height, width, channels)",
    "images of any size": "layers that take images of any height and width",
    "outputs": "two outputs or more, each with a loss",
    "separate examples": "layers that look at each example by itself, so no batch norm that is trained",
    "float inputs": "dense inputs of a floating dtype",
    "dense inputs": "inputs that are no sparse tensors",
    "compiled loss": "losses given to `compile`, which have a value for each example",
}
"""What a strategy may ask of a model and its data, by the word for it in `Declaration.needs`."""


@dataclass(frozen=True)
class Declaration:
    """What a strategy says of itself; the rest of the package reads it and knows no strategy by name."""

    name: str
    stage: Stage | Callable[[Any], Stage]
    """Where it sits: always, or with these options."""
    summary: str
    reference: str
    options: type[StrategyOptions] = StrategyOptions
    neutral: Mapping[str, Any] | None = None
    """Options under which it equals `standard` bit for bit; None with `why_not_neutral` where there are none."""
    why_not_neutral: str = ""
    conflicts: Mapping[str, str] | Callable[[Any], Mapping[str, str]] = field(default_factory=dict)
    """Names of strategies it cannot be combined with, and why: ever, or with these options."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """Names of strategies it combines with in a way worth knowing, and how."""
    replaces: Mapping[str, str] = field(default_factory=dict)
    """Settings of an optimizer that do the same job again, and what to do instead."""
    passes_through: Callable[[Any], Sequence[str]] = lambda options: ()
    """Hooks it overrides, but with these options only to hand on what it gets."""
    cost: Callable[[Any], Cost] = lambda options: Cost()
    state: Callable[[Any], Mapping[str, Slot]] = lambda options: {}
    updates: Callable[[Any], int] = lambda options: 1
    """How many updates it makes of a batch."""
    reports: Callable[[Any], Mapping[str, Report]] = lambda options: {}
    """Numbers it records, by the name a log shows; strategies that report the same thing share a name."""
    needs: Collection[str] = ()
    """What it asks of a model and its data, unless its options are neutral: words of `NEEDS`."""
    example: Mapping[str, Any] = field(default_factory=dict)
    """Options to show it with, where some have no default."""
    without_xla: Callable[[Any], str] = lambda options: ""
    """Why XLA cannot compile a step with these options, and what to do instead; empty where it can."""
    collects_reports: bool = False
    """Whether the numbers all strategies of the model report are to be kept and logged."""

    def __post_init__(self) -> None:
        """Check what a slip would make silently wrong.

        Raises:
            StrategyDefinitionError: the name cannot be written on a command line, the stage is none, or a need.
            InvalidOptionsError: the neutral options, or those of the example, are not among the options.
        """
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name):
            raise StrategyDefinitionError(
                f"A strategy is named in lower case, with digits and underscores, not {self.name!r}."
            )
        for need in self.needs:
            if need not in NEEDS:
                raise StrategyDefinitionError(
                    f"{self.name!r} needs {need!r}, which is no need.{nearest(need, NEEDS)} Needs: {', '.join(NEEDS)}."
                )
        required = [key for key, option in self.options.model_fields.items() if option.is_required()]
        if missing := sorted(set(required) - set(self.example)):
            raise StrategyDefinitionError(
                f"The option {missing[0]!r} of {self.name!r} has no default: give one in `example`, to show it with."
            )
        for shown in (self.neutral, self.example or None):
            if shown is not None:
                validated_options(self.name, self.options, shown)
        self.stage_with(validated_options(self.name, self.options, self.example))

    def stage_with(self, options: Any) -> Stage:
        """Return where it sits with these options.

        Raises:
            StrategyDefinitionError: that is no stage.
        """
        stage = self.stage(options) if callable(self.stage) else self.stage
        if not isinstance(stage, Stage):
            stages = ", ".join(stage.name for stage in Stage)
            raise StrategyDefinitionError(
                f"The stage of {self.name!r} is {stage!r}, which is none of trainstep.Stage: {stages}."
            )
        return stage

    def conflicts_with(self, options: Any) -> Mapping[str, str]:
        """Return the names of strategies it cannot be combined with, with these options, and why."""
        return self.conflicts(options) if callable(self.conflicts) else self.conflicts


TAGS = ("a number", "a schedule")
"""How pydantic tells apart what an option may be, see `schedules.Within`; no part of the option's name."""

Schema = TypeVar("Schema", bound=BaseModel)


def validated_options(
    name: str, schema: type[Schema], options: Any, example: Mapping[str, Any] = MappingProxyType({})
) -> Schema:
    """Return `options`, a mapping or an object of `schema`, as checked options of what is called `name`.

    Args:
        name: of whose options they are, for the message.
        schema: of the options.
        options: as they were given; None: the defaults.
        example: options to show, where one that has no default is missing.

    Raises:
        InvalidOptionsError: the message says which option of what is wrong, what was given, and what is allowed.
    """
    if type(options) is schema:  # And not of one that inherits from it: those of another strategy.
        return options
    options = {} if options is None else options
    if not isinstance(options, Mapping):
        raise InvalidOptionsError(
            f"Options of {name!r} must be a mapping or {schema.__name__}, not {type(options).__name__}: {options!r}."
        )
    # NumPy's integers are no integers to a strict schema.
    given = {key: value.item() if isinstance(value, np.generic) else value for key, value in options.items()}
    try:
        return schema.model_validate(given)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        raise InvalidOptionsError(
            f"{name}: " + " ".join(_explained(schema, each, example) for each in problems)
        ) from error


def _explained(schema: type[BaseModel], problem: Any, example: Mapping[str, Any]) -> str:
    """Return in words what pydantic found to be wrong."""
    loc = [part for part in problem["loc"] if part not in TAGS]
    place, option = ".".join(map(str, loc)), str(loc[0]) if loc else ""
    whole = schema.model_json_schema()
    if problem["type"] == "extra_forbidden":
        known = [key for kind in _kinds(whole, _demands(whole, loc[:-1])) for key in kind.get("properties", {})]
        outer = f" of {'.'.join(map(str, loc[:-1]))}" if loc[1:] else ""
        hint = nearest(str(loc[-1]), known)
        return f"unknown option {place!r}.{hint} Options{outer}: {', '.join(known) or 'none'}."
    message = problem["msg"].removeprefix("Value error, ")
    if not place:
        return f"{message}."
    if problem["type"] == "missing":
        shown = f", for example {option}={example[option]!r}" if place in example else ""
        text = f"{place}: it has no default{shown}."
    else:
        text = f"{place}: {message}. Given: {problem['input']!r}."
    if words := allowed(whole, _demands(whole, loc)):
        text += f" Allowed: {words}."
    if option in schema.model_fields and schema.model_fields[option].description:
        text += f" ({option}: {schema.model_fields[option].description})"
    return text


def _demands(whole: Mapping[str, Any], loc: Sequence[Any]) -> Mapping[str, Any]:
    """Return the part of the JSON schema `whole` that is about the place `loc`; empty where there is none."""
    found: Mapping[str, Any] = whole
    for part in loc:
        inner: dict[str, Any] = {key: value for kind in _kinds(whole, found) for key, value in kind.items()}
        if isinstance(part, int):
            items = inner.get("prefixItems", [])
            found = items[part] if part < len(items) else inner.get("items", {})
        else:
            found = inner.get("properties", {}).get(part) or inner.get("additionalProperties") or {}
    return found


def _kinds(whole: Mapping[str, Any], demands: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the alternatives that `demands` allows, each without a reference."""
    choices = demands.get("anyOf", demands.get("oneOf", [demands]))
    definitions = whole.get("$defs", {})
    return [definitions[each["$ref"].rpartition("/")[2]] if "$ref" in each else each for each in choices]


_BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
_TYPES = {
    "number": "a number",
    "integer": "an integer",
    "boolean": "True or False",
    "string": "a string",
    "null": "None",
}


def allowed(whole: Mapping[str, Any], demands: Mapping[str, Any]) -> str:
    """Return in words what a JSON schema allows; empty where it does not say.

    Args:
        whole: the schema with its definitions.
        demands: the part of it that is about one option.
    """
    return ", or ".join(filter(None, (_in_words(whole, kind) for kind in _kinds(whole, demands))))


def _in_words(whole: Mapping[str, Any], kind: Mapping[str, Any]) -> str:
    if "enum" in kind:
        return " or ".join(map(repr, kind["enum"]))
    if "properties" in kind:
        fields = ", ".join(f"{key!r}: ..." for key in kind.get("required", kind["properties"]))
        return f"a {str(kind.get('title', 'mapping')).lower()} {{{fields}}}"
    if "prefixItems" in kind:
        parts = [" or ".join(_in_words(whole, each) for each in _kinds(whole, part)) for part in kind["prefixItems"]]
        return f"a pair ({', '.join(parts)})"
    if "items" in kind:
        return f"a list [{allowed(whole, kind['items'])}, ...]" + " that is not empty" * (kind.get("minItems") == 1)
    if isinstance(kind.get("additionalProperties"), Mapping):
        return f"a mapping {{name: {allowed(whole, kind['additionalProperties'])}}}"
    bounds = [f"{word} {kind[key]}" for key, word in _BOUNDS.items() if key in kind]
    return " ".join(filter(None, [_TYPES.get(str(kind.get("type")), ""), " and ".join(bounds)]))
