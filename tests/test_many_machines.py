"""Two processes, each with half of every batch, do what one does; one that is killed costs no more than time."""

import functools
import json
import os
import pathlib
import re
import runpy
import signal
import subprocess
import sys
from typing import Any

import cluster
import keras
import pytest
import tensorflow as tf
import workers
from catalogue import NAMES
from workers import SCENARIOS

import trainstep

pytestmark = pytest.mark.filterwarnings("ignore:mixed_precision computes in float16:UserWarning")

COARSEST = {
    "mixed_precision": "bfloat16",
    "deferred build": "bfloat16",
    "full stack": "float16",
    "subclassed": "float16",
}


def recipe() -> str:
    text = (pathlib.Path(trainstep.__file__).parent / "docs" / "running.md").read_text()
    [script] = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "TF_CONFIG" in block]
    return script


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """Return where two processes have written what they did; the second was killed in the end, by signal 9."""
    path = tmp_path_factory.mktemp("machines")
    (path / "recipe.py").write_text(recipe())
    first, second = cluster.run([workers.__file__, str(path), "first"], path)
    assert second.returncode == -signal.SIGKILL, second.output
    assert first.returncode != 0, first.output
    return path


@pytest.fixture(scope="module")
def both(folder) -> list[dict[str, Any]]:
    return [json.loads((folder / f"first-{index}.json").read_text()) for index in range(2)]


@functools.cache
def trained_alone(name: str) -> dict[str, Any]:
    return workers.train(name, tf.distribute.get_strategy())


@pytest.mark.shows("multi-worker")
@pytest.mark.parametrize("name", [*NAMES, *(name for name in SCENARIOS if "+" not in name and name not in NAMES)])
def test_two_processes_are_one(name, both, assert_close):
    """Weights and logs; of who is judged in a way of its own also those of validation, `evaluate` and `predict`."""
    name = workers.SCENARIO_OF.get(name, name)
    alone = trained_alone(name)
    judged = {"val_loss"} if workers.is_judged(name) else set()
    assert both[0][name]["logs"].keys() == alone["logs"].keys() >= {"loss", *judged}
    for kind, expected in alone.items():
        for process in both:
            assert_close(process[name][kind], expected, COARSEST.get(name, "float32"))


@pytest.mark.parametrize("name", SCENARIOS)
def test_both_processes_end_alike(name, both):
    assert both[0][name] == both[1][name]


def test_the_recipe_of_the_documentation_is_one_script_for_one_process_and_for_two(
    both, folder, tmp_path, monkeypatch, assert_close
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TF_CONFIG", raising=False)
    alone = runpy.run_path(str(folder / "recipe.py"), run_name="__main__")
    for process in both:
        assert_close(process["recipe"], [weight.tolist() for weight in alone["model"].get_weights()])
    assert (tmp_path / "log.csv").read_text().count("\n") == (folder / "log.csv").read_text().count("\n")


def test_callbacks_of_the_chief_write_once(both, folder):
    loaded = keras.models.load_model(folder / "checkpoint.keras")
    assert trainstep.applied(loaded).keys() == workers.FULL.keys()
    assert [weight.tolist() for weight in loaded.get_weights()] == both[0]["deferred build"]["weights"]
    assert list((folder / "board").rglob("events.out.*"))


def test_a_job_restarted_after_a_process_was_killed_ends_as_one_never_stopped(both, folder):
    """To the bit: logs, weights, statistics, optimizer, accumulators, loss scale, counters."""
    for each in cluster.run([workers.__file__, str(folder), "again"], folder):
        assert each.returncode == 0, each.output
    for index, process in enumerate(both):
        resumed = json.loads((folder / f"again-{index}.json").read_text())["resumed"]
        whole = process["never stopped"]
        assert resumed["logs"]["loss"] == whole["logs"]["loss"][workers.backups.STOPPED_IN :]
        assert resumed["variables"] == whole["variables"]


def test_a_job_that_hangs_is_ended(tmp_path):
    script = tmp_path / "hang.py"
    script.write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(100)\n")
    with pytest.raises(TimeoutError, match="hang"):
        cluster.run([str(script)], tmp_path, timeout=2)
    for log in sorted(tmp_path.glob("*.log")):
        with pytest.raises(ProcessLookupError):
            os.kill(int(log.read_text()), 0)


PARAMETER_SERVER = """
import keras, tensorflow as tf, trainstep
addresses = {addresses}
cluster = tf.train.ClusterSpec({{"worker": addresses[:1], "ps": addresses[1:2], "chief": addresses[2:]}})
servers = [tf.distribute.Server(cluster, job_name=job, task_index=0, protocol="grpc") for job in ("worker", "ps")]
resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(cluster, task_type="chief", task_id=0, rpc_layer="grpc")
distribution = tf.distribute.ParameterServerStrategy(resolver)
with distribution.scope():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
for attempt in (
    lambda: trainstep.apply(model, "standard"),
    lambda: trainstep.model_class(keras.Sequential, "gradient_accumulation")([keras.layers.Dense(1)]).compile("sgd"),
):
    try:
        with distribution.scope():
            attempt()
    except trainstep.errors.ModelConflictError as error:
        print(error, flush=True)
"""


def test_a_parameter_server_is_refused(tmp_path):
    with cluster.ports(3) as addresses:
        script = PARAMETER_SERVER.format(addresses=addresses)
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.count("Strategies do not train under ParameterServerStrategy: its workers") == 2, done.stderr
