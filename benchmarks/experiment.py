"""An experiment as a record: what is compared, on what, how often and for how long. From YAML, TOML or Python.

    workload: digits_cnn
    strategies:
      standard:
      clipped: gradient_clipping:global_clipnorm=0.5
      sharper:
        adversarial: {epsilon: {grid: [0.05, 0.1]}}
    seeds: 5

A strategy is written as on the command line, or as a mapping from names to options; without a value its label is the
text. `{grid: [...]}` in place of an option's value stands for several strategies, one for each value, and labelled by
it; several grids of one label are multiplied out.
"""

import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from trainstep import registry
from trainstep.benchmarks import optimizers, own, workload
from trainstep.benchmarks.attack import Attack
from trainstep.benchmarks.errors import InvalidComparisonError, InvalidExperimentError
from trainstep.benchmarks.metrics import several, taken_apart
from trainstep.benchmarks.source import Source
from trainstep.benchmarks.spec import GRID, check_label, expanded, parse_spec
from trainstep.composition import compose
from trainstep.errors import InvalidOptionsError, TrainstepError, nearest


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, ser_json_inf_nan="constants")


class WorkloadChoice(_Part):
    """A workload, or its variant with label noise."""

    name: str = Field(description="One of `trainstep list`.")
    noise: float = Field(default=0.0, ge=0, le=1, description="Share of the training labels made wrong.")

    @model_validator(mode="after")
    def _known(self) -> "WorkloadChoice":
        _placed("name", workload.get, self.name)
        return self


class TargetChoice(_Part):
    """The value of a validation metric whose first crossing is waited for."""

    metric: str = Field(description="Among the metrics.")
    value: float = Field(allow_inf_nan=False, description="To be reached.")
    higher_is_better: bool | None = Field(default=None, description="None: as the metric's name says.")


def _placed(place: Any, check: Callable[..., Any], *arguments: Any) -> Any:
    """Return what `check` does, and say of what it refuses where that is."""
    path = place if isinstance(place, tuple) else (place,)
    try:
        return check(*arguments)
    except TrainstepError as error:
        raise _problem(str(error), (*path, *getattr(error, "path", ()))) from error


def _problem(message: str, path: tuple[Any, ...] = ()) -> PydanticCustomError:
    # In braces, as the message itself may hold some.
    return PydanticCustomError("trainstep", "{message}", {"message": message, "path": path})  # pyright: ignore[reportArgumentType]


# --- From what is convenient to write to what is checked ------------------------------------------


def _as_seeds(value: Any) -> Any:
    chosen = tuple(value) if isinstance(value, list | tuple) else value
    _placed((), seeds, chosen)
    return chosen


def seeds(given: Any) -> tuple[int, ...]:
    """Return the seeds: as many as asked for, from 0 on, or those given.

    Raises:
        InvalidComparisonError: they are not different integers, or there is none.
    """
    chosen: tuple[Any, ...] = ()
    if is_integer(given):
        chosen = tuple(range(min(given, 2**31)))
    elif isinstance(given, Iterable) and not isinstance(given, str | bytes):
        chosen = tuple(given)
    valid = all(is_integer(seed) and 0 <= seed < 2**31 for seed in chosen)
    if not chosen or not valid or len(set(chosen)) < len(chosen):
        raise InvalidComparisonError(
            f"`seeds` is how many, at least 1, or different integers from 0 to 2**31 - 1, not {given!r}."
        )
    return tuple(map(int, chosen))


