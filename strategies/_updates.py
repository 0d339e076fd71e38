"""What several strategies do with the gradients of an update, all of them together."""

import math

import tensorflow as tf

from trainstep.gradients import Gradients, dense, scale


def clip_by_norm(gradients: Gradients, clipnorm: float | tf.Tensor) -> Gradients:
    """Scale `gradients` together to an L2 norm of at most `clipnorm`; to NaN where that norm is not finite.

    As in Keras, entries from 2**64 on make it so: their squares are beyond float32.
    """
    norm = tf.linalg.global_norm(gradients)
    # Exactly 1 where nothing is to be clipped; 0 where both are.
    factor = tf.math.divide_no_nan(clipnorm, tf.maximum(norm, clipnorm))
    # A factor of 0, from an infinite norm, would turn the finite entries to zeros in silence.
    return scale(gradients, tf.where(tf.math.is_finite(norm), factor, math.nan))


def differs(clipped: Gradients, gradients: Gradients) -> tf.Tensor:
    """Return whether clipping changed any entry of `gradients`, a boolean scalar."""
    pairs = zip(clipped, gradients, strict=True)
    return tf.reduce_any([tf.reduce_any(one != dense(other)) for one, other in pairs if other is not None])


def add_noise(gradients: Gradients, stddev: tf.Tensor, seed: tf.Tensor) -> Gradients:
    """Return `gradients` with normal noise of `stddev` in each entry; a None stays None.

    Args:
        gradients: of any floating dtype.
        stddev: float32 scalar.
        seed: int32 (2,), other numbers of which give other noise.
    """
    seeds = tf.random.split(seed, len(gradients))

    def noisy(gradient: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        noise = tf.random.stateless_normal(tf.shape(gradient), seed)
        return gradient + tf.cast(stddev * noise, gradient.dtype)

    return [
        None if gradient is None else noisy(dense(gradient), seeds[index]) for index, gradient in enumerate(gradients)
    ]
