"""Checking what `compare` is asked for, before any data are read or any model is built."""

import functools
import math
import numbers
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorflow as tf

from trainstep import registry
from trainstep.benchmarks import datasets, optimizers, own, source
from trainstep.benchmarks import workload as workloads
from trainstep.benchmarks.attack import Attack
from trainstep.benchmarks.data import Source, Split, checked
from trainstep.benchmarks.errors import InvalidComparisonError, InvalidExperimentError
from trainstep.benchmarks.experiment import Experiment, WorkloadChoice, is_integer, seeds
from trainstep.benchmarks.metrics import Metrics, Wanted, by_output, several
from trainstep.benchmarks.records import Budget, Settings, Target
from trainstep.benchmarks.runner import Task
from trainstep.benchmarks.spec import check_label, expanded, parse_spec
from trainstep.benchmarks.workload import Workload
from trainstep.composition import Composition, Spec, compose
from trainstep.declaration import validated_options
from trainstep.definition import check_optimizer_with
from trainstep.errors import InvalidSpecError, UnknownStrategyError, nearest

CONTROL = "standard"
SEEDS = 5
"""With fewer nothing is called better or worse."""
OWN = "own model and data"
"""The label where no workload was named."""

WANTED = (
    "strategies", "workload", "noise", "data_dir", "model", "train", "validation", "seeds", "epochs", "updates",
    "seconds", "batch_size", "optimizer", "learning_rate", "loss", "metric", "metrics", "higher_is_better", "attack",
    "target",
)  # fmt: skip
"""Arguments of `suite_of`; all others of an experiment say how it is run."""


@dataclass(frozen=True)
class Suite:
    """What is asked for: everything checked, nothing read yet."""

    tasks: dict[str, Task]
    """By label of the workload, such as "digits_cnn" or "digits_cnn noise=0.4"."""
    compositions: dict[str, Composition]
    """By label of the strategy, in order; the control is among them."""
    control: str
    """Label of the strategy the others are compared with."""
    seeds: tuple[int, ...]
    settings: dict[str, Settings]
    """By label of the workload."""


