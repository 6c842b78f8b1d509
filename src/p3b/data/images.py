"""Labelled images behind one map-style data set, wherever the pixels lie.

A store (`stores`) knows how to open image i and what to call it; `LabelledImages` adds labels, subsets and what happens to
an image that cannot be read.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

from p3b.data.stores import ImageStore
from p3b.errors import DataError

logger = logging.getLogger("p3b.data")

MIN_IMAGES_TRIED = 32
"""From so many images on it tells of the whole data set, not of single images, if more than half cannot be read."""
_READ, _UNREADABLE = 1, 2  # of an image that was tried; 0: not tried yet


@final
class LabelledImages(Dataset[tuple[Any, int]]):
    """Images of a store with their labels; `dataset[i]` is (RGB PIL image or what `transform` made of it, class index).

    Args:
        store: where the pixels are.
        targets: (len(store),) class index of every image of the store.
        skip_unreadable: False: an image that cannot be decoded is a `DataError` that names it. True: `dataset[i]`
            answers with the next image of this set that can be read, and the bad one is listed in `unreadable`. That
            is for single bad images: it stays a `DataError` if the folder or tar itself is gone, or if more than half of
            the images that one process and its workers have tried, once these are 32, cannot be read.
        indices: (n,) the images of the store that belong to this set, all by default.

    Attributes:
        store: where an image is taken from; a cache may take its place.
        origin: where the images come from.
        transform: called with the PIL image (RGB) if not None; may be set at any time.
        skip_unreadable: as above; may be set at any time before the loaders start.
    """

    def __init__(
        self,
        store: ImageStore,
        targets: Sequence[int] | NDArray[np.int64],
        *,
        skip_unreadable: bool = False,
        indices: NDArray[np.int64] | None = None,
    ) -> None:
        self.store = self.origin = store
        self.skip_unreadable = skip_unreadable
        self.transform: Callable[[Image.Image], Any] | None = None
        self._store_targets = np.asarray(targets, dtype=np.int64)
        self._indices = np.arange(len(store)) if indices is None else indices
        # One value per image in memory that worker processes share: says which and how many, counts none twice, needs
        # no lock.
        self._tried = torch.zeros(len(store), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, position: int) -> tuple[Any, int]:
        if not 0 <= position < len(self):
            raise IndexError(f"image {position} of {len(self)}")  # also ends a plain `for` over the set
        for step in range(len(self) if self.skip_unreadable else 1):
            sample = self.get_readable((position + step) % len(self))
            if sample is not None:
                return sample
        raise DataError(f"None of the {len(self)} images can be read, {self.name(position)} among them.")

    def get_readable(self, position: int) -> tuple[Any, int] | None:
        """The sample at `position`; None if it cannot be read and `skip_unreadable` is set, a `DataError` if it is not
        set or if it is more than this image that cannot be read."""
        index = int(self._indices[position])
        if self.skip_unreadable and self._tried[index] == _UNREADABLE:
            return None
        try:
            image = self.store.open(index)
        except DataError:
            raise
        except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error ...
            self._require_the_place(error, index)
            if not self.skip_unreadable:
                raise DataError(
                    f"Cannot read the image {self.store.name(index)} ({type(error).__name__}: {error}). Mend or remove the "
                    "file, or go on without such images with --skip-unreadable."
                ) from error
            self._tried[index] = _UNREADABLE
            self._require_most(error, index)
            logger.warning("Skipped an image that cannot be read: %s (%s)", self.store.name(index), error)
            return None
        if self.skip_unreadable:
            self._tried[index] = _READ
        label = int(self._store_targets[index])
        return (image if self.transform is None else self.transform(image)), label

    def _require_the_place(self, error: Exception, index: int) -> None:
        """Raise `DataError` where the image is not at fault but the folder that it lies in, or one above."""
        lost = _lost_folder(error)
        if lost is not None:
            raise DataError(
                f"{lost}; it was needed for the image {self.store.name(index)} ({error}). Was it unmounted, moved or deleted "
                "during the run? Bring it back and start again."
            ) from error

    def _require_most(self, error: Exception, index: int) -> None:
        """Raise `DataError` where most of what was tried cannot be read."""
        tried, unreadable = int((self._tried > 0).sum()), int((self._tried == _UNREADABLE).sum())
        if tried >= MIN_IMAGES_TRIED and 2 * unreadable > tried:
            raise DataError(
                f"{unreadable} of the first {tried} images cannot be read, the last of them {self.store.name(index)} "
                f"({type(error).__name__}: {error}). --skip-unreadable is for single bad images; here the data set itself "
                "is damaged, moved or of another format. Mend it and start again."
            ) from error

    @property
    def targets(self) -> NDArray[np.int64]:
        """(n,) class index of every image of this set, without reading any image."""
        return self._store_targets[self._indices]

    @property
    def unreadable(self) -> tuple[str, ...]:
        """Names of the images of this set found unreadable so far by this process and its loaders' workers."""
        return tuple(self.store.name(int(index)) for index in self._indices[self._tried.numpy()[self._indices] == _UNREADABLE])

    def name(self, position: int) -> str:
        """What a user calls the image at `position`."""
        return self.store.name(int(self._indices[position]))

    def subset(self, positions: NDArray[np.int64]) -> LabelledImages:
        """The images at `positions` as a set of their own, with its own `transform`; the pixels are not copied."""
        part = LabelledImages(
            self.store,
            self._store_targets,
            skip_unreadable=self.skip_unreadable,
            indices=self._indices[np.asarray(positions, dtype=np.int64)],
        )
        part.origin = self.origin
        return part

    @property
    def indices(self) -> NDArray[np.int64]:
        """(n,) number in the store of every image of this set."""
        return self._indices


def _lost_folder(error: Exception) -> str | None:
    """The uppermost folder above the file of an error that is gone, empty or shut, in words; None where only the file is."""
    if not isinstance(error, OSError) or not isinstance(error.filename, str | bytes):
        return None
    lost = None
    for folder in Path(os.fsdecode(error.filename)).absolute().parents:
        try:
            with os.scandir(folder) as entries:
                if next(entries, None) is not None:
                    return lost
            lost = f"The folder {folder} is empty"  # what is left of a place where nothing is mounted any more
        except (FileNotFoundError, NotADirectoryError):
            lost = f"There is no folder {folder} any more"
        except OSError as reason:
            lost = f"The folder {folder} cannot be read any more ({reason.strerror})"
    return lost
