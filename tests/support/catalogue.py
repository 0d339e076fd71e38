"""The catalogue as data for `pytest.mark.parametrize`: what is special about a strategy is in its declaration."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from nets import Task, teacher

import trainstep
from trainstep import composition, errors, registry
from trainstep.definition import HOOKS, HOST_HOOKS, hooks_used
from trainstep.strategies import distillation

NAMES = trainstep.names()
distillation.provide("teacher.keras", teacher)  # The one of its example, which teaches nets of every kind.


def declaration(name: str) -> trainstep.Declaration:
    return trainstep.get(name).declaration


def schema(name: str) -> dict[str, Any]:
    """Return the JSON schema of the options of `name`."""
    return declaration(name).options.model_json_schema()


def task_of(*names: str) -> Task:
    """Return what nets have to be made for, for all these strategies to train them."""
    needs = {need for name in names for need in declaration(name).needs}
    classes = bool(needs & {"classes", "one-hot labels"})
    return Task(
        images="images" in needs, classes=classes, outputs="outputs" in needs, separate="separate examples" in needs
    )


def spec_of(*names: str) -> dict[str, dict[str, Any]]:
    """Return these strategies with options: their defaults, or those of their examples where some have none.

    Two steps of an attack show what ten do, in a fifth of the time.
    """
    return {name: {**({"steps": 2} if _takes_ten_steps(name) else {}), **declaration(name).example} for name in names}


def _takes_ten_steps(name: str) -> bool:
    return schema(name).get("properties", {}).get("steps", {}).get("default") == 10


def constraints(field: dict[str, Any]) -> dict[str, Any]:
    """Return what the JSON schema of one option demands, seen through a choice with null, or with a schedule."""
    choices = [choice for choice in field.get("anyOf", field.get("oneOf", [field])) if choice.get("type") != "null"]
    return choices[0] if choices else field


def variants() -> list[tuple[str, dict[str, Any]]]:
    """Return every strategy with its defaults, and once more for each choice of an option that is an enumeration."""
    found = []
    for name in NAMES:
        found.append((name, spec_of(name)[name]))
        for option, field in schema(name).get("properties", {}).items():
            found += [
                (name, spec_of(name)[name] | {option: choice})
                for choice in constraints(field).get("enum", [])
                if choice != field.get("default")
            ]
    return found


def by_state() -> list[tuple[str, dict[str, Any]]]:
    """Return every strategy with its defaults, and once more for each choice that changes what state it keeps."""
    found = {}
    for name, options in variants():
        found.setdefault((name, repr(declaration(name).state(declaration(name).options(**options)))), (name, options))
    return list(found.values())


def conflicts(name: str) -> dict[str, str]:
    """Return what `name`, with its default options or those of its example, cannot be combined with, and why."""
    return dict(declaration(name).conflicts_with(declaration(name).options(**declaration(name).example)))


def conflict(one: str, other: str) -> str | None:
    """Return why two strategies cannot be combined; None where they can."""
    return conflicts(one).get(other) or conflicts(other).get(one)


def compatible(names: list[str]) -> list[str]:
    """Return those of `names` that go together: each that no earlier one excludes."""
    kept: list[str] = []
    for name in names:
        if not any(conflict(name, other) for other in kept):
            kept.append(name)
    return kept


def together() -> list[str]:
    """Return strategies of every stage that go together: of each stage the first one that no earlier one excludes.

    Every pair is trained with by itself. All there are at once would be a step of a hundred passes.
    """
    kept: list[str] = []
    for name in compatible(NAMES):
        if stage_of(name) not in map(stage_of, kept):
            kept.append(name)
    return kept


def companies(entries: Iterable[tuple[str, dict[str, Any]]]) -> list[dict[str, dict[str, Any]]]:
    """Return `entries`, names with options, as specifications: those share a net that go together, as many as do.

    Together are those that have nothing to say of each other: what `micro_batches` does to one that projects gradients,
    for example, depends on which examples are in a part of the batch, and so on how many replicas there are.
    Of those that evaluate the net it is three at most, by themselves: what they do is not to be lost in what others
    make of gradients. Alone are strategies of the stages at which one has all others make fewer updates, or compute in
    16 bits. A net for those that need one without batch norm is for no others.
    """
    found: list[dict[str, dict[str, Any]]] = []
    for name, options in entries:
        for spec in found:
            if name not in spec and _makes_company({**spec, name: options}):
                spec[name] = options
                break
        else:
            found.append({name: options})
    return found


def _makes_company(spec: dict[str, dict[str, Any]]) -> bool:
    said = {name: declaration(name) for name in spec}
    stages = {said[name].stage_with(said[name].options(**options)) for name, options in spec.items()}
    kinds = {(name in EVALUATING, "separate examples" in said[name].needs) for name in spec}
    if stages & {trainstep.Stage.ACCUMULATION, trainstep.Stage.LOSS_SCALING} or len(kinds) > 1:
        return False
    if len(spec) > 3 and any(name in EVALUATING for name in spec):
        return False
    if any(other in said[name].notes for name in spec for other in spec):
        return False
    try:
        composition.compose(spec)
    except errors.StrategyConflictError:
        return False
    return True


def stage_of(name: str) -> trainstep.Stage:
    """Return the stage of `name`, with its defaults or the options of its example."""
    return declaration(name).stage_with(declaration(name).options(**declaration(name).example))


def hooks(name: str) -> set[str]:
    """Return the hooks in which `name` does something, with its default options."""
    return set(hooks_used(trainstep.get(name), declaration(name).options(**declaration(name).example)))


def has_slots(name: str) -> bool:
    """Tell whether `name`, as `spec_of` has it, keeps state."""
    return bool(declaration(name).state(declaration(name).options(**declaration(name).example)))


def features(name: str) -> set[str]:
    """Return what `name` has of what the machinery around strategies treats differently."""
    strategy, said = trainstep.get(name), declaration(name)
    options = said.options(**said.example)
    kinds = {"a scalar" if not (slot.per_weight or slot.per_statistic or slot.shape) else repr(slot)
             for slot in said.state(options).values()}  # fmt: skip
    overridden = {hook for hook in (*HOOKS, *HOST_HOOKS) if hook in vars(strategy)}
    return {*kinds, *overridden, *said.needs, *(["an example"] if said.example else [])}


def representatives(names: list[str]) -> list[str]:
    """Return those of `names` that have between them every feature any has: the first with most no earlier one has."""
    left, chosen = set().union(*map(features, names)), []
    while left:
        best = max(names, key=lambda name: len(features(name) & left))
        chosen.append(best)
        left -= features(best)
    return sorted(chosen)


REPRESENTATIVES = representatives(NAMES)
"""Enough for what does not depend on what a strategy computes: files, classes, copies, compiling again."""
VARIANTS = variants()
BY_STATE = by_state()
"""Those of `VARIANTS` that differ in what state they keep: enough for what keeps and restores it."""
TOGETHER = together()
COMPATIBLE = compatible(NAMES)
"""As many as go together: for neutral options, under which a step is as small as that of one."""
EVALUATING = [
    name
    for name in NAMES
    if hooks(name) - {"update_weights", "report_metrics"} or "attach_strategies" in vars(trainstep.get(name))
]
"""Those that act on batches, losses, layers or how gradients are taken: what kind the model and its data are matters to
them. All others see gradients and weights, and nothing else."""
DEFAULT_IS_NEUTRAL = [name for name in NAMES if declaration(name).neutral == {}]
NEUTRAL = [name for name in NAMES if declaration(name).neutral is not None]


def variant_id(value: Any) -> str:
    return value if isinstance(value, str) else ",".join(f"{k}={v}" for k, v in value.items()) or "defaults"


def coarsest_dtype(model: Any) -> str:
    """Return the coarsest dtype a layer of `model` computes in."""
    found = {layer.compute_dtype for layer in model.layers}
    return next((dtype for dtype in ("bfloat16", "float16") if dtype in found), "float32")


@contextlib.contextmanager
def registered(*strategies: type[trainstep.Strategy]) -> Iterator[None]:
    """Register throw-away strategies for the duration of a test."""
    before = dict(registry._strategies)
    try:
        for strategy in strategies:
            trainstep.register(strategy)
        yield
    finally:
        registry._strategies.clear()
        registry._strategies.update(before)
