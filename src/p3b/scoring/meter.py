"""Means over the interval between two mask updates, kept as sums and counts on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]
"""Mean of a tensor over all ranks, the same on each of them; the identity in a single process."""


BUCKET_BYTES = 2**26
"""What is averaged over ranks in one go, at most: a reduction holds two copies of it; below this, latency begins to count."""


def average(reduce: Reduce, tensors: Iterable[Tensor], bucket_bytes: int = BUCKET_BYTES) -> None:
    """Put the mean over all ranks into each tensor, many small ones in one reduction and a large one piece by piece.

    Probes over many classes hold gigabytes; averaged in one go they would be there three times more.

    Args:
        reduce: mean over ranks.
        tensors: of one dtype and device; the same shapes in the same order on every rank.
        bucket_bytes: of a reduction, at most (a tensor that is not contiguous is never taken apart).
    """
    for bucket in _buckets(tensors, bucket_bytes):
        means = reduce(torch.cat([piece.flatten() for piece in bucket]) if len(bucket) > 1 else bucket[0].flatten())
        for piece, mean in zip(bucket, means.split([piece.numel() for piece in bucket]), strict=True):
            piece.copy_(mean.view_as(piece))


def _buckets(tensors: Iterable[Tensor], bucket_bytes: int) -> Iterator[list[Tensor]]:
    """Views of the tensors, in their order, in lists of at most so many bytes."""
    bucket: list[Tensor] = []
    room = bucket_bytes
    for tensor in tensors:
        whole = tensor.numel() * tensor.element_size() <= bucket_bytes or not tensor.is_contiguous()
        for piece in [tensor] if whole else tensor.view(-1).split(bucket_bytes // tensor.element_size()):
            size = piece.numel() * piece.element_size()
            if bucket and size > room:
                yield bucket
                bucket, room = [], bucket_bytes
            bucket.append(piece)
            room -= size
    if bucket:
        yield bucket


def is_alone(reduce: Reduce, example: Tensor) -> bool:
    """Whether there is one process only. All ranks have to ask together: it costs a reduction of one number."""
    asked = example.new_zeros(())
    return reduce(asked) is asked


class IntervalMeter:
    """Sums of named tensors, each with the number of times it was added to; remembers the last two finished intervals."""

    def __init__(self) -> None:
        self._intervals: list[dict[str, tuple[Tensor, Tensor]]] = [{}]

    def add(self, name: str, value: Tensor, counts: Tensor) -> None:
        """Add a value; `counts` is a 0-dim bool tensor: where it is false (non-finite gradients) nothing is added.

        Everything stays on the device: the decision costs no synchronisation.
        """
        value = torch.where(counts, value, 0.0)
        total, count = self._intervals[-1].get(name, (torch.zeros_like(value), torch.zeros((), device=value.device)))
        self._intervals[-1][name] = (total + value, count + counts)

    def close(self) -> None:
        """End the interval; a new, empty one begins."""
        if self._intervals[-1]:
            self._intervals = [*self._intervals[-2:], {}]

    def mean(self, name: str) -> Tensor | None:
        """Mean over the last finished interval; None where nothing was added."""
        return self._mean(name, self._finished()[-1:])

    def mean_of_last_two(self, name: str) -> Tensor | None:
        """Mean over the last two finished intervals together; None where nothing was added."""
        return self._mean(name, self._finished()[-2:])

    def steps(self, name: str) -> int:
        """How often something was added in the last finished interval. Waits for the device."""
        return sum(int(interval[name][1]) for interval in self._finished()[-1:] if name in interval)

    def state_dict(self) -> dict[str, Any]:
        return {"intervals": [dict(interval) for interval in self._intervals]}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on from `state_dict`, with all sums on the device that the values to come are on."""
        self._intervals = [
            {name: (total.to(device), count.to(device)) for name, (total, count) in interval.items()}
            for interval in state["intervals"]
        ]

    def _finished(self) -> list[dict[str, tuple[Tensor, Tensor]]]:
        return self._intervals[:-1]

    @staticmethod
    def _mean(name: str, intervals: list[dict[str, tuple[Tensor, Tensor]]]) -> Tensor | None:
        sums = [interval[name] for interval in intervals if name in interval]
        if not sums:
            return None
        total, count = sum(total for total, _ in sums), sum(count for _, count in sums)
        return total / torch.as_tensor(count).clamp(min=1)
