"""The JSON schema of experiment files, which editors complete and check by."""

import math
from collections.abc import Mapping
from typing import Any

from trainstep import registry
from trainstep.benchmarks import workload
from trainstep.benchmarks.experiment import Experiment
from trainstep.benchmarks.spec import GRID


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of an experiment file, with the options of all registered strategies."""
    schema = Experiment.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "An experiment of trainstep"
    definitions, properties = schema["$defs"], schema["properties"]
    text = {"type": "string", "minLength": 1}
    definitions["WorkloadChoice"]["properties"]["name"]["enum"] = workload.names()
    one = {"anyOf": [{"enum": workload.names()}, {"$ref": "#/$defs/WorkloadChoice"}]}
    several = {"anyOf": [*one["anyOf"], {"type": "array", "items": one, "minItems": 1}]}
    properties["workload"] = {**several, "description": properties["workload"]["description"]}
    properties["workloads"] = properties["workload"]
    options: dict[str, Any] = {}
    for name in registry.names():
        declaration = registry.get(name).declaration
        own = declaration.options.model_json_schema()
        definitions.update(own.pop("$defs", {}))
        own["properties"] = {key: _or_grid(value) for key, value in own.get("properties", {}).items()}
        options[name] = {"description": declaration.summary, "anyOf": [own, {"type": "null"}]}
    composition = {"type": "object", "properties": options, "additionalProperties": False, "minProperties": 1}
    definitions["Composition"] = {"anyOf": [text, {"type": "array", "items": text}, composition, {"type": "null"}]}
    properties["strategies"] = {
        "description": properties["strategies"]["description"],
        "anyOf": [
            {"type": "object", "additionalProperties": {"$ref": "#/$defs/Composition"}, "minProperties": 1},
            {"type": "array", "items": text, "minItems": 1},
        ],
    }
    optimizer = {"type": "object", "properties": {"name": text, "schedule": {}}, "required": ["name"]}
    properties["optimizer"] = {"description": properties["optimizer"]["description"], "anyOf": [text, optimizer]}
    metrics = {"anyOf": [text, {"type": "array", "items": text, "minItems": 1}]}
    outputs = {"type": "object", "additionalProperties": metrics, "minProperties": 1}
    metrics = {"anyOf": [*metrics["anyOf"], outputs]}
    properties["metrics"] = {"description": properties["metrics"]["description"], **metrics}
    number = {"type": "object", "additionalProperties": {"type": "number"}, "minProperties": 1, "maxProperties": 1}
    target = {"anyOf": [text, {"$ref": "#/$defs/TargetChoice"}, number]}
    properties["target"] = {"description": properties["target"]["description"], **target}
    return _finite(schema)


def _or_grid(option: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema of an option's value, or of several of them."""
    value = {key: part for key, part in option.items() if key not in ("title", "description", "default")}
    grid = {
        "type": "object",
        "properties": {GRID: {"type": "array", "items": value, "minItems": 1}},
        "required": [GRID],
        "additionalProperties": False,
    }
    about = {key: option[key] for key in ("description", "default") if key in option}
    return {**about, "anyOf": [value, grid]}


def _finite(schema: Any) -> Any:
    """Return `schema` without the infinities that JSON does not know."""
    if isinstance(schema, dict):
        return {
            key: _finite(value)
            for key, value in schema.items()
            if not (isinstance(value, float) and not math.isfinite(value))
        }
    return [_finite(value) for value in schema] if isinstance(schema, list) else schema
