"""Whether two ways of computing the same model give the same answers. S images, C classes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from p3b.errors import ExportError

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Agreement:
    """How far logits are from those that they stand for.

    Attributes:
        images: S.
        difference: largest difference of a logit, relative to the largest logit; infinite where one is not finite.
        top1: share of the images whose first class is the same, in [0, 1].
    """

    images: int
    difference: float
    top1: float

    def __str__(self) -> str:
        return f"logits off by {self.difference:.1e} (relative) at most, same top-1 in {self.top1:.1%} of {self.images} images"


@dataclass(frozen=True)
class Limit:
    """What an export may differ by."""

    difference: float
    top1: float


def compare(expected_SC: Logits, got_SC: Logits) -> Agreement:
    """The agreement of (S, C) logits with those expected; pure."""
    if expected_SC.shape != got_SC.shape:
        raise ExportError(f"The export answers with logits of shape {got_SC.shape}; expected {expected_SC.shape}.")
    scale = float(np.abs(expected_SC).max())
    finite = bool(np.isfinite(got_SC).all())
    difference = float(np.abs(got_SC.astype(np.float64) - expected_SC).max()) / (scale or 1.0) if finite else float("inf")
    top1 = float((expected_SC.argmax(1) == got_SC.argmax(1)).mean())
    return Agreement(len(expected_SC), difference, top1)


def require(agreement: Agreement, limit: Limit, what: str) -> None:
    """ExportError where the agreement is beyond the limit."""
    if not (agreement.difference <= limit.difference and agreement.top1 >= limit.top1):
        raise ExportError(
            f"{what} does not compute what the model computes: {agreement}; expected at most {limit.difference:.0e} and at "
            f"least {limit.top1:.0%}. Nothing was written. This is no mistake of yours: please report it with the model's "
            "config.json."
        )
