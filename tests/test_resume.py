"""A run that was killed and started again ends as one that never stopped, bit for bit."""

import functools
import os
import pathlib
import signal
import subprocess
import sys

import backups
import numpy as np
import pytest
from backups import SPECS, backing_up, backup_of, train
from nets import BATCH, X

pytestmark = pytest.mark.filterwarnings("ignore:mixed_precision computes in float16:UserWarning")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> pathlib.Path:
    """Return a folder of backups, of runs that stopped in their second epoch; the last by signal 9."""
    folder = tmp_path_factory.mktemp("backups")
    command = [sys.executable, backups.__file__, str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(backups.__file__), "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(done.stdout.splitlines()) == len(SPECS) - 1
    return folder


def spec_id(index: int) -> str:
    spec = SPECS[index]
    [*names] = spec
    return "full stack" if len(names) > 1 else f"{names[0]}-{spec[names[0]] or 'defaults'}"


@functools.cache
def never_stopped(index: int) -> backups.Run:
    return train(SPECS[index])


@pytest.mark.parametrize("index", range(len(SPECS)), ids=spec_id)
def test_a_run_restored_from_its_backup_ends_as_one_never_stopped(index, stopped):
    """Weights, statistics, optimizer slots, accumulators, loss scale, counters, draws of attacks."""
    resumed = train(SPECS[index], backing_up(backup_of(stopped, index)))
    whole = never_stopped(index)
    assert len(resumed.history["loss"]) == backups.EPOCHS - backups.STOPPED_IN
    assert resumed.history["loss"] == whole.history["loss"][backups.STOPPED_IN :]
    for kind in ("variables", "optimizer", "state"):
        for mine, expected in zip(getattr(resumed, kind), getattr(whole, kind), strict=True):
            np.testing.assert_array_equal(mine, expected, err_msg=kind)


def test_the_backup_of_the_full_stack_is_from_the_middle_of_a_window():
    """Or the test above would show less than it says."""
    batches_before = -(-len(X) // BATCH) * backups.STOPPED_IN
    assert batches_before % backups.WINDOW != 0
