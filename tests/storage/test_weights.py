"""Weights are taken whole or not at all: what is loaded equals its source, and whatever does not fit is told by name."""

from __future__ import annotations

import argparse
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from built import TINY, shaken, tiny
from p3b.errors import ModelError, WeightsError
from p3b.storage.models import build_model
from p3b.storage.weights import load_weights, read_weights
from tiny import DISTILLED, VIT, images


def rebuilt(path: Path, name: str = VIT, classes: int = 5, **changed: Any) -> tuple[VisionTransformer, Any]:
    model, report = build_model(name, num_classes=classes, model_kwargs={**TINY, **changed}, weights=path, seed=9)
    assert isinstance(model, VisionTransformer)
    return model.eval(), report


# --- files that fit


def wrap_bare(state: dict[str, Tensor]) -> object:
    return state


def wrap_training(state: dict[str, Tensor]) -> object:
    averaged = {key: value + 1 for key, value in state.items()}
    return {"model_ema": averaged, "model": state, "epoch": 3, "args": argparse.Namespace(lr=0.1)}


def wrap_average(state: dict[str, Tensor]) -> object:
    return {"state_dict_ema": OrderedDict(state), "epoch": 3}


def wrap_distributed(state: dict[str, Tensor]) -> object:
    return {"state_dict": {f"module.{key}": value for key, value in state.items()}}


@pytest.mark.parametrize("wrap", [wrap_bare, wrap_training, wrap_average, wrap_distributed])
def test_a_pickled_state_dict_is_found_wherever_it_lies(wrap: Any, tmp_path: Path) -> None:
    source = shaken(tiny())
    torch.save(wrap(source.state_dict()), tmp_path / "w.pth")
    model, report = rebuilt(tmp_path / "w.pth")
    assert torch.equal(model(images()), source(images()))
    assert report.loaded == len(source.state_dict())
    assert report.replaced == report.resampled == report.missing == report.unexpected == ()


@pytest.mark.parametrize("zipped", [True, False])
def test_weights_are_found_beside_what_training_left(zipped: bool, tmp_path: Path) -> None:
    """Half precision, tied tensors, views of one memory, an optimizer's state: nothing of it is unusual in a checkpoint."""
    source = shaken(tiny()).half()
    source.blocks[1].norm1.weight = source.blocks[0].norm1.weight
    optimizer = torch.optim.AdamW(source.parameters())
    sum(parameter.sum() for parameter in source.parameters()).backward()
    optimizer.step()
    flat = torch.cat([value.flatten() for value in source.state_dict().values()])
    views = flat.split([value.numel() for value in source.state_dict().values()])
    state = {key: view.view_as(value) for (key, value), view in zip(source.state_dict().items(), views, strict=True)}
    for content in (source.state_dict(), state):
        whole = {"model": content, "optimizer": optimizer.state_dict(), "random": torch.get_rng_state(), "epoch": 3}
        torch.save(whole, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
        found = read_weights(tmp_path / "w.pth")
        assert all(torch.equal(found[key], value) for key, value in source.state_dict().items())
        assert rebuilt(tmp_path / "w.pth")[1].loaded == len(state)


def test_a_patch_that_would_take_minutes_to_resample_is_refused(tmp_path: Path) -> None:
    state = tiny().state_dict()
    state["patch_embed.proj.weight"] = torch.zeros(1, 1, 1000, 1000)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="patches of 1000x1000 pixels"):
        rebuilt(tmp_path / "w.pth")


