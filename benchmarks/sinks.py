"""Runs where people look at runs: TensorBoard and MLflow. Both get what is in the records, and nothing else.

A run that is there already stays as it is, so that a suite that goes on enters what is new.
"""

import hashlib
import importlib
import importlib.util
import json
import math
import os
import re
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from trainstep.benchmarks.errors import InvalidComparisonError
from trainstep.benchmarks.records import Run


class Sink(ABC):
    """Takes runs as they end."""

    @abstractmethod
    def add(self, run: Run) -> None:
        """Enter `run`, unless it is there."""


class TensorBoard(Sink):
    """A folder for `tensorboard --logdir`: scalars of each run by epoch, and the table of HParams."""

    def __init__(self, folder: str | Path) -> None:
        """Take `folder`, made where needed.

        Raises:
            InvalidComparisonError: it cannot be made; or TensorBoard is not installed, which TensorFlow brought up
                to 2.20.
        """
        if importlib.util.find_spec("tensorboard") is None:
            raise InvalidComparisonError('`tensorboard=` needs TensorBoard: pip install "trainstep[tensorboard]".')
        self._folder = _made(Path(folder), "tensorboard", folder)

    def add(self, run: Run) -> None:
        # Its own writer and records: `tf.summary` needs the package as well since TensorFlow 2.21, and the graph.
        from tensorboard.plugins.hparams import api, summary  # noqa: PLC0415

        path = self._folder / _file_name(run.settings.workload, run.label) / f"seed_{run.seed}_{run.key[:8]}"
        if path.exists():
            return
        part = path.with_name(f".{path.name}.{os.getpid()}")  # Whole, or not there.
        shutil.rmtree(part, ignore_errors=True)
        statuses = _module("tensorboard.plugins.hparams.api_pb2").Status
        status = statuses.STATUS_FAILURE if run.failure else statuses.STATUS_SUCCESS
        with _events(part) as add:
            add(api.hparams_pb(dict(hyperparameters(run)), trial_id=f"{run.label}, seed {run.seed}"))
            for name, value, step in scalars(run):
                add(_scalar(name, value), step)
            add(summary.session_end_pb(status))
        part.rename(path)


class _events:  # noqa: N801  A context manager, as those of contextlib.
    def __init__(self, folder: Path) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter  # noqa: PLC0415

        self._writer = EventFileWriter(str(folder))

    def __enter__(self) -> Any:
        return self._add

    def __exit__(self, *exception: object) -> None:
        self._writer.close()

    def _add(self, summary: Any, step: int = 0) -> None:
        # TensorBoard's records, but where TensorFlow is there some of its functions make TensorFlow's.
        own = _module("tensorboard.compat.proto.summary_pb2").Summary.FromString(summary.SerializeToString())
        event = _module("tensorboard.compat.proto.event_pb2").Event
        self._writer.add_event(event(summary=own, step=step, wall_time=time.time()))


def _scalar(name: str, value: float) -> Any:
    summary = _module("tensorboard.compat.proto.summary_pb2").Summary
    return summary(value=[summary.Value(tag=name, simple_value=value)])


def _module(name: str) -> Any:
    # What protoc generates has no types.
    return importlib.import_module(name)


