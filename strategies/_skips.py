"""Updates left out in a row: counted inside the step, and too many of them stop training.

Inside the step an assertion stops it at once. XLA leaves assertions out: there the count stays at the
limit until the host looks, when an epoch of `fit` ends and after each `train_on_batch`.
"""

from typing import Any

import tensorflow as tf

from trainstep.errors import NonFiniteGradientError
from trainstep.step import require


def after_skip(skips: Any, limit: int, message: str) -> tf.Tensor:
    """Return the count after one more update was left out, an int32 scalar; at `limit`, stop with `message`."""
    count = tf.convert_to_tensor(skips) + 1
    with tf.control_dependencies([require(count < limit, message)]):
        return tf.identity(count)  # After the assertion: who trains on after it finds the count below the limit.


def after_update(skips: Any, limit: int) -> tf.Tensor:
    """Return the count after an update: 0, unless the host has yet to see that it was at `limit`."""
    count = tf.convert_to_tensor(skips)
    return tf.where(count >= limit, count, 0)


def check(skips: Any, limit: int, message: str) -> None:
    """On the host: raise `NonFiniteGradientError` with `message` where the count is at `limit`, and start it anew."""
    if int(skips.numpy()) >= limit:
        skips.assign(0)
        raise NonFiniteGradientError(message)
