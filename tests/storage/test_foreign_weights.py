"""Weights of what is no plain Vision Transformer are refused for what they are; what cannot be told is said."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from p3b.errors import WeightsError
from p3b.storage.hub_folder import Facts
from p3b.storage.models import build_model
from p3b.storage.outline import can_be_pruned
from p3b.storage.suggestions import unknown_model
from p3b.storage.untrusted import read_pickle
from p3b.storage.weights import load_weights
from p3b.storage.weights_file import open_weights
from tiny import tiny_vit

SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}


def state_of(name: str, **more: Any) -> dict[str, Tensor]:
    return timm.create_model(name, **{**SHAPE, **more}).state_dict()


@pytest.mark.parametrize(
    ("name", "target", "word"),
    [
        ("vit_small_patch16_dinov3", {"pos_embed": "none", "reg_tokens": 4, "qkv_bias": False, "init_values": 1e-5}, "rotary"),
        ("vit_small_patch16_rope_224", {"pos_embed": "none", "init_values": 1e-5}, "rotary"),
        ("vit_small_patch16_rope_mixed_ape_224", {"init_values": 1e-5}, "rotary"),
        ("vit_pe_core_base_patch16_224", {"name": "vit_base_patch16_clip_224"}, "Perception Encoder"),
        ("vit_pe_spatial_small_patch16_512", {"name": "vit_base_patch16_clip_224", "final_norm": False}, "Perception Encoder"),
        ("eva02_tiny_patch14_224", {}, "EVA"),
        ("beit_base_patch16_224", {"init_values": 1e-5, "pos_embed": "none"}, "relative positions"),
        ("cait_xxs24_224", {}, "CaiT"),
    ],
)
def test_a_family_is_refused_by_its_name_and_the_model_untouched(name: str, target: dict[str, Any], word: str) -> None:
    model = tiny_vit(**target)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(WeightsError, match=word):
        load_weights(model, state_of(name))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_rotary_weights_that_look_like_deit_iii_are_refused_by_their_script_or_file_and_else_doubted(tmp_path: Path) -> None:
    state = state_of("vit_small_patch16_rope_ape_224")
    target = {"model_kwargs": {key: value for key, value in SHAPE.items() if key != "num_classes"}, "num_classes": 5}
    for content, file in (({"model": state, "args": {"model": "rope_axial_ape_deit"}}, "w.pth"), (state, "rope_vit.pth")):
        torch.save(content, tmp_path / file)
        with pytest.raises(WeightsError, match="rotary"):
            build_model("deit3_small_patch16_224", weights=tmp_path / file, **target)
    torch.save(state, tmp_path / "w.pth")
    report = build_model("deit3_small_patch16_224", weights=tmp_path / "w.pth", **target)[1]
    assert report is not None and any("rope" in line and "guess" in line for line in report.lines())


@pytest.mark.parametrize(
    ("extra", "word"),
    [
        ("blocks.0.attn.qkv.lora_A.default.weight", "merge the adapter"),
        ("blocks.0.attn.qkv.parametrizations.weight.original0", "reparametrised"),
        ("blocks.0.mlp.fc1.weight_mask", "reparametrised"),
        ("blocks.0.mlp.fc1.SCB", "quantised"),
        ("rope_embed.periods", "rotary"),
    ],
)
def test_one_tensor_may_tell(extra: str, word: str) -> None:
    model = tiny_vit()
    with pytest.raises(WeightsError, match=word):
        load_weights(model, {**model.state_dict(), extra: torch.ones(24)})


@pytest.mark.parametrize(
    ("changed", "cause"),
    [({"embed_dim": 48}, "another width"), ({"depth": 3}, "another depth"), ({"mlp_ratio": 2.0}, "another width of the MLP")],
)
def test_the_likely_cause_comes_first(changed: dict[str, Any], cause: str) -> None:
    with pytest.raises(WeightsError, match=rf"^Weights 'w' are of (a model with )?{cause}"):
        load_weights(tiny_vit(), tiny_vit(**changed).state_dict(), "w")


def test_heads_and_activation_that_no_shape_shows_are_compared() -> None:
    model = tiny_vit()
    state = model.state_dict()
    with pytest.raises(WeightsError, match="num_heads=6"):
        load_weights(model, state, facts=Facts(said_by="config.json", num_heads=6))
    with pytest.raises(WeightsError, match="act_layer=quick_gelu"):
        load_weights(model, state, facts=Facts(said_by="config.json", activation="quick_gelu"))
    report = load_weights(model, state, facts=Facts(said_by="config.json", num_heads=3, activation="gelu", norm_eps=1e-12))
    assert model.blocks[0].norm1.eps == model.norm.eps == 1e-12
    assert "epsilon 1e-12" in report.notes[0]


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!DOCTYPE html>", "web page"),
        (b"\x89HDF\r\n", "HDF5"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"\x80\x04\x95", "plain pickle"),
        (b"\0" * 257 + b"ustar", "tar archive"),
    ],
)
def test_what_is_no_weights_file_is_told_for_what_it_is(content: bytes, word: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pth.tar"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=word):
        open_weights(path)


def test_programs_and_whole_models_are_told_for_what_they_are(tmp_path: Path) -> None:
    layer = torch.nn.Linear(2, 2)
    path = tmp_path / "w.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has deprecated its programs; people have them
        torch.jit.save(torch.jit.trace(layer, torch.ones(1, 2)), path)
    with pytest.raises(WeightsError, match="TorchScript"):
        read_pickle(path)
    torch.save(layer, path)
    with pytest.raises(WeightsError, match=r"whole pickled model \(torch\.nn\.modules\.linear\.Linear\).*weights-only"):
        read_pickle(path)


# --- misspelt models


def test_suggestions_are_models_that_can_be_pruned() -> None:
    assert "'deit_small_patch16_224'" in unknown_model("deit_smal")
    named = unknown_model("vit_tinny_patch16_224").split("Did you mean ")[1].rstrip("?").split(" or ")
    assert all(can_be_pruned(name.strip("'")) for name in named)
    assert "for instance" in unknown_model("qqqqqqqq")


def test_a_model_of_another_kind_cannot_be_pruned() -> None:
    assert not can_be_pruned("resnet18")
