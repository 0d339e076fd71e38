"""A run that goes on from a backup, in another process, ends as one that never stopped, bit for bit."""

import os
import pathlib
import signal
import subprocess
import sys

import backups
import pytest
from backups import BATCHES, CASES, WINDOW, backing_up, backup_of, train, whole_of
from runs import assert_same

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


def case_id(index: int) -> str:
    spec, save_freq, *_ = CASES[index]
    [*names] = spec
    name = "full stack" if len(names) > 1 else f"{names[0]}-{spec[names[0]] or 'defaults'}"
    return f"{name}-every {save_freq}"


@pytest.mark.shows("resumed mid-window")
@pytest.mark.parametrize(
    ("index", "spec"), [(index, case.spec) for index, case in enumerate(CASES)], ids=map(case_id, range(len(CASES)))
)
def test_a_run_restored_from_its_backup_ends_as_one_never_stopped(index, spec, stopped):
    """Weights, statistics, optimizer slots, accumulators, loss scale, counters, draws of attacks and dropout, logs."""
    resumed = train(CASES[index], backing_up(backup_of(stopped, index), CASES[index].save_freq))
    whole = whole_of(stopped, index)
    first = (CASES[index].backed_up - (CASES[index].save_freq != "epoch")) // BATCHES
    logs = {name: values[first:] for name, values in whole.history.items()}
    assert_same(resumed, whole._replace(history=logs))


def test_backups_are_from_the_middle_of_windows_and_epochs():
    """Or the test above would show less than it says."""
    for case in CASES:
        assert case.backed_up % WINDOW
        assert (case.backed_up % BATCHES != 0) == (case.save_freq == 3)