def merged(
    experiment: Experiment | Mapping[str, Any] | str | Path | None, given: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what is wanted, as arguments of `suite_of`, and how it is to be run.

    Args:
        experiment: an experiment, a mapping of its fields, or a file; None for none.
        given: arguments by name, which override the experiment's; those that are None do not count. A budget overrides
            any other, a workload an own model, and the other way round.

    Raises:
        InvalidExperimentError: the experiment is wrong.
        InvalidComparisonError: its model or data cannot be imported.
    """
    given = {name: value for name, value in given.items() if value is not None}
    if experiment is None:
        asked: dict[str, Any] = {}
    else:
        read = Experiment.read(experiment)
        names = [name for name in Experiment.model_fields if getattr(read, name) not in (None, ())]
        asked = {name: getattr(read, name) for name in names}
        asked["strategies"] = read.specs()
    for rivals in (("epochs", "updates", "seconds"), ("metric", "metrics")):
        if given.keys() & set(rivals):
            asked = {name: value for name, value in asked.items() if name not in rivals}
    if "workload" in given:
        asked = {name: value for name, value in asked.items() if name not in ("model", "data")}
    if "model" in given:
        asked.pop("workload", None)
    if "train" in given:
        asked.pop("data", None)
    asked |= given
    for name, target in (("model", "model"), ("data", "train")):
        if name in asked:
            found = asked.pop(name)
            if isinstance(found, str):
                found = _imported(found, name, None if name in given else experiment)
            asked[target] = found
    wanted = {name: value for name, value in asked.items() if name in WANTED}
    return wanted, checked_running({name: value for name, value in asked.items() if name not in WANTED})


def _imported(text: str, name: str, experiment: Any) -> Callable[..., Any]:
    """Return the function `text`; where a file asked for it, an error has its line."""
    try:
        return own.imported(text, name)
    except InvalidComparisonError as error:
        if isinstance(experiment, str | Path):
            file = source.Source(experiment)
            raise InvalidExperimentError(f"{file.path}, line {file.line([name])}: {name}: {error}") from error
        raise


def suite_of(
    *,
    experiment: Experiment | Mapping[str, Any] | str | Path | None = None,
    strategies: Mapping[str, Spec] | Sequence[str] | None = None,
    workload: Any = None,
    noise: float | None = None,
    data_dir: str | Path | None = None,
    model: Callable[..., Any] | None = None,
    train: Source | Callable[[], Any] = None,
    validation: Source = None,
    seeds: int | Sequence[int] | None = None,
    epochs: int | None = None,
    updates: int | None = None,
    seconds: float | None = None,
    batch_size: int | None = None,
    optimizer: Any = None,
    learning_rate: float | None = None,
    loss: Any = None,
    metric: Any = None,
    metrics: Any = None,
    higher_is_better: bool | None = None,
    attack: Attack | Mapping[str, Any] | bool | None = None,
    target: Any = None,
) -> Suite:
    """Return the suite that is asked for; all of `trainstep.compare`'s arguments that say what, and not how.

    Args, where they differ from those of `trainstep.compare`:
        experiment: see `merged`; how it is to be run is left out.
        strategies, seeds, epochs, updates, seconds, batch_size, loss, model, validation: see there.
        workload: a name, `Workload`, {"name": ..., "noise": ...}, or several of them.
        noise: share of training labels made wrong, of all workloads.
        data_dir: folder with the data of workloads.
        train: data; or a function that returns (train, validation), called when they are needed, and in each process.
        optimizer: a name, a mapping (see `trainstep.benchmarks.optimizers`), an optimizer to be copied, or a function
            that returns a new one.
        learning_rate: of an optimizer given by name, or of the workload's.
        metric, metrics: one or several: names, metrics to be copied, or functions that return a new one; or by output.
        higher_is_better: of the first metric; None: as its name says.
        attack: budget; False: none. None: that of the workload.
        target: {metric: value}, a `Target`, or the value of the first metric; None: that of the workload.

    Raises:
        See `trainstep.compare`.
    """
    if experiment is not None:
        given = {name: value for name, value in locals().items() if name != "experiment"}
        return suite_of(**merged(experiment, given)[0])
    if strategies is None or (isinstance(strategies, Sequence | Mapping) and not strategies):
        raise InvalidComparisonError(
            f"Give strategies= to compare with {CONTROL!r}, at least one of: {', '.join(registry.names())}."
        )
    composed, control = compositions(strategies)
    chosen = _seeds(SEEDS if seeds is None else seeds)
    changes = {
        "budget": _budget(epochs, updates, seconds),
        "batch_size": _positive("batch_size", batch_size),
        "optimizer": optimizer,
        "learning_rate": learning_rate,
        "loss": _loss(loss),
        "metrics": _metrics(metric, metrics),
        "higher_is_better": _flag("higher_is_better", higher_is_better),
        "attack": attack if attack is None or attack is False else validated_options("attack", Attack, attack),
        "target": target,
    }
    if workload is not None:
        if model is not None or train is not None or validation is not None:
            raise InvalidComparisonError("Give a workload, or your own model, train and validation, but not both.")
        folder = None if data_dir is None else Path(data_dir)
        if folder is not None and not folder.is_dir():
            raise InvalidComparisonError(f"There is no folder data_dir={str(data_dir)!r}.")
        made = [_of_workload(one, folder, changes) for one in _workloads(workload, noise)]
    elif missing := _missing(model, train, validation):
        raise InvalidComparisonError(
            f"{missing} missing. Give model=, train= and validation=, or workload= with one of: "
            f"{', '.join(workloads.names())}."
        )
    elif data_dir is not None:
        raise InvalidComparisonError(
            "`data_dir` is for the data of workloads, and yours are given by train= and validation=."
        )
    elif own.is_loader(train) and validation is not None:
        raise InvalidComparisonError("The function `train` returns (train, validation): leave out validation=.")
    elif isinstance(train, tf.data.Dataset) and batch_size is not None:
        raise InvalidComparisonError("`batch_size` is for arrays, and the dataset `train` has its own batches.")
    else:
        made = [_of_user(model, train, validation, noise or 0.0, changes)]
    tasks = dict(made)
    if len(tasks) < len(made):
        raise InvalidComparisonError(f"A workload is given twice: {', '.join(label for label, _ in made)}.")
    for task in tasks.values():
        optimizer_made = task.make_optimizer()
        for composition in composed.values():
            check_optimizer_with(composition, optimizer_made)
    return Suite(tasks, composed, control, chosen, {label: task.settings for label, task in tasks.items()})


def _missing(model: Any, train: Any, validation: Any) -> str:
    """Return what of these is not there, with its verb; of a function of data, validation is a part."""
    given = {"model": model, "train": train, "validation": True if own.is_loader(train) else validation}
    names = [f"{name}=" for name, value in given.items() if value is None]
    return f"{' and '.join(names)} {'are' if len(names) > 1 else 'is'}" if names else ""


# --- Strategies -----------------------------------------------------------------------------------


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
        labels = [name.strip() for name in strategies]
        repeated = sorted({label for label in labels if labels.count(label) > 1})
        if repeated:
            raise InvalidSpecError(f"{repeated[0]!r} is listed twice. Leave one out, or give it other options.")
        given = dict(zip(labels, strategies, strict=True))
    else:
        raise InvalidSpecError(
            "`strategies` is a list of names, or a mapping from labels to a name, a list of names or "
            f"{{name: options}}, not {strategies!r}."
        )
    composed: dict[str, Composition] = {}
    shown: set[str] = set()
    for label, spec in given.items():
        check_label(label)
        spec = label if spec is None else spec  # noqa: PLW2901
        spec = parse_spec(spec) if isinstance(spec, str) else spec  # noqa: PLW2901
        variants = expanded(label, spec) if isinstance(spec, Mapping) else [(label, spec)]
        for full, variant in variants:
            if full in composed or " ".join(full.split()) in shown:
                raise InvalidSpecError(f"Two strategies would be labelled {full!r}.")
            shown.add(" ".join(full.split()))  # As a page shows it.
            composed[full] = _composed(label, variant)
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


_seeds = seeds  # `suite_of` has an argument of that name.


# --- Settings -------------------------------------------------------------------------------------


def _positive(name: str, value: Any) -> int | None:
    if value is None:
        return None
    if not (is_integer(value) and value > 0):
        raise InvalidComparisonError(f"`{name}` must be a positive integer, not {value!r}.")
    return int(value)


def _number(name: str, value: Any) -> float | None:
    if value is None:
        return None
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not (number and 0 < float(value) < float("inf")):
        raise InvalidComparisonError(f"`{name}` must be a positive number, not {value!r}.")
    return float(value)


def _flag(name: str, value: Any) -> bool | None:
    if value is not None and not isinstance(value, bool):
        raise InvalidComparisonError(f"`{name}` is True or False, not {value!r}.")
    return value


def _path(name: str, value: Any) -> Any:
    if value is not None and not (isinstance(value, str | os.PathLike) and str(value)):
        raise InvalidComparisonError(f"`{name}` is a path, not {value!r}.")
    return value


_RUNNING: dict[str, Callable[[str, Any], Any]] = {
    "output": _path,
    "store": _path,
    "workers": _positive,
    "executor": lambda name, value: value,  # Which there are, the executors know.
    "cost": _flag,
    "time_limit": _number,
    "retry_failed": _flag,
    "tensorboard": _path,
    "mlflow": _path,
    "progress": _flag,
}


def checked_running(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments that say how a suite is run, those that are None left out.

    Raises:
        InvalidComparisonError: one is of the wrong kind, or two do not go together.
    """
    running = {name: _RUNNING[name](name, value) for name, value in given.items() if value is not None}
    if running.get("workers") == 1 and "time_limit" in running and running.get("executor") in (None, "processes"):
        raise InvalidComparisonError(
            "`time_limit` ends a process, and with workers=1 all happens in this one. Leave workers out, or take 2."
        )
    return running


def _budget(epochs: Any, updates: Any, seconds: Any) -> Budget | None:
    given = {"epochs": epochs, "updates": updates, "seconds": seconds}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) > 1:
        raise InvalidComparisonError(f"A run has one budget: give {' or '.join(given)}, but not both.")
    kinds = {"epochs": _positive, "updates": _positive, "seconds": _number}
    return Budget(**{name: kinds[name](name, value) for name, value in given.items()}) if given else None


