"""Modules around a model that is exported: preprocessing inside the graph, and half precision behind float32 inputs.

N images, C channels, H and W height and width as they come, S the network's side.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from p3b.data.transforms import Preprocessing
from p3b.errors import ConfigError

INTERPOLATIONS = ("bilinear", "bicubic")
"""What both runtimes resize with as Pillow does: with a filter that widens as the image shrinks (antialias)."""


class Prepared(nn.Module):
    """uint8 images of any size to logits: (N, C, H, W) -> (N, classes); all images of a batch have the same size.

    The shorter side is resized to S / crop_pct, the centre is cropped, and pixels are normalised, with the roundings of
    torchvision's Resize and CenterCrop. Pillow resizes with integer weights of its own precision, so a pixel may differ by a
    level or two from what `p3b.data` gives; `p3b export` measures what that makes of the logits.

    Args:
        model: takes (N, C, S, S) normalised float32.
        preprocessing: of that model.

    Raises:
        ConfigError: the input is not square, or the interpolation is neither bilinear nor bicubic.
    """

    def __init__(self, model: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        channels, height, width = preprocessing.input_size
        if height != width or preprocessing.interpolation not in INTERPOLATIONS:
            raise ConfigError(
                f"--with-preprocessing covers square inputs resized by {' or '.join(INTERPOLATIONS)}; this model takes "
                f"{height} x {width} pixels resized by {preprocessing.interpolation}. Export it without it."
            )
        self.model, self.side, self.mode = model, height, preprocessing.interpolation
        self.resized = math.floor(height / preprocessing.crop_pct)
        shape = (1, channels, 1, 1)
        self.register_buffer("mean", torch.tensor(preprocessing.mean).mul(255).view(shape), persistent=False)
        self.register_buffer("std", torch.tensor(preprocessing.std).mul(255).view(shape), persistent=False)

    mean: Tensor
    std: Tensor

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(self.prepare(images))
        return logits

    def prepare(self, images: Tensor) -> Tensor:
        """(N, C, H, W) uint8 -> (N, C, S, S) float32, normalised."""
        height, width = images.shape[-2:]
        shorter = torch.sym_min(height, width)
        size: list[Any] = [self.resized * extent // shorter for extent in (height, width)]  # integers, or symbols of them
        pixels = F.interpolate(images, size=size, mode=self.mode, antialias=True)
        top, left = (_half(extent - self.side) for extent in size)
        pixels = pixels[..., top : top + self.side, left : left + self.side]
        return (pixels.reshape(-1, self.mean.shape[1], self.side, self.side).float() - self.mean) / self.std


class HalfPrecision(nn.Module):
    """A model of float16 weights that is fed and answers in float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images.half())
        return logits.float()


def _half(extra: int) -> int:
    """round(extra / 2) as Python rounds, half to even, in integer arithmetic that a graph can hold."""
    return (extra + extra % 4 // 3) // 2
