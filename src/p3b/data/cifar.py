"""CIFAR batches whose checksums are not the published ones (subsets, variants), read without trusting them.

torchvision unpickles CIFAR files after it has verified their checksums. A file of another checksum may hold anything, so here
only what an array is made of is let through.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p3b.errors import DataError

_ARRAY_PARTS = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("_codecs", "encode"),
}


def read_images(files: Sequence[Path], label_key: str) -> tuple[NDArray[np.uint8], list[int]]:
    """Images (n, 32, 32, 3) and labels of CIFAR batches, in order.

    Raises:
        DataError: a file is missing, damaged, or holds more than arrays and plain values.
    """
    contents = [_read(file) for file in files]
    try:
        pixels = np.concatenate([np.asarray(content["data"], dtype=np.uint8) for content in contents])
        labels = [int(label) for content in contents for label in content[label_key]]
        return pixels.reshape(len(labels), 3, 32, 32).transpose(0, 2, 3, 1), labels
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(f"{files[0].parent} does not hold CIFAR batches in their published format: {error}") from error


def read_names(file: Path, key: str) -> list[str]:
    """Class names from the meta file."""
    names = _read(file).get(key)
    if not isinstance(names, list):
        raise DataError(f"{file} has no list '{key}' of class names; expected CIFAR's meta file.")
    return [str(name) for name in names]


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ARRAY_PARTS:
            raise pickle.UnpicklingError(f"it would load {module}.{name}, which no CIFAR file needs")
        return super().find_class(module, name)


def _read(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            content = _ArraysOnly(stream, encoding="latin1").load()
    except (OSError, pickle.UnpicklingError, EOFError, ValueError, AttributeError, IndexError) as error:
        raise DataError(f"{file} cannot be read as a CIFAR file: {error}. Fetch the data set again with --download.") from error
    if not isinstance(content, dict):
        raise DataError(f"{file} does not hold a CIFAR batch.")
    return content
