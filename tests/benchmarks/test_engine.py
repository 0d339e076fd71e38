"""Running a suite: paired runs, budgets, failures as rows, and nothing lost to a kill."""

import dataclasses
import os
import random
import subprocess
import sys
import time

import catalogue
import keras
import numpy as np
import pytest
import suites
import tensorflow as tf

from trainstep import registry
from trainstep.benchmarks import cost, engine, runner
from trainstep.benchmarks.data import Split
from trainstep.benchmarks.engine import Options
from trainstep.benchmarks.errors import InvalidComparisonError, InvalidDataError
from trainstep.benchmarks.records import Budget
from trainstep.benchmarks.runner import Bench, Trainer, run_seed
from trainstep.benchmarks.store import Store
from trainstep.composition import compose

HERE = Options(workers=1, cost=False)
VERSIONS = dict.fromkeys(("trainstep", "keras", "tensorflow", "python"), "1")


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "results.sqlite") as opened:
        yield opened


def outcomes(runs):
    """Return all that a run decides, without the times."""
    return {
        (run.label, run.seed): (
            [(epoch.updates, epoch.loss, epoch.metrics) for epoch in run.epochs],
            run.robust_accuracy,
            run.calibration_error,
            run.failure,
        )
        for run in runs
    }


def one_run(composition="standard", seed=0, **changes):
    trainer = Trainer(Bench(suites.task(**changes)), compose(composition))
    return run_seed(trainer, "label", seed, VERSIONS)


# --- Runs -----------------------------------------------------------------------------------------


def test_there_is_a_run_for_each_seed_and_strategy_and_those_of_one_seed_are_paired(store):
    neutral = {"gradient_clipping": {"global_clipnorm": float("inf")}}
    runs, costs = engine.run(
        suites.suite({"standard": "standard", "neutral": neutral}, attack={"epsilon": 0.1}), store, HERE
    )
    assert [(run.seed, run.label) for run in runs] == [(s, label) for s in (0, 1) for label in ("standard", "neutral")]
    assert costs == ()
    found = outcomes(runs)
    for seed in (0, 1):
        assert found["standard", seed] == found["neutral", seed]
        assert found["standard", seed][0][0][0] == 3  # 22 examples in batches of 8.
    assert found["standard", 0] != found["standard", 1]
    assert all(0 <= run.calibration_error <= 1 and run.robust_accuracy <= run.metric for run in runs)


def test_what_is_in_the_store_is_not_done_again(store, monkeypatch):
    first = engine.run(suites.suite(), store, HERE)
    monkeypatch.setattr(engine, "run_job", None)
    assert engine.run(suites.suite(), store, HERE) == first
    renamed = suites.suite({"standard": "standard", "other": suites.SPECS["clipped"]})
    assert [run.label for run in engine.run(renamed, store, HERE)[0]] == ["standard", "other"] * 2
    assert store.controls() == ("standard",)


@pytest.mark.parametrize(
    ("budget", "updates"),
    [
        # 22 examples in batches of 8 are 3 updates an epoch.
        ({"epochs": 2}, [3, 6]),
        ({"updates": 6}, [3, 6]),
        ({"updates": 7}, [3, 6, 7]),
        ({"updates": 2}, [2]),
    ],
)
def test_a_budget_in_epochs_or_updates_is_used_up_and_its_end_measured(budget, updates):
    run = one_run(budget=Budget(**budget))
    assert run.failure is None
    assert [epoch.updates for epoch in run.epochs] == updates
    seconds = [epoch.seconds for epoch in run.epochs]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0
    assert run.metric == run.epochs[-1].metrics["accuracy"]


def test_a_budget_in_updates_trains_on_the_same_batches_as_one_in_epochs():
    in_epochs, in_updates = one_run(), one_run(budget=Budget(updates=6))
    assert [epoch.loss for epoch in in_epochs.epochs] == [epoch.loss for epoch in in_updates.epochs]


