"""A run that goes on from a backup, in another process, ends as one that never stopped, bit for bit."""

import functools
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Callable

import backups
import pytest
from backups import BATCHES, CASES, COMPANIES, STACKS, WINDOW, backing_up, backup_of, train, whole_of
from catalogue import BY_STATE, declaration, task_of, variant_id
from runs import Run, assert_same

pytestmark = pytest.mark.filterwarnings("ignore:mixed_precision computes in float16:UserWarning")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> pathlib.Path:
    """Return a folder of backups from the second epoch of runs, and of what these runs were in the end."""
    folder = tmp_path_factory.mktemp("backups")
    command = [sys.executable, backups.__file__, str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(backups.__file__), "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    return folder


@pytest.fixture(scope="module")
def resumed(stopped) -> Callable[[int], Run]:
    """Return what gives the run that goes on from the backup of a case; one that strategies share is made once."""
    return functools.cache(
        lambda index: train(CASES[index], backing_up(backup_of(stopped, index), CASES[index].save_freq))
    )


def assert_as_never_stopped(index: int, resumed: Run, whole: Run) -> None:
    first = (CASES[index].backed_up - (CASES[index].save_freq != "epoch")) // BATCHES
    logs = {name: values[first:] for name, values in whole.history.items()}
    assert_same(resumed, whole._replace(history=logs))


@pytest.mark.shows("resumed mid-window")
@pytest.mark.parametrize(("name", "options"), BY_STATE, ids=variant_id)
def test_a_run_restored_from_its_backup_ends_as_one_never_stopped(name, options, stopped, resumed):
    """Weights, statistics, optimizer slots, accumulators, loss scale, counters, draws of attacks and dropout, logs.

    With others, in one run: it ends otherwise if the state of any of them is not what it was.
    """
    index = next(index for index, spec in enumerate(COMPANIES) if spec.get(name) == options)
    assert_as_never_stopped(index, resumed(index), whole_of(stopped, index))


@pytest.mark.shows("resumed mid-window")
@pytest.mark.parametrize(
    ("index", "spec"),
    [(index, CASES[index].spec) for index in STACKS],
    ids=[f"{'+'.join(CASES[index].spec)} every {CASES[index].save_freq}" for index in STACKS],
)
def test_a_stack_goes_on_from_any_place(index, spec, stopped, resumed):
    """From the end of an epoch, from before it, where the last window is applied, and after its process was killed."""
    assert_as_never_stopped(index, resumed(index), whole_of(stopped, index))


def test_backups_are_from_the_middle_of_windows_and_epochs():
    """Or the test above would show less than it says."""
    for case in CASES:
        assert case.backed_up % WINDOW
        assert (case.backed_up % BATCHES != 0) == (case.save_freq == 3)
    for name, options in BY_STATE:  # And none that keeps something of statistics trains a net without any.
        slots = declaration(name).state(declaration(name).options(**options)).values()
        [spec] = [spec for spec in COMPANIES if spec.get(name) == options]
        assert not (any(slot.per_statistic for slot in slots) and task_of(*spec).separate)
