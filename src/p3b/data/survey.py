"""What the images of a part are like, by a look at them: sizes, formats, unreadable ones, equal ones, similar ones."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import PurePath

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from p3b.data.images import LabelledImages
from p3b.data.stores import FileBytes
from p3b.errors import DataError

LOOKED_AT = 2_000
"""Images of a part that are opened; of more, a sample evenly spread."""
MOST_BITS, MOST_LEVELS, LEAST_CONTRAST = 4, 8.0, 12.0
"""Two pictures look alike where so few of 64 bits differ and grey levels differ by so little on average; both must have some
contrast, or every plain picture would look like every other."""


@dataclass(frozen=True)
class Survey:
    """What was found in one part; P images were opened and could be read.

    Attributes:
        images: of the part.
        unreadable: names of those that could not be read.
        names: (P,) of those that could.
        labels: (P,) their class indices.
        sizes: (P, 2) width and height in pixels.
        digests: (P,) of their pixels: equal pictures have equal ones, whatever their files are called or how they are stored.
        hashes: (P,) 64 bits each: whether grey levels rise from left to right, on 9 x 8 pixels (a difference hash).
        thumbnails: (P, 72) grey levels of these pixels.
        formats: how many files have which ending.
    """

    images: int
    unreadable: tuple[str, ...]
    names: tuple[str, ...]
    labels: NDArray[np.int64]
    sizes: NDArray[np.int64]
    digests: tuple[str, ...]
    hashes: NDArray[np.uint64]
    thumbnails: NDArray[np.uint8]
    formats: Mapping[str, int]


def survey(images: LabelledImages, most: int = LOOKED_AT) -> Survey:
    """Open at most so many images of a part, evenly spread."""
    names, labels, sizes, digests, thumbnails, unreadable = [], [], [], [], [], []
    for position in np.unique(np.linspace(0, len(images) - 1, min(most, len(images))).astype(int)).tolist():
        try:
            found = images.get_readable(position)
        except DataError:
            found = None
        if found is None:
            unreadable.append(images.name(position))
            continue
        picture, label = found
        names.append(images.name(position))
        labels.append(label)
        sizes.append(picture.size)
        digests.append(hashlib.blake2b(picture.tobytes(), digest_size=16, key=repr(picture.size).encode()).hexdigest())
        thumbnails.append(_thumbnail(picture))
    small = np.array(thumbnails, dtype=np.uint8).reshape(-1, 72)
    return Survey(
        images=len(images),
        unreadable=tuple(unreadable),
        names=tuple(names),
        labels=np.array(labels, dtype=np.int64),
        sizes=np.array(sizes, dtype=np.int64).reshape(-1, 2),
        digests=tuple(digests),
        hashes=difference_hashes(small),
        thumbnails=small,
        formats=_formats(images),
    )


def difference_hashes(thumbnails: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """(P,) 64 bits of each (72,) thumbnail: whether a pixel is brighter than its left neighbour."""
    pixels = thumbnails.reshape(-1, 8, 9)
    bits = (pixels[:, :, 1:] > pixels[:, :, :-1]).reshape(-1, 64)
    return np.packbits(bits, axis=1).view(np.uint64)[:, 0]


def equal_within(part: Survey) -> list[tuple[str, str, bool]]:
    """Pictures that are in a part twice: both names, and whether they are of one class."""
    first: dict[str, int] = {}
    found = []
    for number, digest in enumerate(part.digests):
        before = first.setdefault(digest, number)
        if before != number:
            found.append((part.names[before], part.names[number], bool(part.labels[before] == part.labels[number])))
    return found


def alike_between(one: Survey, other: Survey) -> list[tuple[str, str]]:
    """Pictures of one part that look like one of another: scaled, stored anew or a little changed. Equal ones count."""
    found = []
    with_contrast = other.thumbnails.std(axis=1) >= LEAST_CONTRAST
    for number, name in enumerate(one.names):
        thumbnail = one.thumbnails[number].astype(np.int16)
        if thumbnail.std() < LEAST_CONTRAST:
            continue
        near = with_contrast & (_bits_set(other.hashes ^ one.hashes[number]) <= MOST_BITS)
        for candidate in np.flatnonzero(near).tolist():
            if np.abs(other.thumbnails[candidate] - thumbnail).mean() <= MOST_LEVELS:
                found.append((name, other.names[candidate]))
                break
    return found


def survey_lines(parts: Mapping[str, Survey]) -> list[str]:
    """What is said of the parts: a few lines each, and of what they share."""
    lines = [line for name, part in parts.items() for line in _lines_of(name, part)]
    for first, second in combinations(parts, 2):
        alike = alike_between(parts[second], parts[first])
        if alike:
            pair = f"such as {alike[0][0]} and {alike[0][1]}"
            lines.append(f"{len(alike):,} of {len(parts[second].names):,} images of {second} look like one of {first} ({pair})")
    return lines


def _lines_of(name: str, part: Survey) -> Iterator[str]:
    of = "" if len(part.names) + len(part.unreadable) == part.images else f" ({len(part.names):,} of them looked at)"
    formats = ", ".join(f"{count:,} {ending}" for ending, count in part.formats.items())
    yield f"{name}: {part.images:,} images{of}{f': {formats}' if formats else ''}"
    if len(part.sizes):
        low, middle, high = (np.percentile(part.sizes.min(axis=1), share) for share in (0, 50, 100))
        aspects = np.sort(part.sizes[:, 0] / part.sizes[:, 1])
        yield (
            f"  shorter side {low:.0f} to {high:.0f} pixels, median {middle:.0f}; width to height {aspects[0]:.2f} to "
            f"{aspects[-1]:.2f}, median {np.median(aspects):.2f}"
        )
    if part.unreadable:
        yield f"  {len(part.unreadable):,} cannot be read, such as {part.unreadable[0]}"
    twice = equal_within(part)
    if twice:
        yield f"  {len(twice):,} are there twice, such as {twice[0][0]} and {twice[0][1]}"
    torn = [(one, other) for one, other, same in twice if not same]
    if torn:
        yield f"  {len(torn):,} of these are in two classes: what is the right one of {torn[0][0]} and {torn[0][1]}?"


def _bits_set(words: NDArray[np.uint64]) -> NDArray[np.int64]:
    return np.unpackbits(words.view(np.uint8).reshape(-1, 8), axis=1).sum(axis=1, dtype=np.int64)


def _thumbnail(picture: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(picture.convert("L").resize((9, 8), Image.Resampling.BOX)).ravel()


def _formats(images: LabelledImages) -> dict[str, int]:
    """How many files have which ending, the most frequent first; nothing where the images are no files."""
    if not isinstance(images.origin, FileBytes):
        return {}
    endings = Counter(PurePath(images.name(position)).suffix.lower().lstrip(".") for position in range(len(images)))
    return dict(endings.most_common())
