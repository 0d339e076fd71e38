"""Files in YAML and TOML, and the line on which each of their values stands."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from trainstep.benchmarks.errors import InvalidExperimentError

try:
    import tomllib
except ModuleNotFoundError:  # On Python 3.10.
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

Place = Sequence[str | int]
"""Keys and indices that lead from the top of a file to a value."""


class Source:
    """A file that was read."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._text = self.path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidExperimentError(f"{self.path} cannot be read: {error}") from error
        suffix = self.path.suffix.lower()
        if suffix in (".yaml", ".yml"):
            self._node, self.content = _read_yaml(self.path, self._text)
        elif suffix == ".toml":
            self._node, self.content = None, _read_toml(self.path, self._text)
        else:
            raise InvalidExperimentError(f"{self.path}: an experiment is a file .yaml, .yml or .toml.")

    def line(self, place: Place) -> int:
        """Return the line, from 1 on, of the value at `place`, or of the innermost that is there."""
        if self._node is None:
            return _toml_line(self._text, place)
        return _yaml_line(self._node, place)


# --- YAML -----------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Plain data, by the rules of YAML 1.2, of which PyYAML knows only 1.1.

    There `1e-3` is a text, `no` and `off` are false, and 1:30 is ninety.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  PyYAML declares it so.


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", "<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)


def _read_yaml(path: Path, text: str) -> tuple[Any, Any]:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            raise InvalidExperimentError(f"{path} is empty.")
        _refuse_repeated(path, node, set())
        return node, loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise InvalidExperimentError(f"{path}{where}: not valid YAML: {getattr(error, 'problem', error)}") from error
    finally:
        loader.dispose()


def _refuse_repeated(path: Path, node: Any, seen: set[int]) -> None:
    """PyYAML keeps the last of several equal keys without a word."""
    if id(node) in seen or isinstance(node, yaml.ScalarNode):
        return
    seen.add(id(node))
    keys: dict[str, int] = {}
    for child in node.value:
        key, value = child if isinstance(node, yaml.MappingNode) else (None, child)
        if isinstance(key, yaml.ScalarNode):
            line = key.start_mark.line + 1
            if key.value in keys:
                raise InvalidExperimentError(
                    f"{path}, line {line}: {key.value!r} is there already, on line {keys[key.value]}."
                )
            keys[key.value] = line
        _refuse_repeated(path, value, seen)


def _yaml_line(node: Any, place: Place) -> int:
    line = node.start_mark.line + 1
    for step in place:
        found = None
        if isinstance(node, yaml.MappingNode):
            found = next((pair for pair in node.value if getattr(pair[0], "value", None) == str(step)), None)
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            found = (node.value[step], node.value[step])
        if found is None:
            break
        line, node = found[0].start_mark.line + 1, found[1]
    return line


# --- TOML -----------------------------------------------------------------------------------------


def _read_toml(path: Path, text: str) -> Any:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidExperimentError(f"{path}: not valid TOML: {error}") from error


def _toml_line(text: str, place: Place) -> int:
    """Return the first line of the statement that brings the value in.

    The reader of the standard library tells no lines. But what the first lines of a file hold can be asked of it, as
    long as no value is cut in two: the statement is the one that has to be there for the value to be there.
    """
    lines = text.splitlines(keepends=True)
    best, begin, depth = 1, 1, 0
    for number in range(1, len(lines) + 1):
        try:
            content = tomllib.loads("".join(lines[:number]))
        except tomllib.TOMLDecodeError:
            continue  # Within a value of several lines.
        reached = _depth(content, place)
        if reached > depth:
            best, depth = begin, reached
        begin = number + 1
    return best


def _depth(content: Any, place: Place) -> int:
    """Return how many steps of `place` are there."""
    for depth, step in enumerate(place):
        steps: Any = (
            content if isinstance(content, dict) else dict(enumerate(content if isinstance(content, list) else []))
        )
        if step not in steps:
            return depth
        content = steps[step]
    return len(place)
