"""Images to labels with probabilities: decoded on many cores, computed in batches, in the order in which they came.

Memory is bounded whatever the files are. An image is measured before it is decoded: one that claims to be huge is refused by
its header. No more than `workers` images are decoded at a time, and only what the model takes of each is kept until its batch
is full.
"""

from __future__ import annotations

import io
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from p3b.data.formats import load_plugins
from p3b.deploy.photos import Preparation, find_files
from p3b.deploy.runners import Runner
from p3b.errors import DataError
from p3b.storage.untrusted import first_line

STANDARD_INPUT = "-"
MOST_PIXELS = 89_478_485
"""Pillow's own limit: 256 MB as RGB."""
MOST_FILE_BYTES = 1 << 30
MOST_BATCH_BYTES = 64 << 20
"""Of images that are prepared inside the model and wait for each other; one alone may be larger."""


@dataclass(frozen=True)
class Label:
    """A class and its probability, in [0, 1]."""

    name: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """What is on an image: the likeliest classes, the first one first; or why it cannot be read."""

    file: str
    labels: tuple[Label, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class Source:
    """An image that is to be read: what it is called, and how to open it."""

    name: str
    open: Callable[[], BinaryIO]


def sources(inputs: Sequence[str | Path], standard_input: BinaryIO) -> list[Source]:
    """Files, the images in folders, and "-" for an image on standard input.

    Args:
        inputs: as given. A file is taken whatever its name is; of a folder, at any depth, those with the ending of an image.
        standard_input: where "-" reads from.

    Raises:
        DataError: an input is not there, a folder has no image, or nothing is given.
    """
    found: list[Source] = []
    for given in inputs:
        path = Path(given)
        if str(given) == STANDARD_INPUT:
            found.append(Source("standard input", lambda: io.BytesIO(standard_input.read(MOST_FILE_BYTES + 1))))
        elif path.is_dir():
            files = find_files(path)
            if not files:
                raise DataError(f"The folder {path} has no image, at any depth.")
            found += [_file(file) for file in files]
        elif path.exists():
            found.append(_file(path))
        else:
            raise DataError(f"There is no {path}. Expected image files, folders of them, or - for an image on standard input.")
    if not found:
        raise DataError("No image is given. Give image files, folders of them, or - for an image on standard input.")
    return found


def predict(
    runner: Runner,
    images: Iterable[Source],
    *,
    top: int = 3,
    batch_size: int = 32,
    workers: int = 1,
    max_pixels: int = MOST_PIXELS,
) -> Iterator[Prediction]:
    """A prediction for each image, in order; those that cannot be read say why.

    Args:
        runner: any model.
        images: to look at.
        top: classes to name for each, at most.
        batch_size: images that are computed at a time.
        workers: threads that decode and prepare.
        max_pixels: an image with more is not decoded.

    Raises:
        DataError: the model does not say how its images are prepared.
    """
    prepare = Preparation(runner.metadata)
    window = workers if runner.metadata.takes == "images" else workers + batch_size
    names: list[str] = []
    waiting: list[NDArray[Any] | str] = []
    with pixel_limit(max_pixels), ThreadPoolExecutor(workers) as pool:

        def prepared(source: Source) -> NDArray[Any] | str:
            return _prepared(source, prepare, max_pixels)

        for source, image in _ahead(pool, prepared, images, window):
            if waiting and not _fits(waiting, image, batch_size):
                yield from _answers(runner, names, waiting, top)
                names, waiting = [], []
            names.append(source.name)
            waiting.append(image)
        yield from _answers(runner, names, waiting, top)


def _ahead(
    pool: ThreadPoolExecutor, work: Callable[[Source], NDArray[Any] | str], images: Iterable[Source], window: int
) -> Iterator[tuple[Source, NDArray[Any] | str]]:
    """Each image with what became of it, in order; no more than `window` are under way or done ahead of the one handed out."""
    under_way: deque[tuple[Source, Future[NDArray[Any] | str]]] = deque()
    for source in images:
        if len(under_way) == window:
            first, future = under_way.popleft()
            yield first, future.result()
        under_way.append((source, pool.submit(work, source)))
    while under_way:
        first, future = under_way.popleft()
        yield first, future.result()


def _prepared(source: Source, prepare: Preparation, max_pixels: int) -> NDArray[Any] | str:
    """An image as the model takes it, or why it cannot be read."""
    try:
        with opened(source, max_pixels) as image:
            return prepare(image)
    except DataError as error:
        return str(error)


@contextmanager
def opened(source: Source, max_pixels: int) -> Iterator[Image.Image]:
    """An image that is not decoded yet, as long as its file is open; what fails inside, such as decoding it, is told in words.

    Args:
        source: of the image.
        max_pixels: an image with more is refused by its header; while `pixel_limit` is in force, Pillow warns of none below.

    Raises:
        DataError: it cannot be read, and why.
    """
    try:
        with source.open() as file:
            if _size(file) > MOST_FILE_BYTES:
                raise DataError(f"more than {MOST_FILE_BYTES >> 20} MB")
            load_plugins()
            with Image.open(file) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise DataError(f"{width} x {height} pixels, more than the {max_pixels:,} that are allowed")
                yield image
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError("it is no image, or of a format that is not known here") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"far more than the {max_pixels:,} pixels that are allowed") from error
    except MemoryError as error:
        raise DataError("there is not enough memory to decode it") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error ...
        raise DataError(first_line(error) or type(error).__name__) from error


