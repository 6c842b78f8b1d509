"""The same image file in two parts: counted and told, because an accuracy over images that were trained on says little."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from p3b.data.images import LabelledImages
from p3b.data.stores import FileBytes, FileStore, TarStore

MOST_SIZES = 200_000
"""Files of a part whose size is looked up; of more, a sample evenly spread."""
MOST_READ = 20_000
"""Files of equal size of which a piece is read, over both parts."""
_PIECE = 1024
"""Bytes from the middle of a file; where these are equal, all bytes are compared."""


@dataclass(frozen=True)
class EqualFiles:
    """Files of one part that are in another, too.

    Attributes:
        count: files of the first part that have an equal one in the second.
        example: one such file and its equal.
        sampled: not all files were compared; there may be more.
    """

    count: int
    example: tuple[str, str]
    sampled: bool


def equal_file_lines(parts: Mapping[str, LabelledImages]) -> list[str]:
    """A line for each two parts that share files, by the bytes."""
    said = []
    for first, second in combinations(parts, 2):
        equal = equal_files(parts[second], parts[first])
        if equal is not None:
            at_least = "at least " if equal.sampled else ""
            so = "its accuracy is partly that of images trained on" if first == "train" else "the two are not independent"
            said.append(
                f"{at_least}{equal.count:,} of {len(parts[second]):,} files of {second} are identical to files of {first} "
                f"(such as {equal.example[0]} and {equal.example[1]}): {so}"
            )
    return said


def equal_files(part: LabelledImages, other: LabelledImages) -> EqualFiles | None:
    """Files of `part` that are in `other`; None where there are none, or the images are no files.

    Sizes first, then a piece, then all bytes: for photos this reads next to nothing.
    """
    if not all(isinstance(images.origin, FileStore | TarStore) for images in (part, other)):
        return None
    (mine, sizes), (theirs, their_sizes) = (_sampled_sizes(images) for images in (part, other))
    common = np.intersect1d(sizes[sizes > 0], their_sizes)
    mine, sizes = mine[np.isin(sizes, common)], sizes[np.isin(sizes, common)]
    keep = np.isin(their_sizes, common)
    theirs, their_sizes = theirs[keep], their_sizes[keep]
    sampled = len(part) > MOST_SIZES or len(other) > MOST_SIZES
    if len(mine) + len(theirs) > MOST_READ:
        common = np.random.default_rng(0).permutation(common)
        reads = np.cumsum([np.sum(sizes == size) + np.sum(their_sizes == size) for size in common])
        common = common[: max(1, int(np.searchsorted(reads, MOST_READ)))]
        mine, theirs, sampled = mine[np.isin(sizes, common)], theirs[np.isin(their_sizes, common)], True
        sizes, their_sizes = sizes[np.isin(sizes, common)], their_sizes[np.isin(their_sizes, common)]
    pieces: dict[bytes, list[int]] = {}
    for position, size in zip(theirs.tolist(), their_sizes.tolist(), strict=True):
        pieces.setdefault(_piece(other, position, size), []).append(position)
    pairs = []
    for position, size in zip(mine.tolist(), sizes.tolist(), strict=True):
        candidates = pieces.get(_piece(part, position, size), [])
        twin = next((there for there in candidates if digest_of(part, position) == digest_of(other, there)), None)
        if twin is not None:
            pairs.append((position, twin))
    if not pairs:
        return None
    return EqualFiles(len(pairs), (part.name(pairs[0][0]), other.name(pairs[0][1])), sampled)


def digest_of(images: LabelledImages, position: int) -> str:
    """16 hexadecimal digits that tell the bytes of an image from others; "" where they cannot be read."""
    store = images.origin
    assert isinstance(store, FileBytes)
    try:
        return hashlib.blake2b(store.read_bytes(int(images.indices[position])), digest_size=8).hexdigest()
    except OSError:
        return ""


def _sampled_sizes(images: LabelledImages) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    store = images.origin
    assert isinstance(store, FileBytes)
    positions = np.unique(np.linspace(0, len(images) - 1, min(len(images), MOST_SIZES)).astype(np.int64))
    return positions, store.sizes(images.indices[positions])


def _piece(images: LabelledImages, position: int, size: int) -> bytes:
    """What most equal-sized files differ in: their size and some bytes from the middle; unlike any other if unreadable."""
    store = images.origin
    assert isinstance(store, FileBytes)
    try:
        middle = store.read_bytes(int(images.indices[position]), max(0, size // 2 - _PIECE // 2), _PIECE)
    except OSError:
        return f"unreadable {id(images)} {position}".encode()
    return size.to_bytes(8, "little") + hashlib.blake2b(middle, digest_size=16).digest()
