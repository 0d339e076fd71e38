"""Records of a comparison: frozen, and one JSON line each, that stands by itself."""

from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from trainstep.benchmarks.errors import InvalidComparisonError, InvalidDataError


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class Settings(_Record):
    """What all cells of a comparison share."""

    workload: str
    epochs: int
    batch_size: int | None
    """Examples; None where a `tf.data.Dataset` brought its own batches."""
    optimizer: dict[str, Any]
    """Its class name, and its settings where they are scalars."""
    loss: str
    metric: str
    """Measured on the validation examples after each epoch."""
    attack: dict[str, Any] | None
    """The budget of the attack behind the robust accuracy; None where there is none."""


class StepCost(_Record):
    """Seconds a step, against the control, from slices of training that took turns in one process."""

    trace_seconds: float
    """Duration of the first step: tracing, compilation and the step itself."""
    seconds: float
    """Duration of each step after it: median over the rounds."""
    ratio: float | None
    """To the control in the same round: median over the rounds; None where the control has no time."""
    low: float | None
    """Lower quartile of the ratio."""
    high: float | None
    """Upper quartile of the ratio."""


class Cell(_Record):
    """One strategy, or composition, trained with one seed."""

    label: str
    spec: dict[str, dict[str, Any]]
    """All options by strategy name, outermost strategy first."""
    seed: int
    losses: tuple[float, ...] = ()
    """Training loss of each epoch: the mean over its steps, of the objective the strategy minimizes."""
    metrics: tuple[float, ...] = ()
    """Validation metric after each epoch."""
    robust_accuracy: float | None = None
    """From 0 to 1; None for the reason in `not_robust`."""
    not_robust: str | None = None
    step_seconds: float | None = None
    """Median duration of the steps of this cell but the first. For comparing strategies take `cost`."""
    cost: StepCost | None = None
    not_costed: str | None = None
    """Class and first line of what kept the cost from being measured."""
    failure: str | None = None
    """Class and first line of what ended the training early; None where it ended as planned."""
    settings: Settings
    environment: dict[str, str]
    """Versions and machine."""


def free_folder(folder: Path) -> Path:
    """Return `folder`, made where needed, or a new one in it, named by date and time, where it holds results.

    Raises:
        InvalidComparisonError: it cannot be made, or is a file.
    """
    try:
        return _free_folder(folder)
    except OSError as error:
        raise InvalidComparisonError(f"Nothing can be written to output={str(folder)!r}: {error.strerror}.") from error


def _free_folder(folder: Path) -> Path:
    taken = any((folder / name).exists() for name in ("results.jsonl", "report.html"))
    if not taken:
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    stamp = datetime.now(timezone.utc).strftime("%Y-%m-%d_%H-%M-%S")
    free, number = folder / stamp, 1
    while free.exists():
        number += 1
        free = folder / f"{stamp}_{number}"
    free.mkdir()
    return free


def write_line(path: Path, cell: Cell) -> None:
    """Append `cell` to the file `path` as one line of JSON."""
    with path.open("a", encoding="utf-8") as file:
        file.write(cell.model_dump_json() + "\n")


def read_lines(path: Path) -> list[Cell]:
    """Return the cells of a file that `write_line` wrote.

    Raises:
        InvalidDataError: a line is not such a record; the message names file and line.
    """
    return list(_parsed(path, path.read_text(encoding="utf-8").splitlines()))


def _parsed(path: Path, lines: Iterable[str]) -> Iterable[Cell]:
    for number, line in enumerate(lines, start=1):
        try:
            yield Cell.model_validate_json(line)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            place = ".".join(str(part) for part in problem["loc"])
            raise InvalidDataError(f"{path}, line {number}: {place}: {problem['msg']}.") from error
