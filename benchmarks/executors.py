"""Where runs happen: in this process, in processes of this machine, or in those of a Ray cluster.

A worker does one thing at a time, and keeps what it has imported, read and traced for the next. Each process is a pool
of its own, so that when one dies, or is ended because a run takes too long, it is known which run it was, and no other
is touched. What comes after gets a new process.

    joblib's loky    processes of this machine
    Ray              actors of a cluster, an extra: pip install trainstep[ray]
"""

import concurrent.futures.process
import contextlib
import functools
import importlib.util
import os
import queue
import re
import signal
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import cloudpickle

# The library of joblib's own process pool, under `concurrent.futures`' interface. Imported here, and not where it is
# first needed: that is in several threads at once, and one could see it half imported.
from joblib.externals.loky import ProcessPoolExecutor

import trainstep_cli
from trainstep.benchmarks.errors import InvalidComparisonError, OutOfTimeError, WorkerDiedError

EXECUTORS = ("processes", "ray")

ONE_THREAD = {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1"}
"""Environment of a worker among others: as many workers as cores would fight over them with a pool of threads each."""


class Worker(ABC):
    """Something that calls functions, one after the other, in one process."""

    @abstractmethod
    def call(self, function: Callable[..., Any], *arguments: Any, limit: float | None = None) -> Any:
        """Return what `function` returns, and raise what it raises.

        Args:
            function: picklable by cloudpickle, as are its arguments and what it returns.
            *arguments: of it.
            limit: seconds it may take.

        Raises:
            WorkerDiedError: the process ended.
            OutOfTimeError: the limit was reached, and the process ended for it.
        """

    @abstractmethod
    def stop(self) -> None:
        """End the process, whatever it is doing."""


class Here(Worker):
    """This process. What crashes here crashes the suite, and what hangs here hangs it."""

    def __init__(self, receive: Callable[..., None], *arguments: Any) -> None:
        receive(*arguments)

    def call(self, function: Callable[..., Any], *arguments: Any, limit: float | None = None) -> Any:
        del limit
        return function(*arguments)

    def stop(self) -> None:
        pass


class LocalProcess(Worker):
    """A process of this machine. It starts at the first call, and ends when this process does."""

    def __init__(self, environment: Mapping[str, str], receive: Callable[..., None], *arguments: Any) -> None:
        """Prepare the process.

        Args:
            environment: variables to set before it imports anything.
            receive: called first in it, and quickly: what it raises cannot be told from a crash.
            *arguments: of `receive`.
        """
        self._environment, self._receive, self._arguments = dict(environment), receive, arguments
        self._pool: Any = None

    def call(self, function: Callable[..., Any], *arguments: Any, limit: float | None = None) -> Any:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                max_workers=1,
                env=self._environment,
                initializer=trainstep_cli.start_quietly,
                initargs=(cloudpickle.dumps(functools.partial(_start, os.getpid(), self._receive)), *self._arguments),
            )
            if limit is not None:
                self._pool.submit(_nothing).result()  # Its start, with the import of TensorFlow, is off the clock.
        future = self._pool.submit(function, *arguments)
        try:
            return future.result(limit)
        except concurrent.futures.TimeoutError as error:
            if future.done():  # The function's own.
                raise
            self.stop()
            raise OutOfTimeError(f"not done after {limit:g} seconds, the limit of a run") from error
        except concurrent.futures.process.BrokenProcessPool as error:
            self.stop()
            raise WorkerDiedError(_cause_of_death(str(error))) from error

    def stop(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(kill_workers=True)
            self._pool = None


class RayActor(Worker):
    """An actor of a Ray cluster: the one this process is connected to, else that of RAY_ADDRESS, else a local one."""

    def __init__(self, environment: Mapping[str, str], receive: Callable[..., None], *arguments: Any) -> None:
        """Prepare the actor; see `LocalProcess`."""
        self._environment, self._receive, self._arguments = dict(environment), receive, arguments
        self._actor: Any = None

    def call(self, function: Callable[..., Any], *arguments: Any, limit: float | None = None) -> Any:
        import ray  # noqa: PLC0415  An extra.
        import ray.exceptions  # noqa: PLC0415

        if self._actor is None:
            options = {"num_cpus": 1, "max_restarts": 0, "runtime_env": {"env_vars": self._environment}}
            self._actor = ray.remote(**options)(_Actor).remote(sys.path, self._receive, *self._arguments)
            if limit is not None:
                ray.get(self._actor.call.remote(_nothing))
        try:
            return ray.get(self._actor.call.remote(function, *arguments), timeout=limit)
        except ray.exceptions.GetTimeoutError as error:
            self.stop()
            raise OutOfTimeError(f"not done after {limit:g} seconds, the limit of a run") from error
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error  # What the function raised.
        except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
            self.stop()
            raise WorkerDiedError(_cause_of_death(str(error))) from error

    def stop(self) -> None:
        import ray  # noqa: PLC0415
        import ray.exceptions  # noqa: PLC0415

        if self._actor is not None:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(self._actor)
            self._actor = None


class _Actor:
    def __init__(self, path: list[str], receive: Callable[..., None], *arguments: Any) -> None:
        sys.path.extend(folder for folder in path if folder not in sys.path)  # A user's modules, where they are there.
        receive(*arguments)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)


