"""Cutout hides a square of each image."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from nets import IMAGES, NUMBERS, Task, X, Y, dense, numbers, tokens, workload_for
from runs import assert_same, prepared, run
from seen import batches_seen

from trainstep import errors
from trainstep.strategies._images import box_mask
from trainstep.strategies.cutout import without_square

PICTURES = Task(images=True)


def authors_mask(height: int, width: int, y: int, x: int, length: int) -> np.ndarray:
    """Return the mask of util/cutout.py of the authors, of one hole whose centre is drawn as y and x."""
    mask = np.ones((height, width), np.float32)
    y1, y2 = np.clip(y - length // 2, 0, height), np.clip(y + length // 2, 0, height)
    x1, x2 = np.clip(x - length // 2, 0, width), np.clip(x + length // 2, 0, width)
    mask[y1:y2, x1:x2] = 0.0
    return mask


@pytest.mark.parametrize("length", [0, 2, 4, 6])
def test_boxes_are_those_of_the_authors_at_every_centre(length):
    height, width = 5, 7
    centres = [(y, x) for y in range(height) for x in range(width)]
    shares = tf.constant([((y + 0.5) / height, (x + 0.5) / width) for y, x in centres], tf.float32)
    hidden = box_mask(tf.constant([height, width]), shares, tf.fill([len(centres), 2], length))
    expected = np.stack([authors_mask(height, width, y, x, length) for y, x in centres])
    np.testing.assert_array_equal(1 - hidden.numpy().astype("float32"), expected)


def test_a_square_in_the_middle_and_one_at_the_corner_by_hand():
    # Four by four pixels, half of which is 2. Around the pixel (2, 2) the square covers rows and columns 1 and 2; of
    # that around (0, 0) only this pixel is left.
    images = tf.ones((2, 4, 4, 1))
    seen = without_square(images, tf.constant([[0.5, 0.5], [0.0, 0.0]]), 0.5)[..., 0].numpy()
    np.testing.assert_array_equal(seen[0], [[1, 1, 1, 1], [1, 0, 0, 1], [1, 0, 0, 1], [1, 1, 1, 1]])
    np.testing.assert_array_equal(seen[1], [[0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]])


def test_an_odd_side_is_hidden_whole():
    hidden = box_mask(tf.constant([5, 5]), tf.constant([[0.5, 0.5]]), tf.constant([[3, 3]]))
    assert hidden.numpy().sum() == 9


def test_the_mean_hides_as_well_channel_by_channel():
    images = numbers(3, 6, 6, 2)
    seen = without_square(tf.constant(images), tf.constant([[0.5, 0.5]] * 3), 1 / 3, "mean").numpy()
    means = np.broadcast_to(images.mean((1, 2))[:, None, None], (3, 2, 2, 2))
    np.testing.assert_allclose(seen[:, 2:4, 2:4], means, rtol=1e-5)
    hidden = np.zeros((6, 6), bool)
    hidden[2:4, 2:4] = True
    np.testing.assert_array_equal(seen[:, ~hidden], images[:, ~hidden])


def test_images_of_whole_numbers_stay_such():
    seen = without_square(tf.ones((1, 4, 4, 1), tf.uint8), tf.constant([[0.5, 0.5]]), 0.5, "mean")
    assert seen.dtype == tf.uint8
    np.testing.assert_array_equal(seen, 1)


def test_each_image_has_a_square_of_its_own_anywhere_and_all_else_stays():
    x, y = np.ones((200, 8, 8, 3), "float32"), np.arange(200.0, dtype="float32")
    weights = np.linspace(0, 1, 200, dtype="float32")
    [batch] = batches_seen({"cutout": {}}, x, y, weights)
    np.testing.assert_array_equal(batch.y, y)
    np.testing.assert_array_equal(batch.sample_weight, weights)
    hidden = batch.x[..., 0] == 0
    np.testing.assert_array_equal(hidden, (batch.x == 0).all(axis=-1))
    # A square of 4 by 4 around each of 64 centres: every one of their masks is one of the authors', and most are drawn.
    allowed = {authors_mask(8, 8, y, x, 4).tobytes() for y in range(8) for x in range(8)}
    drawn = {(~mask).astype("float32").tobytes() for mask in hidden}
    assert drawn <= allowed
    assert len(drawn) > 50


def test_each_step_and_each_seed_draws_anew():
    def seen(steps=1, **options):
        return [batch.x for batch in batches_seen({"cutout": options}, IMAGES, Y, steps=steps)]

    first, second = seen(steps=2)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, seen(seed=1)[0])
    np.testing.assert_array_equal(first, seen()[0])


def test_training_is_plain_keras_on_the_images_it_made(assert_close):
    left = []
    for name in ("cutout", None):
        model = prepared(workload_for(dense, PICTURES), name)
        for batch in batches_seen({"cutout": {}}, IMAGES, Y, steps=3):
            model.train_on_batch(IMAGES if name else batch.x, Y)
        left.append(model.get_weights())
    assert_close(*left)


def test_inputs_that_are_no_images_stay():
    x = {"ids": tokens(22), "image": IMAGES}
    [batch] = batches_seen({"cutout": {}}, x, Y)
    np.testing.assert_array_equal(batch.x["ids"], x["ids"])
    assert not np.array_equal(batch.x["image"], IMAGES)


def test_no_images_are_refused_unless_nothing_is_asked_of_them():
    with pytest.raises(
        errors.UnsupportedInputError, match=r"cutout needs an input of images.*\(4, 6\).*x\[..., None\]"
    ):
        batches_seen({"cutout": {}}, X[:4], Y[:4])
    assert_same(run(workload_for(dense, NUMBERS), "cutout", {"length": 0.0}), run(workload_for(dense, NUMBERS)))


def test_channels_that_come_first_are_refused():
    keras.backend.set_image_data_format("channels_first")
    try:
        with pytest.raises(errors.UnsupportedInputError, match="channels_first"):
            batches_seen({"cutout": {}}, IMAGES, Y)
    finally:
        keras.backend.set_image_data_format("channels_last")
