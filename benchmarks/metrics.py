"""The metrics of a comparison: made anew for each model, and found again in what Keras logs.

Of a model with several outputs, a metric is of one of them, by its name, or of all of them: then it is their mean.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

from trainstep.benchmarks import own
from trainstep.benchmarks.errors import InvalidComparisonError
from trainstep.errors import nearest

Wanted = tuple[str | None, Any]
"""An output, None for all, and a metric: a name, an object of Keras, or a function that returns a new one."""


def by_output(given: Any) -> list[Wanted]:
    """Return what is wanted: one metric or several, or by output; a text may be OUTPUT:METRIC."""
    if isinstance(given, Mapping):
        return [(str(output), metric) for output, metrics in given.items() for metric in _several(metrics)]
    return [_taken_apart(metric) for metric in _several(given)]


def _several(given: Any) -> list[Any]:
    return list(given) if isinstance(given, list | tuple) else [given]


def _taken_apart(metric: Any) -> Wanted:
    if isinstance(metric, str) and ":" in metric:
        output, _, name = metric.partition(":")
        return output.strip(), name.strip()
    return None, metric


class Made(NamedTuple):
    """Metrics made for one model."""

    compiled: Any
    """What `compile` takes as `metrics`."""
    logged: dict[str, tuple[str, ...]]
    """By the name of a metric: what Keras calls it in its logs, once for each output."""

    def values(self, logs: Mapping[str, Any]) -> dict[str, float]:
        """Return each metric on the validation examples, by its name, in order.

        Args:
            logs: of an epoch, as callbacks are given them.

        Raises:
            InvalidComparisonError: one is not among them.
        """
        if missing := [f"val_{name}" for names in self.logged.values() for name in names if f"val_{name}" not in logs]:
            given = ", ".join(name for name in logs if name.startswith("val_"))
            raise InvalidComparisonError(f"Keras was to log {', '.join(missing)}, and logged {given}.")
        return {name: fmean(float(logs[f"val_{one}"]) for one in names) for name, names in self.logged.items()}


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
        names = tuple(own.name(make()) if output is None else f"{output}:{own.name(make())}" for output, make in makers)
        if len(set(names)) < len(names):
            raise InvalidComparisonError(f"Two metrics have one name: {', '.join(names)}.")
        return cls(makers, names)

    def example(self, name: str) -> Any:
        """Return a new metric of those that are called `name`, or its name in Keras."""
        return self.makers[self.names.index(name)][1]()

    def made(self, model: Any) -> Made:
        """Return new metrics for `model`.

        Raises:
            InvalidComparisonError: one is of an output that the model has not, or is not known to have.
        """
        outputs = list(getattr(model, "output_names", None) or ())
        chosen = [output for output, _ in self.makers if output is not None]
        for output in chosen:
            if outputs and output not in outputs:
                raise InvalidComparisonError(
                    f"A metric is of the output {output!r}, which the model {model.name!r} has not."
                    f"{nearest(output, outputs)} Outputs: {', '.join(outputs)}."
                )
        if not outputs and 0 < len(chosen) < len(self.makers):
            raise InvalidComparisonError(
                f"What the outputs of the model {model.name!r} are called cannot be told. Say of each metric which it "
                f"is of, as of {chosen[0]!r}."
            )
        by_output = len(outputs) > 1 or (not outputs and bool(chosen))
        compiled: dict[str | None, dict[str, Any]] = {}
        logged = []
        for output, make in self.makers:
            measured = [None] if not by_output else outputs if output is None else [output]
            names = []
            for one in measured:
                metric = make()
                name = own.name(metric)
                known = compiled.setdefault(one, {}).setdefault(name, metric)  # Of all outputs, and of this one.
                if known is not metric and not _alike(known, metric):
                    raise InvalidComparisonError(f"Two metrics of the output {one!r} have one name: {name}.")
                names.append(name if one is None else f"{one}_{name}")
            logged.append(tuple(names))
        listed = {one: list(metrics.values()) for one, metrics in compiled.items()}
        return Made(listed if by_output else listed[None], dict(zip(self.names, logged, strict=True)))


def _alike(one: Any, other: Any) -> bool:
    """Return whether two metrics, or names of them, measure the same."""
    if isinstance(one, str) or isinstance(other, str):
        return one == other
    return type(one) is type(other) and one.get_config() == other.get_config()
