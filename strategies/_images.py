"""Inputs that are images, and boxes within them: what cutout, cutmix and their kind have in common."""

from typing import Any

import keras
import tensorflow as tf

from trainstep.errors import UnsupportedInputError


def images_among(strategy: str, x: Any) -> list[int]:
    """Return the places of images, (batch, height, width, channels), among the flattened inputs `x`.

    Raises:
        UnsupportedInputError: there is none.
    """
    tensors = tf.nest.flatten(x)
    found = [place for place, tensor in enumerate(tensors) if isinstance(tensor, tf.Tensor) and tensor.shape.rank == 4]
    if keras.backend.image_data_format() == "channels_first":
        raise UnsupportedInputError(
            f"{strategy} takes images of shape (batch, height, width, channels), and Keras is set to channels_first. "
            "Call keras.backend.set_image_data_format('channels_last') before the model is built."
        )
    if not found:
        given = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise UnsupportedInputError(
            f"{strategy} needs an input of images, (batch, height, width, channels), and there are inputs of shape "
            f"{given}. Give images of one channel a last axis: x[..., None]."
        )
    return found


def size_of(images: tf.Tensor) -> tf.Tensor:
    """Return height and width of `images`: int32 (2,)."""
    return tf.shape(images)[1:3]


def box_mask(size: tf.Tensor, centre: tf.Tensor, sides: tf.Tensor) -> tf.Tensor:
    """Return where a box lies in an image, cut off at its border: boolean (batch, height, width).

    Args:
        size: height and width of the image: int32 (2,).
        centre: of the box, as shares of height and width from 0 to below 1: float32 (batch, 2).
        sides: height and width of the box, in pixels: int32 (batch, 2).
    """
    # The pixel of the centre is drawn, as the authors of cutout and cutmix do: one of a box of even sides lies right
    # and below of its middle.
    first = tf.cast(centre * tf.cast(size, tf.float32), tf.int32) - sides // 2
    last = first + sides

    def within(axis: int) -> tf.Tensor:
        places = tf.range(size[axis])[None]
        return (places >= first[:, axis, None]) & (places < last[:, axis, None])

    return within(0)[:, :, None] & within(1)[:, None, :]
