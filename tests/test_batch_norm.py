"""Batch-norm statistics estimated anew are the means over the data, and go with the weights the model is judged by."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from nets import BATCH, X, Y, dense, functional, sgd

import trainstep
from trainstep import errors
from trainstep._seam import KERAS_3


def normalizing() -> keras.Model:
    """Return batch norm, and one weight for each of its six outputs."""
    keras.utils.set_random_seed(0)
    layers = keras.layers
    return keras.Sequential([keras.Input((6,)), layers.BatchNormalization(momentum=0.9), layers.Dense(1)])


def statistics(model: keras.Model) -> list[np.ndarray]:
    layer = next(layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization))
    return [layer.moving_mean.numpy(), layer.moving_variance.numpy()]


def test_of_one_batch_they_are_its_mean_and_variance():
    model = normalizing()
    trainstep.reestimate_batch_norm(model, X, batch_size=len(X))
    mean, variance = statistics(model)
    np.testing.assert_allclose(mean, X.mean(axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(variance, X.var(axis=0), rtol=1e-5)
    assert model.layers[0].momentum == 0.9


@pytest.mark.skipif(KERAS_3, reason="Keras 3 has BatchNormalization(synchronized=True) instead, a batch norm like any")
def test_the_one_that_keras_2_has_for_replicas_is_a_batch_norm():
    norm = keras.layers.experimental.SyncBatchNormalization(momentum=0.9)
    assert not isinstance(norm, keras.layers.BatchNormalization)
    model = keras.Sequential([keras.Input((6,)), norm, keras.layers.Dense(1)])
    trainstep.reestimate_batch_norm(model, X, batch_size=len(X))
    np.testing.assert_allclose(norm.moving_mean.numpy(), X.mean(axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(norm.moving_variance.numpy(), X.var(axis=0), rtol=1e-5)
    assert norm.momentum == 0.9


@pytest.mark.parametrize("kind", ["arrays", "dataset", "dataset with labels"])
def test_of_several_batches_they_are_the_means_weighted_by_examples(kind):
    # Five batches of four and one of two: the mean of means is the mean, that of the variances that within batches.
    data = X if kind == "arrays" else tf.data.Dataset.from_tensor_slices((X, Y) if "labels" in kind else X).batch(BATCH)
    model = normalizing()
    trainstep.reestimate_batch_norm(model, data, **({"batch_size": BATCH} if kind == "arrays" else {}))
    parts = [X[start : start + BATCH] for start in range(0, len(X), BATCH)]
    mean, variance = statistics(model)
    np.testing.assert_allclose(mean, X.mean(axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(variance, sum(len(p) * p.var(axis=0) for p in parts) / len(X), rtol=1e-5)


def trained(name: str, **options) -> keras.Model:
    keras.utils.set_random_seed(0)
    model = trainstep.apply(functional(), name, **options)
    model.compile(sgd(), "mse")
    model.fit(X, Y, batch_size=BATCH, shuffle=False, verbose=0)
    return model


AVERAGES = [("ema", {"decay": 0.5}), ("swa", {})]


@pytest.mark.parametrize(("name", "options"), AVERAGES)
def test_an_average_keeps_its_own_until_its_next_update(name, options):
    model = trained(name, **options, batch_norm="reestimate")
    own = statistics(model)
    with model.evaluation_weights():
        np.testing.assert_array_equal(statistics(model), own)
        hidden = keras.Model(model.input, model.get_layer("hidden").output)(X).numpy()
    trainstep.reestimate_batch_norm(model, X, batch_size=len(X))
    np.testing.assert_array_equal(statistics(model), own)
    with model.evaluation_weights():
        np.testing.assert_allclose(statistics(model)[0], hidden.mean(axis=0), rtol=1e-4, atol=1e-6)
    model.train_on_batch(X[:BATCH], Y[:BATCH])
    own = statistics(model)
    with model.evaluation_weights():
        np.testing.assert_array_equal(statistics(model), own)


@pytest.mark.parametrize(("name", "options"), AVERAGES)
def test_estimated_statistics_are_in_the_file(name, options, tmp_path):
    model = trained(name, **options, batch_norm="reestimate")
    trainstep.reestimate_batch_norm(model, X)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), model.predict(X, verbose=0))


def test_averaged_statistics_are_averaged_as_the_weights_are():
    # momentum 0.99; EMA of what the statistics are after each update, with decay 0.5, from those of the first on.
    model = trainstep.apply(functional(), "ema", decay=0.5, warmup=False)
    model.compile(sgd(), "mse")
    average = None
    for start in range(0, 12, BATCH):
        model.train_on_batch(X[start : start + BATCH], Y[start : start + BATCH])
        now = statistics(model)
        average = now if average is None else [(a + n) / 2 for a, n in zip(average, now, strict=True)]
    with model.evaluation_weights():
        np.testing.assert_allclose(statistics(model), average, rtol=1e-6)


def test_the_mean_of_statistics_is_a_mean():
    model = trainstep.apply(functional(), "swa", batch_norm="average")
    model.compile(sgd(), "mse")
    seen = []
    for start in range(0, 12, BATCH):
        model.train_on_batch(X[start : start + BATCH], Y[start : start + BATCH])
        seen.append(statistics(model))
    with model.evaluation_weights():
        np.testing.assert_allclose(statistics(model), np.mean(seen, axis=0), rtol=1e-6)


@pytest.mark.parametrize("batch_norm", ["average", "copy"])
def test_an_average_that_keeps_others_refuses_them(batch_norm):
    model = trained("ema", batch_norm=batch_norm)
    with pytest.raises(errors.ModelConflictError, match="ema keeps statistics estimated anew with batch_norm='reest"):
        trainstep.reestimate_batch_norm(model, X)


def test_training_goes_on_as_if_nobody_had_estimated():
    weights = []
    for estimates in (True, False):
        model = trained("swa")
        if estimates:
            trainstep.reestimate_batch_norm(model, X)
        model.fit(X, Y, batch_size=BATCH, shuffle=False, verbose=0)
        weights.append(model.get_weights())
    if not hasattr(keras.backend, "experimental"):  # On Keras 2 the passes draw masks of dropout from one stream.
        tf.nest.map_structure(np.testing.assert_array_equal, *weights)


def test_a_model_that_is_not_built_or_on_several_replicas_is_refused(mirrored):
    with pytest.raises(errors.NotCompiledError, match="before it is built"):
        trainstep.reestimate_batch_norm(keras.Sequential([keras.layers.Dense(1)]), X)
    with mirrored.scope():
        model = dense()
    with pytest.raises(errors.ModelConflictError, match="on 2 replicas"):
        trainstep.reestimate_batch_norm(model, X)
    with pytest.raises(errors.UnsupportedInputError, match="no examples"):
        trainstep.reestimate_batch_norm(normalizing(), X[:0])
