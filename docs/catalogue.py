"""Writes what is said of strategies elsewhere from what they say of themselves: `make docs`.

The table in the README, and the JSON schema of experiment files.
"""

import json
import pathlib

import trainstep
from trainstep.benchmarks.schema import json_schema

README = pathlib.Path(__file__).parents[1] / "README.md"
SCHEMA = pathlib.Path(__file__).parent / "experiment.schema.json"
BEGIN = "<!-- The table is written by `make docs`. -->\n"


def table() -> str:
    """Return the catalogue as a Markdown table."""
    rows = [
        f"| `{name}` | {trainstep.get(name).declaration.summary} | [card](docs/strategies/{name}.md) |\n"
        for name in sorted(trainstep.names(), key=lambda name: (name != "standard", name))
    ]
    return "| name | what it does | card |\n|---|---|---|\n" + "".join(rows)


def with_table(text: str) -> str:
    """Return the README with its table as it should be."""
    before, after = text.split(BEGIN)
    lines = after.splitlines(keepends=True)
    end = next(number for number, line in enumerate(lines) if not line.startswith("|"))
    return before + BEGIN + table() + "".join(lines[end:])


def schema() -> str:
    """Return the JSON schema of experiment files, as text."""
    return json.dumps(json_schema(), indent=1) + "\n"


if __name__ == "__main__":
    SCHEMA.write_text(schema())
    README.write_text(with_table(README.read_text()))
