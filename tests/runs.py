"""Tiny runs of the commands: coloured images in class folders, a two-block model, and a look at what a run left behind."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import p3b
from p3b.cli import main, published_main

COLOURS = ("blue", "green", "red")
SIZES = {"train": 4, "val": 3, "test": 3}
"""Images of each class in each part."""
SHAPE = ("img_size=16", "patch_size=8", "embed_dim=24", "depth=2", "num_heads=3")
BLOCKS = 4
"""Two a block of the network: attention and MLP."""
MODEL = ("--model", "vit_tiny_patch16_224", "--model-kwargs", *SHAPE)
MACHINE = ("--num-workers", "0", "--device", "cpu", "--precision", "fp32", "--batch-size", "4")
CALM = ("--no-augment", "--mixup", "0", "--cutmix", "0", "--smoothing", "0", "--drop-path", "0")
"""Nothing random in training."""
PHASES = ("--epochs", "3", "--prune-start-epoch", "1")


def colour_folders(root: Path, parts: Mapping[str, int] = SIZES, classes: Sequence[str] = COLOURS, seed: int = 0) -> Path:
    """PNGs of 16 pixels in `<part>/<class>/`; noise, and one channel that says the class."""
    noise = np.random.default_rng(seed)
    for part, images in parts.items():
        for number, name in enumerate(classes):
            folder = root / part / name
            folder.mkdir(parents=True)
            for image in range(images):
                pixels = noise.integers(0, 120, (16, 16, 3), dtype=np.uint8)
                pixels[..., 2 - number % 3] += 120
                Image.fromarray(pixels).save(folder / f"{image}.png")
    return root


def flags(data: Path, out: Path, *more: str, model: Sequence[str] = MODEL) -> list[str]:
    """Flags of a tiny run; later ones win."""
    return ["--data-path", str(data), "--output-dir", str(out), *model, *MACHINE, *more]


def run(command: str, *given: str) -> int:
    """Exit status of `p3b <command>`, or of main.py. Everything is real; only the final throughput is measured more briefly."""
    import p3b.commands

    brief = partial(p3b.commands.images_per_second, rounds=1, seconds_per_round=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(p3b.commands, "images_per_second", brief)
        try:
            return published_main(given) if command == "main.py" else main([command, *given])
        except SystemExit as stop:  # how the parser of the flags ends
            return int(stop.code or 0)


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text())
    return content


def weights(saved: Path) -> dict[str, Tensor]:
    return p3b.load(saved).state_dict()


def same_tensors(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def everything_in(folder: Path) -> dict[str, bytes]:
    """Content of every file, to see that nothing has changed."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}
