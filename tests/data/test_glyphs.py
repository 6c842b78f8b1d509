"""The demo's source domain can be rendered again, and the weights in the package know it."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

from p3b.data.glyphs import CLASS_NAMES, render_glyphs
from p3b.errors import ConfigError

WEIGHTS = Path(str(resources.files("p3b.data"))) / "glyph_vit.safetensors"
DESCRIPTION = WEIGHTS.with_suffix(".json")


def test_the_seed_decides_every_byte() -> None:
    images, labels = render_glyphs(60, seed=5)
    again, labels_again = render_glyphs(60, seed=5)
    other, _ = render_glyphs(60, seed=6)
    assert np.array_equal(images, again)
    assert np.array_equal(labels, labels_again)
    assert not np.array_equal(images, other)


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    images, _ = render_glyphs(20, seed=5)
    assert np.array_equal(np.random.get_state()[1], before)
    np.random.seed(2)
    assert np.array_equal(render_glyphs(20, seed=5)[0], images)


def test_shapes_types_and_balance() -> None:
    images, labels = render_glyphs(100, seed=0, size=20)
    assert images.shape == (100, 20, 20)
    assert images.dtype == np.uint8
    assert labels.shape == (100,)
    assert labels.dtype == np.int64
    counts = np.bincount(labels, minlength=len(CLASS_NAMES))
    assert len(counts) == len(CLASS_NAMES)
    assert set(counts) == {2, 3}


def test_classes_are_letters_only() -> None:
    assert len(set(CLASS_NAMES)) == len(CLASS_NAMES) == 41
    assert all(name.isascii() and name.isalpha() for name in CLASS_NAMES)


def test_strokes_are_bright_on_dark_and_nothing_is_empty() -> None:
    images, _ = render_glyphs(500, seed=3)
    assert (images.max(axis=(1, 2)) > 150).all()
    assert np.median(images) < 60
    border = np.concatenate([images[:, [0, -1]].ravel(), images[:, :, [0, -1]].ravel()])
    assert border.mean() < images[:, 4:12, 4:12].mean() / 2


@pytest.mark.parametrize(("num_images", "seed", "size"), [(0, 0, 16), (1, -1, 16), (1, 0, 3)])
def test_numbers_outside_their_range_are_refused(num_images: int, seed: int, size: int) -> None:
    with pytest.raises(ConfigError, match="expected an integer of at least"):
        render_glyphs(num_images, seed, size)


def test_the_weights_are_small_and_their_description_fits_the_classes() -> None:
    description = json.loads(DESCRIPTION.read_text(encoding="utf-8"))
    assert WEIGHTS.stat().st_size <= 2_000_000
    assert tuple(description["classes"]) == CLASS_NAMES
    assert description["model_kwargs"]["num_classes"] == len(CLASS_NAMES)
    assert description["params"] == sum(tensor.numel() for tensor in load_file(WEIGHTS).values())
    assert description["command"].startswith("python scripts/pretrain_glyphs.py")


def test_the_weights_name_fresh_renders() -> None:
    description = json.loads(DESCRIPTION.read_text(encoding="utf-8"))
    model = timm.create_model(description["timm_model"], **description["model_kwargs"])
    model.load_state_dict(load_file(WEIGHTS), strict=True)
    model.eval()
    images, labels = render_glyphs(205, seed=12345, size=description["model_kwargs"]["img_size"])
    mean, std = (torch.tensor(description["normalization"][key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.inference_mode():
        predicted = model((torch.from_numpy(images).float().div(255).unsqueeze(1) - mean) / std).argmax(dim=1)
    accuracy = (predicted == torch.from_numpy(labels)).float().mean().item()
    assert accuracy > 0.85  # chance is 0.024