def test_all_that_is_measured_in_the_end_is_of_the_weights_a_strategy_is_judged_by():
    """With a decay of nearly one the average is what the weights were at the beginning."""
    attack = {"epsilon": 0.1, "steps": 2, "clip_range": None}
    trained, averaged, never = (
        one_run(spec, attack=attack, make_optimizer=lambda: keras.optimizers.SGD(rate))  # noqa: B023  Called here.
        for spec, rate in (("standard", 0.5), ({"ema": {"decay": 0.999999, "warmup": False}}, 0.5), ("standard", 0.0))
    )
    for kind in ("robust_accuracy", "calibration_error"):
        assert getattr(averaged, kind) == pytest.approx(getattr(never, kind), abs=1e-4)
    assert averaged.epochs[-1].metrics == never.epochs[-1].metrics
    assert trained.calibration_error != pytest.approx(averaged.calibration_error, abs=1e-2)


def test_a_budget_in_seconds_ends_with_the_step_that_uses_it_up(monkeypatch):
    monkeypatch.setattr(runner, "_CHUNK", 2)  # Epochs that are ordered at once.
    reusable = dataclasses.replace(suites.task(), reusable=True)
    trainer = Trainer(Bench(reusable), compose("standard"))
    run_seed(trainer, "label", 0, VERSIONS)
    seconds = trainer.first_step + 0.1  # Tracing is on the clock, though it happened before.
    budget = suites.settings(budget=Budget(seconds=seconds))
    trainer.bench.task = dataclasses.replace(reusable, settings=budget)
    run = run_seed(trainer, "label", 0, VERSIONS)
    assert run.failure is None
    assert len(run.epochs) > 2
    assert run.epochs[-2].seconds < seconds <= run.epochs[-1].seconds


# Keras 3 says so of each dataset whose end it has to find, at the end of the first epoch.
@pytest.mark.filterwarnings("ignore:Your input ran out of data:UserWarning")
def test_datasets_have_budgets_too():
    def load():
        (x, y), validation = suites.load()
        batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
        return Split(batches.filter(lambda x, y: True), validation)  # Nobody knows how many.

    run = one_run(load=load, budget=Budget(updates=4), batch_size=None)
    assert run.failure is None
    assert [epoch.updates for epoch in run.epochs] == [3, 4]


def test_evaluation_is_off_the_clock(monkeypatch):
    plain = keras.Model.evaluate

    def slow(self, *args, **kwargs):
        time.sleep(1)
        result = plain(self, *args, **kwargs)
        time.sleep(1)
        return result

    monkeypatch.setattr(keras.Model, "evaluate", slow)
    run = one_run()
    assert run.epochs[1].seconds - run.epochs[0].seconds < 2


def test_tracing_is_on_the_clock_of_each_run_though_a_model_used_again_is_traced_once():
    task = dataclasses.replace(suites.task(), reusable=True)
    trainer = Trainer(Bench(task), compose("standard"))
    first, second = (run_seed(trainer, "label", seed, VERSIONS).epochs[0].seconds for seed in (0, 1))
    assert second >= trainer.first_step
    assert first >= trainer.first_step


# --- Failures -------------------------------------------------------------------------------------


def test_a_run_that_diverges_is_a_row_with_its_reason():
    run = one_run(make_optimizer=lambda: keras.optimizers.SGD(float("inf")))
    assert run.failure.startswith("DivergedError: the training loss is")
    assert run.metric is None


def test_what_does_not_apply_has_a_reason():
    run = one_run()
    assert run.not_robust.startswith("no attack was asked for")
    assert run.not_calibrated is None
    wide = one_run(build=lambda seed: keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(3)]))
    assert 0 <= wide.calibration_error <= 1  # Logits.


def test_a_failure_stays_until_it_is_asked_to_be_tried_again(store):
    calls = []

    def build(seed):
        calls.append(seed)
        if len(calls) == 3:  # After the two of the fingerprint.
            raise RuntimeError("no such luck")
        return suites.build(seed)

    suite = suites.suite({"standard": "standard"}, seeds=(0,), build=build)
    [failed] = engine.run(suite, store, HERE)[0]
    assert failed.failure == "RuntimeError: no such luck"
    assert engine.run(suite, store, HERE)[0] == (failed,)
    [again] = engine.run(suite, store, dataclasses.replace(HERE, retry_failed=True))[0]
    assert again.failure is None


