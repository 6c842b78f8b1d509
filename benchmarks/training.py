"""Steps of the published training loop, plain and pruning, as sides of a measurement; what they take in time and memory."""

from __future__ import annotations

import multiprocessing
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import p3b
from harness.command import Given, device_of
from harness.pages import counted
from harness.records import Line
from harness.turns import Machine
from p3b.scoring.ridge import SOLVE_EVERY
from p3b.vit.attention import choose_attention

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16}
CYCLES = {"ridge": SOLVE_EVERY, "subsampled": 4}
"""Steps after which the work of an estimator repeats, where they differ."""


@dataclass(frozen=True)
class Shape:
    """A model to measure with: what timm builds it from, and the images of a batch on a CPU."""

    title: str
    model: str
    cpu_batch: int
    rounds: int
    arguments: Mapping[str, int]
    classes: int = 100

    def build(self) -> VisionTransformer:
        torch.manual_seed(0)
        return timm.create_model(self.model, num_classes=self.classes, drop_path_rate=0.1, **self.arguments).train()

    def batch_on(self, machine: Machine) -> int:
        return self.cpu_batch if machine.device.type == "cpu" else 128

    def prune_options(self, side: str, **more: Any) -> dict[str, Any] | None:
        """What the pruner of a side is given: nothing for "plain", keep ratios for "gated", else the estimator of that name."""
        if side == "plain":
            return None
        if side == "gated":
            return {"keep_ratios": [0.5] * 2 * self.arguments.get("depth", 12)}
        return {"prune_ratio": 0.5, "estimator": side, **more}


class Training:
    """One side: a model, its optimizer and perhaps a pruner, doing steps on one batch.

    Args:
        shape: of the model.
        machine: where it trains.
        precision: "fp32" or "bf16" (autocast).
        prune: arguments of the pruner beside its schedule, which is in the phase of pruning throughout; None: plain training.
        masked: decide on masks from a step of its own first, so that soft ones are in place.
    """

    def __init__(
        self, shape: Shape, machine: Machine, precision: str, prune: Mapping[str, Any] | None = None, masked: bool = False
    ) -> None:
        self._machine, self._precision, batch = machine, precision, shape.batch_on(machine)
        self.model = choose_attention(shape.build(), machine.device, AUTOCAST[precision]).to(machine.device)
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        size = self.model.patch_embed.img_size
        self._images = torch.randn(batch, 3, *size, device=machine.device)
        self._targets = torch.randint(shape.classes, (batch,), device=machine.device)
        self.pruner: p3b.Pruner | None = None
        if prune is not None:
            first_update = 1 if masked else 10**6
            # Past `sparse` by then: the keep ratios have reached their goals, and the masks are soft.
            schedule = p3b.Schedule(start=0, sparse=1, final=10**6, update_every=first_update)
            self.pruner = p3b.Pruner(self.model, schedule=schedule, **prune)
            if masked:
                self.step()
                self.pruner.schedule = p3b.Schedule(start=0, sparse=1, final=10**6, update_every=10**6 - 1)

    def step(self) -> None:
        with torch.autocast(self._machine.device.type, torch.bfloat16, enabled=self._precision == "bf16"):
            loss = nn.functional.cross_entropy(self.model(self._images).float(), self._targets)
            if self.pruner is not None:
                loss = loss + self.pruner.loss(nn.functional.cross_entropy, self._targets)
        loss.backward()
        if self.pruner is not None:
            self.pruner.step()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def mask_update(self) -> Callable[[], None]:
        """A whole mask update, to be repeated: benefits -> masks -> gates -> parameters counted -> digest."""
        pruner = self.pruner
        assert pruner is not None
        self.step()
        measured = pruner.state_dict()

        def renew() -> None:
            pruner.load_state_dict(measured)  # an update ends the interval: every one begins with the same measurements
            pruner._renew(5)

        return renew


@dataclass(frozen=True)
class Entry:
    """One measurement of a training step.

    Attributes:
        table: that it stands in.
        shape: name of its model.
        precision: "fp32" or "bf16".
        measure: (shape, machine, precision, rounds) -> what the line says as its result.
        rounds: in place of those of the shape.
    """

    table: str
    shape: str
    precision: str
    measure: Callable[[Shape, Machine, str, int], Mapping[str, Any]]
    rounds: int | None = None

    def run(self, shapes: Mapping[str, Shape], given: Given) -> dict[str, Any]:
        shape, machine = shapes[self.shape], Machine(torch.device(given.device))
        rounds = given.rounds or self.rounds or shape.rounds
        result = self.measure(shape, machine, self.precision, rounds)
        return {
            "table": self.table,
            "shape": self.shape,
            "precision": self.precision,
            "device": device_of(given),
            "threads": given.threads,
            "result": {**result, "rounds": rounds, "batch": shape.batch_on(machine)},
        }


def measure_memory(
    sides: Mapping[str, Mapping[str, Any] | None], shape: Shape, machine: Machine, precision: str, steps: int
) -> dict[str, Any]:
    """The most memory that some steps of each side take, each in a process of its own that has loaded everything before."""
    with preloaded().Pool(1, maxtasksperchild=1) as pool:
        asked = {name: (shape, machine, precision, options, steps) for name, options in sides.items()}
        return {"sides": {name: {"peak_bytes": pool.apply(peak_bytes, given)} for name, given in asked.items()}}


def peak_bytes(shape: Shape, machine: Machine, precision: str, prune: Mapping[str, Any] | None, steps: int) -> int:
    """What this process takes at most in so many steps, beside what it held before the model was built.

    That is resident memory of the process on a CPU, allocated memory on a GPU.
    """
    torch.set_num_threads(1)
    on_gpu = machine.device.type == "cuda"
    before = 0 if on_gpu else _resident_bytes()
    side = Training(shape, machine, precision, prune, masked=prune is not None)
    for _ in range(steps):
        side.step()
    return torch.cuda.max_memory_allocated(machine.device) if on_gpu else _resident_bytes() - before


def preloaded() -> Any:
    """Processes that fork from one which has loaded everything and done nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["timm", "p3b.pruner"])
    return context


def rounds_of(lines: Sequence[Line]) -> list[str]:
    return [counted(line["result"]["rounds"], "round") for line in lines]


def _resident_bytes() -> int:
    """The most that this process has held so far."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
