"""Two rows of a table compared image by image and seed by seed.

Every run says of each test image whether its answer was right. Two p-values come of it, and they answer different questions:

- over images: do these very networks differ in accuracy? For an image, d is the number of seeds in which the first row alone
  is right, less that in which the second alone is. If the two were alike, d and -d would be equally likely: sum(d) has mean 0
  and variance sum(d^2). With one seed this is McNemar's test (1947); with more, an image counts as one, since its answers in
  different seeds are not independent.
- over seeds: would the ways of training differ again with other seeds? The paired t-test of the differences by seed. Two seeds
  can say next to nothing.
"""

from __future__ import annotations

import base64
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Correct = Mapping[int, Sequence[bool]]
"""By seed: whether each test image was answered rightly."""


@dataclass(frozen=True)
class Paired:
    """The first row less the second.

    Attributes:
        points: mean difference in top-1 over the seeds, in points.
        only_first, only_second: images that one of the two alone answers rightly, summed over the seeds.
        p_images: two-sided, over images.
        p_seeds: two-sided, over seeds; None with fewer than two, or where all differences are equal.
        seeds: that both rows have.
    """

    points: float
    only_first: int
    only_second: int
    p_images: float
    p_seeds: float | None
    seeds: tuple[int, ...]


def compare(first: Correct, second: Correct) -> Paired | None:
    """Compare two rows over the seeds that both have; None where there is none.

    Raises:
        ValueError: the rows were tested on different numbers of images.
    """
    seeds = tuple(sorted(first.keys() & second.keys()))
    if not seeds:
        return None
    ours, theirs = (np.array([row[seed] for seed in seeds], dtype=np.int64) for row in (first, second))
    if ours.shape != theirs.shape:
        raise ValueError(f"The rows were tested on {ours.shape[1]} and {theirs.shape[1]} images; expected the same ones.")
    difference = ours - theirs  # (seeds, images)
    by_image = difference.sum(axis=0)
    spread = math.sqrt(float((by_image**2).sum()))
    p_images = math.erfc(abs(float(by_image.sum())) / spread / math.sqrt(2)) if spread else 1.0
    by_seed = (100 * difference.mean(axis=1)).tolist()
    return Paired(
        statistics.fmean(by_seed),
        int((difference > 0).sum()),
        int((difference < 0).sum()),
        p_images,
        _over_seeds(by_seed),
        seeds,
    )


def _over_seeds(differences: Sequence[float]) -> float | None:
    if len(differences) < 2 or statistics.stdev(differences) == 0:
        return None
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return _beyond(abs(statistics.fmean(differences)) / error, len(differences) - 1)


def _beyond(t: float, degrees: int) -> float:
    """Probability that |T| exceeds t, for Student's T with so many degrees of freedom.

    With t = sqrt(degrees) tan(angle) the density is that of cos(angle) to the power of degrees - 1.
    """
    return _under_cosine(math.atan(t / math.sqrt(degrees)), degrees - 1) / _under_cosine(0.0, degrees - 1)


def _under_cosine(angle: float, power: int) -> float:
    """Integral of cos to a power, from an angle to a quarter of a circle."""
    angles = np.linspace(angle, math.pi / 2, 4001)
    return float(np.trapezoid(np.cos(angles).clip(min=0) ** power, angles))


def pack(correct: Sequence[bool]) -> str:
    """Bits as text for a record: one an image, eight to a byte, base64."""
    return base64.b64encode(np.packbits(np.array(correct, dtype=bool)).tobytes()).decode()


def unpack(text: str, images: int) -> list[bool]:
    """What `pack` packed, so many images."""
    bits = np.unpackbits(np.frombuffer(base64.b64decode(text), dtype=np.uint8))
    found: list[bool] = bits[:images].astype(bool).tolist()
    return found