def test_a_run_that_ends_its_process_hangs_or_takes_all_memory_is_a_row_and_the_others_go_on(store):
    suite = suites.suite({"standard": "standard"}, seeds=(0, 1, 2, 3, 4, 5), build=suites.doomed)
    runs, _ = engine.run(suite, store, Options(workers=2, cost=False, time_limit=15))
    failures = [run.failure for run in runs]
    assert (failures[0], failures[5]) == (None, None)
    assert failures[1].startswith("WorkerDiedError: its process ended by itself: SIGABRT")
    assert failures[2] == "OutOfTimeError: not done after 15 seconds, the limit of a run"
    assert failures[3].startswith("WorkerDiedError: its process was killed (SIGKILL)")
    assert "MemoryError: Unable to allocate" in failures[4]
    assert store.started(runs[1].key) is None


def test_wrong_data_and_what_cannot_be_sent_are_refused(store):
    wrong = suites.suite(load=lambda: Split(1, 2))
    with pytest.raises(InvalidDataError):
        engine.run(wrong, store, HERE)
    dataset = tf.data.Dataset.from_tensor_slices(suites.load().train).batch(8)
    held = suites.suite(load=lambda: Split(dataset, dataset), batch_size=None)
    with pytest.raises(InvalidComparisonError, match="cannot be sent to another process"):
        engine.run(held, store, Options(workers=2))
    with pytest.raises(InvalidComparisonError, match="is one of 'processes', 'ray'"):
        engine.run(suites.suite(), store, Options(workers=2, executor="threads"))
    with pytest.raises(InvalidComparisonError, match="must be a positive integer"):
        engine.run(suites.suite(), store, Options(workers=0))


def test_own_models_and_data_are_told_apart_and_known_again(store):
    def key(**changes):
        [run] = engine.run(suites.suite({"standard": "standard"}, seeds=(0,), **changes), store, HERE)[0]
        return run.key

    def other_data():
        (x, y), validation = suites.load()
        return Split((x, 1 - y), validation)

    first = key()
    assert key() == first
    assert len({first, key(load=other_data), key(build=lambda seed: wide())}) == 3


def wide():
    return keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(5, "relu"), keras.layers.Dense(2, "softmax")])


def test_weights_that_no_seed_decides_are_shared_all_the_same(store):
    generator = np.random.default_rng()

    def unseeded(seed):
        model = suites.build(seed)
        model.set_weights([generator.normal(size=weight.shape) for weight in model.get_weights()])
        return model

    neutral = {"gradient_clipping": {"global_clipnorm": float("inf")}}
    suite = suites.suite({"standard": "standard", "neutral": neutral}, seeds=(0,), build=unseeded)
    standard, other = engine.run(suite, store, HERE)[0]
    assert outcomes([standard])["standard", 0] == outcomes([other])["neutral", 0]


# --- Costs ----------------------------------------------------------------------------------------


def test_costs_are_measured_in_a_process_that_counts_memory(store):
    """Of a dense layer 64 to 64 without bias and SGD a step must hold the gradient, and accumulation its sum."""

    def build(seed):
        layers = [keras.layers.Input((4,)), keras.layers.Dense(300), keras.layers.Dense(300, use_bias=False)]
        return keras.Sequential([*layers, keras.layers.Dense(2, "softmax")])

    suite = suites.suite({"standard": "standard", "sum": "gradient_accumulation"}, seeds=(0,), build=build)
    standard, summed = engine.run(suite, store, Options(workers=2))[1]
    assert (standard.failure, summed.failure) == (None, None)
    assert standard.ratio == (1.0, 1.0, 1.0)
    assert standard.seconds[0] <= standard.seconds[1] <= standard.seconds[2] < standard.trace_seconds
    assert standard.examples_per_second == 8 / standard.seconds[1]
    assert standard.peak_bytes >= 4 * 300 * 300
    assert summed.memory_ratio == summed.peak_bytes / standard.peak_bytes
    assert standard.environment["processor"]


def test_a_strategy_that_cannot_train_has_no_cost_but_a_reason_and_the_others_have_theirs(store, monkeypatch):
    def broken(self, update):
        raise RuntimeError("no such luck\nsecond line")

    monkeypatch.setattr(registry.get("gradient_clipping"), "update_weights", broken)
    suite = suites.suite({"standard": "standard", "clipped": "gradient_clipping"}, seeds=(0,))
    runs, (standard, clipped) = engine.run(suite, store, Options(workers=1))
    assert clipped.failure == runs[1].failure
    assert "RuntimeError" in clipped.failure
    assert "\n" not in clipped.failure
    assert standard.failure is None
    assert standard.peak_bytes is None  # Nobody counts in this process.


