"""Plain training loops around a pruner, on batches that depend on the step alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

import p3b
from p3b.methods.base import Decision
from tiny import images, labels

CE = nn.functional.cross_entropy

Running = TypeVar("Running", bound="Loop")


class Loop:
    """Trains and prunes step by step, and keeps the decisions."""

    def __init__(self, pruner: p3b.Pruner, model: nn.Module, optimizer: torch.optim.Optimizer, accumulate: int = 1) -> None:
        self.pruner, self.model, self.optimizer, self.accumulate = pruner, model.train(), optimizer, accumulate
        self.dtype = next(model.parameters()).dtype
        self.decisions: list[Decision] = []

    def backward(self, own: slice = slice(None), scale: float = 1.0, criterion: Any = CE) -> None:
        """The gradients of a step, on one's own part of each micro-batch."""
        for micro_batch in range(self.accumulate):
            seed = self.accumulate * self.pruner.steps_done + micro_batch
            batch, targets = images(4, seed=seed, dtype=self.dtype)[own], labels(4, seed=seed)[own]
            loss = CE(self.model(batch), targets) + self.pruner.loss(criterion, targets)
            (scale * loss / self.accumulate).backward()

    def step(self, change: Callable[[nn.Module], object] = lambda model: None, criterion: Any = CE) -> Decision | None:
        """One step; `change` may do to the model whatever it likes before the pruner looks at it."""
        self.backward(criterion=criterion)
        change(self.model)
        decision = self.pruner.step()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if decision is not None:
            self.decisions.append(decision)
        return decision

    def steps(self: Running, count: int) -> Running:
        for _ in range(count):
            self.step()
        return self

    def to_the_end(self) -> nn.Module:
        while not self.pruner.done:
            self.step()
        return self.pruner.finalize()


def prune_in_mixed_precision(model: nn.Module, pruner: p3b.Pruner, scaler: torch.amp.GradScaler) -> nn.Module:
    """The small model, after a loop with bfloat16 and a gradient scaler."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    while not pruner.done:
        batch, targets = images(4, seed=pruner.steps_done), labels(4, seed=pruner.steps_done)
        with torch.autocast("cpu", torch.bfloat16):
            loss = CE(model(batch), targets) + pruner.loss(CE, targets)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        pruner.step(scaler)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return pruner.finalize()
