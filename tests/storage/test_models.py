"""A model is built as asked or an error says what is wrong; a saved small model comes back itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import DropPath, calculate_drop_path_rates
from timm.models.vision_transformer import VisionTransformer

from built import TINY, shaken, tiny
from p3b.errors import ConfigError, ModelError, WeightsError
from p3b.storage import artifact
from p3b.storage.models import build_model, parse_model_kwargs
from p3b.vit.compact import apply_cuts, plan_cuts
from p3b.vit.layout import read_layout
from tiny import DISTILLED, VIT, images

SHARED = Path(__file__).parents[3] / "shared"


# --- building


def test_a_model_is_built_as_asked_and_its_seed_decides_every_weight() -> None:
    first, second, other = tiny(seed=3), tiny(seed=3), tiny(seed=4)
    assert first.patch_embed.grid_size == (4, 4)
    assert len(first.blocks) == 2
    assert first.head.out_features == 5
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.head.weight, other.head.weight)


def test_a_seed_leaves_the_global_generator_as_it_was() -> None:
    before = torch.get_rng_state()
    tiny(seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_drop_path_grows_linearly_over_the_blocks() -> None:
    model, _ = build_model(VIT, num_classes=2, model_kwargs={**TINY, "depth": 3}, drop_path=0.2)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2])


@pytest.mark.parametrize(
    ("name", "kwargs", "words"),
    [
        ("vit_tinny_patch16_224", {}, ["vit_tinny_patch16_224", "Did you mean", "'vit_tiny_patch16_224'"]),
        ("vit_tiny_patch16_224.augreg_in21", {}, ["pretrained tag", "augreg_in21k"]),
        ("resnet50", {}, ["ResNet", "VisionTransformer"]),
        ("cait_xxs24_224", {}, ["Cait", "VisionTransformer"]),
        (VIT, {"embed_dimm": 48}, ["embed_dimm", "'embed_dim'"]),
        (VIT, {"embed_dim": "48"}, ["embed_dim", "'48'", "int"]),
        (VIT, {"depth": True}, ["depth", "bool", "int"]),
        (VIT, {"depth": 0}, ["depth=0", "positive"]),
        (VIT, {"qkv_bias": "no"}, ["qkv_bias", "bool"]),
        (VIT, {"global_pool": "mean"}, ["global_pool", "'avg'"]),
        (VIT, {"act_layer": "gelux"}, ["act_layer", "gelux"]),
        (VIT, {"init_values": None}, ["init_values", "leave it out"]),
        (VIT, {"attn_drop_rate": 1.5}, ["attn_drop_rate", "[0, 1)"]),
        (VIT, {"weight_init": "skip"}, ["weight_init", "leave it out"]),
        (VIT, {"img_size": 30, "patch_size": 8}, ["img_size 30x30", "patch_size 8x8", "multiple"]),
        (VIT, {"img_size": (32, 36), "patch_size": 8}, ["img_size 32x36", "patch_size 8x8"]),
        (VIT, {"img_size": 100}, ["img_size 100x100", "patch_size 16x16"]),
        (VIT, {"embed_dim": 50}, ["embed_dim 50", "num_heads 3"]),
        (VIT, {"num_heads": 5}, ["embed_dim 192", "num_heads 5"]),
        (VIT, {"class_token": False}, ["class_token=False", "global_pool=avg"]),
        (DISTILLED, {"global_pool": "avg"}, ["distillation", "global_pool"]),
    ],
)
def test_a_model_that_cannot_be_built_says_what_is_wrong(name: str, kwargs: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ModelError) as caught:
        build_model(name, num_classes=4, model_kwargs=kwargs)
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"num_classes": 0}, "num_classes"),
        ({"num_classes": 4, "drop_path": 1.0}, "drop_path"),
        ({"num_classes": 4, "model_kwargs": {"num_classes": 5}}, "num_classes=5"),
        ({"num_classes": 4, "model_kwargs": {"drop_path_rate": 0.3}}, "drop_path_rate=0.3"),
        ({"num_classes": 4, "pretrained": True, "weights": "x.pth"}, "x.pth"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(arguments: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        build_model(VIT, **arguments)


def test_a_size_may_be_a_list_as_json_gives_it() -> None:
    assert tiny(img_size=[32, 64]).patch_embed.grid_size == (4, 8)


def test_pretrained_weights_out_of_reach_say_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match=r"network.*--model-path"):
        build_model(VIT, num_classes=4, pretrained=True)


def test_pretrained_weights_that_nobody_has_are_not_looked_for() -> None:
    with pytest.raises(WeightsError, match="no pretrained weights for 'vit_base_patch32_plus_256'"):
        build_model("vit_base_patch32_plus_256", num_classes=4, pretrained=True)


# --- model arguments from words


def test_model_arguments_are_literals_or_words() -> None:
    items = [
        "img_size=32",
        "class_token=False",
        "act_layer=gelu",
        "mlp_ratio=2.5",
        "patch_size=(4, 8)",
        "init_values=1e-5",
    ]
    assert parse_model_kwargs(items) == {
        "img_size": 32,
        "class_token": False,
        "act_layer": "gelu",
        "mlp_ratio": 2.5,
        "patch_size": (4, 8),
        "init_values": 1e-5,
    }
    assert parse_model_kwargs([]) == {}


@pytest.mark.parametrize("item", ["img_size", "=3", "img size=3", "img_size=", "img_size=(32", "a=__import__('os')", "b=true"])
def test_a_model_argument_that_cannot_be_read_is_named(item: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_model_kwargs([item])
    assert item in str(caught.value)


def test_a_model_argument_given_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="twice"):
        parse_model_kwargs(["depth=2", "depth=3"])


# --- small models of ours


def small_model() -> VisionTransformer:
    """One narrowed block, one constant, one that is gone, one whole."""
    model = shaken(tiny())
    layout = read_layout(model)
    masks = {block.gate(dim): torch.ones(size) for block in layout.blocks for dim, size in block.dims.items()}
    narrowed, constant, gone, _ = layout.blocks
    for dim in narrowed.dims:
        masks[narrowed.gate(dim)][::2] = 0
    masks[constant.gate("in")][:] = 0
    masks[gone.gate("out")][:] = 0
    return apply_cuts(model, plan_cuts(layout, masks)).eval()


@pytest.fixture(params=["small", "first_sparse_checkpoint.pth", "any name.pt"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[VisionTransformer, Path]:
    model, path = small_model(), tmp_path / request.param
    save = artifact.save_checkpoint if path.suffix else artifact.save
    save(model, path)
    return model, path


def test_a_small_model_comes_back_itself(saved: tuple[VisionTransformer, Path]) -> None:
    source, folder = saved
    model, report = build_model(VIT, num_classes=5, model_kwargs=TINY, weights=folder)
    assert model.training
    assert torch.equal(model.eval()(images()), source(images()))
    assert report is not None
    assert report.loaded == len(source.state_dict())
    assert report.replaced == ()


def test_a_small_model_gets_a_new_head_for_other_classes(saved: tuple[VisionTransformer, Path]) -> None:
    source, folder = saved
    first, report = build_model(VIT, num_classes=3, weights=folder, seed=1)
    second, _ = build_model(VIT, num_classes=3, weights=folder, seed=1)
    assert first(images()).shape == (2, 3)
    assert torch.equal(first.head.weight, second.head.weight)
    assert report is not None
    assert report.replaced[0] == "head.weight: checkpoint (5, 48), model (3, 48): kept as newly initialised"
    assert report.loaded == len(source.state_dict()) - 2


def test_a_small_model_drops_only_paths_that_exist(saved: tuple[VisionTransformer, Path]) -> None:
    model, _ = build_model(VIT, num_classes=5, weights=saved[1], drop_path=0.3)
    paths = [path for block in model.blocks for path in (block.drop_path1, block.drop_path2)]
    rates = calculate_drop_path_rates(0.3, 2)
    assert [path.drop_prob if isinstance(path, DropPath) else 0.0 for path in paths] == [0.0, 0.0, 0.0, rates[1]]
    torch.manual_seed(0)
    assert model.train()(images()).shape == (2, 5)


@pytest.mark.parametrize(
    "contradiction",
    [
        *({"embed_dim": 96}, {"depth": 3}, {"img_size": 64}, {"patch_size": 4}, {"num_heads": 4}, {"mlp_ratio": 2}),
        *({"init_values": 0.1}, {"drop_rate": 0.1}),
    ],
)
def test_a_small_model_cannot_be_reshaped(contradiction: dict[str, Any], saved: tuple[VisionTransformer, Path]) -> None:
    with pytest.raises(WeightsError, match=next(iter(contradiction))):
        build_model(VIT, num_classes=5, model_kwargs=contradiction, weights=saved[1])


# --- the shared source model


@pytest.mark.skipif(not (SHARED / "data/source_vit.safetensors").is_file(), reason="needs the shared data")
def test_the_source_model_loads_whole() -> None:
    shape = json.loads((SHARED / "data/source_vit.json").read_text())
    kwargs = {key: value for key, value in shape["model_kwargs"].items() if key != "num_classes"}
    path = SHARED / "data/source_vit.safetensors"
    model, report = build_model(shape["timm_model"], num_classes=4, model_kwargs=kwargs, weights=path)
    assert sum(parameter.numel() for parameter in model.parameters()) == shape["params"]
    assert report is not None
    assert report.loaded == len(model.state_dict())
    assert report.replaced == report.resampled == report.missing == report.unexpected == ()
