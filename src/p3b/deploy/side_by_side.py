"""One image through several models, one after the other: labels, probabilities and the time that each takes."""

from __future__ import annotations

import io
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from p3b.deploy.photos import Preparation
from p3b.deploy.prediction import Label, Source, labels_of, opened, softmax
from p3b.deploy.runners import Runner

_MOST_ROUNDS, _SECONDS = 9, 0.1
"""A large model computes an image once; a small one, of which a single call says little, several times."""


@dataclass(frozen=True)
class Model:
    """A model that takes part.

    Attributes:
        name: that people see.
        about: a few words on it.
        runner: computes it.
    """

    name: str
    about: str
    runner: Runner


@dataclass(frozen=True)
class Answer:
    """What a model says of an image, and the milliseconds that computing it takes, the median of some calls."""

    model: str
    labels: tuple[Label, ...]
    milliseconds: float


@dataclass(frozen=True)
class Looked:
    """Of one image.

    Attributes:
        width, height: of the file, in pixels.
        preparation_ms: reading and preparing it.
        answers: of all models, in their order.
    """

    width: int
    height: int
    preparation_ms: float
    answers: tuple[Answer, ...]


class SideBySide:
    """Models that look at the same image. It may be called from many threads: images are decoded side by side, and computed
    one at a time, so that times mean something.

    Args:
        models: at least one.
        top: classes to name.
        max_pixels: an image with more is not decoded.

    Raises:
        DataError: a model does not say how its images are prepared.
    """

    def __init__(self, models: Sequence[Model], *, top: int, max_pixels: int) -> None:
        self.models = tuple(models)
        self._prepare = [Preparation(model.runner.metadata) for model in models]
        self._top, self._max_pixels = top, max_pixels
        self._one_at_a_time = threading.Lock()
        for model, prepare in zip(self.models, self._prepare, strict=True):  # the first call of a runtime takes longer
            model.runner(prepare(Image.new("RGB", (64, 64)))[None])

    def __call__(self, content: bytes) -> Looked:
        """Look at the content of an image file.

        Raises:
            DataError: it is no image, or one that cannot be read or is too large; in words for whoever sent it.
        """
        begun = time.perf_counter()
        with opened(Source("the image", lambda: io.BytesIO(content)), self._max_pixels) as image:
            width, height = image.size
            prepared = [prepare(image) for prepare in self._prepare]
        preparation_ms = 1e3 * (time.perf_counter() - begun)
        with self._one_at_a_time:
            answers = self._answers(prepared)
        return Looked(width, height, preparation_ms, answers)

    def _answers(self, prepared: Sequence[NDArray[Any]]) -> tuple[Answer, ...]:
        """Of all models, which take turns as long as that is quick."""
        taken: list[list[float]] = [[] for _ in self.models]
        logits: list[NDArray[Any]] = [np.empty(0)] * len(self.models)
        begun = time.perf_counter()
        while not taken[0] or (len(taken[0]) < _MOST_ROUNDS and time.perf_counter() - begun < _SECONDS):
            for place, model in enumerate(self.models):
                start = time.perf_counter()
                logits[place] = model.runner(prepared[place][None])
                taken[place].append(1e3 * (time.perf_counter() - start))
        return tuple(
            Answer(
                model.name, labels_of(softmax(found)[0], model.runner.metadata.class_names, self._top), statistics.median(ms)
            )
            for model, found, ms in zip(self.models, logits, taken, strict=True)
        )
