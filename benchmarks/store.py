"""Where runs and costs are kept: one file, an SQLite database, a row as soon as something ends.

    with Store("results.sqlite") as store:
        store.add_run(run)
        store.runs()

Several suites may use one file at once: each marks what it is doing, and beats while it lives, so that another does
something else meanwhile, and takes over what a dead one left. A mark that is taken over too early costs a run done
twice, and nothing else: runs of one key are the same.

The file is in write-ahead mode, which SQLite has on local disks only.
"""

import json
import os
import socket
import sqlite3
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

from pydantic import ValidationError

from trainstep.benchmarks.errors import StoreError
from trainstep.benchmarks.records import Cost, Run

APPLICATION = 0x7472_7374
"""What SQLite's `application_id` is in a store: "trst"."""
LAYOUT = 1
"""Of the tables."""
SILENCE = 60.0
"""Seconds without a beat after which a suite counts as dead."""

_SCHEMA = """
CREATE TABLE runs (key TEXT PRIMARY KEY, failed INTEGER NOT NULL, record TEXT NOT NULL);
CREATE TABLE costs (key TEXT PRIMARY KEY, failed INTEGER NOT NULL, record TEXT NOT NULL);
CREATE TABLE started (key TEXT PRIMARY KEY, host TEXT NOT NULL, pid INTEGER NOT NULL, suite TEXT NOT NULL,
    since REAL NOT NULL, beat REAL NOT NULL);
CREATE TABLE suites (id INTEGER PRIMARY KEY, control TEXT NOT NULL, labels TEXT NOT NULL, since REAL NOT NULL);
"""

RecordT = TypeVar("RecordT", Run, Cost)


class Mark(NamedTuple):
    """Who is doing something, and since when."""

    host: str
    pid: int
    suite: str
    """Random: a process may run several suites."""
    since: float
    """Seconds since 1970."""
    beat: float
    """The last sign of life, likewise."""

    @property
    def alive(self) -> bool:
        """Whether the suite is still at it, as far as can be known from here."""
        if self.host == socket.gethostname() and not _exists(self.pid):
            return False
        return time.time() - self.beat < SILENCE


class Suite(NamedTuple):
    """One call of `compare`: which rows it is about."""

    control: str
    labels: dict[str, tuple[str, ...]]
    """Labels by the key of a run or a cost. Two labels may stand for the same."""