def test_the_oldest_pickle_format_is_read(tmp_path: Path) -> None:
    source = shaken(tiny())
    torch.save(source.state_dict(), tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(rebuilt(tmp_path / "w.pt")[0](images()), source(images()))


def test_safetensors_give_the_same_model(tmp_path: Path) -> None:
    source = shaken(tiny())
    safetensors.torch.save_file(source.state_dict(), tmp_path / "w.safetensors")
    assert torch.equal(rebuilt(tmp_path / "w.safetensors")[0](images()), source(images()))


def as_authors_archive(model: VisionTransformer, prefix: str = "") -> dict[str, np.ndarray]:
    """Weights in the layout of the ViT authors: kernels input first, heads apart."""
    heads, width = model.blocks[0].attn.num_heads, model.embed_dim
    arrays: dict[str, Tensor] = {
        "cls": model.cls_token,
        "embedding/kernel": model.patch_embed.proj.weight.permute(2, 3, 1, 0),
        "embedding/bias": model.patch_embed.proj.bias,
        "Transformer/posembed_input/pos_embedding": model.pos_embed,
        "Transformer/encoder_norm/scale": model.norm.weight,
        "Transformer/encoder_norm/bias": model.norm.bias,
        "head/kernel": model.head.weight.T,
        "head/bias": model.head.bias,
    }
    for depth, block in enumerate(model.blocks):
        at = f"Transformer/encoderblock_{depth}"
        attention = f"{at}/MultiHeadDotProductAttention_1"
        for norm, number in ((block.norm1, 0), (block.norm2, 2)):
            arrays[f"{at}/LayerNorm_{number}/scale"] = norm.weight
            arrays[f"{at}/LayerNorm_{number}/bias"] = norm.bias
        for name, weight, bias in zip(
            ("query", "key", "value"), block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3), strict=True
        ):
            arrays[f"{attention}/{name}/kernel"] = weight.T.reshape(width, heads, -1)
            arrays[f"{attention}/{name}/bias"] = bias.reshape(heads, -1)
        arrays[f"{attention}/out/kernel"] = block.attn.proj.weight.T.reshape(heads, -1, width)
        arrays[f"{attention}/out/bias"] = block.attn.proj.bias
        for number, layer in enumerate((block.mlp.fc1, block.mlp.fc2)):
            arrays[f"{at}/MlpBlock_3/Dense_{number}/kernel"] = layer.weight.T
            arrays[f"{at}/MlpBlock_3/Dense_{number}/bias"] = layer.bias
    return {f"{prefix}{key}": value.detach().numpy() for key, value in arrays.items()}


@pytest.mark.parametrize("prefix", ["", "opt/target/"])
def test_the_vit_authors_archive_gives_the_same_logits(prefix: str, tmp_path: Path) -> None:
    source = shaken(tiny(mlp_ratio=2.7))
    np.savez(tmp_path / "w.npz", **as_authors_archive(source, prefix))
    model, report = rebuilt(tmp_path / "w.npz", mlp_ratio=2.7)
    assert torch.equal(model(images()), source(images()))
    assert report.loaded == len(source.state_dict())


def test_their_later_archive_with_stacked_blocks_gives_the_same_logits(tmp_path: Path) -> None:
    source = shaken(tiny())
    arrays = as_authors_archive(source)
    renamed = {"MultiHeadDotProductAttention_1": "MultiHeadDotProductAttention_0", "LayerNorm_2": "LayerNorm_1"}
    renamed |= {"MlpBlock_3": "MlpBlock_0", "Transformer/posembed_input/": ""}
    stacked: dict[str, np.ndarray] = {}
    for key, value in arrays.items():
        for old, new in renamed.items():
            key = key.replace(old, new)
        if "encoderblock_1/" not in key:
            second = arrays.get(next(k for k in arrays if arrays[k] is value).replace("encoderblock_0/", "encoderblock_1/"))
            name = f"params/{key.replace('encoderblock_0/', 'encoderblock/')}"
            stacked[name] = np.stack((value, second)) if "encoderblock_0/" in key else value
    np.savez(tmp_path / "w.npz", **stacked)
    assert torch.equal(rebuilt(tmp_path / "w.npz")[0](images()), source(images()))


