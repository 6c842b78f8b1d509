"""What a pruning method offers to the training loop, whichever it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

Criterion = Callable[[Tensor, Any], Tensor]


@dataclass(frozen=True)
class BlockDecision:
    """What was decided for one block, and why; one entry of a line in blocks.jsonl. None where a method does not measure it."""

    name: str
    kind: str
    benefit_cls: float | None
    benefit_patch: float | None
    importance: float | None
    keep_ratio_goal: float
    keep_ratio: float
    kept_params: int
    params: int


@dataclass(frozen=True)
class Decision:
    """New masks for all gates, by gate name, and what they mean block by block."""

    masks: Mapping[str, Tensor]
    blocks: tuple[BlockDecision, ...]
    progress: float
    tau: float


class Method(Protocol):
    """A pruning method. `Pruner` calls it; the loop never sees it.

    In every forward pass `loss`; after the last backward of an optimizer step `collect` (or `discard`, in the warm-up) and
    `train_own`; at a mask update `renew`; at the end `last`.
    """

    def loss(self, criterion: Criterion, targets: Any) -> Tensor:
        """What the method adds to the training loss of the forward pass just done: a scalar, 0 where it adds nothing."""
        ...

    def collect(self, gradients_finite: Tensor) -> None:
        """Take in what the step measured; a step whose gradients are not finite (0-dim bool) counts for nothing."""
        ...

    def discard(self) -> None:
        """Forget what the step measured."""
        ...

    def train_own(self, gradients_finite: Tensor, scaler: torch.amp.GradScaler | None) -> None:
        """One optimizer step of the method's own parameters, where it has any; none where a gradient is not finite."""
        ...

    def renew(self, kept_params: Mapping[str, int], progress: float, tau: float) -> Decision:
        """Close the interval and decide.

        Args:
            kept_params: what each block keeps now, by block name.
            progress, tau: from the schedule.
        """
        ...

    def last(self, kept_params: Mapping[str, int]) -> Decision:
        """The hard masks that the model is shrunk by."""
        ...

    def detach(self) -> None:
        """Take off everything that was attached to the model."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        ...
