"""What a result was measured with: versions and machine."""

import os
import platform
from datetime import datetime, timezone

import keras
import tensorflow as tf

import trainstep


def environment() -> dict[str, str]:
    """Return versions, machine and time as text, by name."""
    accelerators = [device.name for device in tf.config.list_physical_devices() if device.device_type != "CPU"]
    return {
        "trainstep": trainstep.__version__,
        "keras": keras.__version__,
        "tensorflow": tf.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": str(_processors()),
        "accelerators": ", ".join(accelerators) or "none",
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _processors() -> int:
    # What the process may use, which in a container is less than what the machine has; not on every platform.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
