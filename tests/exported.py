"""A tiny pruned model, saved, and images on disk: what the tests of export, prediction and speed share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

import p3b
from p3b.data.transforms import Preprocessing
from p3b.vit.compact import apply_cuts, plan_cuts
from p3b.vit.layout import read_layout
from tiny import CLASSES, random_masks, tiny_vit

NAMES = tuple(f"class {number}" for number in range(CLASSES))
PREPROCESSING = Preprocessing((3, 32, 32), (0.5, 0.4, 0.3), (0.25, 0.2, 0.3))


def small_vit(**changed: object) -> VisionTransformer:
    """Two timm blocks, unless told otherwise; the last one's attention is a constant."""
    dense = tiny_vit(**changed)
    layout = read_layout(dense)
    masks = random_masks(layout, seed=0, keep=0.6)
    masks[f"{layout.blocks[-2].name}.in"].zero_()
    return apply_cuts(dense, plan_cuts(layout, masks))


def save_small(folder: Path, **changed: object) -> Path:
    """The small model with names, preprocessing and provenance."""
    return p3b.save(
        small_vit(**changed), folder, class_names=NAMES, preprocessing=PREPROCESSING.to_dict(), provenance={"stage": "a test"}
    )


def photos(count: int, seed: int = 0) -> list[Image.Image]:
    """Smooth colour images of several sizes, larger and smaller than the network's."""
    noise = np.random.default_rng(seed)
    sizes = [(40, 40), (64, 37), (33, 70), (20, 28)]
    return [
        Image.fromarray(noise.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize(sizes[number % len(sizes)], 2)
        for number in range(count)
    ]


def save_photos(folder: Path, count: int) -> list[Path]:
    """These images as PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{number}.png" for number in range(count)]
    for image, file in zip(photos(count), files, strict=True):
        image.save(file)
    return files
