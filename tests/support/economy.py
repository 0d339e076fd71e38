"""What tests, and the processes they start, do seldom that costs much and changes nothing."""

import gc

from tensorflow.python import pywrap_tfe  # noqa: TID251  Nothing public seeds without throwing kernels away.

from trainstep._seam import KERAS_3


def economize() -> None:
    """Look for garbage seldom, and keep kernels."""
    _collect_seldom()
    if KERAS_3:  # On Keras 2 dropout and initial weights are drawn by kernels, which go on where they were.
        _keep_kernels()


def _collect_seldom() -> None:
    """Leave alone what is there by now, and look at the rest seldom.

    Tracing makes objects by the hundred thousand; to look for cycles among those of TensorFlow each time takes a sixth
    of the suite.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


def _keep_kernels() -> None:
    """Have TensorFlow keep the kernels of its operations, also where a seed is set or Keras's session cleared.

    It throws them away then, for some draw random numbers and would go on where they were: operations that nothing here
    calls eagerly. To make the others anew for each net is a quarter of what steps this small take.
    """
    pywrap_tfe.TFE_ContextClearCaches = lambda context: None
