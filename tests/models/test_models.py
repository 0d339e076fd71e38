"""Reference models: the same for the same seed, closed to wrong options, and without side effects."""

import random

import keras
import numpy as np
import pytest
import tensorflow as tf

import trainstep
from trainstep import models

CASES = {
    "cnn": ("cnn", (8, 8, 1), {}),
    "cnn with dropout": ("cnn", (8, 8, 1), {"dropout": 0.5}),
    "mlp": ("mlp", (6,), {}),
    "mlp on images with dropout": ("mlp", (4, 4, 1), {"units": (5, 4), "dropout": 0.5}),
    "resnet": ("resnet", (8, 8, 3), {"width": 4}),
    "transformer on tokens": ("transformer", (5,), {"vocabulary": 7, "width": 8, "heads": 2, "layers": 1}),
    "transformer on patches": ("transformer", (8, 8, 1), {"width": 8, "heads": 2, "layers": 1}),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    return request.param


def built(case, **changes):
    name, shape, options = case
    return models.build(name, **{"input_shape": shape, "classes": 3, **options, **changes})


def examples(case, count=4):
    _, shape, options = case
    generator = np.random.default_rng(0)
    if "vocabulary" in options:
        return generator.integers(0, options["vocabulary"], (count, *shape)).astype("int32")
    return generator.random((count, *shape), dtype=np.float32)


def test_every_name_has_a_case():
    assert {name for name, _, _ in CASES.values()} == set(models.names())


def test_the_seed_decides_all_weights(case):
    one, same, other = (built(case, seed=seed).get_weights() for seed in (1, 1, 2))
    assert all((a == b).all() for a, b in zip(one, same, strict=True))
    assert any((a != b).any() for a, b in zip(one, other, strict=True))


def test_the_global_seed_neither_matters_nor_changes(case):
    keras.backend.clear_session()  # Before 3.13 Keras's own generator outlived the seed.
    keras.utils.set_random_seed(5)
    first = built(case).get_weights()
    after = (
        random.random(),
        np.random.random(),
        keras.random.normal((2,)) if hasattr(keras, "random") else tf.random.normal((2,)),
    )
    keras.backend.clear_session()
    keras.utils.set_random_seed(5)
    untouched = (
        random.random(),
        np.random.random(),
        keras.random.normal((2,)) if hasattr(keras, "random") else tf.random.normal((2,)),
    )
    assert after[:2] == untouched[:2]
    np.testing.assert_array_equal(after[2], untouched[2])
    assert all((a == b).all() for a, b in zip(first, built(case).get_weights(), strict=True))


def test_no_two_kernels_of_a_model_start_alike(case):
    kernels = [weight for weight in built(case).get_weights() if weight.ndim > 1]
    for index, kernel in enumerate(kernels):
        assert not any(kernel.shape == other.shape and (kernel == other).all() for other in kernels[:index])


def test_the_output_is_a_probability_for_each_class(case):
    y = np.asarray(built(case)(examples(case)))
    assert y.shape == (4, 3)
    assert (y >= 0).all()
    np.testing.assert_allclose(y.sum(axis=1), 1, rtol=1e-6)  # Three float32, each rounded once.


def test_several_outputs_have_names_and_classes_of_their_own(case):
    model = built(case, classes={"kind": 3, "size": 2})
    y = model(examples(case))
    assert {name: tuple(output.shape) for name, output in y.items()} == {"kind": (4, 3), "size": (4, 2)}
    assert sorted(model.output_names) == ["kind", "size"]
    model.compile("adam", "sparse_categorical_crossentropy")
    model.train_on_batch(examples(case), {"kind": np.array([0, 1, 2, 0]), "size": np.array([0, 1, 1, 0])})


def test_training_and_saving(case, tmp_path):
    model = built(case)
    model.compile("adam", "sparse_categorical_crossentropy")
    model.train_on_batch(examples(case), np.array([0, 1, 2, 0]))
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(model(examples(case)), again(examples(case)))


def test_the_convolutional_net_is_the_one_of_the_measurements():
    layers = [type(layer).__name__ for layer in models.build("cnn", input_shape=(28, 28, 1), classes=10).layers[1:]]
    assert layers == ["Conv2D", "MaxPooling2D", "Conv2D", "MaxPooling2D", "Flatten", "Dense", "Dense"]
    # conv: 3 * 3 * 1 * 32 + 32, 3 * 3 * 32 * 64 + 64; two pools leave 7 x 7 of 64 channels; 128; 10.
    expected = (9 * 32 + 32) + (9 * 32 * 64 + 64) + (7 * 7 * 64 * 128 + 128) + (128 * 10 + 10)
    assert models.build("cnn", input_shape=(28, 28, 1), classes=10).count_params() == expected


@pytest.mark.parametrize("depth", [8, 14, 20])
def test_the_depth_of_a_resnet_counts_its_weight_layers(depth):
    model = models.build("resnet", input_shape=(8, 8, 3), classes=2, depth=depth, width=2)
    weighted = [
        x for x in model.layers if isinstance(x, keras.layers.Conv2D | keras.layers.Dense) and "shortcut" not in x.name
    ]
    assert len(weighted) == depth


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("cnn", {"unit": 3}, "unknown option 'unit'. Did you mean 'units'"),
        ("cnn", {"dropout": 1.0}, "dropout: .*less than 1"),
        ("cnn", {"units": 3.0}, "units: .*integer"),
        ("cnn", {"input_shape": (3, 3, 1)}, "at least 4 x 4"),
        ("cnn", {"input_shape": (8,)}, "height, width, channels"),
        ("cnn", {"filters": (3, 0)}, r"filters\.1: .*greater than or equal to 1.* Given: 0"),
        ("mlp", {"units": (3, 0)}, "units.1: Input should be greater than or equal to 1. Given: 0"),
        ("mlp", {"input_shape": ()}, "positive integers"),
        ("mlp", {"classes": 1}, "2 or more"),
        ("mlp", {"classes": {"left": 2, "right": 1}}, "2 or more, or one for each output by its name, not {'left'"),
        ("mlp", {"classes": {}}, "2 or more"),
        ("mlp", {"classes": {"a/b": 2}}, "the name of an output is of letters, digits, .*, not 'a/b'"),
        ("mlp", {"classes": {0: 2}}, "the name of an output is of letters, digits, .*, not 0"),
        ("mlp", {"seed": -1}, "seed must be"),
        ("resnet", {"depth": 9}, "depth: .*8, 14 or 20"),
        ("transformer", {"heads": 5}, "does not divide 32"),
        ("transformer", {"patch_size": 3}, "does not divide the image"),
        ("transformer", {"vocabulary": 9}, "token ids of shape"),
        ("transformer", {"input_shape": (8,)}, "give vocabulary="),
    ],
)
def test_wrong_options_are_refused_with_what_is_allowed(name, arguments, message):
    with pytest.raises(trainstep.errors.InvalidOptionsError, match=message):
        models.build(name, **{"input_shape": (8, 8, 1), "classes": 3, **arguments})


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(
        trainstep.errors.UnknownModelError, match=r"Did you mean 'resnet'\?.*cnn, mlp, resnet, transformer"
    ):
        models.build("restnet", input_shape=(8, 8, 1), classes=3)


@pytest.mark.parametrize("name", models.names())
def test_every_option_is_described(name):
    assert all(field.get("description") for field in models.describe(name)["properties"].values())
    assert models.validate(name).model_config["frozen"]