def test_reading_an_archive_costs_no_random_numbers(tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", **as_authors_archive(tiny()))
    before = torch.get_rng_state()
    read_weights(tmp_path / "w.npz")
    assert torch.equal(torch.get_rng_state(), before)


def test_the_vit_authors_archive_meets_another_grid_and_head(tmp_path: Path) -> None:
    source = shaken(tiny())
    np.savez(tmp_path / "w.npz", **as_authors_archive(source))
    model, report = rebuilt(tmp_path / "w.npz", classes=3, img_size=64)
    assert torch.equal(model.pos_embed, resample_abs_pos_embed(source.pos_embed, new_size=[8, 8]))
    assert [line.split(":")[0] for line in report.replaced] == ["head.weight", "head.bias"]
    assert torch.equal(model.blocks[1].mlp.fc2.weight, source.blocks[1].mlp.fc2.weight)


# --- what is adapted


def test_another_number_of_classes_gives_a_new_reproducible_head() -> None:
    state = shaken(tiny()).state_dict()
    first, second = tiny(classes=7, seed=5), tiny(classes=7, seed=5)
    fresh = first.head.weight.clone()
    report = load_weights(first, state, "old.pth")
    load_weights(second, state)
    assert torch.equal(first.head.weight, fresh)
    assert torch.equal(first.head.weight, second.head.weight)
    assert report.replaced[0] == "head.weight: checkpoint (5, 48), model (7, 48): kept as newly initialised"
    assert report.loaded == len(state) - 2
    assert any("head.weight" in line for line in report.lines())


def test_both_heads_of_a_distilled_model_are_replaced() -> None:
    source, model = shaken(tiny(DISTILLED)), tiny(DISTILLED, classes=7)
    report = load_weights(model, source.state_dict())
    named = [line.split(":")[0] for line in report.replaced]
    assert sorted(named) == ["head.bias", "head.weight", "head_dist.bias", "head_dist.weight"]
    assert torch.equal(model.dist_token, source.dist_token)


def test_an_absent_head_is_missing_and_stays_new() -> None:
    state = {key: value for key, value in tiny().state_dict().items() if not key.startswith("head.")}
    report = load_weights(tiny(), state)
    assert report.missing == ("head.weight", "head.bias")


def test_positions_and_patches_are_resampled_by_timm() -> None:
    source, model = shaken(tiny()), tiny(img_size=48, patch_size=16)
    report = load_weights(model, source.state_dict())
    assert torch.equal(model.pos_embed, resample_abs_pos_embed(source.pos_embed, new_size=[3, 3]))
    assert torch.equal(model.patch_embed.proj.weight, resample_patch_embed(source.patch_embed.proj.weight, [16, 16]))
    assert sorted(line.split(":")[0] for line in report.resampled) == ["patch_embed.proj.weight", "pos_embed"]
    assert report.loaded == len(source.state_dict()) - 2


def test_a_plain_model_takes_distilled_weights_without_their_distillation_token() -> None:
    source, model = shaken(tiny(DISTILLED)), tiny()
    report = load_weights(model, source.state_dict())
    assert torch.equal(model.pos_embed, source.pos_embed[:, [0, *range(2, 18)]])
    assert set(report.unexpected) == {"dist_token", "head_dist.weight", "head_dist.bias"}
    assert "dist_token" in report.resampled[0]


def test_distilled_weights_meet_another_grid() -> None:
    source, model = shaken(tiny(DISTILLED)), tiny(img_size=64)
    load_weights(model, source.state_dict())
    kept = source.pos_embed[:, [0, *range(2, 18)]]
    assert torch.equal(model.pos_embed, resample_abs_pos_embed(kept, new_size=[8, 8]))


def test_a_distilled_model_does_not_invent_its_distillation_token() -> None:
    with pytest.raises(WeightsError, match=r"dist_token.*deit_tiny_patch16_224"):
        load_weights(tiny(DISTILLED), tiny().state_dict())


@pytest.mark.parametrize(("theirs", "ours"), [(False, True), (True, False)])
@pytest.mark.parametrize("reg_tokens", [0, 2])
def test_where_prefix_tokens_get_their_positions_changes_no_output(theirs: bool, ours: bool, reg_tokens: int) -> None:
    source = shaken(tiny(no_embed_class=theirs, reg_tokens=reg_tokens).double())
    model = tiny(no_embed_class=ours, reg_tokens=reg_tokens).double()
    before = {key: value.clone() for key, value in source.state_dict().items()}
    report = load_weights(model, source.state_dict())
    pixels = images(dtype=torch.float64)
    torch.testing.assert_close(model(pixels), source(pixels), rtol=0, atol=1e-12)
    assert report.resampled
    assert all(torch.equal(before[key], value) for key, value in source.state_dict().items())


@pytest.mark.parametrize("name", ["head_dist.weight", "optimizer_step", "blocks.0.attn.relative_position_index"])
def test_a_tensor_that_changes_no_feature_is_reported(name: str) -> None:
    value = torch.arange(4) if name.endswith("index") else torch.ones(48)
    report = load_weights(tiny(), {**tiny().state_dict(), name: value})
    assert report.unexpected == (name,)


# --- what does not fit


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"embed_dim": 96}, ["embed_dim 96", "embed_dim 48"]),
        ({"depth": 3}, ["depth 3", "depth 2"]),
        ({"depth": 1}, ["depth 1", "depth 2"]),
        ({"in_chans": 1}, ["1 input channels", "3 input channels"]),
        ({"mlp_ratio": 2.0}, ["blocks.0.mlp.fc1.weight", "(96, 48)", "(192, 48)"]),
    ],
)
def test_another_architecture_is_told_and_the_model_untouched(changed: dict[str, Any], words: list[str]) -> None:
    state, model = tiny(**changed).state_dict(), tiny(seed=6)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(WeightsError) as caught:
        load_weights(model, state, "other.pth")
    assert [word for word in ["other.pth", *words] if word not in str(caught.value)] == []
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_weights_of_another_kind_of_network_are_told_by_their_names() -> None:
    with torch.device("meta"):
        state = timm.create_model("resnet18").state_dict()
    with pytest.raises(WeightsError, match=r"conv1\.weight"):
        load_weights(tiny(), state)


