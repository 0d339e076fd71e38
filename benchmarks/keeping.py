"""Where results go: folders, and files that are kept in the repository, dated and never edited afterwards."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainstep.benchmarks.errors import InvalidComparisonError


def made_folder(path: str | Path) -> Path:
    """Return the folder `path`, which is made where it is missing.

    Raises:
        InvalidComparisonError: it cannot be.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidComparisonError(f"Nothing can be written to output={str(path)!r}: {error.strerror}.") from error
    return Path(path)


def path_of(folder: Path, name: str, machine: Mapping[str, str]) -> Path:
    """Return the file for what `name` is measured to be on `machine`, see `environment`, on the day of its time."""
    return folder / f"{name}_keras-{machine['keras']}_{machine['time'][:10]}.json"


def keep(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content`, all of it or nothing, to a file that is not there yet; its folder is made.

    Raises:
        FileExistsError: the file is there.
        ValueError: a number is not finite.
    """
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        whole = Path(folder) / path.name
        whole.write_text(text, encoding="utf-8")
        os.link(whole, path)  # Unlike a renaming, fails where the file is there.


def newest(folder: Path, name: str) -> Path | None:
    """Return the latest file of `name` in `folder`; None where there is none."""
    files = folder.glob(f"{name}_keras-*.json")
    return max(files, key=lambda path: (path.stem.rsplit("_", 1)[-1], path.name), default=None)
