"""Progressive resizing begins with small images, and lets them grow."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from nets import IMAGES, Task, Workload, X, Y, dense, functional, numbers, sgd, tokens, workload_for
from runs import assert_same, fitted, prepared, run
from seen import batches_seen

import trainstep
from trainstep import errors
from trainstep.strategies.progressive_resizing import resized, resized_to

PICTURES = Task(images=True)
HALF = {"scale": 0.5}


@pytest.mark.parametrize(
    ("side", "scale", "increment", "expected"),
    [
        (32, 0.5, 1, 16),
        (32, 0.6, 4, 20),  # 19.2, and the multiple of 4 nearest to it.
        (32, 0.99, 4, 32),
        (30, 0.99, 4, 28),  # 29.7 is nearest to 28.
        (30, 1.0, 4, 30),
        (8, 0.01, 4, 4),
        (6, 0.5, 8, 6),
    ],
)
def test_sizes_by_hand(side, scale, increment, expected):
    np.testing.assert_array_equal(resized_to(tf.constant([side, side]), scale, increment), [expected, expected])


def test_height_and_width_each_have_their_own():
    np.testing.assert_array_equal(resized_to(tf.constant([8, 20]), tf.constant(0.5), 2), [4, 10])


def test_half_the_size_is_the_mean_of_two_by_two_pixels():
    images = numbers(3, 6, 4, 2)
    expected = images.reshape(3, 3, 2, 2, 2, 2).mean(axis=(2, 4))
    np.testing.assert_allclose(resized(tf.constant(images), tf.constant([3, 2])), expected, rtol=1e-5, atol=1e-6)


def test_full_size_is_the_images_themselves():
    np.testing.assert_array_equal(resized(tf.constant(IMAGES), tf.constant([4, 4])), IMAGES)


def test_what_is_between_whole_numbers_is_not_rounded():
    # The mean of 0, 1, 2 and 3.
    images = tf.constant([[[[0], [1]], [[2], [3]]]], tf.uint8)
    made = resized(images, tf.constant([1, 1]))
    assert made.dtype == tf.float32
    np.testing.assert_array_equal(made, [[[[1.5]]]])
    assert resized(tf.cast(images, tf.float16), tf.constant([1, 1])).dtype == tf.float16


def test_images_grow_with_the_updates_by_hand():
    # 8 pixels at 0.5, 0.625, 0.75, 0.875, 1, 1.
    schedule = {"start": 0.5, "end": 1.0, "updates": 4}
    x, y = numbers(2, 8, 8, 1), np.ones((2, 1), "float32")
    seen = batches_seen({"progressive_resizing": {"scale": schedule}}, x, y, steps=6)
    assert [batch.x.shape[1] for batch in seen] == [batch.x.shape[2] for batch in seen] == [4, 5, 6, 7, 8, 8]
    np.testing.assert_array_equal(seen[-1].x, x)


def of_any_size(task: Task) -> keras.Model:
    x = h = keras.Input((None, None, 2))
    for layer in task.first_layers():
        h = layer(h)
    return keras.Model(x, keras.layers.Dense(1)(h))


def inside_another(task: Task) -> keras.Model:
    x = keras.Input((4, 4, 2))
    return keras.Model(x, dense(task)(x))


@pytest.mark.parametrize("build", [dense, functional, inside_another])
@pytest.mark.parametrize("compiled", [{}, {"run_eagerly": True}], ids=str)
def test_training_is_plain_keras_on_small_images_whatever_the_input_says(build, compiled, assert_close):
    """A functional model refuses other sizes than that of its `Input` where it runs eagerly."""
    small = IMAGES.reshape(-1, 2, 2, 2, 2, 2).mean(axis=(2, 4))
    ours = prepared(workload_for(build, PICTURES), "progressive_resizing", HALF, **compiled)
    trained = fitted(ours, workload_for(build, PICTURES))
    if build is functional:  # Of which there is no net without a size.
        assert np.isfinite(trained.history["loss"]).all()
    else:
        plain = run(Workload(lambda: of_any_size(PICTURES), small, Y))
        assert_close(trained.variables, plain.variables)


@pytest.mark.parametrize("compiled", [{}, {"run_eagerly": True}], ids=str)
def test_what_a_functional_model_refuses_it_refuses_afterwards(compiled):
    model = prepared(workload_for(functional, PICTURES), "progressive_resizing", **compiled)
    fitted(model, workload_for(functional, PICTURES))
    with pytest.raises(ValueError, match="expected shape=\\(None, 4, 4, 2\\)"):
        model(tf.zeros((1, 2, 2, 2)))


def test_one_trace_serves_all_sizes():
    traces = []

    class Traced(keras.Model):
        def __init__(self):
            super().__init__()
            self.all = keras.Sequential([*PICTURES.first_layers(), *PICTURES.last_layers().values()])

        def call(self, x):
            traces.append(tuple(x.shape))
            return self.all(x)

    model = trainstep.apply(Traced(), "progressive_resizing", scale={"start": 0.5, "end": 1.0, "updates": 4})
    model.compile(sgd(), "mse")
    model.train_on_batch(IMAGES[:4], Y[:4])
    first = len(traces)
    for _ in range(6):
        model.train_on_batch(IMAGES[:4], Y[:4])
    assert len(traces) == first
    assert traces[-1][1:3] == (None, None)


def test_inputs_that_are_no_images_stay():
    x = {"ids": tokens(22), "image": IMAGES}
    [batch] = batches_seen({"progressive_resizing": HALF}, x, Y)
    np.testing.assert_array_equal(batch.x["ids"], x["ids"])
    assert batch.x["image"].shape == (22, 2, 2, 2)


def flat() -> keras.Model:
    return keras.Sequential([keras.Input((4, 4, 2)), keras.layers.Flatten(), keras.layers.Dense(1)])


def flat_made_at_the_first_batch() -> keras.Model:
    return keras.Sequential([keras.layers.Flatten(), keras.layers.Dense(1)])


@pytest.mark.parametrize("build", [flat, flat_made_at_the_first_batch])
@pytest.mark.parametrize("compiled", [{}, {"run_eagerly": True}], ids=str)
def test_a_model_that_takes_one_size_only_is_refused_before_it_trains(build, compiled):
    model = trainstep.apply(build(), "progressive_resizing")
    model.compile(sgd(), "mse", **compiled)
    with pytest.raises(errors.ModelConflictError, match=r"images of \(2, 2, 2\) out of \(4, 4, 2\).*GlobalAverage"):
        model.fit(IMAGES, Y, verbose=0)
    assert int(model.optimizer.iterations.numpy()) == 0


def test_a_model_is_asked_again_for_a_smaller_size():
    layers = keras.layers
    model = keras.Sequential(
        [keras.Input((4, 4, 2)), layers.Conv2D(2, 3), layers.GlobalAveragePooling2D(), layers.Dense(1)]
    )
    trainstep.apply(model, "progressive_resizing", scale=0.75)
    model.compile(sgd(), "mse", run_eagerly=True)
    model.fit(IMAGES, Y, verbose=0)  # Of 3 x 3 pixels.
    trainstep.apply(trainstep.remove(model), "progressive_resizing", scale=0.5)
    with pytest.raises(errors.ModelConflictError, match=r"images of \(2, 2, 2\) out of \(4, 4, 2\)"):
        model.fit(IMAGES, Y, verbose=0)


def test_a_model_that_predicts_images_is_refused():
    model = trainstep.apply(
        keras.Sequential([keras.Input((4, 4, 2)), keras.layers.Conv2D(2, 1)]), "progressive_resizing"
    )
    model.compile(sgd(), "mse")
    with pytest.raises(errors.ModelConflictError, match=r"makes \[\(None, 2, 2, 2\)\] of them"):
        model.fit(IMAGES, IMAGES, verbose=0)


def test_xla_is_refused_and_never_chosen_by_keras():
    model = trainstep.apply(dense(PICTURES), "progressive_resizing")
    with pytest.raises(errors.ModelConflictError, match=r"progressive_resizing: images change their size.*jit_compile"):
        model.compile(sgd(), "mse", jit_compile=True)
    model.compile(sgd(), "mse")
    assert not model.jit_compile
    model = trainstep.apply(dense(PICTURES), "progressive_resizing", scale=1.0)
    model.compile(sgd(), "mse", jit_compile=True)
    assert model.jit_compile is True


def test_no_images_are_refused_unless_nothing_is_asked_of_them():
    with pytest.raises(errors.UnsupportedInputError, match="progressive_resizing needs an input of images"):
        batches_seen({"progressive_resizing": HALF}, X[:4], Y[:4])
    assert_same(run(workload_for(dense), "progressive_resizing", {"scale": 1.0}), run(workload_for(dense)))
