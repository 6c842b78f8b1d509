"""What a saved model remembers of the images that it was trained on, so that an evaluation can tell them from others.

Kept is a sketch in plain JSON values: digests of the bytes of at most some hundred training images, chosen by their content
alone. Order, names and folders do not matter, and an image that is met again is known by its bytes. An image belongs to the
choice if the hash of its file size and then the digest of its bytes lie below two limits; so whether it would have been kept,
had it been trained on, can be told of every image. For sets up to `MOST_KEPT` images all are kept and the answer is exact.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p3b.data.equal_files import digest_of
from p3b.data.images import LabelledImages
from p3b.data.stores import FileBytes
from p3b.errors import DataError

MOST_KEPT = 512
"""Digests; 10 kB of text."""
_ALL = "f" * 16


@dataclass(frozen=True)
class TrainRecord:
    """A sketch of a training part.

    Attributes:
        images: how many it had.
        size_limit, digest_limit: 16 hexadecimal digits; images with a greater hash of their size, or a greater digest, are
            not in the choice.
        digests: of the chosen images, sorted.
    """

    images: int
    size_limit: str
    digest_limit: str
    digests: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether every training image is in the choice."""
        return self.size_limit == self.digest_limit == _ALL

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` is the way back."""
        return {
            "images": self.images,
            "size_limit": self.size_limit,
            "digest_limit": self.digest_limit,
            "digests": list(self.digests),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainRecord:
        """From what `to_dict` gave. Raises `DataError` for anything else."""
        try:
            digests = tuple(str(digest) for digest in values["digests"])
            return cls(int(values["images"]), str(values["size_limit"]), str(values["digest_limit"]), digests)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"The record of the training images is damaged ({error}).") from error


@dataclass(frozen=True)
class Seen:
    """What a record says of the images of a part.

    Attributes:
        looked_at: positions of the images that would be in the record, had they been trained on.
        trained_on: those of them that are.
    """

    looked_at: NDArray[np.int64]
    trained_on: NDArray[np.int64]

    @property
    def share(self) -> float | None:
        """Share of the part that was trained on, in [0, 1], by those that were looked at; None where there are none."""
        return len(self.trained_on) / len(self.looked_at) if len(self.looked_at) else None


def record_training(train: LabelledImages) -> TrainRecord | None:
    """The record of a training part; None where its images are no files and do not lie in memory either."""
    if not isinstance(train.origin, FileBytes) or not len(train):
        return None
    sizes = train.origin.sizes(train.indices)
    by_hash = sorted((_hash_of(size), size) for size in np.unique(sizes).tolist())
    counts = dict(zip(*(values.tolist() for values in np.unique(sizes, return_counts=True)), strict=True))
    total, size_limit = 0, _ALL
    for hashed, size in by_hash:
        total += counts[size]
        if total >= MOST_KEPT and total < len(train):
            size_limit = hashed
            break
    chosen = _within(sizes, size_limit)
    digests = sorted({digest_of(train, position) for position in chosen.tolist()} - {""})
    digest_limit = _ALL if len(digests) <= MOST_KEPT else digests[MOST_KEPT - 1]
    return TrainRecord(len(train), size_limit, digest_limit, tuple(digests[:MOST_KEPT] if digest_limit != _ALL else digests))


def seen_in_training(record: TrainRecord, part: LabelledImages) -> Seen | None:
    """Which images of a part the record knows; None where the part's images have no bytes to compare."""
    if not isinstance(part.origin, FileBytes):
        return None
    known = set(record.digests)
    looked_at, trained_on = [], []
    for position in _within(part.origin.sizes(part.indices), record.size_limit).tolist():
        digest = digest_of(part, position)
        if digest and digest <= record.digest_limit:
            looked_at.append(position)
            if digest in known:
                trained_on.append(position)
    return Seen(np.array(looked_at, np.int64), np.array(trained_on, np.int64))


def _within(sizes: NDArray[np.int64], limit: str) -> NDArray[np.int64]:
    small = [size for size in np.unique(sizes).tolist() if _hash_of(size) <= limit]
    return np.flatnonzero(np.isin(sizes, small))


def _hash_of(size: int) -> str:
    return hashlib.blake2b(str(size).encode(), digest_size=8).hexdigest()
