"""What a run computes on: its processes, the device of this one, and the number format."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from timm.models.vision_transformer import VisionTransformer

from p3b.train.distributed import Processes, process_group
from p3b.train.optim import Precision
from p3b.vit.attention import choose_attention


@dataclass(frozen=True)
class Machine:
    """This process among all, its device, and the precision of training steps."""

    processes: Processes
    device: torch.device
    precision: Precision

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.processes.is_main

    @property
    def number_format(self) -> str:
        """That steps compute in: "float32", "bfloat16", ..."""
        return str(self.precision.dtype or torch.float32).removeprefix("torch.")

    def on_main(self, act: Callable[[], object]) -> None:
        """Do something on the main process alone, such as writing."""
        if self.is_main:
            act()

    def put(self, model: VisionTransformer) -> VisionTransformer:
        """The model on the device, its attention in the form that is quickest there."""
        return choose_attention(model, self.device, self.precision.dtype).to(self.device)


@contextmanager
def open_machine(device: str, timeout_minutes: float, precision: str) -> Iterator[Machine]:
    """Join the other processes, and leave them at the end.

    Raises:
        ConfigError: no such device or precision.
    """
    with process_group(device, timeout_minutes) as (processes, chosen):
        yield Machine(processes, chosen, Precision.choose(precision, chosen))