class Store:
    """An SQLite file of runs and costs. May be used from several threads, and from several processes."""

    def __init__(self, path: str | Path, *, create: bool = True) -> None:
        """Open the store at `path`.

        Args:
            path: of the file.
            create: make it, and its folder, where it is missing.

        Raises:
            StoreError: it is missing, cannot be written, is no store, or one of a newer version.
        """
        self.path = Path(path)
        self._suite = os.urandom(8).hex()
        self._lock = threading.RLock()
        if not create and not self.path.exists():
            raise StoreError(f"There is no store {str(self.path)!r}.")
        if self.path.is_dir():
            within = sorted(str(path) for path in self.path.glob("*.sqlite"))
            hint = f" Did you mean {within[0]!r}?" if within else ""
            raise StoreError(f"A store is a file, and {str(self.path)!r} is a folder.{hint}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Autocommit; and a minute of waiting for other writers, who need milliseconds each.
            self._connection = sqlite3.connect(self.path, timeout=60, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"Nothing can be written to {str(self.path)!r}: {_reason(error)}.") from error
        try:
            self._prepare()
        except sqlite3.Error as error:
            self._connection.close()
            raise StoreError(f"{str(self.path)!r} is not a store of trainstep: {error}.") from error
        except StoreError:
            self._connection.close()
            raise

    def _prepare(self) -> None:
        with self._lock:
            self._connection.execute("PRAGMA journal_mode = WAL")
            # A crash of the process loses nothing; one of the machine at most the last rows, and never the file.
            self._connection.execute("PRAGMA synchronous = NORMAL")
            self._connection.execute("BEGIN IMMEDIATE")  # One of two that open a new file at once makes the tables.
            try:
                self._check_or_make()
                self._connection.execute("COMMIT")
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise

    def _check_or_make(self) -> None:
        [[application]] = self._connection.execute("PRAGMA application_id")
        [[layout]] = self._connection.execute("PRAGMA user_version")
        [[tables]] = self._connection.execute("SELECT count(*) FROM sqlite_master")
        if not application and not layout and not tables:
            for statement in _SCHEMA.split(";"):  # Not `executescript`, which commits first.
                self._connection.execute(statement)
            self._connection.execute(f"PRAGMA application_id = {APPLICATION}")
            self._connection.execute(f"PRAGMA user_version = {LAYOUT}")
        elif application != APPLICATION:
            raise StoreError(f"{str(self.path)!r} is a database, but not a store of trainstep.")
        elif layout > LAYOUT:
            raise StoreError(
                f"{str(self.path)!r} was written by a newer trainstep (layout {layout} of its tables, and this one "
                f"knows {LAYOUT}). Install that, or name another file."
            )

    def __enter__(self) -> "Store":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        del kind, error, traceback
        self.close()

    def close(self) -> None:
        """Close the file. What was added is there."""
        with self._lock:
            self._connection.close()

    # --- Results ----------------------------------------------------------------------------------

    def add_run(self, run: Run) -> None:
        """Keep `run`, and take its mark away. A run that failed does not replace one that did not."""
        self._add("runs", run)

    def add_cost(self, cost: Cost) -> None:
        """Keep `cost`, likewise."""
        self._add("costs", cost)

    def _add(self, table: str, record: Run | Cost) -> None:
        row = (record.key, record.failure is not None, record.model_dump_json())
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.execute(
                f"INSERT INTO {table} VALUES (?, ?, ?) ON CONFLICT (key) DO UPDATE SET failed = excluded.failed, "
                f"record = excluded.record WHERE {table}.failed OR NOT excluded.failed",
                row,
            )
            self._connection.execute("DELETE FROM started WHERE key = ?", (record.key,))
            self._connection.execute("COMMIT")

    def runs(self, keys: Iterable[str] | None = None) -> tuple[Run, ...]:
        """Return all runs in the order in which they ended first, or those of `keys` that are there, in that order.

        Raises:
            StoreError: a row is not such a record.
        """
        return self._read("runs", Run, keys)

    def costs(self, keys: Iterable[str] | None = None) -> tuple[Cost, ...]:
        """Return the costs, likewise."""
        return self._read("costs", Cost, keys)

    def _read(self, table: str, record: type[RecordT], keys: Iterable[str] | None) -> tuple[RecordT, ...]:
        with self._lock:
            rows = self._connection.execute(f"SELECT key, record FROM {table} ORDER BY rowid").fetchall()
        if keys is not None:
            known = dict(rows)
            rows = [(key, known[key]) for key in keys if key in known]
        return tuple(self._parsed(record, key, text) for key, text in rows)

    def _parsed(self, record: type[RecordT], key: str, text: str) -> RecordT:
        try:
            return record.model_validate_json(text)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            place = ".".join(str(part) for part in problem["loc"])
            raise StoreError(f"{str(self.path)!r}, row {key}: {place}: {problem['msg']}.") from error

    def ended(self) -> dict[str, bool]:
        """Return, by key, whether a run or a cost that is there failed."""
        with self._lock:
            rows = self._connection.execute("SELECT key, failed FROM runs UNION ALL SELECT key, failed FROM costs")
            return {key: bool(failed) for key, failed in rows}

    # --- Suites -----------------------------------------------------------------------------------

    def add_suite(self, control: str, labels: Mapping[str, Sequence[str]]) -> None:
        """Note that a suite is about the keys of `labels`, by which it calls them, the control's among them."""
        with self._lock:
            self._connection.execute(
                "INSERT INTO suites (control, labels, since) VALUES (?, ?, ?)",
                (control, json.dumps({key: list(names) for key, names in labels.items()}), time.time()),
            )

    def suites(self) -> tuple[Suite, ...]:
        """Return the suites that used this store, the latest last."""
        with self._lock:
            rows = self._connection.execute("SELECT control, labels FROM suites ORDER BY id").fetchall()
        return tuple(
            Suite(control, {key: tuple(names) for key, names in json.loads(labels).items()}) for control, labels in rows
        )

    def controls(self) -> tuple[str, ...]:
        """Return the labels of the controls of the suites, each once, the latest last."""
        controls = [suite.control for suite in self.suites()]
        return tuple(reversed(dict.fromkeys(reversed(controls))))

    # --- What is being done -----------------------------------------------------------------------

    def start(self, key: str, *, again: bool = False) -> bool:
        """Mark `key` as being done by this suite, and return whether that is so: nobody else is at it, or was.

        Args:
            key: of a run or a cost.
            again: even where it ended before, in failure.
        """
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                free = self._is_free(key, again)
                if free:
                    now = time.time()
                    self._connection.execute(
                        "INSERT OR REPLACE INTO started VALUES (?, ?, ?, ?, ?, ?)",
                        (key, socket.gethostname(), os.getpid(), self._suite, now, now),
                    )
            finally:
                self._connection.execute("COMMIT")
        return free

    def _is_free(self, key: str, again: bool) -> bool:
        rows = self._connection.execute(
            "SELECT failed FROM runs WHERE key = ? UNION ALL SELECT failed FROM costs WHERE key = ?", (key, key)
        ).fetchall()
        if rows and not (again and rows[0][0]):
            return False
        mark = self.started(key)
        return mark is None or mark.suite == self._suite or not mark.alive

    def started(self, key: str) -> Mark | None:
        """Return who is at `key`, or was when his process ended; None where nobody is, or it has ended."""
        with self._lock:
            row = self._connection.execute(
                "SELECT host, pid, suite, since, beat FROM started WHERE key = ?", (key,)
            ).fetchone()
        return None if row is None else Mark(*row)

    def give_up(self) -> None:
        """Take away the marks of this suite."""
        with self._lock:
            self._connection.execute("DELETE FROM started WHERE suite = ?", (self._suite,))

    def beat(self) -> None:
        """Say that this suite is alive."""
        with self._lock:
            self._connection.execute("UPDATE started SET beat = ? WHERE suite = ?", (time.time(), self._suite))


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # It is somebody else's.
        return True
    return True


def _reason(error: Any) -> str:
    return getattr(error, "strerror", None) or str(error)
