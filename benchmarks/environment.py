"""What a result was measured with: versions and machine."""

import os
import pathlib
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
        "processor": _processor(),
        "processors": str(_processors()),
        "accelerators": ", ".join(accelerators) or "none",
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    # Linux says more in this file than `platform` knows: the model, and whether it multiplies in bfloat16.
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor()
    fields = dict(line.split(":", 1) for line in cpuinfo.read_text().split("\n\n")[0].splitlines() if ":" in line)
    known = {key.strip(): value.strip() for key, value in fields.items()}
    bfloat16 = "with" if "avx512_bf16" in known.get("flags", "") else "without"
    return f"{known.get('model name', platform.processor())}, {bfloat16} AVX512-BF16"


def _processors() -> int:
    # What the process may use, which in a container is less than what the machine has; not on every platform.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
