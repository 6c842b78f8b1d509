"""Which images of a set are kept back for validation, or are taken when there are to be fewer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def stratified_cut(targets: NDArray[np.int64], share: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cut a share of the images off, the same share of every class as nearly as whole images allow.

    Args:
        targets: (n,) class indices.
        share: in (0, 1).
        seed: decides which images of a class go.

    Returns:
        Positions that stay and positions that go, both ascending, together 0 .. n-1. max(1, round(share * n)) go,
        unless that would take a class's last image: every class keeps at least one. And of every class of two or more
        images at least one goes, so that a few more may go where classes are small.
    """
    rank, class_size, order = _rank_in_class(targets, seed)
    # The k-th of n images of a class stands at (k + 1/2) / n: the lowest share of all are round(share * n) of each
    # class.
    place = np.where(rank == class_size - 1, np.inf, (rank + 0.5) / class_size)
    wanted = min(max(1, round(share * len(targets))), int(np.isfinite(place).sum()))
    goes = np.zeros(len(targets), dtype=bool)
    goes[np.lexsort((order, place))[:wanted]] = True
    goes |= (rank == 0) & (class_size > 1)
    return np.flatnonzero(~goes), np.flatnonzero(goes)


def balanced_subset(targets: NDArray[np.int64], size: int, seed: int) -> NDArray[np.int64]:
    """Positions (ascending) of `size` images, equally many of each class until a class has no more."""
    rank, _, order = _rank_in_class(targets, seed)
    return np.sort(np.lexsort((order, rank))[:size])


def _rank_in_class(targets: NDArray[np.int64], seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """For each image its random rank within its class, its class's size, and its random rank among all (to break
    ties)."""
    shuffled = np.random.default_rng(seed).permutation(len(targets))
    by_class = shuffled[np.argsort(targets[shuffled], kind="stable")]
    _, first, inverse, counts = np.unique(targets[by_class], return_index=True, return_inverse=True, return_counts=True)
    rank, class_size, order = (np.empty(len(targets), dtype=np.int64) for _ in range(3))
    rank[by_class] = np.arange(len(targets)) - first[inverse]
    class_size[by_class] = counts[inverse]
    order[shuffled] = np.arange(len(targets))
    return rank, class_size, order
