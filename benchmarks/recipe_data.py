"""Small data sets of different kinds, as class folders, for `benchmarks/recipes.py`: what a person with few images may have.

Photos are CIFAR-10's animals from the tars of the shared folder, letters are rendered (`p3b.data.glyphs`), digits are those of
scikit-learn. Every folder is made once, the same each time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from p3b.data import LabelledImages, open_data
from p3b.data.glyphs import CLASS_NAMES, render_glyphs

LETTERS, VEHICLES = "letters", "vehicles"
"""What a model was trained on before."""
Images = Iterator[tuple[Image.Image, str]]


@dataclass(frozen=True)
class DataSet:
    """A data set.

    Attributes:
        about: what it is, in a few words.
        start: what the model was trained on before: LETTERS or VEHICLES.
        symbols: whether images must not be mirrored.
        make: (folder of the tars, part) to the images of a part, "train" or "test".
    """

    about: str
    start: str
    make: Callable[[Path, str], Images]
    symbols: bool = False


def write_folders(data: DataSet, shared: Path, folder: Path) -> Path:
    """`<folder>/train/<class>/` and `<folder>/test/<class>/`, where they are not there yet."""
    if (folder / "done").exists():
        return folder
    for part in ("train", "test"):
        for number, (image, name) in enumerate(data.make(shared, part)):
            place = folder / part / name
            place.mkdir(parents=True, exist_ok=True)
            image.save(place / f"{number:05}.png")
    (folder / "done").touch()
    return folder


def _animals(shared: Path, part: str) -> LabelledImages:
    tar = shared / f"cifar10-animals-{part}.tar"
    return open_data("FOLDER", tar, val_share=0.0).train


def _by_class(images: LabelledImages, counts: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    """(class, positions of its first so many images)."""
    for label, count in enumerate(counts):
        yield label, np.flatnonzero(np.asarray(images.targets) == label)[:count].tolist()


NAMES = ("bird", "cat", "deer", "dog", "frog", "horse")


def animals(train: Sequence[int], test: int = 200) -> Callable[[Path, str], Images]:
    """So many training images of each class, and as many of all for the test."""

    def make(shared: Path, part: str) -> Images:
        images = _animals(shared, part)
        for label, positions in _by_class(images, train if part == "train" else [test] * len(NAMES)):
            for position in positions:
                yield images[position][0], NAMES[label]

    return make


def shapes(train: int, test: int = 100) -> Callable[[Path, str], Images]:
    """Photos twice as wide as high, or twice as high as wide: two animals of a class beside or above each other."""

    def make(shared: Path, part: str) -> Images:
        images = _animals(shared, part)
        count = train if part == "train" else test
        for label, positions in _by_class(images, [3_000 + 2 * count if part == "train" else 2 * count] * len(NAMES)):
            chosen = positions[-2 * count :]  # others than those of `animals`
            for number, (first, second) in enumerate(zip(chosen[::2], chosen[1::2], strict=True)):
                pixels = [np.asarray(images[position][0]) for position in (first, second)]
                yield Image.fromarray(np.concatenate(pixels, axis=number % 2)), NAMES[label]

    return make


def digits(train: Sequence[int], test: int = 60) -> Callable[[Path, str], Images]:
    """So many of each digit, and as many of all for the test."""

    def make(_shared: Path, part: str) -> Images:
        from sklearn.datasets import load_digits

        found = load_digits()
        for label in range(10):
            of_class = np.flatnonzero(found.target == label)
            for position in of_class[: train[label]] if part == "train" else of_class[-test:]:
                grey = Image.fromarray((found.images[position] * 255 / 16).astype(np.uint8))
                yield grey.resize((16, 16), Image.Resampling.BICUBIC).convert("RGB"), str(label)

    return make


def characters(train: int, test: int = 25) -> Callable[[Path, str], Images]:
    """So many of each of 41 letters."""

    def make(_shared: Path, part: str) -> Images:
        count, seed = (train, 101) if part == "train" else (test, 102)
        images, labels = render_glyphs(count * len(CLASS_NAMES), seed)
        for image, label in zip(images, labels, strict=True):
            yield Image.fromarray(image).convert("RGB"), CLASS_NAMES[label]

    return make


FEWER = (80, 60, 40, 30, 20, 15, 10, 8, 6, 5)
DATA = {
    "animals-40": DataSet("photos, 40 of each of 6 classes", VEHICLES, animals([40] * 6)),
    "digits": DataSet("handwritten digits, 30 of each", LETTERS, digits([30] * 10), symbols=True),
    "characters": DataSet("printed letters, 8 of each of 41", VEHICLES, characters(8), symbols=True),
    "imbalanced": DataSet("handwritten digits, 80 of the first, 5 of the last", LETTERS, digits(FEWER), symbols=True),
    "shapes": DataSet("photos 2:1 and 1:2, 40 of each of 6 classes", VEHICLES, shapes(40)),
    "animals-200": DataSet("photos, 200 of each of 6 classes", VEHICLES, animals([200] * 6)),
}
