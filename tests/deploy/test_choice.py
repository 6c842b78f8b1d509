"""Layouts from outside: chosen by name or by measurement, and what is saved is the same."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import p3b
import p3b.deploy.choice
from p3b.deploy.choice import CANDIDATES, LEAST_GAIN, choose_layout
from p3b.deploy.layouts import LAYOUTS
from p3b.errors import ConfigError, ModelError
from p3b.storage.artifact import save_checkpoint
from p3b.vit.compact import apply_cuts, plan_cuts
from p3b.vit.deployment import layout_of
from p3b.vit.layout import read_layout
from tiny import images, random_masks, tiny_vit


def _small() -> VisionTransformer:
    dense = tiny_vit(init_values=0.2)
    return apply_cuts(dense, plan_cuts(read_layout(dense), random_masks(read_layout(dense))))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_saved_is_the_compact_model_whatever_the_layout(layout: str, tmp_path: Path) -> None:
    small = _small()
    laid = p3b.with_layout(small, layout)
    assert layout_of(laid) == layout
    p3b.save(small, tmp_path / "compact")
    p3b.save(laid, tmp_path / "laid")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "laid" / name).read_bytes() == (tmp_path / "compact" / name).read_bytes()
    again = p3b.load(tmp_path / "laid", layout=layout)
    assert layout_of(again) == layout
    assert torch.equal(again(images()), laid(images()))
    file = save_checkpoint(laid, tmp_path / "laid.pth")
    assert torch.equal(p3b.load(file)(images()), small(images()))


def test_the_quickest_candidate_is_chosen_and_a_tie_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    small, speeds = _small(), dict.fromkeys(CANDIDATES, 100.0)

    def measured(models: list[nn.Module], *_shape: object, **_settings: object) -> list[float]:
        return [speeds[layout_of(model)] for model in models]

    monkeypatch.setattr(p3b.deploy.choice, "images_per_second", measured)
    assert choose_layout(small).layout == "index"
    speeds["zeros"] = 100 * LEAST_GAIN
    assert choose_layout(small).layout == "index"
    for name in CANDIDATES:
        speeds.update(dict.fromkeys(CANDIDATES, 100.0))
        speeds[name] = 110.0
        choice = choose_layout(small, batch_size=4)
        assert choice.layout == name
        assert choice.batch_size == 4
        assert choice.images_per_second == speeds
        assert layout_of(p3b.with_layout(p3b.with_layout(small, "padded"), "auto")) == name


def test_it_is_measured_for_real_and_leaves_the_model_as_it_was() -> None:
    small = _small().train()
    state = deepcopy(small.state_dict())
    choice = choose_layout(small, batch_size=2, seconds=0.2)
    assert set(choice.images_per_second) <= set(CANDIDATES)
    assert choice.layout in choice.images_per_second
    assert min(choice.images_per_second.values()) > 0
    assert small.training
    assert all(torch.equal(value, state[key]) for key, value in small.state_dict().items())


def test_a_dense_model_is_not_measured() -> None:
    dense = tiny_vit()
    assert p3b.with_layout(dense) is dense
    assert choose_layout(dense).images_per_second == {"index": 0.0}


def test_wrong_names_sizes_and_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'quickest'.*auto"):
        p3b.with_layout(_small(), "quickest")
    with pytest.raises(ConfigError, match="layout"):
        p3b.load(p3b.save(_small(), tmp_path / "small"), layout="foldet")
    with pytest.raises(ConfigError, match="batch size must be 1 or more, got 0"):
        p3b.with_layout(_small(), batch_size=0)
    with pytest.raises(ModelError, match="VisionTransformer"):
        p3b.with_layout(nn.Linear(2, 2), "folded")
