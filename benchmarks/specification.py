"""An experiment, from the records it left: what `trainstep compare experiment.yaml` takes to run it again."""

from collections.abc import Sequence
from typing import Any

from trainstep.benchmarks.records import Settings
from trainstep.benchmarks.summary import Group


def specification(groups: Sequence[Group]) -> str:
    """Return YAML text: a document for all workloads with the same settings, several where settings differ."""
    import yaml  # noqa: PLC0415  Only reports need it.

    documents: list[dict[str, Any]] = []
    for group in groups:
        document = _document(group)
        alike = next((each for each in documents if _without_workload(each) == _without_workload(document)), None)
        if alike is None:
            documents.append(document)
        elif not set(document["workloads"]) <= set(alike["workloads"]):
            alike["workloads"] += document["workloads"]
    return yaml.safe_dump_all(documents, sort_keys=False, allow_unicode=True, width=100)


def _document(group: Group) -> dict[str, Any]:
    settings, seeds = group.settings, list(group.seeds)
    return {
        "workloads": [settings.workload],
        "strategies": {row.label: row.spec for row in group.rows},
        "seeds": len(seeds) if seeds == list(range(len(seeds))) else seeds,
        **_settings(settings),
    }


def _settings(settings: Settings) -> dict[str, Any]:
    plain = settings.model_dump(mode="json", exclude={"workload", "budget", "examples", "higher_is_better"})
    given = {name: value for name, value in plain.items() if value not in (None, 0.0)}
    budget = {name: value for name, value in settings.budget.model_dump().items() if value is not None}
    return {**budget, **given}


def _without_workload(document: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in document.items() if name != "workloads"}
