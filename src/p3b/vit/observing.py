"""What chosen layers are given and put out while a model runs, for what is measured on a trained model without training it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Seen:
    """Input and output of a layer's last forward pass."""

    input: Tensor
    output: Tensor


@contextmanager
def observed(model: nn.Module, layers: Sequence[nn.Module]) -> Iterator[dict[nn.Module, Seen]]:
    """Keep what the layers see; the model is in evaluation mode meanwhile, each module in its own mode afterwards."""
    seen: dict[nn.Module, Seen] = {}

    def keep(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        seen[layer] = Seen(inputs[0], output)

    with evaluating(model):
        handles = [layer.register_forward_hook(keep) for layer in layers]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and each of its modules in its own mode again afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
