"""An experiment, from the records it left: what `trainstep compare experiment.yaml` takes to run it again."""

from collections.abc import Mapping, Sequence
from typing import Any

from trainstep.benchmarks import workload as workloads
from trainstep.benchmarks.records import Settings
from trainstep.benchmarks.request import is_told_by_name, suite_of
from trainstep.benchmarks.summary import Group
from trainstep.errors import TrainstepError

_OWN = """\
# This was a model and data of your own. Name the functions that return them here, as package.module:function,
# or give them to trainstep.compare(experiment="experiment.yaml", model=..., train=..., validation=...).
# model:
# data:
"""
_OBJECTS = "# What names do not say is not here: give {} to trainstep.compare(experiment=..., {}).\n"
_SEVERAL = "# Several experiments: save each, from one line of --- to the next, as a file of its own.\n---\n"
_MEASURED = {"examples", "fingerprint"}
"""Settings that follow from the data."""
_NOT_TO_BE_GIVEN = {"is_legacy_optimizer"}
"""What Keras 2 writes into the settings of an optimizer, and does not take."""


def specification(groups: Sequence[Group]) -> str:
    """Return YAML text: one experiment where one can say all that was run, else several documents."""
    import yaml  # noqa: PLC0415  Only reports need it.

    documents: list[dict[str, Any]] = []
    for group in groups:
        document = _document(group)
        alike = next((each for each in documents if _without_workload(each) == _without_workload(document)), None)
        if alike is None or "workload" not in document:
            documents.append(document)
        else:
            alike["workload"] += [each for each in document["workload"] if each not in alike["workload"]]
    if len(documents) > 1:
        documents = _as_one(documents, groups) or documents
    texts = [yaml.safe_dump(each, sort_keys=False, allow_unicode=True, width=100) for each in documents]
    own = [text if "workload" in document else _OWN + text for text, document in zip(texts, documents, strict=True)]
    objects = sorted({name for group in groups for name in group.settings.objects})
    if objects:
        own[0] = _OBJECTS.format(" and ".join(objects), ", ".join(f"{name}=..." for name in objects)) + own[0]
    return own[0] if len(own) == 1 else _SEVERAL + "---\n".join(own)


def _as_one(documents: Sequence[dict[str, Any]], groups: Sequence[Group]) -> list[dict[str, Any]] | None:
    """Return one document that leaves to the workloads what differs between them; None where that is not the same."""
    if not all("workload" in each for each in documents):
        return None
    first = documents[0]
    shared = {
        name: first[name] for name in first if all(name in each and each[name] == first[name] for each in documents)
    }
    names = [name for each in documents for name in each["workload"]]
    document = {"workload": names, **{name: value for name, value in shared.items() if name != "workload"}}
    try:
        settings = suite_of(experiment=document).settings
    except TrainstepError:  # What differs is what has to be said.
        return None
    known = {name: found.model_dump(exclude=_MEASURED) for name, found in settings.items()}
    same = all(known.get(g.settings.workload) == g.settings.model_dump(exclude=_MEASURED) for g in groups)
    return [document] if same else None


def _document(group: Group) -> dict[str, Any]:
    settings, seeds = group.settings, list(group.seeds)
    name = settings.workload.removesuffix(f" noise={settings.noise:g}")
    workload = {"name": name, "noise": settings.noise} if settings.noise else name
    known = name in workloads.names()
    return {
        **({"workload": [workload]} if known else {"noise": settings.noise} if settings.noise else {}),
        "strategies": {row.label: row.spec for row in group.rows},
        "seeds": len(seeds) if seeds == list(range(len(seeds))) else seeds,
        **{name: value for name, value in settings.budget.model_dump().items() if value is not None},
        **({} if settings.batch_size is None else {"batch_size": settings.batch_size}),
        "optimizer": _optimizer(settings.optimizer),
        **({} if "loss" in settings.objects else {"loss": settings.loss}),
        **({} if "metrics" in settings.objects else {"metrics": list(settings.metrics)}),
        **_asked(settings, known=known),
    }


def _optimizer(settings: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in settings.items() if name not in _NOT_TO_BE_GIVEN}
    rate = given.get("learning_rate")
    if isinstance(rate, Mapping):
        given = {name: value for name, value in given.items() if name != "learning_rate"}
        given["schedule"] = _named(rate)
    return _named(given)


def _named(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": settings.get("class"), **{name: value for name, value in settings.items() if name != "class"}}


def _asked(settings: Settings, *, known: bool) -> dict[str, Any]:
    asked: dict[str, Any] = {}
    if settings.attack is not None:
        asked["attack"] = settings.attack
    elif known:  # Which may have one of its own.
        asked["attack"] = False
    if not is_told_by_name(settings.metrics[0], higher_is_better=settings.higher_is_better):
        asked["higher_is_better"] = settings.higher_is_better
    if settings.target is not None:
        asked["target"] = settings.target.model_dump()
    return asked


def _without_workload(document: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in document.items() if name != "workload"}