class MLflow(Sink):
    """An experiment of MLflow for each workload, a run of it for each run."""

    def __init__(self, where: str | Path) -> None:
        """Take the server, or the file, at `where`.

        Args:
            where: an address as MLflow has them, such as "http://localhost:5000" or "sqlite:///mlflow.db"; or the path
                of an SQLite file, made where needed.

        Raises:
            InvalidComparisonError: MLflow is not installed, or the folder of the file cannot be made.
        """
        if importlib.util.find_spec("mlflow") is None:
            raise InvalidComparisonError('`mlflow=` needs MLflow: pip install "trainstep[mlflow]".')
        from mlflow import MlflowClient  # noqa: PLC0415  An extra, and slow to import.

        address = str(where)
        if "://" not in address and address != "databricks":
            _made(Path(address).parent, "mlflow", where)
            address = f"sqlite:///{Path(address).absolute()}"
        self._client: Any = MlflowClient(tracking_uri=address)
        self._experiments: dict[str, str] = {}

    def add(self, run: Run) -> None:
        from mlflow.entities import Metric, Param  # noqa: PLC0415

        experiment = self._experiment(run.settings.workload)
        if self._client.search_runs([experiment], f"tags.`trainstep.key` = '{run.key}'", max_results=1):
            return
        tags = {"trainstep.key": run.key, "mlflow.runName": f"{run.label}, seed {run.seed}"}
        if run.failure:
            tags["trainstep.failure"] = run.failure
        entered = self._client.create_run(experiment, tags=tags).info.run_id
        now = int(1000 * time.time())
        params = [Param(_mlflow_name(name), str(value)) for name, value in hyperparameters(run)]
        metrics = [Metric(_mlflow_name(name), value, now, step) for name, value, step in scalars(run)]
        for chunk in _chunks(params, 100):  # As many as a server takes at once.
            self._client.log_batch(entered, params=chunk)
        for chunk in _chunks(metrics, 1000):
            self._client.log_batch(entered, metrics=chunk)
        self._client.set_terminated(entered, status="FAILED" if run.failure else "FINISHED")

    def _experiment(self, workload: str) -> str:
        name = f"trainstep {workload}"
        if name not in self._experiments:
            known = self._client.get_experiment_by_name(name)
            self._experiments[name] = known.experiment_id if known else self._client.create_experiment(name)
        return self._experiments[name]


def hyperparameters(run: Run) -> Iterator[tuple[str, bool | int | float | str]]:
    """Yield what was chosen for `run`, by name: label, workload, seed, each option of each strategy."""
    yield "strategy", run.label
    yield "workload", run.settings.workload
    yield "noise", run.settings.noise
    yield "seed", run.seed
    yield "batch_size", run.settings.batch_size or "of the dataset"
    for name, value in run.settings.optimizer.items():
        yield f"optimizer.{name}", _plain(value)
    for strategy, options in run.spec.items():
        for name, value in options.items():
            yield f"{strategy}.{name}", _plain(value)


def scalars(run: Run) -> Iterator[tuple[str, float, int]]:
    """Yield the numbers of `run`: name, value, and the epoch, from 1."""
    for number, epoch in enumerate(run.epochs, start=1):
        yield "loss", epoch.loss, number
        yield "updates", float(epoch.updates), number
        yield "seconds", epoch.seconds, number
        for name, value in epoch.metrics.items():
            yield f"validation/{name}", value, number
    last = len(run.epochs)
    if run.robust_accuracy is not None:
        yield "robust_accuracy", run.robust_accuracy, last
    if run.calibration_error is not None:
        yield "calibration_error", run.calibration_error, last


def sinks(tensorboard: str | Path | None, mlflow: str | Path | None) -> list[Sink]:
    """Return those that were asked for."""
    chosen: list[Sink] = []
    if tensorboard is not None:
        chosen.append(TensorBoard(tensorboard))
    if mlflow is not None:
        chosen.append(MLflow(mlflow))
    return chosen


def _plain(value: Any) -> bool | int | float | str:
    if isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return json.dumps(value)


def _made(folder: Path, name: str, given: str | Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidComparisonError(f"Nothing can be written to {name}={str(given)!r}: {error.strerror}.") from error
    return folder


def _file_name(*parts: str) -> Path:
    """Return a path of names that every system takes, that stay where they belong, and that TensorBoard shows."""
    return Path(*(_one_file_name(part) for part in parts))


def _one_file_name(text: str) -> str:
    plain = re.sub(r"[^\w.,=+-]+", "_", text)
    plain = f"_{plain.lstrip('.')}" if plain.startswith(".") else plain  # Hidden, or the folder above.
    if len(plain.encode()) <= _LONGEST_NAME:
        return plain
    end = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{plain.encode()[: _LONGEST_NAME - 9].decode(errors='ignore')}_{end}"


_LONGEST_NAME = 120
"""Bytes; most systems take 255, and other names follow on the same path."""


def _mlflow_name(name: str) -> str:
    return re.sub(r"[^\w./ -]+", "_", name)


def _chunks(values: list[Any], size: int) -> Iterable[list[Any]]:
    return (values[begin : begin + size] for begin in range(0, len(values), size))
