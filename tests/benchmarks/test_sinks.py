"""TensorBoard and MLflow, read back with their own readers."""

import pytest
import suites

from trainstep.benchmarks.records import Epoch, Run
from trainstep.benchmarks.sinks import TensorBoard, hyperparameters, sinks

EPOCHS = (
    Epoch(updates=3, seconds=0.5, loss=1.5, metrics={"accuracy": 0.25}),
    Epoch(updates=6, seconds=1.0, loss=0.5, metrics={"accuracy": 0.75}),
)


def run(key="0123456789", **changes):
    values = {
        "label": "clip + <b>ema</b>",
        "spec": {"gradient_clipping": {"clipvalue": 0.5, "clipnorm": None, "global_clipnorm": float("inf")}},
        "seed": 4,
        "epochs": EPOCHS,
        "robust_accuracy": 0.5,
        "calibration_error": 0.125,
        **changes,
    }
    return Run(key=key, settings=suites.settings(), environment={}, **values)


def test_what_was_chosen_is_plain_values():
    assert dict(hyperparameters(run())) == {
        "strategy": "clip + <b>ema</b>",
        "workload": "tiny",
        "noise": 0.0,
        "seed": 4,
        "batch_size": 8,
        "optimizer.class": "SGD",
        "gradient_clipping.clipvalue": 0.5,
        "gradient_clipping.clipnorm": "null",
        "gradient_clipping.global_clipnorm": "Infinity",
    }


def test_tensorboard_has_scalars_and_hparams_of_each_run_once(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="an extra")
    from tensorboard.plugins.hparams import metadata  # noqa: PLC0415

    sink = TensorBoard(tmp_path / "logs")
    for each in (run(), run(), run("9876543210", seed=5, failure="no", epochs=EPOCHS[:1])):
        sink.add(each)
    folders = sorted((tmp_path / "logs").rglob("seed_*"))
    assert [folder.relative_to(tmp_path / "logs").as_posix() for folder in folders] == [
        "tiny/clip_+_b_ema_b_/seed_4_01234567",
        "tiny/clip_+_b_ema_b_/seed_5_98765432",
    ]
    statuses = []
    for folder in folders:
        [events] = folder.iterdir()
        assert events.stat().st_size
        read = event_accumulator.EventAccumulator(str(folder))
        read.Reload()
        if folder.name.startswith("seed_4"):
            tags = ("loss", "validation/accuracy", "updates", "seconds", "robust_accuracy", "calibration_error")
            found = {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in tags}
            assert found == {
                "loss": [(1, 1.5), (2, 0.5)],
                "validation/accuracy": [(1, 0.25), (2, 0.75)],
                "updates": [(1, 3), (2, 6)],
                "seconds": [(1, 0.5), (2, 1)],
                "robust_accuracy": [(2, 0.5)],
                "calibration_error": [(2, 0.125)],
            }
        contents = read.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
        values = metadata.parse_session_start_info_plugin_data(contents).hparams
        assert values["strategy"].string_value == "clip + <b>ema</b>"
        assert values["gradient_clipping.clipvalue"].number_value == 0.5
        contents = read.SummaryMetadata(metadata.SESSION_END_INFO_TAG).plugin_data.content
        statuses.append(metadata.parse_session_end_info_plugin_data(contents).status)
    assert statuses == [1, 2]  # Success and failure.


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
def test_mlflow_has_parameters_metrics_and_status_of_each_run_once(tmp_path):
    mlflow = pytest.importorskip("mlflow", reason="an extra")
    path = tmp_path / "folder" / "mlflow.db"
    [sink] = sinks(None, path)
    for each in (run(), run(), run("9876543210", seed=5, failure="no", epochs=EPOCHS[:1])):
        sink.add(each)
    [again] = sinks(None, f"sqlite:///{path}")
    again.add(run())
    client = mlflow.MlflowClient(f"sqlite:///{path}")
    experiment = client.get_experiment_by_name("trainstep tiny")
    failed, ended = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time DESC"])
    if ended.data.tags["trainstep.key"] != run().key:
        failed, ended = ended, failed
    assert (ended.info.status, failed.info.status) == ("FINISHED", "FAILED")
    assert failed.data.tags["trainstep.failure"] == "no"
    assert ended.info.run_name == "clip + <b>ema</b>, seed 4"
    assert ended.data.params["gradient_clipping.clipvalue"] == "0.5"
    assert ended.data.metrics["robust_accuracy"] == 0.5
    history = client.get_metric_history(ended.info.run_id, "validation/accuracy")
    assert [(metric.step, metric.value) for metric in history] == [(1, 0.25), (2, 0.75)]