def _loss(loss: Any) -> Any:
    if loss is not None:
        own.check_loss(loss)
    return loss


def _metrics(metric: Any, metrics: Any) -> list[Wanted] | None:
    if metric is not None and metrics is not None:
        raise InvalidComparisonError("Give metric= or metrics=, but not both.")
    given = metric if metrics is None else metrics
    if given is None:
        return None
    chosen = by_output(given)
    if not chosen:
        raise InvalidComparisonError("`metrics` names at least one metric: verdicts are on the first.")
    return chosen


def _of_workload(workload: Workload, folder: Path | None, changes: Mapping[str, Any]) -> tuple[str, Task]:
    defaults = {
        "budget": Budget(epochs=workload.epochs),
        "batch_size": workload.batch_size,
        "optimizer": workload.optimizer,
        "loss": workload.loss,
        "metrics": by_output(workload.metrics),
        "attack": workload.attack,
        "target": workload.target,
    }
    read = workload.read_one_hot if own.takes_one_hot(changes["loss"]) else workload.read
    task = _task(
        build=workload.build,
        load=functools.partial(read, folder),
        label=workload.name,
        noise=workload.noise,
        examples=workload.examples,
        steps=None,
        defaults=defaults,
        changes=changes,
        # The reference models draw at random in training only for dropout, which on Keras 2 nobody can set back.
        known=not workload.draws_while_training,
    )
    return workload.label, task


