"""The metrics of a comparison: made anew for each model, and found again in what Keras logs.

Of a model with several outputs, a metric is of one of them, by its name, or of all of them: then it is their mean.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

from trainstep import _seam
from trainstep.benchmarks import own
from trainstep.benchmarks.errors import InvalidComparisonError
from trainstep.errors import nearest

Wanted = tuple[str | None, Any]
"""An output, None for all, and a metric: a name, an object of Keras, or a function that returns a new one."""


def by_output(given: Any) -> list[Wanted]:
    """Return what is wanted: one metric or several, or by output; a text may be OUTPUT:METRIC.

    Raises:
        InvalidComparisonError: a text has a colon, and no output or no metric beside it.
    """
    if isinstance(given, Mapping):
        return [(str(output), metric) for output, metrics in given.items() for metric in several(metrics)]
    return [taken_apart(metric) for metric in several(given)]


def several(given: Any) -> tuple[Any, ...]:
    """Return what a list or a tuple holds, or the one thing that is given instead."""
    return tuple(given) if isinstance(given, list | tuple) else (given,)


def taken_apart(metric: Any) -> Wanted:
    """Return output and metric of a text OUTPUT:METRIC; None and what is given of anything else.

    Raises:
        InvalidComparisonError: there is no output or no metric beside the colon.
    """
    if not (isinstance(metric, str) and ":" in metric):
        return None, metric
    output, _, name = (piece.strip() for piece in metric.partition(":"))
    if not (output and name):
        raise InvalidComparisonError(f"The metric of an output is OUTPUT:METRIC, not {metric!r}.")
    return output, name


class Made(NamedTuple):
    """Metrics made for one model."""

    compiled: Any
    """What `compile` takes as `metrics`."""
    logged: dict[str, tuple[str, ...]]
    """By the name of a metric: what Keras calls it in its logs, once for each output."""

    def values(self, logs: Mapping[str, Any]) -> dict[str, float]:
        """Return each metric on the validation examples, by its name, in order.

        Args:
            logs: what `evaluate` returns as a dict.

        Raises:
            InvalidComparisonError: one is not among them.
        """
        if missing := [name for names in self.logged.values() for name in names if name not in logs]:
            raise InvalidComparisonError(
                f"Keras logs no {', '.join(missing)}, but {', '.join(logs)}. Of several outputs say of each metric "
                "which it is of, OUTPUT:METRIC; of a single one leave that out."
            )
        return {name: fmean(float(logs[one]) for one in names) for name, names in self.logged.items()}


@dataclass(frozen=True)
class Metrics:
    """What is measured; verdicts are on the first."""

    makers: tuple[tuple[str | None, Callable[[], Any]], ...]
    """For an output, None for all, what makes a metric, or says the name of one."""
    names: tuple[str, ...]
    """What they are called here: OUTPUT:METRIC for one of an output, as it may be asked for."""

    @classmethod
    def of(cls, given: list[Wanted]) -> "Metrics":
        """Return metrics that can be made.

        Raises:
            InvalidComparisonError: there is no such metric, a function returns none, or two have one name.
        """
        makers = tuple((output, own.metric_maker(metric)) for output, metric in given)
        names = tuple(_name(make) if output is None else f"{output}:{_name(make)}" for output, make in makers)
        if len(set(names)) < len(names):
            raise InvalidComparisonError(f"Two metrics have one name: {', '.join(names)}.")
        return cls(makers, names)

    def example(self, name: str) -> Any:
        """Return a new metric of those that are called `name`, or its name in Keras."""
        return self.makers[self.names.index(name)][1]()

    def made(self, model: Any, batch: Callable[[], Any]) -> Made:
        """Return new metrics for `model`.

        Args:
            model: built.
            batch: returns a batch of inputs; called for a model that is no graph of layers.

        Raises:
            InvalidComparisonError: one is of an output that the model has not, or is not known to have; or Keras would
                log two things under one name.
        """
        outputs = _seam.names_of_outputs(model, batch)
        chosen = [output for output, _ in self.makers if output is not None]
        for output in chosen:
            if outputs and output not in outputs:
                raise InvalidComparisonError(
                    f"A metric is of the output {output!r}, which the model {model.name!r} has not."
                    f"{nearest(output, outputs)} Outputs: {', '.join(outputs)}."
                )
        if not outputs and 0 < len(chosen) < len(self.makers):
            raise InvalidComparisonError(
                f"What the outputs of the model {model.name!r} are called cannot be told: it is to return them in a "
                "dict, by name."
            )
        apart = len(outputs) > 1 or (not outputs and bool(chosen))
        compiled: dict[str | None, list[Any]] = {}
        found: dict[str, tuple[str | None, Any]] = {}  # By its name in the logs.
        losses = {"loss", *(f"{prefix}_loss" for prefix in (outputs.values() if apart else ()))}
        logged = []
        for output, make in self.makers:
            names = []
            for one in [None] if not apart else outputs or [output] if output is None else [output]:
                metric = make()
                name = own.name(metric) if one is None else f"{outputs.get(one, one)}_{own.name(metric)}"
                if name not in found and name not in losses:
                    found[name] = (one, metric)
                    compiled.setdefault(one, []).append(metric)
                elif name in losses or found[name][0] != one or not _alike(found[name][1], metric):
                    raise InvalidComparisonError(
                        f"Keras would log two things as {name!r}, of which one is the metric {own.name(metric)!r}"
                        f"{'' if one is None else f' of the output {one!r}'}. Call it something else."
                    )  # One of all outputs, and the same of this one, are measured once.
                names.append(name)
            logged.append(tuple(names))
        return Made(compiled if apart else compiled[None], dict(zip(self.names, logged, strict=True)))


def _name(make: Callable[[], Any]) -> str:
    """Return what the metrics that `make` makes are called, without the number by which Keras tells two apart."""
    one, other = own.name(make()), own.name(make())
    return one if one == other else re.sub(r"_\d+$", "", one)


def _alike(one: Any, other: Any) -> bool:
    """Return whether two metrics, or names of them, measure the same."""
    if isinstance(one, str) or isinstance(other, str):
        return one == other
    return type(one) is type(other) and one.get_config() == other.get_config()