def test_missing_weights_are_named() -> None:
    state = tiny().state_dict()
    del state["blocks.1.attn.proj.bias"]
    with pytest.raises(WeightsError, match=r"lack 1 tensors.*blocks\.1\.attn\.proj\.bias"):
        load_weights(tiny(), state)


@pytest.mark.parametrize(
    ("theirs", "names", "mend"),
    [
        ({"init_values": 0.1}, ["blocks.0.ls1.gamma", "blocks.1.ls2.gamma"], "init_values=1e-5"),
        ({"qk_norm": True}, ["blocks.0.attn.q_norm.weight", "blocks.0.attn.k_norm.weight"], "qk_norm=True"),
        ({"scale_attn_norm": True}, ["blocks.0.attn.norm.weight"], "scale_attn_norm=True"),
        ({"scale_mlp_norm": True}, ["blocks.0.mlp.norm.weight"], "scale_mlp_norm=True"),
        ({"pre_norm": True}, ["norm_pre.weight"], "pre_norm=True"),
    ],
)
def test_a_tensor_that_the_model_would_compute_without_is_refused(theirs: dict[str, Any], names: list[str], mend: str) -> None:
    source, model = shaken(tiny(**theirs)), tiny(seed=6)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(WeightsError) as caught:
        load_weights(model, source.state_dict())
    assert [word for word in [*names, mend] if word not in str(caught.value)] == []
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    mended = tiny(**theirs)
    load_weights(mended, source.state_dict())
    assert torch.equal(mended(images()), source(images()))


@pytest.mark.parametrize(
    ("ours", "mend"),
    [
        ({"qkv_bias": False}, "qkv_bias=True"),
        ({"proj_bias": False}, "proj_bias=True"),
        ({"pos_embed": "none"}, "pos_embed=learn"),
    ],
)
def test_weights_of_what_the_model_was_built_without_are_refused(ours: dict[str, Any], mend: str) -> None:
    with pytest.raises(WeightsError, match=mend):
        load_weights(tiny(**ours), tiny().state_dict())


def test_further_blocks_are_no_matter_of_an_argument() -> None:
    with pytest.raises(WeightsError, match=r"blocks\.2\.norm1\.weight") as caught:
        load_weights(tiny(), tiny(depth=3, init_values=0.1).state_dict())
    assert "init_values" not in str(caught.value)


def test_a_norm_on_the_other_side_of_the_pooling_says_how_to_keep_it() -> None:
    state = tiny().state_dict()
    with pytest.raises(WeightsError, match="fc_norm=False"):
        load_weights(tiny(global_pool="avg"), state)
    assert load_weights(tiny(global_pool="avg", fc_norm=False), state).loaded == len(state)


def test_quantised_weights_are_refused() -> None:
    state = tiny().state_dict()
    state["blocks.0.mlp.fc1.weight"] = state["blocks.0.mlp.fc1.weight"].to(torch.int8)
    with pytest.raises(WeightsError, match=r"blocks\.0\.mlp\.fc1\.weight.*int8"):
        load_weights(tiny(), state)


