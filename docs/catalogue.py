"""Writes the table of strategies in the README from what they say of themselves: `make docs`."""

import pathlib

import trainstep

README = pathlib.Path(__file__).parents[1] / "README.md"
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


if __name__ == "__main__":
    README.write_text(with_table(README.read_text()))
