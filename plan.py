"""What a training step will do, in words: before it runs, and without a model."""

import html
import math
import sys
from dataclasses import dataclass
from typing import Any

from trainstep import registry
from trainstep.composition import Spec, compose
from trainstep.declaration import NEEDS, Cost, StrategyOptions, allowed
from trainstep.definition import hooks_used
from trainstep.step import Strategy


@dataclass(frozen=True)
class Stop:
    """One stop on the way of a batch through the step."""

    hook: str
    """Its name, "update_weights" for example; or "the model", for what changes the model or nothing at all."""
    what: str
    """A strategy with its options, or what Keras does."""
    depth: int = 0
    """How many strategies it is inside of: what it gets is what they hand on."""


@dataclass(frozen=True)
class Plan:
    """A composition, laid out in the order in which it acts. Prints as text, and as a table in a notebook."""

    strategies: dict[str, StrategyOptions]
    """Options by strategy name, outermost strategy first."""
    stops: tuple[Stop, ...]
    costs: dict[str, Cost]
    notes: tuple[str, ...]

    @property
    def time(self) -> float:
        """Time of a step at the limit, in plain steps: where each evaluates what all others add once more."""
        return math.prod(cost.time for cost in self.costs.values())

    @property
    def least_time(self) -> float:
        """The same where none does: what each adds to a plain step."""
        return 1.0 + sum(cost.time - 1.0 for cost in self.costs.values())

    def _written_time(self) -> str:
        low, high = (f"{time:.2f}" for time in sorted((self.least_time, self.time)))
        return low if low == high else f"{low} to {high}"

    def __str__(self) -> str:
        lines = [f"Training step: {' + '.join(self.strategies)}", ""]
        previous = None
        for stop in self.stops:
            lines.append(f"  {stop.hook if stop.hook != previous else '':18}{'  ' * stop.depth}{stop.what}")
            previous = stop.hook
        lines += ["", "  " + "  ".join(f"{title:{width}}" for title, width in _COLUMNS).rstrip()]
        for row in self._cost_rows():
            cells = zip(row, _COLUMNS, strict=True)
            lines.append("  " + "  ".join(f"{cell:{width}}" for cell, (_, width) in cells).rstrip())
        lines.append(f"  time of a step, at the limit: {self._written_time()} of a plain one")
        if self.notes:
            lines += ["", *(f"  {note}" for note in self.notes)]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        def table(titles: list[str], rows: list[list[str]]) -> str:
            head = "".join(f"<th style='text-align:left'>{html.escape(title)}</th>" for title in titles)
            body = "".join(
                "<tr>" + "".join(f"<td style='text-align:left'>{cell}</td>" for cell in row) + "</tr>" for row in rows
            )
            return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

        stops = [[html.escape(s.hook), "&emsp;" * s.depth + html.escape(s.what)] for s in self.stops]
        costs = [[html.escape(cell) for cell in row] for row in self._cost_rows()]
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self.notes)
        return (
            f"<p><b>Training step:</b> {html.escape(' + '.join(self.strategies))}</p>"
            + table(["hook", "what happens"], stops)
            + table([title for title, _ in _COLUMNS], costs)
            + f"<p>Time of a step, at the limit: {self._written_time()} of a plain one.</p>"
            + (f"<ul>{notes}</ul>" if notes else "")
        )

    def _cost_rows(self) -> list[list[str]]:
        return [
            [name, f"{cost.forward} forward, {cost.backward} backward", cost.memory, cost.batch_norm]
            for name, cost in self.costs.items()
        ]


_COLUMNS = (("strategy", 22), ("extra passes", 22), ("extra memory", 34), ("batch norm", 0))

_HOOKS = {
    "transform_batch": None,
    "train_batch": None,
    "compute_objective": "forward pass and `compute_loss` of the model",
    "compute_gradients": "backward pass to the weights",
    "update_weights": "optimizer.apply_gradients",
    "report_metrics": "metrics of the model",
}


