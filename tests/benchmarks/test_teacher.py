"""A teacher from a workload: trained as a comparison trains, saved plain, and taken by `distillation`."""

import keras
import numpy as np
import pytest

import trainstep
from trainstep.benchmarks import teacher, workload


def test_a_teacher_is_trained_saved_and_taught_by(tmp_path, capsys):
    """What is saved is plain, and has the accuracy that is told."""
    path = tmp_path / "new" / "teacher.keras"
    assert teacher.main(["blobs_mlp", "--epochs", "2", "--output", str(path)]) == 0
    saved = keras.models.load_model(path)
    _, (x, y) = workload.get("blobs_mlp").read()
    reached = saved.evaluate(x, y, verbose=0, return_dict=True)["accuracy"]
    assert f"blobs_mlp, accuracy {reached:.4f}" in capsys.readouterr().out
    assert not trainstep.applied(saved)
    (standard, run) = trainstep.compare(
        workload="blobs_mlp",
        strategies={"standard": "standard", "taught": {"distillation": {"teacher": str(path), "alpha": 1.0}}},
        seeds=1,
        epochs=1,
        attack=False,
        workers=1,
        cost=False,
        progress=False,
    ).runs
    assert run.failure is None
    assert run.epochs[-1].loss != standard.epochs[-1].loss


def test_the_seed_decides_a_teacher():
    one, same, other = (teacher.taught("blobs_mlp", epochs=1, seed=seed)[0].get_weights() for seed in (0, 0, 1))
    for a, b, another in zip(one, same, other, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)  # Threads may add in another order.
        assert not np.allclose(a, another, rtol=1e-2)


def test_a_teacher_may_have_several_outputs():
    model, run = teacher.taught("digits_pair_cnn", epochs=1)
    assert sorted(model.output_names) == ["left", "right"]
    assert list(run.epochs[-1].metrics) == ["accuracy"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["blob_mlp", "--output", "a.keras"], "Did you mean 'blobs_mlp'"),
        (["blobs_mlp", "--output", "a.h5"], "a file of Keras, .keras, not 'a.h5'"),
        (["cifar10_resnet", "--output", "a.keras"], "cifar10_resnet could not be trained: MissingDataError: "),
        (["blobs_mlp", "--epochs", "0", "--output", "a.keras"], "--epochs is at least 1, not 0"),
    ],
)
def test_a_wrong_wish_is_refused(arguments, message, capsys, monkeypatch):
    monkeypatch.setenv("TRAINSTEP_DATA", "/nosuch")
    try:
        code = teacher.main(arguments)
    except SystemExit as error:  # As argparse has it.
        code = error.code
    assert code == 2
    assert message in capsys.readouterr().err
