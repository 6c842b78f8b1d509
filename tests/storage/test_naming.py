"""Whatever wraps a state dict, the same tensors come out, or it is said why not; names of others become timm's."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from p3b.errors import WeightsError
from p3b.storage.load_report import LoadReport
from p3b.storage.naming import to_timm_names
from p3b.storage.weights import load_weights
from p3b.storage.weights_file import open_weights
from tiny import DISTILLED, VIT, tiny_vit

State = dict[str, Tensor]
STATE: State = tiny_vit(num_classes=3).state_dict()
PARTS = (
    "model",
    "module",
    "_orig_mod",
    "backbone",
    "encoder",
    "timm_model",
    "visual",
    "trunk",
    "net",
    "teacher",
    "student",
    "vit",
)
ENVELOPES = (
    "model",
    "state_dict",
    "model_state_dict",
    "network",
    "ema",
    "model_ema",
    "teacher",
    "student",
    "params",
    "weights",
)
ENDINGS = (".pth", ".pt", ".bin", ".ckpt", ".pth.tar", ".pkl", ".safetensors", "", ".PTH", ".backup")


def same(left: State, right: State) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[key]) for key, value in left.items())


def written(path: Path, content: Any, *, oldest: bool = False) -> Path:
    if path.suffix == ".safetensors" and all(isinstance(value, Tensor) for value in content.values()):
        safetensors.torch.save_file({key: value.contiguous() for key, value in content.items()}, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=not oldest)
    return path


def wrapped(state: State, envelopes: list[str]) -> Any:
    content: Any = state
    for name in reversed(envelopes):
        content = {"epoch": 3, name: content, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []}}
    return content


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prefix=st.lists(st.sampled_from(PARTS), max_size=4),
    envelopes=st.lists(st.sampled_from(ENVELOPES), max_size=3),
    ending=st.sampled_from(ENDINGS),
    oldest=st.booleans(),
)
def test_any_prefix_in_any_envelope_under_any_ending_gives_the_same_tensors(
    prefix: list[str], envelopes: list[str], ending: str, oldest: bool, tmp_path: Path
) -> None:
    before = "".join(f"{part}." for part in prefix)
    content = wrapped({f"{before}{key}": value for key, value in STATE.items()}, envelopes)
    opened = open_weights(written(tmp_path / f"w{ending}", content, oldest=oldest))
    renamed = to_timm_names(opened.state)
    assert same(renamed.state, STATE)
    notes = " ".join((*opened.notes, *renamed.notes))
    assert all(part in notes for part in (*envelopes, *prefix)), "what was taken off is said"


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(places=st.lists(st.sampled_from([*PARTS, *ENVELOPES]), min_size=2, max_size=2, unique=True), flat=st.booleans())
def test_of_two_copies_one_is_taken_whole_and_the_other_named_or_both_are_named(
    places: list[str], flat: bool, tmp_path: Path
) -> None:
    copies = {place: {key: value + number for key, value in STATE.items()} for number, place in enumerate(places)}
    content: Any = copies
    if flat:
        content = {f"{place}.{key}": value for place, copy in copies.items() for key, value in copy.items()}
    path = written(tmp_path / "w.pth", content)
    try:
        opened = open_weights(path)
        renamed = to_timm_names(opened.state)
    except WeightsError as error:
        assert all(place in str(error) for place in places)
        return
    (taken,) = (place for place, copy in copies.items() if same(renamed.state, copy))
    notes = (*opened.notes, *renamed.notes)
    assert any(repr(other) in note or f"'{other}.'" in note for other in set(places) - {taken} for note in notes)


@pytest.mark.parametrize(
    ("taken", "left"),
    [("model", "model_ema"), ("teacher", "student"), ("state_dict", "state_dict_ema"), ("encoder", "target_encoder")],
)
def test_the_trained_copy_is_taken_before_its_average_and_a_teacher_before_its_student(
    taken: str, left: str, tmp_path: Path
) -> None:
    path = written(tmp_path / "w.pth", {left: {key: value + 1 for key, value in STATE.items()}, taken: STATE})
    opened = open_weights(path)
    assert same(opened.state, STATE)
    assert any(left in note and "not taken" in note for note in opened.notes)


# --- names of others, written here once more and independently


def split_qkv(state: State, name: str) -> State:
    """`name` has {part} for one of q, k, v, and stands behind the name of the block."""
    split: State = {}
    for key, value in state.items():
        match = re.fullmatch(r"(blocks\.\d+)\.attn\.qkv\.(\w+)", key)
        if match is None:
            split[key] = value
        else:
            chunks = value.chunk(3)
            split |= {f"{match[1]}.{name.format(part=p)}.{match[2]}": c for p, c in zip("qkv", chunks, strict=True)}
    return split


def replaced(state: State, *pairs: tuple[str, str]) -> State:
    def name(key: str) -> str:
        for old, new in pairs:
            key = re.sub(old, new, key)
        return key

    return {name(key): value for key, value in state.items()}


def as_hugging_face(state: State) -> State:
    long = {"q": "query", "k": "key", "v": "value"}
    state = replaced(
        split_qkv(state, "attn.{part}"), *((rf"attn\.{p}\.", f"attention.attention.{w}.") for p, w in long.items())
    )
    return replaced(
        state,
        (r"^(cls_token)", r"vit.embeddings.\1"),
        (r"^dist_token", "vit.embeddings.distillation_token"),
        (r"^pos_embed", "vit.embeddings.position_embeddings"),
        (r"^patch_embed\.proj", "vit.embeddings.patch_embeddings.projection"),
        (r"^norm\.", "vit.layernorm."),
        (r"^head\.", "classifier."),
        (r"^head_dist\.", "distillation_classifier."),
        (r"attn\.proj", "attention.output.dense"),
        (r"mlp\.fc1", "intermediate.dense"),
        (r"mlp\.fc2", "output.dense"),
        (r"norm1", "layernorm_before"),
        (r"norm2", "layernorm_after"),
        (r"^blocks", "vit.encoder.layer"),
    )


def with_ends_of_clip(state: State, class_token: str, positions: str, projection: str) -> State:
    """The class token as a vector, the positions as a matrix and the head without its bias, under these names."""
    rest = {key: value for key, value in state.items() if key not in ("cls_token", "pos_embed", "head.weight", "head.bias")}
    ends = {class_token: state["cls_token"][0, 0], positions: state["pos_embed"][0], projection: state["head.weight"]}
    return {**rest, **ends}


def as_hugging_face_clip(state: State) -> State:
    state = replaced(
        split_qkv(state, "self_attn.{part}_proj"),
        (r"^patch_embed\.proj", "embeddings.patch_embedding"),
        (r"^norm_pre", "pre_layrnorm"),
        (r"^norm\.", "post_layernorm."),
        (r"attn\.proj", "self_attn.out_proj"),
        (r"norm([12])", r"layer_norm\1"),
        (r"^blocks", "encoder.layers"),
    )
    names = ("embeddings.class_embedding", "embeddings.position_embedding.weight", "projection")
    state = with_ends_of_clip(state, *names)
    whole = {f"vision_model.{key}": value for key, value in state.items() if key != "projection"}
    return {
        **whole,
        "visual_projection.weight": state["projection"],
        "text_model.embeddings.token_embedding.weight": torch.ones(2),
    }


def as_open_clip(state: State) -> State:
    state = replaced(
        state,
        (r"^patch_embed\.proj", "conv1"),
        (r"^norm_pre", "ln_pre"),
        (r"^norm\.", "ln_post."),
        (r"attn\.qkv\.", "attn.in_proj_"),
        (r"attn\.proj", "attn.out_proj"),
        (r"mlp\.fc1", "mlp.c_fc"),
        (r"mlp\.fc2", "mlp.c_proj"),
        (r"norm([12])", r"ln_\1"),
        (r"^blocks", "transformer.resblocks"),
    )
    state = with_ends_of_clip(state, "class_embedding", "positional_embedding", "proj")
    state["proj"] = state["proj"].T.contiguous()
    visual = {f"visual.{key}": value for key, value in state.items()}
    return {**visual, "transformer.resblocks.0.ln_1.weight": torch.ones(8), "token_embedding.weight": torch.ones(2, 8)}


def as_deit3(state: State) -> State:
    return replaced(state, (r"ls([12])\.gamma", r"gamma_\1"))


def as_dinov2(state: State) -> State:
    """Registers without positions, a class token with one, a mask token, and blocks grouped for FSDP."""
    state = replaced(state, (r"^reg_token", "register_tokens"), (r"^blocks\.", "blocks.0."))
    state["pos_embed"] = torch.cat((torch.full_like(state["cls_token"], 0.25), state["pos_embed"]), dim=1)
    state["cls_token"] = state["cls_token"] - 0.25
    return {"mask_token": torch.zeros(1, 24), **state}


CLIP = {"name": "vit_base_patch16_clip_224"}
OTHERS: list[tuple[Callable[[State], State], dict[str, Any], bool]] = [
    (as_hugging_face, {}, True),
    (as_hugging_face, {"name": DISTILLED}, True),
    (as_hugging_face_clip, CLIP, False),
    (as_open_clip, CLIP, False),
    (as_deit3, {"name": "deit3_small_patch16_224"}, True),
    (as_dinov2, {"name": "vit_small_patch14_reg4_dinov2"}, True),
]


def loaded(state: State, **model: Any) -> tuple[State, LoadReport]:
    target = tiny_vit(seed=7, **model)
    report = load_weights(target, state)
    return target.state_dict(), report


@pytest.mark.parametrize("prefix", ["", "module.student_net."])
@pytest.mark.parametrize(("to_theirs", "model", "has_head"), OTHERS)
def test_names_of_others_give_timm_s_tensors(
    to_theirs: Callable[[State], State], model: dict[str, Any], has_head: bool, prefix: str
) -> None:
    source = tiny_vit(**model).state_dict()
    got, report = loaded({f"{prefix}{key}": value for key, value in to_theirs(source).items()}, **model)
    for key, value in source.items():
        if has_head or not key.startswith("head."):
            torch.testing.assert_close(got[key], value, rtol=0, atol=1e-6)
    assert (set(report.missing) == {"head.weight", "head.bias"}) is not has_head, "a projection is no classifier"
    assert report.replaced == report.resampled == ()


def test_a_tensor_of_a_block_that_is_not_known_is_refused() -> None:
    state = as_hugging_face(STATE) | {"vit.encoder.layer.1.lambda_1": torch.ones(24)}
    with pytest.raises(WeightsError, match=r"blocks\.1\.lambda_1.*Hugging Face"):
        load_weights(tiny_vit(num_classes=3), state)


def test_a_projection_under_timm_s_names_is_no_classifier() -> None:
    source = tiny_vit(**CLIP).state_dict() | {"head.bias": torch.zeros(5)}
    _, report = loaded(source, **CLIP)
    assert set(report.missing) == {"head.weight", "head.bias"}
    assert any("projection" in line for line in report.lines())


def test_a_head_behind_a_layer_that_is_gone_is_left_out() -> None:
    _, report = loaded({**STATE, "pre_logits.fc.weight": torch.ones(24, 24)}, num_classes=3)
    assert set(report.missing) == {"head.weight", "head.bias"}


def test_colours_are_summed_for_grey_images_and_the_change_is_named() -> None:
    got, report = loaded(STATE, num_classes=3, in_chans=1)
    kernel = STATE["patch_embed.proj.weight"]
    torch.testing.assert_close(got["patch_embed.proj.weight"], kernel.sum(1, keepdim=True))
    assert "colours" in report.resampled[0]


def test_a_grid_of_equal_count_and_another_shape_is_named() -> None:
    _, report = loaded(STATE, num_classes=3, img_size=(16, 64))
    assert "4x4 to 2x8" in report.resampled[0]


def test_a_grid_that_is_no_square_comes_back_itself() -> None:
    source = tiny_vit(img_size=(32, 64)).state_dict()
    got, report = loaded(source, img_size=(32, 64))
    assert torch.equal(got["pos_embed"], source["pos_embed"])
    assert report.resampled == ()


def test_plain_names_need_no_note() -> None:
    assert loaded(STATE, name=VIT, num_classes=3)[1].notes == ()