def _fits(waiting: Sequence[NDArray[Any] | str], image: NDArray[Any] | str, batch_size: int) -> bool:
    """Whether an image can join the batch: all of one shape, not too many, not too large."""
    if len(waiting) >= batch_size:
        return False
    arrays = [each for each in (*waiting, image) if not isinstance(each, str)]
    return len({each.shape for each in arrays}) <= 1 and sum(each.nbytes for each in arrays) <= MOST_BATCH_BYTES


def _answers(runner: Runner, names: Sequence[str], waiting: Sequence[NDArray[Any] | str], top: int) -> Iterator[Prediction]:
    arrays = [each for each in waiting if not isinstance(each, str)]
    probabilities = iter(softmax(runner(np.stack(arrays)))) if arrays else iter(())
    for name, image in zip(names, waiting, strict=True):
        if isinstance(image, str):
            yield Prediction(name, error=image)
        else:
            yield Prediction(name, labels_of(next(probabilities), runner.metadata.class_names, top))


def softmax(logits_SC: NDArray[Any]) -> NDArray[np.float64]:
    """(S, C) logits to probabilities.

    Raises:
        DataError: a logit is not finite.
    """
    if not np.isfinite(logits_SC).all():
        raise DataError("The model answers with NaN or infinity: its weights are damaged, or float16 is too narrow for it.")
    powers = np.exp(logits_SC.astype(np.float64) - logits_SC.max(1, keepdims=True))
    probabilities: NDArray[np.float64] = powers / powers.sum(1, keepdims=True)
    return probabilities


def labels_of(probabilities_C: NDArray[np.float64], names: Sequence[str] | None, top: int) -> tuple[Label, ...]:
    """The likeliest classes of (C,) probabilities, by name or, without names, by number."""
    best = np.argsort(-probabilities_C, kind="stable")[:top]
    return tuple(Label(str(index) if names is None else names[index], float(probabilities_C[index])) for index in best)


def _file(path: Path) -> Source:
    def open_it() -> BinaryIO:
        if not path.is_file():
            raise OSError("it is no regular file")
        return path.open("rb")

    return Source(os.fsencode(path).decode("utf-8", "backslashreplace"), open_it)


def _size(file: BinaryIO) -> int:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    return size


@contextmanager
def pixel_limit(max_pixels: int) -> Iterator[None]:
    """Let Pillow refuse at the same size as we do, and warn of none below it."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before
