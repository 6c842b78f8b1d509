"""Where pixels lie: files, members of a tar, memory, data sets of libraries.

A store knows how to open image i and what to call it. None keeps a file open between two images. timm's tar reader does,
and once its main process has read an image, all forked workers share one file offset and read garbage; an open costs some 20
microseconds beside a decode of several hundred.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, final, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from p3b.data.prepare import prepare_image, read_image
from p3b.errors import DataError


class ImageStore(Protocol):
    """Images by number, without labels."""

    def __len__(self) -> int: ...

    def open(self, index: int) -> Image.Image:
        """Image `index`, decoded and prepared: RGB; raises whatever the decoder raises, and `DataError` where not this image
        but all that the store reads from is at fault."""
        ...

    def name(self, index: int) -> str:
        """What a user calls this image: its file, or its place in the set."""
        ...


@runtime_checkable
class FileBytes(Protocol):
    """A store that can also give the bytes that an image is stored in, without decoding them."""

    def sizes(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Bytes of each image; -1 of one that is gone."""
        ...

    def read_bytes(self, index: int, start: int = 0, count: int | None = None) -> bytes:
        """Bytes of an image, from `start` on, at most `count`; raises `OSError`."""
        ...


@final
class FileStore:
    """Image files by path.

    Args:
        paths: one path for each image. Kept as one array of bytes: a list of a million strings would be copied bit by
            bit into every forked worker, since merely reading a Python object writes its reference count.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = np.array([os.fsencode(path) for path in paths])

    def __len__(self) -> int:
        return len(self._paths)

    def open(self, index: int) -> Image.Image:
        with Path(self.name(index)).open("rb") as file:
            return read_image(file)

    def name(self, index: int) -> str:
        return os.fsdecode(bytes(self._paths[index]))

    def sizes(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.array([_size(bytes(path)) for path in self._paths[indices]], np.int64)

    def read_bytes(self, index: int, start: int = 0, count: int | None = None) -> bytes:
        with Path(self.name(index)).open("rb", buffering=0) as file:
            file.seek(start)
            return file.read(-1 if count is None else count)


@final
class TarStore:
    """Image files inside an uncompressed tar.

    Args:
        path: the tar.
        names: member names.
        offsets: (n,) where each member's data begins, in bytes from the start of the tar.
        sizes: (n,) bytes of each member.
    """

    def __init__(self, path: Path, names: Sequence[str], offsets: Sequence[int], sizes: Sequence[int]) -> None:
        self._path = path
        self._names = np.array([os.fsencode(name) for name in names])
        self._offsets = np.array(offsets, dtype=np.int64)
        self._sizes = np.array(sizes, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._names)

    def open(self, index: int) -> Image.Image:
        try:
            with self._path.open("rb", buffering=0) as file:
                file.seek(int(self._offsets[index]))
                content = file.read(int(self._sizes[index]))
        except OSError as error:
            raise DataError(
                f"The tar {self._path} cannot be read any more ({error}). Was it unmounted, moved or deleted during the run? "
                "Bring it back and start again."
            ) from error
        if len(content) < self._sizes[index]:
            raise DataError(
                f"The tar {self._path} ends before its image {self.name(index)}: it was cut short or replaced during the run. "
                "Bring it back and start again."
            )
        return read_image(io.BytesIO(content))

    def name(self, index: int) -> str:
        return f"{self._path}:{os.fsdecode(bytes(self._names[index]))}"

    def sizes(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return self._sizes[indices]

    def read_bytes(self, index: int, start: int = 0, count: int | None = None) -> bytes:
        left = max(0, int(self._sizes[index]) - start)
        with self._path.open("rb", buffering=0) as file:
            file.seek(int(self._offsets[index]) + start)
            return file.read(left if count is None else min(count, left))


@final
@dataclass(frozen=True)
class ArrayStore:
    """Images that lie in memory: (n, H, W) or (n, H, W, 3), uint8."""

    pixels: NDArray[np.uint8]
    title: str

    def __len__(self) -> int:
        return len(self.pixels)

    def open(self, index: int) -> Image.Image:
        return prepare_image(Image.fromarray(self.pixels[index]))

    def name(self, index: int) -> str:
        return f"{self.title}, image {index}"

    def sizes(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.full(len(indices), self.pixels[0].nbytes if len(self.pixels) else 0, np.int64)

    def read_bytes(self, index: int, start: int = 0, count: int | None = None) -> bytes:
        return self.pixels[index].tobytes()[start : None if count is None else start + count]


@dataclass(frozen=True)
class _LibraryStore:
    """Images that a library hands out by number, under the title of its data set."""

    images: Any
    title: str

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"{self.title}, image {index}"


@final
class ReaderStore(_LibraryStore):
    """Images behind one of timm's random-access readers: images[i] = (binary file, label)."""

    def open(self, index: int) -> Image.Image:
        file, *_ = self.images[index]
        with file:
            return read_image(file)


@final
class TorchvisionStore(_LibraryStore):
    """Images of a torchvision data set: images[i] = (PIL image, label)."""

    def open(self, index: int) -> Image.Image:
        return prepare_image(self.images[index][0])


def _size(path: bytes) -> int:
    try:
        return os.stat(path).st_size  # noqa: PTH116 - paths are kept as bytes
    except OSError:
        return -1
