"""What a suite of runs leaves behind: frozen records, each of which stands by itself.

A *run* is one composition trained on one workload with one seed; it says what a strategy is good for. A
*cost* is one composition on one workload, measured alone and in turns with the control; it says what a
step takes. The two are never mixed: runs share the machine with other runs, and their times say nothing.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """Base of all records: immutable, and closed to fields it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class Budget(Record):
    """When a run ends: after so many passes over the data, updates, or seconds of training. One of them is given."""

    epochs: int | None = None
    updates: int | None = None
    """Steps of `fit`."""
    seconds: float | None = None
    """Of training, compilation included and evaluation left out."""


class Target(Record):
    """The value of a validation metric whose first crossing is waited for."""

    metric: str
    value: float
    higher_is_better: bool = True


class Settings(Record):
    """What all runs of one workload share; all of it is part of the key of a run."""

    workload: str
    noise: float = 0.0
    """Share of training labels replaced at random."""
    budget: Budget
    batch_size: int | None
    """Examples; None where a `tf.data.Dataset` brought its own batches."""
    optimizer: dict[str, Any]
    """Its class name, and its settings where they are plain values, its schedule included."""
    loss: str | dict[str, str | None] | tuple[str | None, ...]
    """Its name; of several outputs the names by output, or in their order."""
    metrics: tuple[str, ...]
    """Measured on the validation examples after each epoch; verdicts are on the first."""
    objects: dict[str, Any] = {}
    """Of a loss or metrics that are no names: their options or their code, by "loss" and "metrics"."""
    higher_is_better: bool = True
    """Of the first metric."""
    attack: dict[str, Any] | None = None
    """The budget of the attack behind the robust accuracy; None where there is none."""
    target: Target | None = None
    examples: int | None = None
    """Training examples; None where a dataset does not say."""
    fingerprint: str | None = None
    """Of a user's own model and data, so that runs of others are not taken for theirs; None where the name of the
    workload says all."""


class Epoch(Record):
    """What was known at the end of one pass over the data, or of the part of one that the budget left."""

    updates: int
    """Steps since the run began."""
    seconds: float
    """Of training since the run began: tracing and compilation included, evaluation left out."""
    loss: float
    """Training loss: the mean over the steps of this epoch, of the objective the strategy minimizes."""
    metrics: dict[str, float]
    """Validation metrics by name."""


class Run(Record):
    """One composition, one workload, one seed."""

    key: str
    label: str
    spec: dict[str, dict[str, Any]]
    """All options by strategy name, outermost strategy first."""
    seed: int
    """Of initial weights, order of the data, and augmentation: shared by all compositions, so that runs are paired."""
    settings: Settings
    environment: dict[str, str]
    """Versions and machine."""
    epochs: tuple[Epoch, ...] = ()
    robust_accuracy: float | None = None
    """From 0 to 1, under the attack of the settings; None for the reason in `not_robust`."""
    not_robust: str | None = None
    calibration_error: float | None = None
    """Expected calibration error, from 0 to 1, on the validation examples; None for the reason in `not_calibrated`."""
    not_calibrated: str | None = None
    failure: str | None = None
    """Class and first line of what ended the run early; None where it ended as planned."""

    @property
    def metric(self) -> float | None:
        """The first metric after the last epoch; None for a run that did not get there."""
        if self.failure is not None or not self.epochs:
            return None
        return self.epochs[-1].metrics[self.settings.metrics[0]]


class Cost(Record):
    """What a step of one composition on one workload takes, measured alone, in turns with the control."""

    key: str
    label: str
    spec: dict[str, dict[str, Any]]
    settings: Settings
    environment: dict[str, str]
    trace_seconds: float | None = None
    """Duration of the first step: tracing, compilation and the step itself."""
    seconds: tuple[float, float, float] | None = None
    """Of a step after it: lower quartile, median and upper quartile over the rounds."""
    ratio: tuple[float, float, float] | None = None
    """To the control in the same round, likewise; None where the control has no time."""
    examples_per_second: float | None = None
    peak_bytes: int | None = None
    """Most memory that tensors took during a step, over what they took before it."""
    memory_ratio: float | None = None
    """Of `peak_bytes` to the control's."""
    failure: str | None = None
    """Class and first line of what kept the cost from being measured."""


VERSIONS = ("trainstep", "keras", "tensorflow", "python")
"""What of the environment is part of a key: with other versions a run is another run."""


def key_of(
    kind: str, spec: Mapping[str, Any], settings: Settings, environment: Mapping[str, str], seed: int | None = None
) -> str:
    """Return what identifies a run or a cost: a hash of all that decides its outcome.

    Args:
        kind: "run" or "cost".
        spec: all options by strategy name. The label is not part of it: a name is not what was measured.
        settings: of the workload.
        environment: of which the `VERSIONS` count; a cost also depends on the processor.
        seed: of a run.
    """
    versions = {name: environment[name] for name in VERSIONS}
    machine = {"processor": environment["processor"]} if kind == "cost" else {}
    told = settings.model_dump(mode="json")
    if not told["objects"]:
        del told["objects"]  # Keys are those of before there were any.
    content = [kind, spec, told, versions, machine, seed]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]
