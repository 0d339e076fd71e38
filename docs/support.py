"""Writes what the tests have shown, from what they noted: `make support`.

`support.md` is of each strategy, `combinations.md` of each two of them.
"""

import json
import pathlib

FOLDER = pathlib.Path(__file__).parent
PAGE = FOLDER / "support.md"
MATRIX = FOLDER / "combinations.md"
KERASES = ("Keras 3", "Keras 2")
PROPERTIES = {
    "saved": "saved in the middle of a window, loaded, trained on: as one that never stopped, bit for bit",
    "resumed mid-window": "killed in the middle of a window, restored from its backup: likewise, in shared runs",
    "mirrored": "two replicas of `MirroredStrategy` are one device",
    "multi-worker": "two processes of `MultiWorkerMirroredStrategy` are one",
    "XLA": "`jit_compile=True` agrees, with default options",
    "steps_per_execution": "several steps at once are the same steps",
    "a bad batch": "a batch with NaN costs one update and no more, beside `skip_nonfinite`",
}

HEAD = """# What the tests show

Of each strategy with every choice of its options, and of all together, on both Kerases. Written by `make support`
from what the tests noted while they ran; not by hand.

"""


def path_of(keras: str) -> pathlib.Path:
    """Return the file with what the tests noted on `keras`."""
    return FOLDER / "support" / f"{keras.lower().replace(' ', '-')}.json"


def page(shown: dict[str, dict[str, dict[str, str]]]) -> str:
    """Return the page; `shown` holds verdicts by Keras, strategy and property."""
    strategies = sorted({strategy for verdicts in shown.values() for strategy in verdicts}, key=_all_together_last)
    notes: list[str] = []

    def cell(strategy: str, what: str) -> str:
        verdicts = {keras: shown[keras].get(strategy, {}).get(what, "not tested") for keras in shown}
        if set(verdicts.values()) == {"yes"}:
            return "yes"
        parts = []
        for keras, verdict in verdicts.items():
            if verdict != "yes" and verdict not in notes:
                notes.append(verdict)
            parts.append(f"{keras}: {'yes' if verdict == 'yes' else f'no ({notes.index(verdict) + 1})'}")
        return ", ".join(parts)

    rows = [
        f"| {strategy} | " + " | ".join(cell(strategy, what) for what in PROPERTIES) + " |" for strategy in strategies
    ]
    lines = [
        f"| strategy | {' | '.join(PROPERTIES)} |",
        "|---" * (len(PROPERTIES) + 1) + "|",
        *rows,
        "",
        *(f"- *{what}*: {meaning}." for what, meaning in PROPERTIES.items()),
        "",
        *(f"{number}. {note}" for number, note in enumerate(notes, start=1)),
    ]
    return HEAD + "\n".join(lines).rstrip("\n") + "\n"


MATRIX_HEAD = """# Which strategies go together

Every two of the catalogue are trained with once by the tests, whatever the order of listing, on both Kerases: `+`
where they go together, else a number for the reason they are refused with, before any data is read. Written by
`make support` from what the tests noted while they ran; not by hand. How two of them act on each other is on their
cards, and in `trainstep plan one+other`.

"""


def matrix(shown: dict[str, dict[str, dict[str, str]]]) -> str:
    """Return the page of combinations; `shown` holds verdicts by Keras, strategy, and "with" another."""
    names = sorted({name for verdicts in shown.values() for name in verdicts if " " not in name})
    reasons: list[str] = []

    def cell(one: str, other: str) -> str:
        if one == other:
            return ""
        first, second = sorted((one, other))
        verdicts = {shown[keras].get(first, {}).get(f"with {second}", "not tested") for keras in shown}
        if verdicts == {"yes"}:
            return "+"
        verdict = "; ".join(sorted(verdicts))
        if verdict not in reasons:
            reasons.append(verdict)
        return f"({reasons.index(verdict) + 1})"

    rows = [f"| {place} {one} | " + " | ".join(cell(one, other) for other in names) + " |"
            for place, one in enumerate(names, start=1)]  # fmt: skip
    head = f"| | {' | '.join(str(place) for place in range(1, len(names) + 1))} |"
    lines = [head, "|---" * (len(names) + 1) + "|", *rows, ""]
    lines += [f"{number}. {reason}" for number, reason in enumerate(reasons, start=1)]
    return MATRIX_HEAD + "\n".join(lines).rstrip("\n") + "\n"


def _all_together_last(strategy: str) -> tuple[bool, str]:
    return " " in strategy, strategy


def noted() -> dict[str, dict[str, dict[str, str]]]:
    """Return what the tests noted, by Keras, strategy and property."""
    return {keras: json.loads(path_of(keras).read_text()) for keras in KERASES}


if __name__ == "__main__":
    PAGE.write_text(page(noted()))
    MATRIX.write_text(matrix(noted()))
