"""Whatever computes logits from images: a saved model, an ONNX file or a `.pt2`, opened and called in the same way."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from torch import nn

from p3b.deploy import choice
from p3b.deploy.agreement import Logits
from p3b.deploy.metadata import Metadata
from p3b.deploy.onnx_file import OnnxRunner
from p3b.deploy.program import ProgramRunner
from p3b.errors import ConfigError, WeightsError
from p3b.storage import artifact

ONNX, PROGRAM = ".onnx", ".pt2"


class Runner(Protocol):
    """A model in its runtime."""

    metadata: Metadata

    def __call__(self, images: NDArray[Any]) -> Logits:
        """(N, C, H, W) images, float32 or uint8 as `metadata.takes` says, to (N, classes) logits."""
        ...


class TorchRunner:
    """A module in eager PyTorch, or compiled.

    Args:
        model: on its device; it is set to evaluation mode.
        metadata: of it.
        compiled: by torch.compile.
    """

    def __init__(self, model: nn.Module, metadata: Metadata, *, compiled: bool = False) -> None:
        self.metadata = metadata
        self._model = model.eval()
        self._device = next(model.parameters()).device
        if compiled:
            self._model.compile(dynamic=False)

    @torch.inference_mode()
    def __call__(self, images: NDArray[Any]) -> Logits:
        """See `Runner`."""
        logits: Logits = self._model(torch.from_numpy(images).to(self._device)).float().cpu().numpy()
        return logits


def open_runner(
    path: Path,
    *,
    layout: str = "index",
    batch_size: int = 1,
    device: str | torch.device = "cpu",
    threads: int | None = None,
    compiled: bool = False,
) -> Runner:
    """A model of any of the three kinds: an .onnx, a .pt2, or what `p3b.save` wrote.

    Args:
        path: of it.
        layout: that a saved model is carried out in ("auto": measure); an export has its own.
        batch_size: images at a time that "auto" measures with.
        device: of PyTorch and .pt2; ONNX Runtime computes on the CPU.
        threads: of ONNX Runtime; by default as many as torch.
        compiled: by torch.compile, for PyTorch and .pt2.

    Raises:
        WeightsError: nothing is there, or it is none of these, or damaged. ConfigError: ONNX Runtime is not installed.
    """
    if not path.exists():
        raise WeightsError(f"There is no {path}. Expected a model that p3b saved (a folder or .pth), an .onnx or a .pt2.")
    if path.suffix == ONNX:
        if torch.device(device).type != "cpu":
            raise ConfigError(f"{path} runs in ONNX Runtime on the CPU; --device {device} is for PyTorch and .pt2.")
        return OnnxRunner(path, threads=threads)
    if path.suffix == PROGRAM:
        return ProgramRunner(path, device, compiled=compiled)
    metadata = Metadata.of_config(artifact.read_config(path))
    model = choice.load(path, device, layout=layout, batch_size=batch_size)
    return TorchRunner(model.float(), metadata, compiled=compiled)
