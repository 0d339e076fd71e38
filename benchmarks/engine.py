"""Running a suite: what the store lacks is measured, costs first and alone, then runs side by side."""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import cloudpickle
import numpy as np
import tensorflow as tf

from trainstep.benchmarks import datasets, own, trial
from trainstep.benchmarks import workload as workloads
from trainstep.benchmarks.attack import Attack, check_examples
from trainstep.benchmarks.cost import COUNTED_MEMORY, cost_job
from trainstep.benchmarks.data import Split
from trainstep.benchmarks.environment import environment
from trainstep.benchmarks.errors import InvalidComparisonError, OutOfTimeError, WorkerDiedError
from trainstep.benchmarks.executors import ONE_THREAD, Here, Job, Outcome, Worker, cores, opener, work
from trainstep.benchmarks.progress import Progress
from trainstep.benchmarks.records import Cost, Run, Settings, key_of
from trainstep.benchmarks.runner import (
    Bench,
    Parcel,
    Task,
    Weights,
    fingerprint,
    get_ready,
    receive,
    run_job,
    spec_of,
)
from trainstep.benchmarks.sinks import Sink
from trainstep.benchmarks.store import Store
from trainstep.composition import Composition
from trainstep.errors import first_line

_BEAT = 5.0
"""Seconds between two signs of life in the store."""
_LOOK = 0.5
"""Seconds between two looks at what another suite is doing."""


class Suite(Protocol):
    """What is wanted, checked: see `trainstep.benchmarks.request.Suite`."""

    @property
    def tasks(self) -> Mapping[str, Task]: ...
    @property
    def compositions(self) -> Mapping[str, Composition]: ...
    @property
    def control(self) -> str: ...
    @property
    def seeds(self) -> Sequence[int]: ...


@dataclass(frozen=True)
class Options:
    """How a suite is run. Nothing of it changes a result."""

    workers: int | None = None
    """Processes at once; 1: all in this one; None: one for each core, where all can be sent to a process."""
    executor: str = "processes"
    """Or "ray"."""
    cost: bool = True
    """Whether costs are measured."""
    time_limit: float | None = None
    """Seconds a run may take, in a process of its own; None: as long as it takes."""
    retry_failed: bool = False
    """Whether runs and costs that are in the store as failures are tried again."""
    progress: bool | None = None
    """Whether progress is shown; None: where the error stream is a terminal."""
    sinks: Sequence[Sink] = field(default=())


class Place(NamedTuple):
    """What a run, or a cost without a seed, is of."""

    workload: str
    label: str
    seed: int | None = None

    def __str__(self) -> str:
        return self.label if self.seed is None else f"{self.label}, seed {self.seed}"


def run(suite: Suite, store: Store, options: Options) -> tuple[tuple[Run, ...], tuple[Cost, ...]]:
    """Measure what `store` lacks of `suite`, and return all of it under the suite's labels: by workload, seed, label.

    What fails is kept as a failure, with its reason, and not tried again unless that is asked for.

    Raises:
        InvalidComparisonError: there is no such executor, or something cannot be sent to another process.
        InvalidDataError, MissingDataError, InvalidModelError, NotAModelError: the data or the model are wrong.
    """
    if options.workers is not None and options.workers < 1:
        raise InvalidComparisonError(f"`workers` must be a positive integer, not {options.workers!r}.")
    tasks, initial = _fingerprinted(suite)
    engine = _Engine(suite, tasks, initial, store, options)
    store.add_suite(suite.control, engine.labels())
    with _beating(store):
        try:
            engine.work()
        finally:
            store.give_up()
    return engine.results()


def _fingerprinted(suite: Suite) -> tuple[dict[str, Task], dict[str, dict[int, Weights]]]:
    """Return the tasks, with a fingerprint in the settings of a user's own; and initial weights no seed decides.

    A user's own are tried on the way, before anything runs.
    """
    tasks, initial = dict(suite.tasks), {}
    for name, task in tasks.items():
        if task.settings.workload in workloads.names():
            _check_changes(task, suite.seeds[0], suite.compositions)
        elif task.settings.fingerprint is None:
            bench, seeds = Bench(task), tuple(suite.seeds)
            models = trial.two_models(bench, seeds[0])
            text, initial[name] = fingerprint(bench, seeds, models)
            trial.check(bench, models[0], suite.compositions)
            if task.settings.attack is not None:
                check_examples(bench.validation, Attack(**task.settings.attack))
            changes: dict[str, Any] = {"fingerprint": text}
            if isinstance(bench.split.train, tf.data.Dataset):
                changes["batch_size"] = None  # It has its own, which a function that returns it could not say before.
            settings = task.settings.model_copy(update=changes)
            tasks[name] = dataclasses.replace(task, settings=settings)
    return tasks, initial


