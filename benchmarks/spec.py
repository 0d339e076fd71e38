"""Strategies as one line of text: names, options, and several joined by a plus; and grids of options.

    adversarial:epsilon=0.1,clip_range=[0,1] + gradient_clipping

The command line, experiment files and `compare` all read it.
"""

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from trainstep.errors import InvalidSpecError

SYNTAX = "NAME, NAME:OPTION=VALUE,OPTION=VALUE, and several joined by +, such as gradient_clipping:global_clipnorm=0.5"

GRID = "grid"


class SpecError(InvalidSpecError):
    """The text is not written as `SYNTAX` says."""


def parse_spec(text: str) -> dict[str, dict[str, Any]]:
    """Return strategies with their options by name, from text such as `adversarial:epsilon=0.1+gradient_clipping`.

    A value is read as JSON (0.1, true, null, [0, 1], "text") or as Python writes it (.1, inf, True), else as it stands.

    Raises:
        SpecError: the text does not keep to the syntax; the message says where.
    """
    spec: dict[str, dict[str, Any]] = {}
    for part in _split(text, "+"):
        name, colon, options = (piece.strip() for piece in part.partition(":"))
        if not name:
            raise SpecError(f"A strategy is missing in {text!r}. Written: {SYNTAX}.")
        if "=" in name:
            raise SpecError(f"{name!r} in {text!r} has no name before its options. Written: {SYNTAX}.")
        if name in spec:
            raise SpecError(f"{name!r} is there twice in {text!r}. A strategy acts once per step.")
        if colon and not options:
            raise SpecError(f"There are no options after {name + ':'!r} in {text!r}. Leave out the colon for defaults.")
        spec[name] = parse_options(name, options) if options else {}
    return spec


def parse_options(name: str, text: str) -> dict[str, Any]:
    """Return what `OPTION=VALUE,OPTION=VALUE` says, by option.

    Args:
        name: whose options they are, for errors.
        text: the options.

    Raises:
        SpecError: the text does not keep to the syntax.
    """
    options: dict[str, Any] = {}
    for part in _split(text, ","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not (key and equals and value):
            if "(" in text:
                raise SpecError(f"Write lists in the options of {name!r} with brackets: [0, 1], not (0, 1).")
            raise SpecError(f"{part.strip()!r} in the options of {name!r} is not OPTION=VALUE. Written: {SYNTAX}.")
        if key in options:
            raise SpecError(f"The option {key!r} of {name!r} is there twice.")
        options[key] = _parse_value(key, name, value)
    return options


def expanded(label: str, composition: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield label and composition for each value of the grids in `composition`; both as they are without any.

    A grid is `{"grid": [value, value]}` in place of an option's value. Those of a composition are multiplied out; the
    labels have the values added: `sam rho=0.05`.
    """
    grids = [
        (name, option, value[GRID])
        for name, options in composition.items()
        if isinstance(options, Mapping)
        for option, value in options.items()
        if isinstance(value, Mapping) and GRID in value
    ]
    for values in itertools.product(*(values for _, _, values in grids)):
        spec = {name: dict(o) if isinstance(o, Mapping) else o for name, o in composition.items()}
        words = [label]
        for (name, option, _), value in zip(grids, values, strict=True):
            spec[name][option] = value
            words.append(f"{option}={value}")
        yield " ".join(words), spec


def check_label(label: Any) -> None:
    """Raise `SpecError` where `label` is not what can stand in a table: one line of text that can be seen."""
    if not isinstance(label, str):
        raise SpecError(f"A label is a text, not {label!r}. Put it in quotes.")
    if not label.strip() or not label.isprintable():
        raise SpecError(f"A label is one line of text that can be seen, not {label!r}.")


def _parse_value(key: str, name: str, value: str) -> Any:
    try:
        return json.loads(_PYTHON_AS_JSON.get(value, value))
    except json.JSONDecodeError:
        if value[0] in "[{\"'":
            raise SpecError(f"The value of {key!r} of {name!r} is not valid JSON: {value}") from None
        if value[0] == "(":
            raise SpecError(f"Write the value of {key!r} of {name!r} with brackets: [0, 1], not (0, 1).") from None
    try:
        return float(value)  # Such as .1 and inf.
    except ValueError:
        return value


_PYTHON_AS_JSON = {"True": "true", "False": "false", "None": "null"}


def _split(text: str, separator: str) -> list[str]:
    """Split at each `separator` outside of brackets and quotes; a plus that belongs to a number does not count."""
    parts, depth, quoted, begin = [], 0, False, 0
    for index, character in enumerate(text):
        if character == '"':
            quoted = not quoted
        elif quoted:
            continue
        elif character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        elif character == separator and depth == 0 and not _in_number(text, index):
            parts.append(text[begin:index])
            begin = index + 1
    if quoted or depth:
        raise SpecError(f"A {'quotation mark' if quoted else 'bracket'} in {text!r} has no counterpart.")
    return [*parts, text[begin:]]


def _in_number(text: str, index: int) -> bool:
    exponent = re.search(r"[=,\[\s][-+]?[\d.]+[eE]$", text[:index]) and re.match(r"\+\d", text[index:])
    sign = re.search(r"=\s*$", text[:index])
    return text[index] == "+" and bool(exponent or sign)
