"""The store: rows that stay, marks of who is at what, files that are refused."""

import os
import sqlite3
import subprocess
import sys
import threading
import time

import pytest
import suites

from trainstep.benchmarks import store as stores
from trainstep.benchmarks.errors import StoreError
from trainstep.benchmarks.records import Cost, Epoch, Run
from trainstep.benchmarks.store import Store

ENVIRONMENT = {"trainstep": "1", "keras": "3", "tensorflow": "2", "python": "3", "processor": "x"}


def run(key="a", **changes):
    epoch = Epoch(updates=3, seconds=0.5, loss=float("inf"), metrics={"accuracy": 0.1 + 0.2})
    values = {"label": "standard", "spec": {"standard": {}}, "seed": 0, "epochs": (epoch,)}
    return Run(key=key, settings=suites.settings(), environment=ENVIRONMENT, **{**values, **changes})


def cost(key="c", **changes):
    values = {"label": "standard", "spec": {"standard": {}}, "seconds": (1.0, 2.0, 3.0), **changes}
    return Cost(key=key, settings=suites.settings(), environment=ENVIRONMENT, **values)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "results.sqlite"


def test_records_come_back_as_they_were_in_the_order_they_came(path):
    runs = (run("b", failure="no"), run("a"))
    with Store(path) as store:
        for each in runs:
            store.add_run(each)
        store.add_cost(cost())
    with Store(path) as store:
        assert store.runs() == runs
        assert store.costs() == (cost(),)
        assert store.runs(["a", "none", "b"]) == runs[::-1]
        assert store.ended() == {"a": False, "b": True, "c": False}


def test_a_failure_is_replaced_and_replaces_nothing(path):
    with Store(path) as store:
        store.add_run(run(failure="first"))
        store.add_run(run(failure="second"))
        assert store.runs()[0].failure == "second"
        store.add_run(run())
        store.add_run(run(failure="third"))
        assert store.runs() == (run(),)


def test_what_one_is_at_another_leaves_alone(path):
    with Store(path) as one, Store(path) as other:
        assert one.start("a")
        assert one.start("a")  # Its own.
        assert not other.start("a")
        assert one.started("a").pid == os.getpid()
        one.add_run(run())
        assert one.started("a") is None
        assert not other.start("a")  # It has ended.
        assert not other.start("a", again=True)  # Well.
        one.add_run(run("f", failure="no"))
        assert not other.start("f")
        assert other.start("f", again=True)
        other.give_up()
        assert other.started("f") is None


def test_what_a_dead_process_was_at_is_free(path, monkeypatch):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    with Store(path) as one, Store(path) as other:
        monkeypatch.setattr(stores.os, "getpid", lambda: dead.pid)
        assert one.start("a")
        monkeypatch.undo()
        assert not other.started("a").alive
        assert other.start("a")
        assert other.started("a").pid == os.getpid()


def test_a_suite_elsewhere_lives_as_long_as_it_beats(path, monkeypatch):
    with Store(path) as one, Store(path) as other:
        monkeypatch.setattr(stores.socket, "gethostname", lambda: "elsewhere")
        one.start("a")
        monkeypatch.undo()
        assert not other.start("a")
        now = time.time()
        monkeypatch.setattr(stores.time, "time", lambda: now + stores.SILENCE - 1)
        one.beat()
        monkeypatch.setattr(stores.time, "time", lambda: now + stores.SILENCE + 1)
        assert not other.start("a")
        monkeypatch.setattr(stores.time, "time", lambda: now + 2 * stores.SILENCE)
        assert other.start("a")


def test_each_thing_is_begun_by_one_of_many_threads_and_stores(path):
    begun = []

    def take(store):
        begun.extend(key for key in map(str, range(100)) if store.start(key))

    opened = [Store(path) for _ in range(4)]
    threads = [threading.Thread(target=take, args=(store,)) for store in opened]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for store in opened:
        store.close()
    assert sorted(begun, key=int) == list(map(str, range(100)))


def test_suites_are_noted_with_their_control(path):
    with Store(path) as store:
        store.add_suite("plain", {"a": ["plain", "same"]})
        store.add_suite("standard", {"b": ["standard"]})
        store.add_suite("plain", {})
        assert store.controls() == ("standard", "plain")
        assert store.suites()[0] == ("plain", {"a": ("plain", "same")})


def test_a_file_that_is_no_store_is_refused_and_stays(path, tmp_path):
    text = tmp_path / "text"
    text.write_text("no database, " * 100)
    with pytest.raises(StoreError, match="is not a store of trainstep"):
        Store(text)
    assert text.read_text() == "no database, " * 100
    with sqlite3.connect(tmp_path / "other") as other:
        other.execute("CREATE TABLE runs (x)")
    other.close()
    with pytest.raises(StoreError, match="a database, but not a store"):
        Store(tmp_path / "other")
    with pytest.raises(StoreError, match="There is no store"):
        Store(path, create=False)
    with pytest.raises(StoreError, match="Nothing can be written"):
        Store(text / "results.sqlite")


def test_a_newer_store_is_refused(path):
    with Store(path) as store:
        store._connection.execute(f"PRAGMA user_version = {stores.LAYOUT + 1}")
    with pytest.raises(StoreError, match="newer trainstep"):
        Store(path)


def test_a_row_that_is_no_record_is_named(path):
    with Store(path) as store:
        store._connection.execute("INSERT INTO runs VALUES ('k', 0, '{}')")
        with pytest.raises(StoreError, match="row k: key: Field required"):
            store.runs()


def test_ten_thousand_runs_are_read_in_seconds(path):
    epoch = Epoch(updates=3, seconds=0.5, loss=1.0, metrics={"accuracy": 0.5})
    text = run(epochs=(epoch,) * 6).model_dump_json()
    with Store(path) as store:
        store._connection.execute("BEGIN")
        rows = ((str(number), 0, text) for number in range(10_000))
        store._connection.executemany("INSERT INTO runs VALUES (?, ?, ?)", rows)
        store._connection.execute("COMMIT")
    begin = time.process_time()
    with Store(path) as store:
        assert len(store.runs()) == 10_000
    assert time.process_time() - begin < 5