def _of_user(model: Any, train: Any, validation: Source, noise: float, changes: Mapping[str, Any]) -> tuple[str, Task]:
    defaults = {
        "budget": Budget(epochs=10),
        "batch_size": 32,
        "optimizer": {"name": "adam"},
        "loss": "sparse_categorical_crossentropy",
        "metrics": by_output("accuracy"),
        "attack": None,
        "target": None,
    }
    workloads.check_noise(noise)
    build = own.builder(model)
    examples = steps = None
    if own.is_loader(train):
        load: Callable[[], Split] = functools.partial(own.loaded, train, noise)
    else:
        split = Split(checked(train, "train"), checked(validation, "validation"))
        if isinstance(split.train, tf.data.Dataset):
            if noise:
                raise InvalidComparisonError("Label noise needs arrays; put it into your tf.data.Dataset yourself.")
            size = int(split.train.cardinality())
            steps = size if size > 0 else None
        else:
            examples = len(tf.nest.flatten(split.train)[0])
        load = functools.partial(datasets.with_noise, split, noise)
    is_dataset = isinstance(train, tf.data.Dataset)
    task = _task(
        build=build,
        load=load,
        label=OWN,
        noise=noise,
        examples=examples,
        steps=steps,
        defaults={**defaults, "batch_size": None} if is_dataset else defaults,
        changes={**changes, "batch_size": None} if is_dataset else changes,
        known=False,
    )
    return (f"{OWN} noise={noise:g}" if noise else OWN), task


