"""Folders of model hubs: the weights in them are found, and what their configs say is taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from p3b.errors import WeightsError
from p3b.storage.artifact import is_artifact, save
from p3b.storage.hub_folder import Facts, facts_beside, is_hub_folder, weights_files
from p3b.storage.weights_file import open_weights
from tiny import tiny_vit

STATE = tiny_vit().state_dict()
VIT = {"model_type": "vit", "num_attention_heads": 3, "layer_norm_eps": 1e-12, "image_size": 32, "patch_size": 8}


def folder(path: Path, config: dict[str, Any] | None = None, **more: dict[str, Any]) -> Path:
    safetensors.torch.save_file(STATE, path / "model.safetensors")
    for name, content in {"config": config, **more}.items():
        if content is not None:
            (path / f"{name}.json").write_text(json.dumps(content))
    return path


def test_what_transformers_says_is_taken(tmp_path: Path) -> None:
    processor = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "resample": 2, "do_normalize": True}
    facts = open_weights(folder(tmp_path, VIT, preprocessor_config=processor)).facts
    assert facts == Facts(
        said_by="config.json and preprocessor_config.json",
        kind="vit",
        num_heads=3,
        activation="gelu",
        norm_eps=1e-12,
        grid=(4, 4),
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        interpolation="bilinear",
    )


def test_the_image_tower_of_clip_has_its_own_config_and_its_own_default(tmp_path: Path) -> None:
    facts = facts_beside(
        folder(tmp_path, {"model_type": "clip", "vision_config": {"num_attention_heads": 12}}) / "model.safetensors"
    )
    assert (facts.num_heads, facts.activation) == (12, "quick_gelu")


def test_what_timm_and_open_clip_say_is_taken(tmp_path: Path) -> None:
    cfg = {"mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.9, "interpolation": "bicubic"}
    facts = open_weights(folder(tmp_path, {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": cfg})).facts
    assert (facts.kind, facts.mean, facts.crop_pct) == ("vit_tiny_patch16_224", (0.5, 0.5, 0.5), 0.9)
    (tmp_path / "config.json").unlink()
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"quick_gelu": True}, "preprocess_cfg": {}}))
    assert open_weights(tmp_path).facts.activation == "quick_gelu"


def test_a_config_beside_a_file_of_another_name_says_nothing_of_it(tmp_path: Path) -> None:
    torch.save(STATE, folder(tmp_path, VIT) / "mine.pth")
    assert open_weights(tmp_path / "mine.pth").facts == Facts()


def test_shards_are_one_state_dict(tmp_path: Path) -> None:
    names = list(STATE)
    parts = {"model-00001-of-00002.safetensors": names[:7], "model-00002-of-00002.safetensors": names[7:]}
    for file, part in parts.items():
        safetensors.torch.save_file({name: STATE[name] for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert open_weights(tmp_path).state.keys() == STATE.keys()
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightsError, match="model-00002-of-00002"):
        open_weights(tmp_path)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd"])
def test_an_index_names_files_of_its_own_folder_only(name: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(WeightsError, match="its own folder"):
        weights_files(tmp_path)


def test_the_one_snapshot_of_a_cache_is_its_folder(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    assert weights_files(folder(snapshot, VIT).parents[1]) == [snapshot / "model.safetensors"]


def test_several_files_are_named(tmp_path: Path) -> None:
    for name in ("a.pth", "b.pth"):
        torch.save(STATE, tmp_path / name)
    with pytest.raises(WeightsError, match=r"a\.pth, b\.pth"):
        weights_files(tmp_path)


def test_a_folder_of_ours_is_none_of_a_hub(tmp_path: Path) -> None:
    save(tiny_vit(), tmp_path / "ours")
    assert is_artifact(tmp_path / "ours") and not is_hub_folder(tmp_path / "ours")
    assert is_hub_folder(folder(tmp_path, VIT)) and not is_artifact(tmp_path)
    with pytest.raises(WeightsError, match="give its folder"):
        open_weights(tmp_path / "ours" / "model.safetensors")


@pytest.mark.parametrize("config", [{**VIT, "num_attention_heads": "three"}, {"model_type": "vit", "vision_config": 3}])
def test_a_config_that_makes_no_sense_is_refused(config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="makes no sense"):
        open_weights(folder(tmp_path, config))
