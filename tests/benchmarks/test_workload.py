"""Workloads: their data, their noise, where the data come from, and what is said where they are not."""

import gzip
import io
import pickle
import tarfile
from collections import Counter

import keras
import needs
import numpy as np
import pytest
import tensorflow as tf

from trainstep.benchmarks import datasets, errors, optimizers, workload
from trainstep.benchmarks.data import Split

OFFLINE = (
    "blobs_mlp",
    "digits_cnn",
    "digits_deep_mlp",
    "digits_dropout_mlp",
    "digits_mlp",
    "digits_pair_cnn",
    "markov_transformer",
)


@pytest.mark.parametrize("name", OFFLINE)
def test_a_workload_has_the_data_it_says_and_always_the_same(name):
    chosen = workload.get(name)
    one, other = chosen.read(), chosen.read()
    for a, b in zip(tf.nest.flatten(tuple(one)), tf.nest.flatten(tuple(other)), strict=True):
        np.testing.assert_array_equal(a, b)
    (x, y), (x_validation, y_validation) = one
    assert {len(x), *map(len, tf.nest.flatten(y))} == {chosen.examples}
    assert x.shape[1:] == x_validation.shape[1:] == chosen.input_shape
    assert x.dtype == (np.int32 if name == "markov_transformer" else np.float32)
    tf.nest.assert_same_structure(y, chosen.classes)
    for labels, held_out, classes in zip(*map(tf.nest.flatten, (y, y_validation, chosen.classes)), strict=True):
        assert set(labels) == set(held_out) == set(range(classes))
    assert not {a.tobytes() for a in x} & {a.tobytes() for a in x_validation} or name.startswith(("digits", "markov"))


