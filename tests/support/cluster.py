"""Several processes that train one model, on this machine: each is told of the others by TF_CONFIG."""

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Ended(NamedTuple):
    """How a process ended, and what it wrote."""

    returncode: int
    output: str


@contextlib.contextmanager
def ports(count: int) -> Iterator[list[str]]:
    """Yield addresses on this machine with ports that nobody else is given meanwhile."""
    with contextlib.ExitStack() as stack:
        # Bound all the time. Two sockets may share a port where both say SO_REUSEADDR, as that of TensorFlow does, and
        # only one of them listens.
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            each.bind(("", 0))
        yield [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]


def run(arguments: Sequence[str], folder: pathlib.Path, *, workers: int = 2, timeout: float = 500) -> list[Ended]:
    """Run a Python script in `workers` processes until all have ended; logs go to `folder`.

    Where one fails, the rest are killed soon after, as whoever runs a cluster does before it starts the job anew.

    Raises:
        TimeoutError: they were still running after `timeout` seconds. None is left then, either.
    """
    with contextlib.ExitStack() as stack:
        addresses = stack.enter_context(ports(workers))
        processes, logs = [], [folder / f"worker-{index}.log" for index in range(workers)]
        try:
            for index, log in enumerate(logs):
                environment = {
                    **os.environ,
                    "TF_CONFIG": json.dumps(
                        {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
                    ),
                    "TF_CPP_MIN_LOG_LEVEL": "3",
                    "PYTHONPATH": os.path.dirname(__file__),
                }
                command = [sys.executable, *arguments]
                output = stack.enter_context(log.open("w"))
                processes.append(subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT))
            _wait(processes, time.monotonic() + timeout)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.wait()
        return [Ended(process.returncode, log.read_text()) for process, log in zip(processes, logs, strict=True)]


def _wait(processes: list[subprocess.Popen], deadline: float) -> None:
    failed_at = None
    while any(process.poll() is None for process in processes):
        now = time.monotonic()
        if failed_at is None and any(process.poll() for process in processes):
            failed_at = now
        if failed_at is not None and now > failed_at + 2:
            return
        if now > deadline:
            raise TimeoutError("The processes hang.")
        time.sleep(0.1)