def is_integer(value: Any) -> bool:
    """Return whether `value` is an integer, NumPy's too, and no truth value."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _as_choice(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def _as_target(value: Any) -> Any:
    if isinstance(value, str):
        metric, equals, number = (piece.strip() for piece in value.partition("="))
        if not equals:
            raise _problem(f"A target is METRIC=VALUE, such as accuracy=0.95, not {value!r}.")
        try:
            return {"metric": metric, "value": float(number)}
        except ValueError:
            raise _problem(f"The value of a target is a number, not {number!r}.") from None
    if isinstance(value, Mapping) and len(value) == 1 and not set(value) & set(TargetChoice.model_fields):
        [(metric, number)] = value.items()
        return {"metric": metric, "value": number}
    if not isinstance(value, Mapping | TargetChoice):
        raise _problem(f"A target is METRIC=VALUE, such as accuracy=0.95, or {{metric: value}}, not {value!r}.")
    return value


def _as_optimizer(value: Any) -> Any:
    return _placed((), optimizers.parse if isinstance(value, str) else optimizers.check, value)


def _as_loss(value: Any) -> Any:
    if isinstance(value, str):
        return _known_to_keras(own.check_loss, value, ())
    if not isinstance(value, Mapping | list | tuple):
        raise _problem(f"A loss is a name of Keras, or one for each output by its name, not {value!r}.")
    if not value:
        _placed((), own.check_loss, value)
    for place, loss in value.items() if isinstance(value, Mapping) else enumerate(value):
        _check_loss(loss, (place,))
    return tuple(value) if isinstance(value, list) else value


def _check_loss(value: Any, place: tuple[Any, ...]) -> None:
    if not isinstance(value, str | None):
        raise _problem(f"The loss of an output is a name of Keras, or null for none, not {value!r}.", place)
    _known_to_keras(own.check_loss, value, place)


def _as_metrics(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {output: _metric_names(names, (output,)) for output, names in value.items()}
    return _metric_names(value, ())


def _metric_names(value: Any, output: tuple[Any, ...]) -> tuple[str, ...]:
    """Return the names of metrics; those of an `output` have none before them."""
    names = several(value)
    for index, name in enumerate(names):
        if not isinstance(name, str) or (output and ":" in name):
            how = "by its name" if output else 'by its name, that of an output as "output:metric"'
            raise _problem(f"A metric is given {how}, not {name!r}.", (*output, index))
        _, metric = _placed((*output, index), taken_apart, name)
        _known_to_keras(own.check_metric, metric, (*output, index))
    return names


def _known_to_keras(check: Callable[[Any], None], name: Any, place: tuple[Any, ...]) -> Any:
    # What is of another type pydantic refuses; what is registered as "package>name" may be so by the model's module.
    if isinstance(name, str) and ">" not in name:
        _placed(place, check, name)
    return name


def _as_strategies(value: Any) -> Any:
    """Return strategies by label, those without a value spelled out."""
    if value and isinstance(value, list | tuple) and all(isinstance(text, str) for text in value):
        labels = [text.strip() for text in value]
        repeated = [index for index, label in enumerate(labels) if label in labels[:index]]
        if repeated:
            label, place = labels[repeated[0]], (repeated[0],)
            raise _problem(f"{label!r} is listed twice. Leave one out, or give it other options.", place)
        return dict(zip(labels, value, strict=True))
    if value and isinstance(value, Mapping):
        for label in value:
            _placed((label,), check_label, label)
        return {label: label if spec is None else spec for label, spec in value.items()}
    raise _problem(
        f"Strategies are a list of texts, or a mapping from labels to compositions, at least one, not {value!r}."
    )


def _as_composition(value: Any) -> Any:
    """Return names to options, each checked, grids as they are."""
    if isinstance(value, str):
        value = _placed((), parse_spec, value)
    if isinstance(value, list | tuple) and all(isinstance(name, str) for name in value):
        value = dict.fromkeys(value)
    if not isinstance(value, Mapping) or not value:
        raise _problem(f"A composition is a text, or a mapping from names of strategies to options, not {value!r}.")
    composition = {name: {} if options is None else options for name, options in value.items()}
    for name, options in composition.items():
        _check_options(name, options)
    for _, spec in expanded("", composition):
        try:
            compose(spec)
        except InvalidOptionsError as error:  # Which option it is, pydantic said to who made this error.
            cause = error.__cause__
            places = [one["loc"][:1] for one in cause.errors()] if isinstance(cause, ValidationError) else [()]
            name = str(error).split(":", 1)[0]
            raise _problem(f"{error}{_like_a_grid(spec[name], places[0])}", (name, *places[0])) from error
        except TrainstepError as error:
            raise _problem(str(error)) from error
    return composition


def _like_a_grid(options: Mapping[str, Any], place: tuple[Any, ...]) -> str:
    """Return a hint where the option at `place`, which was refused, looks like a grid with its word misspelt."""
    value = options.get(place[0]) if place else None
    if isinstance(value, Mapping) and len(value) == 1:
        [(key, values)] = value.items()
        return nearest(str(key), [GRID]) if isinstance(values, list | tuple) else ""
    return ""


def _check_options(name: Any, options: Any) -> None:
    strategy = _placed((name,), registry.get, name)
    if not isinstance(options, Mapping):
        raise _problem(f"Options of {name!r} are a mapping, not {options!r}.", (name,))
    known = list(strategy.declaration.options.model_fields)
    for option, value in options.items():
        if option not in known:
            listed = ", ".join(known) or "none"
            hint = nearest(str(option), known)
            raise _problem(f"{name}: unknown option {option!r}.{hint} Options: {listed}.", (name, option))
        if isinstance(value, Mapping) and GRID in value:
            _check_grid(f"{name}: {option}", value, (name, option))


def _check_grid(what: str, value: Mapping[str, Any], path: tuple[Any, ...]) -> None:
    values = value[GRID]
    if set(value) != {GRID} or not isinstance(values, list | tuple) or not values:
        raise _problem(f"{what}: a grid is {{grid: [value, value, ...]}}, not {dict(value)!r}.", path)
    repeated = [one for index, one in enumerate(values) if one in values[:index]]
    if repeated:
        raise _problem(f"{what}: {repeated[0]!r} is in the grid twice.", path)


def _as_attack(value: Any) -> Any:
    return False if value == "none" else value  # As on the command line.


# --- The experiment -------------------------------------------------------------------------------

Composed = Annotated[dict[str, dict[str, Any]], BeforeValidator(_as_composition)]
Count = Annotated[int, Field(ge=1)]


class Experiment(_Part):
    """What is compared, on what, how often and for how long; nothing is read or built yet.

    What is left out is as the workload has it, or as `trainstep.compare` does without.
    """

    workload: Annotated[
        tuple[Annotated[WorkloadChoice, BeforeValidator(_as_choice)], ...], BeforeValidator(several)
    ] = Field(default=(), description="One or several: a name, or {name: ..., noise: ...}.")
    model: str | None = Field(default=None, description="Own model: package.module:function, which returns a new one.")
    data: str | None = Field(
        default=None, description="Own data: package.module:function, which returns (train, validation)."
    )
    noise: float | None = Field(
        default=None, ge=0, le=1, description="Share of training labels made wrong, of own data or of all workloads."
    )
    data_dir: str | None = Field(default=None, description="Folder with the data of workloads that are downloaded.")
    strategies: Annotated[dict[str, Composed], BeforeValidator(_as_strategies)] = Field(
        description="A list of texts, or a mapping from labels to compositions."
    )
    seeds: Annotated[Count | tuple[int, ...], BeforeValidator(_as_seeds)] | None = Field(
        default=None, description="How many, counted from 0, or which. Fewer than 5 never tell better from worse."
    )
    epochs: Count | None = Field(default=None, description="Budget of a run: passes over the data.")
    updates: Count | None = Field(default=None, description="Budget of a run: steps.")
    seconds: float | None = Field(default=None, gt=0, allow_inf_nan=False, description="Budget of a run: of training.")
    batch_size: Count | None = Field(default=None, description="Examples a step.")
    optimizer: Annotated[dict[str, Any], BeforeValidator(_as_optimizer)] | None = Field(
        default=None, description="A name of Keras, or {name: ..., learning_rate: ..., schedule: {name: ...}, ...}."
    )
    loss: Annotated[str | dict[str, str | None] | tuple[str | None, ...], BeforeValidator(_as_loss)] | None = Field(
        default=None, description="A name of Keras; or one for each output by its name, null for none."
    )
    metrics: Annotated[tuple[str, ...] | dict[str, tuple[str, ...]], BeforeValidator(_as_metrics)] | None = Field(
        default=None,
        description="Names of Keras; verdicts are on the first. Of one of several outputs: by its name, OUTPUT:METRIC.",
    )
    higher_is_better: bool | None = Field(default=None, description="Of the first metric; for a name Keras lacks.")
    attack: Annotated[Attack | Literal[False] | None, BeforeValidator(_as_attack)] = Field(
        default=None, description="Budget of the attack behind the robust accuracy; false: none."
    )
    target: Annotated[TargetChoice, BeforeValidator(_as_target)] | None = Field(
        default=None, description="{metric: value}, whose first crossing is waited for."
    )
    workers: Count | None = Field(default=None, description="Processes that train; 1: this one.")
    executor: Literal["processes", "ray"] | None = Field(default=None, description="Where they run.")
    time_limit: float | None = Field(default=None, gt=0, description="Seconds after which a run is given up.")
    cost: bool | None = Field(default=None, description="Whether to measure what a step costs.")
    output: str | None = Field(default=None, description="Folder for the results and the report.")
    store: str | None = Field(default=None, description="SQLite file for the results, elsewhere than in the output.")
    tensorboard: str | None = Field(default=None, description="Folder for TensorBoard's logs.")
    mlflow: str | None = Field(default=None, description="MLflow's store: a file, sqlite:///... or a server's URL.")

    @model_validator(mode="before")
    @classmethod
    def _not_both(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            values = dict(values)
            if "workloads" in values:
                if "workload" in values:
                    raise _problem("Give `workload` or `workloads`, but not both.", ("workloads",))
                values["workload"] = values.pop("workloads")
            budgets = [name for name in ("epochs", "updates", "seconds") if values.get(name) is not None]
            if len(budgets) > 1:
                raise _problem(f"A run has one budget: give {' or '.join(budgets)}, but not both.", (budgets[-1],))
            if values.get("workload") and (values.get("model") or values.get("data")):
                raise _problem("Give a workload, or your own model and data, but not both.", ("workload",))
        return values

    @model_validator(mode="after")
    def _labels(self) -> "Experiment":
        seen: set[str] = set()
        for label, composition in self.strategies.items():
            for full, _ in expanded(label, composition):
                shown = " ".join(full.split())
                if shown in seen:
                    raise _problem(f"Two strategies would be labelled {full!r}.", ("strategies", label))
                seen.add(shown)
        return self

    def specs(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Return the compositions by label, grids expanded."""
        return {
            full: spec for label, composition in self.strategies.items() for full, spec in expanded(label, composition)
        }

    @classmethod
    def read(cls, given: "Experiment | Mapping[str, Any] | str | Path") -> "Experiment":
        """Return the experiment in a file, `.yaml`, `.yml` or `.toml`, or in a mapping.

        Raises:
            InvalidExperimentError: it cannot be read, or is wrong; the message has a line for each mistake, with the
                line of the file it is on.
        """
        if isinstance(given, cls):
            return given
        source = Source(given) if isinstance(given, str | Path) else None
        content = given if source is None else source.content
        if not isinstance(content, Mapping):
            where = "An experiment" if source is None else str(source.path)
            raise InvalidExperimentError(f"{where} must be a mapping with at least `strategies`, not {content!r}.")
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise InvalidExperimentError("\n".join(_explained(error, content, source))) from error