def opener(executor: str, receive: Callable[..., None], *arguments: Any) -> Callable[[Mapping[str, str]], Worker]:
    """Return the function that makes a worker, given the environment variables of its process.

    Raises:
        InvalidComparisonError: there is no such executor, or its library is not installed.
    """
    if executor not in EXECUTORS:
        raise InvalidComparisonError(f"`executor` is one of {', '.join(map(repr, EXECUTORS))}, not {executor!r}.")
    if executor == "processes":
        return lambda environment: LocalProcess(environment, receive, *arguments)
    if importlib.util.find_spec("ray") is None:
        raise InvalidComparisonError('executor="ray" needs Ray: pip install "trainstep[ray]".')
    import ray  # noqa: PLC0415

    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    shared = [ray.put(argument) for argument in arguments]  # Once into the cluster, and not once for each actor.
    return lambda environment: RayActor(environment, receive, *shared)


# --- Many workers ---------------------------------------------------------------------------------


class Job(NamedTuple):
    """Something to call."""

    key: str
    group: Any
    """What has it in common with others that a worker does the faster for having done one of them."""
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


class Outcome(NamedTuple):
    """What came of a job: a result, or the error that kept it from having one. Neither: it has only begun."""

    job: Job
    result: Any = None
    error: Exception | None = None


def work(
    jobs: Sequence[Job], workers: Sequence[Worker], take: Callable[[Job], bool], limit: float | None = None
) -> Generator[Outcome, None, None]:
    """Do `jobs`, and yield for each its beginning and its end, in the order in which they happen.

    A worker stays with a group as long as there is something left of it; then it takes one that nobody has touched;
    then it helps where most is left.

    Args:
        jobs: what to do.
        workers: who does it. One that is `Here` works in this thread.
        take: asked before a job begins; where it says no, the job is left out.
        limit: seconds a job may take.
    """
    left = _Groups(jobs, take)
    if len(workers) == 1:
        yield from _work(workers[0], left, limit)
        return
    events: queue.SimpleQueue[Outcome | BaseException | None] = queue.SimpleQueue()

    def run(worker: Worker) -> None:
        try:
            for outcome in _work(worker, left, limit):
                events.put(outcome)
        except BaseException as error:  # noqa: BLE001  Raised where somebody listens.
            events.put(error)
        events.put(None)

    for worker in workers:
        threading.Thread(target=run, args=(worker,), daemon=True).start()
    running = len(workers)
    try:
        while running:
            event = events.get()
            if isinstance(event, BaseException):
                raise event
            if event is None:
                running -= 1
            else:
                yield event
    finally:
        left.clear()


def _work(worker: Worker, left: "_Groups", limit: float | None) -> Iterator[Outcome]:
    done: list[Any] = []
    while (job := left.next(done)) is not None:
        yield Outcome(job)
        try:
            yield Outcome(job, result=worker.call(job.function, *job.arguments, limit=limit))
        except Exception as error:  # noqa: BLE001  It is the job's outcome; the others go on.
            yield Outcome(job, error=error)


class _Groups:
    """The jobs that nobody has begun."""

    def __init__(self, jobs: Sequence[Job], take: Callable[[Job], bool]) -> None:
        self._take = take
        self._lock = threading.Lock()
        self._touched: set[Any] = set()
        self._jobs: dict[Any, list[Job]] = {}
        for job in jobs:
            self._jobs.setdefault(job.group, []).append(job)

    def next(self, done: list[Any]) -> Job | None:
        """Return what to do next for one who has done something of the groups `done`, which is added to."""
        while True:
            with self._lock:
                group = self._choose(done)
                if group is None:
                    return None
                job = self._jobs[group].pop(0)
                if not self._jobs[group]:
                    del self._jobs[group]
                self._touched.add(group)
            if self._take(job):
                if group in done:
                    done.remove(group)
                done.append(group)
                return job

    def _choose(self, done: list[Any]) -> Any:
        own = [group for group in reversed(done) if group in self._jobs]
        fresh = [group for group in self._jobs if group not in self._touched]
        others = sorted(self._jobs, key=lambda group: -len(self._jobs[group]))
        return next(iter([*own, *fresh, *others]), None)

    def clear(self) -> None:
        """Leave out all that is left."""
        with self._lock:
            self._jobs.clear()


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Not on every platform; in a container less than the machine has.
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# --- In the process of a worker -------------------------------------------------------------------


def _start(parent: int, receive: Callable[..., None], *arguments: Any) -> None:
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        # The suite was killed. Nobody waits for what is done here, and another may do it already.
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))

    threading.Thread(target=watch, daemon=True).start()
    receive(*arguments)


def _nothing() -> None:
    pass


def _cause_of_death(message: str) -> str:
    if re.search(r"SIGKILL|OutOfMemory|out of memory|memory pressure", message):
        return "its process was killed (SIGKILL), as the system does when memory runs out"
    codes = re.search(r"exit codes of the workers are \{(.*?)\}", message)  # As loky says it.
    if codes:
        return f"its process ended by itself: {codes[1]}"
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return f"its process ended by itself: {lines[0] if lines else 'no reason known'}"
