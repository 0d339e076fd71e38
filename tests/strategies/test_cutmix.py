"""CutMix pastes a box of another image into each, and mixes the labels by its area."""

import numpy as np
import pytest
import tensorflow as tf
from nets import IMAGES, ONE_HOT, Task, X, dense, tokens, workload_for
from runs import assert_same, prepared, run
from seen import batches_seen

from trainstep import errors
from trainstep.strategies.cutmix import pasted

PICTURES = Task(images=True, classes=True)


def authors_box(height: int, width: int, share: float, y: int, x: int) -> tuple[int, int, int, int]:
    """Return the box of `rand_bbox` of the authors (train.py), whose centre is drawn as y and x."""
    cut_rat = np.sqrt(1.0 - share)
    cut_h, cut_w = int(height * cut_rat), int(width * cut_rat)
    return (
        int(np.clip(y - cut_h // 2, 0, height)),
        int(np.clip(y + cut_h // 2, 0, height)),
        int(np.clip(x - cut_w // 2, 0, width)),
        int(np.clip(x + cut_w // 2, 0, width)),
    )


def counted(count: int, steps: int = 1, **options) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return, of each step, images and labels made of images that show the number of their example."""
    x = np.arange(count, dtype="float32")[:, None, None, None] * np.ones((1, 8, 8, 1), "float32")
    return [(b.x, b.y) for b in batches_seen({"cutmix": options}, x, np.eye(count, dtype="float32"), steps=steps)]


def test_a_box_by_hand():
    # 4 by 4 pixels, lambda = 3/4: the box has a side of 4 sqrt(1/4) = 2, so 4 of 16 pixels; at a corner one is left.
    images, others = tf.zeros((2, 4, 4, 1)), tf.ones((2, 4, 4, 1))
    made, kept = pasted(images, others, tf.constant([0.75, 0.75]), tf.constant([[0.5, 0.5], [0.0, 0.99]]))
    np.testing.assert_array_equal(made[0, ..., 0], [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(made[1, ..., 0], [[0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(kept, [12 / 16, 14 / 16])


@pytest.mark.parametrize("share", [0.0, 0.35, 0.75, 0.9375, 1.0])
def test_boxes_of_even_sides_are_those_of_the_authors_at_every_centre(share):
    height, width = 8, 16
    assert int(height * np.sqrt(1 - share)) % 2 == int(width * np.sqrt(1 - share)) % 2 == 0
    centres = [(y, x) for y in range(height) for x in range(width)]
    shape = (len(centres), height, width, 1)
    at = tf.constant([((y + 0.5) / height, (x + 0.5) / width) for y, x in centres], tf.float32)
    made, kept = pasted(tf.zeros(shape), tf.ones(shape), tf.fill([len(centres)], share), at)
    for (y, x), image, own in zip(centres, made.numpy()[..., 0], kept.numpy(), strict=True):
        y1, y2, x1, x2 = authors_box(height, width, share, y, x)
        expected = np.zeros((height, width), "float32")
        expected[y1:y2, x1:x2] = 1
        np.testing.assert_array_equal(image, expected)
        assert own == pytest.approx(1 - (y2 - y1) * (x2 - x1) / (height * width), abs=1e-6)


@pytest.mark.parametrize("per", ["batch", "example"])
def test_labels_are_shares_of_the_pixels(per):
    """Equation 1: of each image the label says which share of it is whose."""
    for images, labels in counted(6, steps=4, per=per):
        for image, label in zip(images, labels, strict=True):
            pixels = np.array([(image == number).mean() for number in range(6)])
            np.testing.assert_allclose(label, pixels, atol=1e-6)
            assert (pixels > 0).sum() <= 2


def test_the_partner_is_from_a_permutation_and_the_box_one_for_the_batch():
    for _, labels in counted(8, steps=4):
        np.testing.assert_allclose(labels.sum(axis=0), 1, rtol=1e-6)
        mixed = ~np.isclose(np.diag(labels), 1)
        assert len(np.unique(np.diag(labels)[mixed])) <= 1


def test_each_example_may_have_a_box_of_its_own():
    [(_, labels)] = counted(64, per="example")
    assert len(np.unique(np.diag(labels))) > 10


def test_a_box_is_there_as_often_as_its_probability_says():
    # 1000 boxes at 0.3: 300, give or take four standard deviations of sqrt(1000 * 0.3 * 0.7) = 14.5. An example of its
    # own, or a box without a pixel, looks like none: not more than 30 of 1000, the side being below 1 pixel of 8.
    x = np.stack([np.full((8, 8, 1), number, "float32") for number in range(1000)])
    [batch] = batches_seen({"cutmix": {"cutmix_prob": 0.3, "per": "example"}}, x, np.arange(1000, dtype="float32"))
    boxes = (batch.x != x).any(axis=(1, 2, 3)).sum()
    assert 300 - 58 - 30 < boxes < 300 + 58


def test_each_step_and_each_seed_draws_anew():
    (first, _), (second, _) = counted(6, steps=2)
    [(other, _)] = counted(6, seed=1)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, other)
    np.testing.assert_array_equal(first, counted(6)[0][0])


def test_weights_are_mixed_with_the_labels():
    """An example of weight 0 lends others its pixels, and never its label."""
    x = np.arange(6, dtype="float32")[:, None, None, None] * np.ones((1, 8, 8, 1), "float32")
    weights = np.array([0, 1, 0, 1, 0, 1], "float32")
    for batch in batches_seen({"cutmix": {"per": "example"}}, x, np.eye(6, dtype="float32"), weights, steps=3):
        shares = np.stack([(batch.x == number).mean(axis=(1, 2, 3)) for number in range(6)], axis=1)
        np.testing.assert_allclose(batch.sample_weight, shares @ weights, atol=1e-6)
        counts = batch.sample_weight > 0
        np.testing.assert_array_equal(batch.y[counts][:, weights == 0], 0)
        np.testing.assert_allclose(batch.y.sum(axis=1), 1, rtol=1e-6)


def test_training_is_plain_keras_on_the_images_it_made(assert_close):
    left = []
    for name in ("cutmix", None):
        model = prepared(workload_for(dense, PICTURES), name)
        for batch in batches_seen({"cutmix": {}}, IMAGES, ONE_HOT, steps=3):
            model.train_on_batch(*((IMAGES, ONE_HOT) if name else (batch.x, batch.y)))
        left.append(model.get_weights())
    assert_close(*left)


def test_inputs_that_are_no_images_stay():
    x = {"ids": tokens(22), "image": IMAGES}
    [batch] = batches_seen({"cutmix": {}}, x, ONE_HOT)
    np.testing.assert_array_equal(batch.x["ids"], x["ids"])
    assert not np.array_equal(batch.x["image"], IMAGES)


def test_class_numbers_and_inputs_that_are_no_images_are_refused():
    with pytest.raises(errors.UnsupportedInputError, match=r"cutmix mixes labels.*keras.utils.to_categorical"):
        batches_seen({"cutmix": {}}, IMAGES, ONE_HOT.argmax(axis=-1))
    with pytest.raises(errors.UnsupportedInputError, match="cutmix needs an input of images"):
        batches_seen({"cutmix": {}}, X, ONE_HOT)


@pytest.mark.parametrize("neutral", [{"alpha": 0.0}, {"cutmix_prob": 0.0}], ids=str)
def test_without_boxes_nothing_is_asked_of_the_model(neutral):
    assert_same(run(workload_for(dense), "cutmix", neutral), run(workload_for(dense)))