@pytest.mark.parametrize("name", workload.names())
def test_a_workload_can_be_built_and_compiled(name):
    chosen = workload.get(name)
    updates = chosen.epochs * -(-chosen.examples // chosen.batch_size)
    model = chosen.build(0)
    model.compile(optimizers.make(chosen.optimizer, updates), chosen.loss, metrics=list(chosen.metrics))
    assert model.input_shape[1:] == chosen.input_shape
    assert [shape[1:] for shape in shapes_of(model)] == [(classes,) for classes in tf.nest.flatten(chosen.classes)]
    assert chosen.target.metric in chosen.metrics


def shapes_of(model):
    return [tuple(output.shape) for output in model.outputs]


def test_a_workload_learns_in_seconds():
    """And reaches its target: 8 epochs of 16 steps."""
    chosen = workload.get("blobs_mlp")
    (x, y), validation = chosen.read()
    model = chosen.build(0)
    model.compile(optimizers.make(chosen.optimizer, None), chosen.loss, metrics=list(chosen.metrics))
    model.fit(x, y, batch_size=chosen.batch_size, epochs=chosen.epochs, verbose=0)
    assert model.evaluate(*validation, verbose=0)[1] >= chosen.target.value


def test_digits_are_in_the_unit_interval():
    (x, _), (x_validation, _) = datasets.load_digits()
    assert (len(x) + len(x_validation), x.shape[1:]) == (1797, (8, 8, 1))
    assert (min(x.min(), x_validation.min()), max(x.max(), x_validation.max())) == (0, 1)


def test_a_pair_of_digits_is_one_on_the_left_and_one_on_the_right():
    for (digits, ids), (x, y) in zip(datasets.load_digits(), datasets.make_pairs(), strict=True):

        def seen(halves, labels):
            return Counter((half.tobytes(), label) for half, label in zip(halves, labels, strict=True))

        # Where they do not overlap each digit of the part, and no other, is there twice.
        assert seen(x[:, :, :4], y["left"]) == seen(np.concatenate([digits[:, :, :4]] * 2), np.tile(ids, 2))
        assert seen(x[:, :, 8:], y["right"]) == seen(np.concatenate([digits[:, :, 4:]] * 2), np.tile(ids, 2))
        # Where they do, a column is the lighter of two: of digits whose other halves are those that are seen.
        left = {(digit[:, :4].tobytes(), label): digit[:, 4:] for digit, label in zip(digits, ids, strict=True)}
        covered = [left[half[:, :4].tobytes(), label] for half, label in zip(x, y["left"], strict=True)]
        assert np.mean([(pair[:, 4:8] >= other).all() for pair, other in zip(x, covered, strict=True)]) > 0.95


def test_no_token_tells_a_chain_but_their_order_does():
    (x, y), _ = datasets.make_sequences()
    for label in range(datasets.CHAINS):
        share = np.bincount(x[y == label].ravel(), minlength=datasets.SYMBOLS) / x[y == label].size
        # 1024 sequences of 16 tokens: a share of 1/8 has a standard error of 0.003, somewhat more as tokens depend.
        np.testing.assert_allclose(share, 1 / datasets.SYMBOLS, atol=0.02)
        pairs = np.stack([x[y == label][:, :-1].ravel(), x[y == label][:, 1:].ravel()])
        followed = np.zeros((datasets.SYMBOLS, datasets.SYMBOLS))
        np.add.at(followed, tuple(pairs), 1)
        # 3/4 by the rule, and 1/8 of the rest by chance.
        np.testing.assert_allclose(followed.max(axis=1) / followed.sum(axis=1), 0.75 + 0.25 / 8, atol=0.05)


def test_an_unknown_workload_is_refused_with_the_nearest():
    with pytest.raises(errors.UnknownWorkloadError, match="Did you mean 'digits_cnn'"):
        workload.get("digit_cnn")


# --- Noise ----------------------------------------------------------------------------------------

LABELS = np.arange(100) % 5


def noisy(labels, noise=0.4):
    return datasets.with_noise(Split((np.zeros((len(tf.nest.flatten(labels)[0]), 1)), labels), ("x", "y")), noise)


def test_noise_makes_its_share_of_the_training_labels_wrong_and_no_other():
    (_, y), validation = noisy(LABELS)
    assert (y != LABELS).sum() == 40
    assert set(y) == set(range(5))
    assert y.dtype == LABELS.dtype
    assert validation == ("x", "y")


def test_noise_is_the_same_at_every_call_and_grows_within_itself():
    np.testing.assert_array_equal(noisy(LABELS).train[1], noisy(LABELS).train[1])
    less, more = noisy(LABELS, 0.2).train[1], noisy(LABELS, 0.4).train[1]
    assert ((less != LABELS) <= (more != LABELS)).all()


def test_every_other_class_is_as_likely():
    labels = np.zeros(8000, int)
    labels[:4] = [1, 2, 3, 4]
    counts = np.bincount(noisy(labels, 1.0).train[1][labels == 0], minlength=5)
    assert counts[0] == 0
    # 8000 draws from four: 2000 each, with a standard deviation of sqrt(8000 * 1/4 * 3/4) = 39.
    assert (abs(counts[1:] - 2000) < 4 * 39).all()


def test_noise_on_one_hot_and_column_labels():
    ids = noisy(LABELS).train[1]
    np.testing.assert_array_equal(noisy(np.eye(5, dtype="float32")[LABELS]).train[1].argmax(axis=1), ids)
    np.testing.assert_array_equal(noisy(LABELS[:, np.newaxis]).train[1][:, 0], ids)


def test_one_hot_labels_are_those_with_noise():
    noisy = workload.get("blobs_mlp", noise=0.3)
    (x, y), (_, held_out) = noisy.read()
    one_hot, validation = noisy.read_one_hot()
    np.testing.assert_array_equal(one_hot[0], x)
    np.testing.assert_array_equal(one_hot[1], np.eye(noisy.classes)[y])
    np.testing.assert_array_equal(validation[1].argmax(axis=1), held_out)


def test_noise_and_one_hot_labels_of_several_outputs_are_of_each():
    labels = {"b": LABELS, "a": LABELS}
    (_, y), _ = noisy(labels)
    assert [(y[name] != LABELS).sum() for name in ("a", "b")] == [40, 40]
    assert (y["a"] != y["b"]).any()  # Which are wrong is drawn for each.
    (_, in_order), _ = noisy((LABELS, LABELS))
    np.testing.assert_array_equal(in_order, [y["a"], y["b"]])
    pair = workload.get("digits_pair_cnn", noise=0.4)
    (_, plain), (_, rows) = pair.read().train, pair.read_one_hot().train
    for side in ("left", "right"):
        np.testing.assert_array_equal(rows[side], np.eye(10)[plain[side]])


def test_noise_keeps_sample_weights():
    split = Split((np.zeros((4, 1)), np.array([0, 1, 0, 1]), np.arange(4)), None)
    np.testing.assert_array_equal(datasets.with_noise(split, 0.5).train[2], np.arange(4))


@pytest.mark.parametrize("labels", [np.zeros(4), np.zeros(4, int)])
def test_noise_needs_classes(labels):
    with pytest.raises(errors.InvalidComparisonError, match="labels of 'size' are float64"):
        noisy({"kind": LABELS, "size": np.zeros(100)})
    with pytest.raises(errors.InvalidComparisonError, match="Label noise needs"):
        noisy(labels)


@pytest.mark.parametrize("noise", [-0.1, 1.1, "0.4", True, float("nan")])
def test_noise_is_a_share(noise):
    with pytest.raises(errors.InvalidComparisonError, match="from 0 to 1"):
        workload.get("blobs_mlp", noise)


def test_a_variant_with_noise_is_another_workload_of_the_same_name():
    variant = workload.get("blobs_mlp", 0.4)
    assert (variant.name, variant.label, workload.get("blobs_mlp").label) == (
        "blobs_mlp",
        "blobs_mlp noise=0.4",
        "blobs_mlp",
    )
    clean, wrong = workload.get("blobs_mlp").read(), variant.read()
    assert (clean.train[1] != wrong.train[1]).mean() == pytest.approx(0.4, abs=1 / 512)
    np.testing.assert_array_equal(clean.train[0], wrong.train[0])
    np.testing.assert_array_equal(clean.validation[1], wrong.validation[1])


# --- Where data come from -------------------------------------------------------------------------

PICTURES = np.arange(3 * 28 * 28).astype("uint8").reshape(3, 28, 28)


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """Leave no folder of data, and no network."""

    def offline():
        raise Exception("URL fetch failure")  # As Keras does.

    monkeypatch.delenv(datasets.VARIABLE, raising=False)
    monkeypatch.setattr(datasets, "DEBIAN_FASHION_MNIST", tmp_path / "nothing")
    monkeypatch.setattr(keras.datasets.fashion_mnist, "load_data", offline)
    monkeypatch.setattr(keras.datasets.cifar10, "load_data", offline)


def fashion(folder):
    """Write three pictures as the four files of Fashion-MNIST."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("train", "t10k"):
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + PICTURES.tobytes()))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + bytes([7, 8, 9])))


def cifar():
    """Return the files of CIFAR-10 by name, two photographs each."""
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    data = np.zeros((2, 3, 32, 32), "uint8")
    data[1, 2, 5, 7] = 255  # Blue, row 5, column 7.
    content = {b"data": data.reshape(2, -1), b"labels": [3, 4]}
    return {name: pickle.dumps(content, protocol=2) for name in names}


def test_other_data_than_the_workload_names_are_refused(nowhere, tmp_path):
    fashion(tmp_path)
    with pytest.raises(errors.InvalidDataError, match=r"\(60000, 28, 28, 1\), and those found are of \(3, 28, 28, 1\)"):
        workload.get("fashion_cnn").read(tmp_path)


@pytest.mark.parametrize("inside", ["", "fashion-mnist"])
def test_fashion_mnist_is_read_from_a_folder(nowhere, tmp_path, inside):
    fashion(tmp_path / inside)
    (x, y), (_, y_validation) = datasets.load_fashion_mnist(tmp_path)
    np.testing.assert_array_equal(x[..., 0], PICTURES.astype("float32") / 255)
    assert (y.tolist(), y_validation.tolist(), y.dtype) == ([7, 8, 9], [7, 8, 9], np.int64)


def test_the_folder_may_be_named_by_the_environment(nowhere, tmp_path, monkeypatch):
    fashion(tmp_path)
    monkeypatch.setenv(datasets.VARIABLE, str(tmp_path))
    assert len(datasets.load_fashion_mnist().train[0]) == 3


def test_the_package_of_debian_is_found_by_itself(nowhere, tmp_path, monkeypatch):
    fashion(tmp_path / "debian")
    monkeypatch.setattr(datasets, "DEBIAN_FASHION_MNIST", tmp_path / "debian")
    assert len(datasets.load_fashion_mnist().train[0]) == 3


@needs.fashion_mnist
def test_fashion_mnist_is_what_its_package_holds():
    (x, y), (x_validation, y_validation) = workload.get("fashion_cnn").read()
    assert (x.shape, x_validation.shape) == ((60_000, 28, 28, 1), (10_000, 28, 28, 1))
    assert (x.min(), x.max(), x.dtype) == (0, 1, np.float32)
    assert (np.bincount(y) == 6000).all()
    assert (np.bincount(y_validation) == 1000).all()


@pytest.mark.parametrize("form", ["folder", "inner folder", "archive"])
def test_cifar10_is_read_from_a_folder(nowhere, tmp_path, form):
    if form == "archive":
        with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as archive:
            for name, content in cifar().items():
                member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    else:
        folder = tmp_path / ("cifar-10-batches-py" if form == "inner folder" else "")
        folder.mkdir(exist_ok=True)
        for name, content in cifar().items():
            (folder / name).write_bytes(content)
    (x, y), (x_validation, _) = datasets.load_cifar10(tmp_path)
    assert (x.shape, x_validation.shape, x.dtype) == ((10, 32, 32, 3), (2, 32, 32, 3), np.float32)
    assert (x[1, 5, 7].tolist(), x.sum(), y.tolist()) == ([0, 0, 1], 5, [3, 4] * 5)


def test_a_pickle_that_holds_anything_else_is_not_run(nowhere, tmp_path):
    for name in cifar():
        (tmp_path / name).write_bytes(pickle.dumps(len))
    with pytest.raises(errors.MissingDataError, match=r"builtins\.len"):
        datasets.load_cifar10(tmp_path)


@pytest.mark.parametrize(
    ("name", "files"), [("fashion_resnet", "t10k-images"), ("cifar10_resnet", "cifar-10-python.tar.gz")]
)
def test_missing_data_say_how_to_get_them(nowhere, name, files, tmp_path):
    with pytest.raises(
        errors.MissingDataError, match=f"URL fetch failure.*{files}.*data_dir=.*TRAINSTEP_DATA.*digits_cnn"
    ):
        workload.get(name).read()
    with pytest.raises(errors.MissingDataError, match=f"is not in the folder.*{files}.*digits_cnn"):
        workload.get(name).read(tmp_path)
    with pytest.raises(errors.MissingDataError, match="does not exist"):
        workload.get(name).read(tmp_path / "nosuch")