def test_positions_that_form_no_grid_are_refused() -> None:
    state = tiny().state_dict()
    state["pos_embed"] = torch.zeros(1, 12, 48)
    with pytest.raises(WeightsError, match="12 positions"):
        load_weights(tiny(), state)


def test_weights_go_into_vision_transformers_only() -> None:
    with pytest.raises(ModelError, match="Linear"):
        load_weights(nn.Linear(2, 2), {})


# --- damaged and foreign files


class Code:
    """Stands for any object of somebody's own."""


def truncated(path: Path, share: float = 0.5) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def bad_file(kind: str, folder: Path) -> tuple[Path, str]:
    """A file that cannot be used, and a word of the message that tells why."""
    state = tiny().state_dict()
    path = folder / ("w.safetensors" if "safetensors" in kind else "w.npz" if "npz" in kind else "w.pth")
    if kind == "missing":
        return path, "no weights file"
    if kind == "folder":
        folder.joinpath("empty").mkdir()
        return folder / "empty", "folder"
    if kind == "foreign folder":
        folder.joinpath("other").mkdir()
        folder.joinpath("other", "config.json").write_text("{}")
        return folder / "other", "p3b"
    if kind.startswith("empty"):
        path.touch()
        return path, "empty"
    if kind == "truncated pth":
        torch.save(state, path)
        return truncated(path), "damaged"
    if kind == "truncated old pth":
        torch.save(state, path, _use_new_zipfile_serialization=False)
        return truncated(path), "damaged"
    if kind == "truncated safetensors":
        safetensors.torch.save_file(state, path)
        return truncated(path), "damaged"
    if kind == "truncated safetensors header":
        safetensors.torch.save_file(state, path)
        return truncated(path, 0.001), "damaged"
    if kind == "truncated npz":
        np.savez(path, **as_authors_archive(tiny()))
        return truncated(path), "damaged"
    if kind == "npz of objects":
        np.savez(path, a=np.array([Code()], dtype=object))
        return path, "plain arrays"
    if kind == "foreign npz":
        np.savez(path, a=np.zeros(2))
        return path, "layout"
    if kind == "incomplete npz":
        arrays = as_authors_archive(tiny())
        del arrays["Transformer/encoderblock_1/MlpBlock_3/Dense_0/bias"]
        np.savez(path, **arrays)
        return path, "not complete"
    if kind == "code":
        torch.save({"model": state, "extra": Code()}, path)
        return path, "weights-only"
    if kind == "whole model":
        torch.save(tiny(), path)
        return path, "weights-only"
    if kind == "text":
        path.write_text("https://example.org/weights.pth")
        return path, "torch.save"
    if kind == "text safetensors":
        path.write_text("https://example.org/weights")
        return path, "damaged"
    if kind == "suffix":
        (folder / "w.xyz").write_bytes(b"something else")
        return folder / "w.xyz", r"\.safetensors"
    if kind == "list":
        torch.save([1, 2], path)
        return path, "list"
    if kind == "no weights":
        torch.save({"epoch": 3}, path)
        return path, "epoch"
    if kind == "integers":
        torch.save({"a": torch.arange(3)}, path)
        return path, "floating-point"
    state["blocks.1.norm2.bias"][3] = float("nan") if kind == "nan" else float("inf")
    torch.save(state, path)
    return path, r"blocks\.1\.norm2\.bias"


@pytest.mark.parametrize(
    "kind",
    [
        *("missing", "folder", "foreign folder", "empty pth", "empty safetensors", "empty npz", "truncated pth"),
        *("truncated old pth", "truncated safetensors", "truncated safetensors header", "truncated npz"),
        *("npz of objects", "foreign npz", "incomplete npz", "code", "whole model", "text", "text safetensors"),
        *("suffix", "list", "no weights", "integers", "nan", "inf"),
    ],
)
def test_a_bad_file_is_refused_with_its_path_and_the_reason(kind: str, tmp_path: Path) -> None:
    path, word = bad_file(kind, tmp_path)
    with pytest.raises(WeightsError, match=word) as caught:
        rebuilt(path)
    assert str(path) in str(caught.value)
    if kind != "foreign folder":
        with pytest.raises(WeightsError, match=word):
            read_weights(path)