def test_only_what_lacks_is_measured_again_with_the_control(store, monkeypatch):
    engine.run(suites.suite({"standard": "standard"}, seeds=(0,)), store, Options(workers=1))
    [before] = store.costs()
    measured = []

    def job(workload, labels, control, seed):
        measured.append((labels, control))
        return cost.cost_job(workload, labels, control, seed)

    monkeypatch.setattr(engine, "cost_job", job)
    costs = engine.run(suites.suite(seeds=(0,)), store, Options(workers=1))[1]
    assert measured == [(["clipped"], "standard")]
    assert costs[0] == before
    assert costs[1].ratio is not None


# --- Kills ----------------------------------------------------------------------------------------


@pytest.fixture
def halved():
    with catalogue.registered(suites.Halved):
        yield


def script(path, workers):
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "TF_NUM_INTRAOP_THREADS": "1"}
    return subprocess.Popen([sys.executable, suites.__file__, str(path), str(workers)], env=environment)


def wait_for(condition):
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < 120
        time.sleep(0.02)


@pytest.mark.usefixtures("halved")
def test_a_suite_killed_three_times_ends_as_one_left_alone(store, tmp_path):
    generator = random.Random(int(time.time()))  # Wherever it strikes.
    for workers in (2, 1, 1):
        before = len(store.ended())
        process = script(store.path, workers)
        wait_for(lambda: len(store.ended()) > before)  # noqa: B023  It is called here.
        time.sleep(generator.uniform(0, 1))
        process.kill()
        process.wait()
    survived = {run.key: run for run in store.runs()}
    assert len(survived) >= 3
    runs, _ = engine.run(suites.killable(), store, HERE)
    assert all(run == survived[run.key] for run in runs if run.key in survived)
    with Store(tmp_path / "alone.sqlite") as alone:
        assert outcomes(engine.run(suites.killable(), alone, HERE)[0]) == outcomes(runs)
    assert len(runs) == 12
    assert not any(run.failure for run in runs)


@pytest.mark.usefixtures("halved")
def test_two_suites_at_once_share_the_work(store, monkeypatch):
    process = script(store.path, 1)
    wait_for(lambda: store._connection.execute("SELECT count(*) FROM started").fetchone()[0])
    mine = []

    def job(*arguments):
        mine.append(arguments)
        return runner.run_job(*arguments)

    monkeypatch.setattr(engine, "run_job", job)
    runs, _ = engine.run(suites.killable(), store, HERE)
    assert process.wait(60) == 0
    assert len(store.runs()) == len(runs) == 12
    assert len(store.suites()) == 2
    assert 0 < len(mine) < 12


# --- Ray ------------------------------------------------------------------------------------------


@pytest.fixture
def cluster(tmp_path):
    """Start a real Ray of one node; it writes to a short path, as its sockets need."""
    ray = pytest.importorskip("ray", reason="an extra")
    # Its own threads and files are none of ours: it leaves some to the garbage collector.
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield ray
    ray.shutdown()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::FutureWarning")
@pytest.mark.usefixtures("cluster", "halved")
def test_actors_of_ray_give_what_this_process_gives_and_their_death_is_a_row(store, tmp_path):
    specs = {"standard": "standard", "halved": "halved"}
    suite = suites.suite(specs, seeds=(0, 1), build=suites.doomed)
    runs, _ = engine.run(suite, store, Options(workers=2, executor="ray", cost=False, time_limit=60))
    failures = {(run.label, run.seed): run.failure for run in runs}
    assert failures["standard", 0] is None
    assert failures["halved", 0] is None
    assert "WorkerDiedError: its process ended by itself" in failures["standard", 1]
    with Store(tmp_path / "here.sqlite") as here:
        alone = engine.run(suites.suite(specs, seeds=(0,)), here, HERE)[0]
    assert outcomes(alone).items() <= outcomes(runs).items()
