"""How often Python looks for cycles among its objects, in tests and in the processes they start."""

import gc


def collect_seldom() -> None:
    """Leave alone what is there by now, and look at the rest seldom.

    Tracing makes objects by the hundred thousand; to look for cycles among those of TensorFlow each time takes a sixth
    of the suite.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)
