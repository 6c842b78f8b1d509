"""Means over the interval between two mask updates, kept as sums and counts on the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]
"""Mean of a tensor over all ranks, the same on each of them; the identity in a single process."""


def is_alone(reduce: Reduce, example: Tensor) -> bool:
    """Whether there is one process only. All ranks have to ask together: it costs a reduction of one number."""
    asked = example.new_zeros(())
    return reduce(asked) is asked


def average_gradients(gradients: Sequence[Tensor], reduce: Reduce) -> None:
    """Average gradients over ranks, in place, with one reduction for all of them."""
    if not gradients:
        return
    together = torch.cat([gradient.flatten() for gradient in gradients])
    average = reduce(together)
    if average is not together:
        for gradient, share in zip(gradients, average.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(share.view_as(gradient))


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