def _explained(error: ValidationError, content: Any, source: Source | None) -> Iterator[str]:
    """Yield a line for each mistake."""
    problems, mistakes = error.errors(include_url=False), []
    for problem in problems:
        if problem["type"] == "literal_error" and any(
            other is not problem and other["loc"][:1] == problem["loc"][:1] for other in problems
        ):
            continue  # "Should be False", beside what is wrong with the mapping that it is.
        place = [*problem["loc"], *problem.get("ctx", {}).get("path", ())]
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            allowed = _fields(place[:-1])
            message = f"unknown key.{nearest(str(place[-1]), allowed)} Known: {', '.join(allowed)}."
        elif problem["type"] not in ("trainstep", "missing"):
            given = problem["input"]
            message = f"{message}. Given: {given!r}."
        shown, place = _within(content, place)
        if problem["type"] == "missing":
            message = f"{problem['loc'][-1]!r} is missing."
        line = 1 if source is None else source.line(place)
        where = "" if source is None else f"{source.path}, line {line}: "
        name = ".".join(str(step) for step in shown)
        mistakes.append((line, f"{where}{name}: {message}" if name else f"{where}{message}"))
    yield from dict.fromkeys(text for _, text in sorted(mistakes, key=lambda mistake: mistake[0]))


def _fields(place: list[Any]) -> list[str]:
    parts = {"workload": WorkloadChoice, "target": TargetChoice, "attack": Attack}
    part: Any = parts.get(str(place[0]), Experiment) if place else Experiment
    return list(part.model_fields)


def _within(content: Any, place: list[Any]) -> tuple[list[Any], list[Any]]:
    """Return `place` as far as the file has it; pydantic adds names of types, and forms that were not written out."""
    found: list[Any] = []
    for step in place:
        step = "workloads" if step == "workload" and not found and "workloads" in content else step  # noqa: PLW2901
        here = content
        for key in found:
            here = here[key]
        if isinstance(here, Mapping):
            match = next((key for key in here if key == step or str(key) == str(step)), None)
            if match is not None:
                found.append(match)
        elif isinstance(here, list | tuple) and isinstance(step, int) and step < len(here):
            found.append(step)
    return found, found