def _check_changes(task: Task, seed: int, compositions: Mapping[str, Composition]) -> None:
    """Try a workload whose loss or metrics are not its own any more, or whose strategies need something of it.

    On zeros, as its data are not read here.
    """
    workload = workloads.get(task.settings.workload)
    needing = {label: composition for label, composition in compositions.items() if trial.needs(composition)}
    if (task.settings.loss, task.settings.metrics) == (workload.loss, workload.metrics) and not needing:
        return
    model: Any = Bench(task).new_model(seed)
    dtype = tf.as_dtype(model.inputs[0].dtype).as_numpy_dtype
    labels = tf.nest.map_structure(lambda _: np.zeros(2, "int64"), workload.classes)
    zeros = (np.zeros((2, *workload.input_shape), dtype), labels)
    split = Split(zeros, zeros)
    if own.takes_one_hot(task.loss):
        split = datasets.one_hot(split, workload.classes)
    bench = Bench(dataclasses.replace(task, load=lambda: split))
    trial.check(bench, model, needing, "Those of a workload are, where the loss is categorical_crossentropy.")


@contextlib.contextmanager
def _beating(store: Store) -> Iterator[None]:
    over = threading.Event()

    def beat() -> None:
        while not over.wait(_BEAT):
            store.beat()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class _Engine:
    def __init__(
        self,
        suite: Suite,
        tasks: dict[str, Task],
        initial: dict[str, dict[int, Weights]],
        store: Store,
        options: Options,
    ) -> None:
        self._suite, self._tasks, self._store, self._options = suite, tasks, store, options
        self._where = environment()
        self._specs = {label: spec_of(composition) for label, composition in suite.compositions.items()}
        self._tried: set[str] = set()
        self._parcel = Parcel(tasks, suite.compositions, initial)
        self._runs = {
            Place(workload, label, seed): self._key("run", tasks[workload].settings, label, seed)
            for workload in tasks
            for seed in suite.seeds
            for label in suite.compositions
        }
        self._costs = {
            Place(workload, label): self._key("cost", tasks[workload].settings, label)
            for workload in (tasks if options.cost else ())
            for label in suite.compositions
        }
        self._open: Callable[[Mapping[str, str]], Worker]
        self._workers = 1
        self._choose_workers()

    def _key(self, kind: str, settings: Settings, label: str, seed: int | None = None) -> str:
        return key_of(kind, self._specs[label], settings, self._where, seed)

    def labels(self) -> dict[str, list[str]]:
        """Return the labels by key."""
        labels: dict[str, list[str]] = {}
        for place, key in [*self._runs.items(), *self._costs.items()]:
            labels.setdefault(key, []).append(place.label)
        return labels

    def results(self) -> tuple[tuple[Run, ...], tuple[Cost, ...]]:
        """Return what the store has of the suite, under its labels."""
        runs = {run.key: run for run in self._store.runs(self._runs.values())}
        costs = {cost.key: cost for cost in self._store.costs(self._costs.values())}
        return (
            tuple(runs[key].model_copy(update={"label": place.label}) for place, key in self._runs.items()),
            tuple(costs[key].model_copy(update={"label": place.label}) for place, key in self._costs.items()),
        )

    # --- Where ------------------------------------------------------------------------------------

    def _choose_workers(self) -> None:
        """Decide how many workers there are, and of which kind."""
        options = self._options
        wanted = options.workers
        if wanted is None:
            wanted = max(1, min(cores(), len(self._runs)))
        if wanted == 1 and options.executor == "processes" and (options.workers == 1 or options.time_limit is None):
            self._open = self._open_here
            return
        try:
            pickled = cloudpickle.dumps(self._parcel)
        except Exception as error:
            if options.workers is not None or options.executor != "processes" or options.time_limit is not None:
                raise InvalidComparisonError(
                    "The model, the data or a strategy cannot be sent to another process: "
                    f"{first_line(error)}. Read data and make objects of Keras inside the functions, or use "
                    "workers=1 without a time limit."
                ) from error
            self._open = self._open_here
            return
        self._open = opener(options.executor, receive, pickled)
        self._workers = wanted

    def _open_here(self, environment: Mapping[str, str]) -> Worker:
        del environment
        return Here(receive, self._parcel)

    # --- What -------------------------------------------------------------------------------------

    def _left(self, places: Mapping[Place, str]) -> dict[str, Place]:
        """Return what is still to do, by key."""
        ended = self._store.ended()
        again = self._options.retry_failed
        return {
            key: place
            for place, key in places.items()
            if key not in ended or (again and ended[key] and key not in self._tried)
        }

    def _start(self, key: str) -> bool:
        started = self._store.start(key, again=self._options.retry_failed and key not in self._tried)
        if started:
            self._tried.add(key)
        return started

    def work(self) -> None:
        """Do all there is to do. What another suite is at is waited for."""
        with contextlib.ExitStack() as stack:
            runs, costs = self._left(self._runs), self._left(self._costs)
            bench = self._opened(stack, {**COUNTED_MEMORY, "TF_CPP_MIN_LOG_LEVEL": "3"}) if costs else None
            workers = [self._opened(stack, ONE_THREAD) for _ in range(min(self._workers, len(runs)))]
            self._get_ready([*workers, *([bench] if bench else [])], runs, costs)
            failed = sum(self._store.ended().get(key, False) for key in self._runs.values())
            done = len(self._runs) - len(runs)
            bar = stack.enter_context(Progress(len(self._runs), done, failed, shown=self._options.progress))
            for sink in self._options.sinks:
                for run in self._store.runs(key for key in self._runs.values() if key not in runs):
                    sink.add(run)
            while costs or runs:
                before = len(costs) + len(runs)
                if costs and bench is not None:
                    bar.say("cost of a step")
                    self._measure_costs(bench, costs)
                if runs:
                    self._do_runs(workers, runs, bar)
                runs, costs = self._left(self._runs), self._left(self._costs)
                if len(costs) + len(runs) == before:
                    bar.say("another suite is at the rest")
                    time.sleep(_LOOK)

    def _opened(self, stack: contextlib.ExitStack, environment: Mapping[str, str]) -> Worker:
        worker = self._open(environment)
        stack.callback(worker.stop)
        return worker

    def _get_ready(self, workers: Sequence[Worker], runs: Mapping[str, Place], costs: Mapping[str, Place]) -> None:
        """Start the workers, all at once, before anything is on a clock."""
        names = list(dict.fromkeys(place.workload for place in [*runs.values(), *costs.values()]))
        jobs = [Job(str(index), index, get_ready, (names,)) for index in range(len(workers))]
        for outcome in work(jobs, workers, lambda job: True):
            if outcome.error is not None:
                raise outcome.error  # Data that are not there, for example: not the fault of a run.

    # --- Costs ------------------------------------------------------------------------------------

    def _measure_costs(self, bench: Worker, left: Mapping[str, Place]) -> None:
        for workload in dict.fromkeys(place.workload for place in left.values()):
            keys = {key: place.label for key, place in left.items() if place.workload == workload}
            mine = {key: label for key, label in keys.items() if self._start(key)}
            if mine and not self._measure(bench, workload, mine):
                for key, label in mine.items():  # One of them took the process with it.
                    if not self._measure(bench, workload, {key: label}):
                        self._store.add_cost(self._failed_cost(workload, label, self._death))

    def _measure(self, bench: Worker, workload: str, labels: Mapping[str, str]) -> bool:
        """Measure the costs of `labels`, by key, and return False where the process died of it."""
        limit = self._options.time_limit
        arguments = (workload, list(labels.values()), self._suite.control, self._suite.seeds[0])
        try:
            costs = bench.call(cost_job, *arguments, limit=limit and limit * (1 + len(labels)))
        except (WorkerDiedError, OutOfTimeError) as error:
            self._death = first_line(error)
            return False
        except Exception as error:  # noqa: BLE001  Such as data that are wrong: all share it.
            costs = [self._failed_cost(workload, label, first_line(error)) for label in labels.values()]
        for cost in costs:
            if cost.key in labels:
                self._store.add_cost(cost)
        return True

    def _failed_cost(self, workload: str, label: str, reason: str) -> Cost:
        return Cost(failure=reason, **self._shared(self._costs, Place(workload, label)))

    # --- Runs -------------------------------------------------------------------------------------

    def _do_runs(self, workers: Sequence[Worker], left: Mapping[str, Place], bar: Progress) -> None:
        jobs = [Job(key, (place.workload, place.label), run_job, tuple(place)) for key, place in left.items()]
        outcomes = work(jobs, workers, lambda job: self._start(job.key), self._options.time_limit)
        with contextlib.closing(outcomes):  # Whatever happens here: nobody begins another run.
            for outcome in outcomes:
                place = left[outcome.job.key]
                if outcome.result is None and outcome.error is None:
                    bar.begin(outcome.job.key, str(place))
                    continue
                run = self._run_of(place, outcome)
                self._store.add_run(run)
                bar.end(run.key, failed=run.failure is not None)
                for sink in self._options.sinks:
                    sink.add(run)

    def _run_of(self, place: Place, outcome: Outcome) -> Run:
        if outcome.error is None:
            # Under the key this suite knows it by: a worker elsewhere may have another Python.
            return outcome.result.model_copy(update={"key": outcome.job.key})
        assert place.seed is not None
        return Run(failure=first_line(outcome.error), seed=place.seed, **self._shared(self._runs, place))

    def _shared(self, places: Mapping[Place, str], place: Place) -> dict[str, Any]:
        return {
            "key": places[place],
            "label": place.label,
            "spec": self._specs[place.label],
            "settings": self._tasks[place.workload].settings,
            "environment": self._where,
        }
