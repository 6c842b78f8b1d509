"""Files that are complete or not there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

_UNFINISHED = ".part"


def write_atomically(file: Path, write: Callable[[Path], object]) -> None:
    """Write beside the file, flush to disk, then rename: whoever looks finds the old content or the new, never half of it.

    What a power cut may undo is only the whole of it: file and folder are both on disk when this returns.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.", suffix=_UNFINISHED)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        flush_to_disk(temporary)
        temporary.chmod(0o644)
        temporary.replace(file)
        flush_to_disk(file.parent)
    finally:
        temporary.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, have reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_unfinished(path: Path) -> bool:
    """Whether a file is what a writer that was killed has left half done."""
    return path.name.startswith(".") and path.suffix == _UNFINISHED


def remove_unfinished(folder: Path) -> None:
    """Remove what writers that were killed have left in a folder; call it only while nobody writes there."""
    for leftover in filter(is_unfinished, list(folder.iterdir())):
        leftover.unlink(missing_ok=True)
