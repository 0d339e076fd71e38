"""Which layers of a model compute in 16 bits, and how they are changed and put back."""

import weakref
from typing import Any

import keras
import tensorflow as tf

from trainstep import _seam
from trainstep.errors import ModelConflictError

_changed: weakref.WeakKeyDictionary[Any, weakref.WeakSet[Any]] = weakref.WeakKeyDictionary()
"""The layers changed here, each with the models it is changed for: models may share layers.

Kept away from the layers themselves, so that nothing of it is saved with them.
"""


def fastest_dtype() -> str:
    """Return the 16-bit dtype to compute in on the devices TensorFlow sees, bfloat16 where all have it."""
    details = [tf.config.experimental.get_device_details(gpu) for gpu in tf.config.list_physical_devices("GPU")]
    # NVIDIA GPUs multiply in bfloat16 from compute capability 8.0 (Ampere) on.
    has_bfloat16 = all(detail.get("compute_capability", (8, 0)) >= (8, 0) for detail in details)
    return "bfloat16" if has_bfloat16 else "float16"


def check(model: Any, dtype: str) -> None:
    """Raise `ModelConflictError` for a model with layers under another mixed policy, or with none in float32.

    Layers under `mixed_<dtype>` already are fine: those of a clone, for example.
    """
    layers = _seam.layers_of(model)
    for layer in layers:
        if _seam.is_mixed(layer) and layer not in _changed and not _is_mixed_to(layer, dtype):
            raise ModelConflictError(
                f"The layer {layer.name!r} has the dtype policy {_seam.dtype_policy_name(layer)!r} already, and the "
                f"strategy is to compute in {dtype}. Build the model under the policy 'float32' and let "
                "'mixed_precision' change it, or leave the strategy out."
            )
    weighted = [layer for layer in layers if layer.weights and layer is not model]
    if weighted and not any(_is_float32(layer) or _seam.is_mixed(layer) for layer in weighted):
        raise ModelConflictError(
            f"No layer computes in float32: {weighted[0].name!r} has the dtype policy "
            f"{_seam.dtype_policy_name(weighted[0])!r}. Build the model under 'float32' for 'mixed_precision'."
        )


def attach(model: Any, dtype: str) -> None:
    """Let the layers of `model` that compute in float32 compute in `dtype`, except those its outputs come from.

    Idempotent: layers a model makes when it is built are changed by a second call.
    """
    outputs = _seam.output_layers_of(model)
    for layer in _seam.layers_of(model):
        if _is_float32(layer) and not _stays_float32(layer, outputs):
            _seam.set_dtype_policy(layer, f"mixed_{dtype}")
        if _is_mixed_to(layer, dtype):  # Now, or before: a clone, or a model that shares layers.
            _changed.setdefault(layer, weakref.WeakSet()).add(model)


def detach(model: Any) -> None:
    """Undo `attach`; a layer that another model has changed too stays as it is."""
    for layer in _seam.layers_of(model):
        owners = _changed.get(layer)
        if owners is None or model not in owners:
            continue
        owners.discard(model)
        if not owners:
            del _changed[layer]
            _seam.set_dtype_policy(layer, "float32")


def as_float32(output: Any) -> Any:
    """Return `output` in float32 if it is a tensor in 16 bits, with its mask; else as it is."""
    if not tf.is_tensor(output) or output.dtype not in (tf.float16, tf.bfloat16):
        return output
    return _seam.with_mask(tf.cast(output, tf.float32), _seam.mask_of(output))


def _is_float32(layer: Any) -> bool:
    return _seam.dtype_policy_name(layer) == "float32"


def _is_mixed_to(layer: Any, dtype: str) -> bool:
    return _seam.dtype_policy_name(layer) == f"mixed_{dtype}"


def _stays_float32(layer: Any, output_layers: list[Any]) -> bool:
    # A softmax or a loss in 16 bits is inexact: the last layer computes in float32, as Keras's guide advises. What
    # normalizes raw inputs needs their range, and has its statistics in the dtype it was adapted in.
    unchanged = isinstance(layer, (keras.layers.InputLayer, keras.layers.Normalization))
    return unchanged or (layer in output_layers and len(_seam.layers_of(layer)) == 1)
