"""A first look at some images of a folder, before anything is trained: can each class be read, and do files hold films?"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from p3b.data.images import LabelledImages
from p3b.data.prepare import holds_several_frames
from p3b.data.scan import some
from p3b.data.stores import FileBytes
from p3b.errors import DataError

DECODED = 256
"""In sets of so many classes one image of each is decoded; of others, its beginning is read."""
TRIED = 64
"""So many images of a class may fail before the class counts as unreadable."""
LOOKED_INTO = 512
"""So many files that may hold several frames are opened to see."""

NAMED = 50_000
"""Among so many images such files are looked for."""

_BEGINNING = 1 << 16
"""Bytes."""
_FILMS = (".gif", ".webp", ".apng", ".png", ".tif", ".tiff", ".avif", ".avifs", ".heics", ".fli", ".flc", ".dcx")


def require_readable(part: str, where: str, images: LabelledImages, class_names: Sequence[str]) -> None:
    """Refuse a part with a class of which no image can be read.

    Raises:
        DataError: names the classes and what is wrong with the first image of one.
    """
    targets = images.targets
    order = np.argsort(targets, kind="stable")
    classes, first = np.unique(targets[order], return_index=True)
    ends = np.append(first[1:], len(order))
    decode = len(classes) <= DECODED
    unreadable: dict[str, str] = {}
    for number, begin, end in zip(classes, first, ends, strict=True):
        errors = []
        for position in order[begin : min(end, begin + TRIED)]:
            error = _error_of(images, int(position), decode)
            if error is None:
                break
            errors.append(f"{images.name(int(position))} ({error})")
        else:
            unreadable[class_names[number]] = f"{len(errors)} of its {end - begin} images were tried, the first {errors[0]}"
    if unreadable:
        name, why = next(iter(unreadable.items()))
        raise DataError(
            f"No image of the class folders {some(list(unreadable))} of {part} ({where}) can be read; of {name} {why}. Mend "
            "the files, or move the folder out of the data set."
        )


def frames_line(part: str, images: LabelledImages) -> str | None:
    """What is said of files that hold several frames or pages; None where none does, as far as was looked."""
    if not isinstance(images.origin, FileBytes):
        return None
    maybe = [position for position in _spread(len(images), NAMED) if images.name(position).lower().endswith(_FILMS)]
    looked = [maybe[number] for number in _spread(len(maybe), LOOKED_INTO)]
    several = [images.name(position) for position in looked if _holds_several(images, position)]
    if not several:
        return None
    of = "" if len(looked) == len(maybe) and len(images) <= NAMED else f" of {len(looked):,} that were looked into"
    return f"{len(several):,} files{of} of {part} hold several frames or pages; the first is used (such as {several[0]})"


def _spread(count: int, most: int) -> list[int]:
    """At most `most` of the numbers below `count`, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(int)).tolist()


def _error_of(images: LabelledImages, position: int, decode: bool) -> str | None:
    index = int(images.indices[position])
    try:
        if not decode and isinstance(images.origin, FileBytes):
            try:
                Image.open(io.BytesIO(images.origin.read_bytes(index, 0, _BEGINNING)))
                return None
            except Exception:  # some formats keep at the end what tells them apart
                pass
        images.store.open(index)
    except DataError:
        raise
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _holds_several(images: LabelledImages, position: int) -> bool:
    assert isinstance(images.origin, FileBytes)
    try:
        return holds_several_frames(Image.open(io.BytesIO(images.origin.read_bytes(int(images.indices[position])))))
    except Exception:  # whatever is wrong with an image is told when it is its turn
        return False