def _task(
    *,
    build: Callable[[int], Any],
    load: Callable[[], Split],
    label: str,
    noise: float,
    examples: int | None,
    steps: int | None,
    defaults: Mapping[str, Any],
    changes: Mapping[str, Any],
    known: bool,
) -> Task:
    """Return the task.

    Args:
        build: seed -> a new model.
        load: reads the data.
        label: of the workload, without its noise.
        noise: share of labels.
        examples: for training, where known.
        steps: of an epoch, where the examples are not known but these are.
        defaults: what is not changed.
        changes: what the user said, None where nothing.
        known: whether all state of the model is in its variables.
    """
    chosen = {name: default if changes[name] is None else changes[name] for name, default in defaults.items()}
    budget, batch_size = chosen["budget"], chosen["batch_size"]
    if changes["batch_size"] and examples is not None and changes["batch_size"] > examples:
        raise InvalidComparisonError(
            f"`batch_size` is {batch_size}, and there are {examples} examples to train on: give at most that many."
        )
    if examples is not None and batch_size is not None:
        steps = -(-examples // batch_size)
    updates = budget.updates or (budget.epochs * steps if budget.epochs and steps else None)
    make_optimizer, plain = _optimizer(chosen["optimizer"], changes["learning_rate"], updates)
    metrics = Metrics.of(chosen["metrics"])
    attack = chosen["attack"] or None
    settings = Settings(
        workload=label,
        noise=noise,
        budget=budget,
        batch_size=batch_size,
        optimizer=optimizers.settings_of(make_optimizer()),
        loss=_of_each(chosen["loss"], _named),
        metrics=metrics.names,
        objects=_objects(chosen["loss"], chosen["metrics"], metrics),
        higher_is_better=_direction(metrics.example(metrics.names[0]), changes["higher_is_better"]),
        attack=None if attack is None else attack.model_dump(mode="json"),
        target=_target(changes["target"], defaults["target"], metrics, changes["higher_is_better"]),
        examples=examples,
    )
    return Task(
        build=build,
        load=load,
        make_optimizer=make_optimizer,
        loss=chosen["loss"],
        metrics=metrics,
        settings=settings,
        reusable=known and plain,
    )


def _optimizer(given: Any, learning_rate: Any, updates: int | None) -> tuple[Callable[[], Any], bool]:
    """Return what makes one, and whether it is one of Keras's own, all of whose state is in its variables."""
    if isinstance(given, str | Mapping):
        wanted = optimizers.check(given)
        if learning_rate is not None:
            wanted = optimizers.check({**wanted, "learning_rate": learning_rate})
        return functools.partial(optimizers.make, wanted, updates), True
    if learning_rate is not None:
        raise InvalidComparisonError("learning_rate= goes with an optimizer given by its name: set it in yours.")
    return own.optimizer_maker(given), False


def _objects(loss: Any, given: Sequence[Wanted], metrics: Metrics) -> dict[str, Any]:
    """Return what names do not say of loss and metrics: nothing of those that are given by name."""
    losses = _of_each(loss, own.details)
    told = any(each is not None for each in tf.nest.flatten(losses))
    pairs = zip(metrics.names, given, strict=True)
    measured = {name: own.details(metrics.example(name)) for name, (_, one) in pairs if not isinstance(one, str)}
    return {**({"loss": losses} if told else {}), **({"metrics": measured} if measured else {})}


def _of_each(loss: Any, of: Callable[[Any], Any]) -> Any:
    """Return what `of` says of `loss`; of one for each output, by name or in their order, what it says of each."""
    if isinstance(loss, Mapping):
        return {str(output): of(one) for output, one in loss.items()}
    return [of(one) for one in loss] if isinstance(loss, list | tuple) else of(loss)


def _named(loss: Any) -> str | None:
    return None if loss is None else own.name(loss)


def _target(given: Any, default: Target | None, metrics: Metrics, first: bool | None) -> Target | None:
    names = metrics.names
    if given is None:  # That of a workload is on its own metric, which the user may have replaced.
        return default if default is not None and default.metric in names else None
    if isinstance(given, Target):
        target = given.model_dump()
    elif isinstance(given, numbers.Real) and not isinstance(given, bool) and math.isfinite(given):
        target = {"metric": names[0], "value": float(given), "higher_is_better": None}
    else:
        target = Experiment.read({"strategies": [CONTROL], "target": given}).target.model_dump()  # pyright: ignore[reportOptionalMemberAccess]
    if target["metric"] not in names:
        raise InvalidComparisonError(
            f"The target is on {target['metric']!r}, which is not among the metrics: {', '.join(names)}."
            f"{nearest(target['metric'], names)}"
        )
    if "accuracy" in target["metric"].rpartition(":")[2] and target["value"] > 1:
        raise InvalidComparisonError(
            f"The target of {target['metric']!r} is a share, from 0 to 1, not {target['value']:g}."
            f" Did you mean {target['value'] / 100:g}?"
        )
    if target["higher_is_better"] is None:
        of_first = first if target["metric"] == names[0] else None
        target["higher_is_better"] = _direction(metrics.example(target["metric"]), of_first)
    return Target(**target)


_UP = (
    r"acc|auc|precision|recall|f1|f_?beta|iou|r2|cosine_?similarity|sensitivity|specificity|true_?(pos|neg)|score|kappa"
)
_DOWN = r"loss|error|mse|mae|mape|msle|rmse|entropy|divergence|hinge|poisson|perplexity|false_?(pos|neg)|log_?cosh"


def _direction(metric: Any, given: bool | None) -> bool:
    if given is not None:
        return given
    named = f"{own.name(metric)} {type(metric).__name__}".lower()
    up, down = re.search(_UP, named), re.search(_DOWN, named)
    if bool(up) == bool(down):
        raise InvalidComparisonError(
            f"The name of the metric {own.name(metric)!r} does not say whether more of it is better. Say "
            "higher_is_better=True or False."
        )
    return bool(up)


def is_told_by_name(metric: str, *, higher_is_better: bool) -> bool:
    """Tell whether the name of `metric` says whether more of it is better, and says that."""
    try:
        return _direction(metric, None) is higher_is_better
    except InvalidComparisonError:
        return False


# --- Workloads -------------------------------------------------------------------


def _workloads(given: Any, noise: float | None) -> list[Workload]:
    chosen = several(given)
    if not chosen:
        raise InvalidComparisonError(f"`workload` names at least one: {', '.join(workloads.names())}.")
    found = []
    for one in chosen:
        if isinstance(one, Workload):
            workload = one
        elif isinstance(one, WorkloadChoice):
            workload = workloads.get(one.name, one.noise)
        elif isinstance(one, Mapping) and set(one) <= {"name", "noise"} and "name" in one:
            workload = workloads.get(**{str(key): value for key, value in one.items()})
        else:
            workload = workloads.get(str(one))
        found.append(workload if noise is None else workload.with_noise(noise))
    return found
