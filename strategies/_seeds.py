"""Seeds for stateless random numbers: of the option `seed` of a strategy, and a slot that counts its draws."""

from typing import Any

import tensorflow as tf

from trainstep.replicas import assign


def next_seed(strategy: str, model: Any, numbers: int = 1) -> tf.Tensor:
    """Return the seed of this step, the same on every replica, and others at the next: int32 (2,).

    Args:
        strategy: whose option `seed` it is, and whose slot `draws`, int32, counts on.
        model: with it.
        numbers: how many second numbers of a seed, beginning with that returned, are this step's alone.
    """
    draws = model.strategy_state[strategy]["draws"]
    draw = tf.convert_to_tensor(draws)
    assign([(draws, draw + 1)])
    return tf.stack([model.strategy_options[strategy].seed, numbers * draw])