def plan(spec: Spec, /, **options: Any) -> Plan:
    """Lay out the training step of `spec` as it will run.

    Args:
        spec: a name, a list of names, or a mapping from names to options; in any order.
        **options: options of the one strategy, where `spec` is a name.

    Raises:
        The errors of `trainstep.composition.compose`.
    """
    composition = compose(spec, **options)
    names = {strategy.declaration.name for strategy in composition}
    idle = [strategy for strategy, choice in composition.items() if not hooks_used(strategy, choice)]
    stops = [Stop("the model", _written(strategy, composition[strategy])) for strategy in idle]
    for hook, end in _HOOKS.items():
        acting = [strategy for strategy, choice in composition.items() if hook in hooks_used(strategy, choice)]
        if hook == "update_weights" and acting:
            stops.append(Stop(hook, "sum over replicas"))
        nested = hook != "transform_batch"
        for depth, strategy in enumerate(acting):
            stops.append(Stop(hook, _written(strategy, composition[strategy]), depth * nested))
        if end:
            stops.append(Stop(hook, end, len(acting)))
    return Plan(
        strategies={strategy.declaration.name: choice for strategy, choice in composition.items()},
        stops=tuple(stops),
        costs={s.declaration.name: s.declaration.cost(choice) for s, choice in composition.items()},
        notes=tuple(
            f"{strategy.declaration.name} with {other}: {note}."
            for strategy in composition
            for other, note in strategy.declaration.notes.items()
            if other in names
        ),
    )


def _written(strategy: type[Strategy], options: StrategyOptions) -> str:
    given = ", ".join(f"{name}={value!r}" for name, value in options if value is not None)
    return f"{strategy.declaration.name}({given})"


@dataclass(frozen=True)
class Description:
    """What is to be known of one strategy. Prints as text."""

    name: str
    summary: str
    text: str
    """The documentation of its module: formula, cost, source."""
    options: dict[str, Any]
    """JSON schema of its options: types, defaults, bounds and a sentence each."""
    cost: Cost
    """With default options, or those of its example where some have no default."""
    reference: str
    needs: dict[str, str]
    """What it asks of a model and its data."""
    conflicts: dict[str, str]
    """What it cannot be combined with, and why; options as for `cost`."""
    notes: dict[str, str]
    """What it combines with in a way worth knowing, and how."""

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"

    def __str__(self) -> str:
        lines = [self.name, "", self.text, "", f"Options: {self.options.get('description', '')}".rstrip()]
        for name, field in self.options.get("properties", {}).items():
            default = f"default: {field['default']!r}" if "default" in field else "required"
            lines.append(f"  {name} ({default}; {allowed(self.options, field)})")
            lines.append(f"      {field.get('description', '')}")
        if not self.options.get("properties"):
            lines.append("  none")
        lines += [
            "",
            f"Cost: {self.cost.time:.2f} of a plain step at the limit",
            f"Memory: {self.cost.memory}",
            f"Batch norm: {self.cost.batch_norm}",
        ]
        lines += [f"Source: {self.reference}"]
        lines += [f"Needs {what}" for what in self.needs.values()]
        lines += [f"Not with {other}: {reason}" for other, reason in self.conflicts.items()]
        lines += [f"With {other}: {note}" for other, note in self.notes.items()]
        return "\n".join(lines)


def describe(name: str, /) -> Description:
    """Return what is to be known of the strategy `name`.

    Raises:
        UnknownStrategyError: there is none of that name.
    """
    strategy = registry.get(name)
    declaration = strategy.declaration
    shown = declaration.options(**declaration.example)
    documentation = sys.modules[strategy.__module__].__doc__ or strategy.__doc__ or declaration.summary
    return Description(
        name=name,
        summary=declaration.summary,
        text=documentation.strip(),
        options=declaration.options.model_json_schema(),
        cost=declaration.cost(shown),
        reference=declaration.reference,
        needs={need: NEEDS[need] for need in declaration.needs},
        conflicts=dict(declaration.conflicts_with(shown)),
        notes=dict(declaration.notes),
    )
