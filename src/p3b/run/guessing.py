"""Whether an accuracy says more than guessing would."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from p3b.run.bisection import standard_error


def chance(targets: NDArray[np.int64]) -> float:
    """Top-1 in percent of answering the most frequent class always; 0 for no images."""
    return 100 * int(np.bincount(targets).max()) / len(targets) if len(targets) else 0.0


def is_guessing(top1: float, by_chance: float, images: int) -> bool:
    """Whether an accuracy lies no more than two standard errors above `chance`; all in percent. Of one class alone every answer
    may be right, and nothing can be said."""
    return images > 0 and by_chance < 100 and top1 <= by_chance + 2 * standard_error(by_chance, images)


def said_of_guessing(model: str, part: str, top1: float, by_chance: float | None, images: int) -> str | None:
    """A sentence where a model cannot be told from one that has learned nothing; None where it can, or where it is not known.

    Args:
        model: how to call it: "the dense model".
        part: of the data: "val".
        top1, by_chance: in percent; None where a record does not say what chance is.
        images: of the part.
    """
    if by_chance is None or not is_guessing(top1, by_chance, images):
        return None
    return (
        f"{model} is no better than guessing, as far as {images:,} {part} images can tell: it has {top1:.2f} %, and always "
        f"answering the most frequent class gives {by_chance:.2f} % (standard error {standard_error(by_chance, images):.2f} "
        "points)."
    )
