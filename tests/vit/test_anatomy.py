"""Blocks of other parts than timm's plain ones: the same laws hold of all of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import DropPath
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from hostile import sealed
from p3b import Pruner, Schedule, load, save
from p3b.deploy.layouts import LAYOUTS, apply_layout, plan_layout
from p3b.errors import ModelError, WeightsError
from p3b.storage.artifact import CONFIG_FILE
from p3b.storage.models import open_saved
from p3b.storage.weights import load_weights
from p3b.vit.anatomy.norms import narrow_norm, norm_of_kept
from p3b.vit.compact import apply_cuts, plan_cuts
from p3b.vit.cost import block_macs, block_params, count_macs, count_parameters, kept_channels
from p3b.vit.families import family_of, patch_embed_of
from p3b.vit.gates import Gates
from p3b.vit.layout import DEFAULT_DIMS, DIMS, ModelLayout, read_layout
from p3b.vit.parts import ConstantBranch, DropAndWrite, NoBranch
from p3b.vit.shapes import branch_shapes
from tiny import ANATOMIES, parameters_of, tiny_vit

Masks = dict[str, Tensor]
STREAMS = ("heads", "hidden", "stream")
WITHOUT_STREAM = {"RoPE, mixed", "Perception Encoder", "Qwen3"}
"""Refused where heads, or the stream, are to be pruned."""


def _tiny(anatomy: str) -> VisionTransformer:
    return tiny_vit(dtype=torch.float64, **ANATOMIES[anatomy])


def _batch(model: VisionTransformer) -> Tensor:
    shape = (2, 3, *patch_embed_of(model).img_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _masks(layout: ModelLayout, keep: float, seed: int = 0) -> Masks:
    generator = torch.Generator().manual_seed(seed)
    masks = {gate: (torch.rand(size, generator=generator) < keep).double() for gate, size in layout.gates.items()}
    return masks | ({"stream": masks["stream"].index_fill(0, torch.tensor(0), 1)} if "stream" in masks else {})


def _gated(model: nn.Module, layout: ModelLayout, masks: Masks) -> Gates:
    gates = Gates(layout, model)
    gates.attach(model)
    gates.set(masks)
    return gates


def _small(anatomy: str, keep: float = 0.5) -> VisionTransformer:
    model = _tiny(anatomy)
    layout = read_layout(model)
    return apply_cuts(model, plan_cuts(layout, _masks(layout, keep)))


@pytest.mark.parametrize("anatomy", ANATOMIES)
def test_every_parameter_of_a_block_is_mapped_once_and_a_dense_block_costs_what_it_has(anatomy: str) -> None:
    model = _tiny(anatomy)
    layout = read_layout(model)
    keys = [weight.key for block in layout.blocks for weight in block.weights]
    assert sorted(keys) == sorted(key for key, _ in model.named_parameters() if "blocks." in key)
    assert layout.other_params + sum(int(block_params(block, {})) for block in layout.blocks) == parameters_of(model)


@pytest.mark.parametrize("anatomy", ANATOMIES)
def test_gates_of_ones_change_no_bit_and_come_off(anatomy: str) -> None:
    model = _tiny(anatomy)
    layout, batch = read_layout(model), _batch(model)
    with torch.no_grad():
        before = model(batch)
        gates = _gated(model, layout, {gate: torch.ones(size) for gate, size in layout.gates.items()})
        assert torch.equal(model(batch), before)
        gates.set(_masks(layout, 0.5))
        assert not torch.allclose(model(batch), before)
        gates.detach()
        assert torch.equal(model(batch), before)


def _gone(*gates: str) -> Callable[[ModelLayout], Masks]:
    return lambda layout: {
        name: torch.zeros_like(mask) if name.endswith(gates) else mask for name, mask in _masks(layout, 0.7, seed=3).items()
    }


KINDS: dict[str, Callable[[ModelLayout], Masks]] = {
    "half": lambda layout: _masks(layout, 0.5),
    "few": lambda layout: _masks(layout, 0.15, seed=1),
    "no input": _gone("0.attn.in", "1.mlp.in"),
    "nothing inside": _gone("1.attn.head", "0.mlp.hidden"),
    "no output": _gone("1.attn.out", "0.mlp.out"),
}


@pytest.mark.parametrize("anatomy", ANATOMIES)
def test_small_equals_masked_and_costs_what_was_planned(anatomy: str) -> None:
    dense = _tiny(anatomy)
    layout, batch = read_layout(dense), _batch(dense)
    for kind, make in KINDS.items():
        masks = make(layout)
        masked, plan = deepcopy(dense), plan_cuts(layout, masks)
        _gated(masked, layout, masks)
        small = apply_cuts(deepcopy(dense), plan)
        with torch.no_grad():
            torch.testing.assert_close(small(batch), masked(batch), rtol=0, atol=1e-10, msg=f"{kind}: other answers")
            torch.testing.assert_close(small.forward_features(batch), masked.forward_features(batch), rtol=0, atol=1e-10)
        assert plan.params == count_parameters(small), kind
        if kind != "half":
            continue
        kept = [{dim: int(n) for dim, n in kept_channels(block, masks).items()} for block in layout.blocks]
        dense_macs = sum(block_macs(block, {}, layout.tokens) for block in layout.blocks)
        small_macs = sum(block_macs(block, one, layout.tokens) for block, one in zip(layout.blocks, kept, strict=True))
        sides = patch_embed_of(dense).img_size
        assert dense_macs - small_macs == count_macs(dense, sides) - count_macs(small, sides), kind


@pytest.mark.parametrize("anatomy", [name for name in ANATOMIES if name not in WITHOUT_STREAM])
@pytest.mark.parametrize("dims", [STREAMS, DIMS])
def test_heads_and_stream_are_exact_too(anatomy: str, dims: tuple[str, ...]) -> None:
    dense = _tiny(anatomy)
    layout, batch = read_layout(dense, dims), _batch(dense)
    masks = _masks(layout, 0.6, seed=2)
    masked, plan = deepcopy(dense), plan_cuts(layout, masks)
    _gated(masked, layout, masks)
    small = apply_cuts(dense, plan)
    with torch.no_grad():
        torch.testing.assert_close(small(batch), masked(batch), rtol=0, atol=1e-10)
    assert plan.params == count_parameters(small)
    # An attention that stays whole is made for the narrower stream all the same.
    whole = {gate: torch.ones_like(mask) if "attn" in gate else mask for gate, mask in masks.items()}
    wide = _tiny(anatomy)
    masked = deepcopy(wide)
    _gated(masked, layout, whole)
    with torch.no_grad():
        small = apply_cuts(wide, plan_cuts(layout, whole))
        torch.testing.assert_close(small(batch), masked(batch), rtol=0, atol=1e-10)


@pytest.mark.parametrize("anatomy", ANATOMIES)
def test_saved_and_loaded_it_is_the_same_bit_for_bit_and_no_layout_changes_it(anatomy: str, tmp_path: Path) -> None:
    for name, model in {"dense": _tiny(anatomy), "small": _small(anatomy)}.items():
        loaded, batch = load(save(model, tmp_path / name)), _batch(model)
        state = loaded.state_dict()
        assert list(state) == list(model.state_dict())
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
        with torch.no_grad():
            assert torch.equal(loaded(batch), model(batch))
        assert branch_shapes(loaded) == branch_shapes(model)
    assert all(apply_layout(model, plan_layout(model, layout)) is model for layout in LAYOUTS)


@pytest.mark.parametrize("anatomy", ["gated MLP, apart", "DINOv3", "EVA-02, apart", "Qwen3"])
def test_a_run_of_the_method_meets_its_budget_and_its_small_model_learns(anatomy: str) -> None:
    model = tiny_vit(**ANATOMIES[anatomy]).train()
    layout, dense = read_layout(model), parameters_of(model)
    pruner = Pruner(model, prune_ratio=0.3, schedule=Schedule(0, 2, 3, 1))
    batch, labels = _batch(model).float(), torch.tensor([1, 3])
    for _ in range(3):
        (nn.functional.cross_entropy(model(batch), labels) + pruner.loss(nn.CrossEntropyLoss(), labels)).backward()
        pruner.step()
    small = pruner.finalize()
    element = max(
        int(block_params(block, {}) - block_params(block, {dim: torch.tensor(size - 1)}))
        for block in layout.blocks
        for dim, size in block.dims.items()
    )
    assert abs(parameters_of(small) - 0.7 * dense) <= element
    small.train()(batch).sum().backward()
    assert all(parameter.grad is not None for parameter in small.parameters() if parameter.requires_grad)


# --- what the parts rest on


def test_a_pair_is_masked_in_queries_keys_and_values_alike() -> None:
    """The definition of the gate, carried out on activations."""
    model = _tiny("grouped keys")
    layout = read_layout(model)
    masks = {gate: torch.rand(size, dtype=torch.float64) for gate, size in layout.gates.items()}
    only = {gate: mask if gate.endswith("head") else torch.ones_like(mask) for gate, mask in masks.items()}
    by_hand = deepcopy(model)
    for depth, block in enumerate(by_hand.blocks):
        along = masks[f"blocks.{depth}.attn.head"].float().double().repeat(2)  # pairs (0, K/2), (1, K/2 + 1), ...
        for layer in (block.attn.q_proj, block.attn.k_proj, block.attn.v_proj):
            layer.register_forward_hook(lambda _m, _i, out, along=along: out * along.repeat(out.shape[-1] // len(along)))
    bare = deepcopy(model)
    for each in (by_hand, bare):
        for block in each.blocks:
            block.attn.q_norm = block.attn.k_norm = nn.Identity()  # their moments would be others
    gates = Gates(read_layout(bare), bare)
    gates.attach(bare)
    gates.set(only)
    with torch.no_grad():
        torch.testing.assert_close(bare(_batch(model)), by_hand(_batch(model)), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", [timm.layers.LayerNorm, timm.layers.RmsNorm])
def test_a_norm_of_what_stays_is_the_narrow_norm(kind: Callable[[int], nn.Module]) -> None:
    norm, x = kind(6).double(), torch.randn(3, 6, dtype=torch.float64)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.uniform_(0.5, 2)
    kept = torch.tensor([1, 2, 5])
    found = norm_of_kept(norm, x, torch.zeros(6).index_fill(0, kept, 1))
    narrow = deepcopy(norm)
    narrow_norm(narrow, 3)
    with torch.no_grad():
        for small, whole in zip(narrow.parameters(), norm.parameters(), strict=True):
            small.copy_(whole[kept])
    torch.testing.assert_close(found[:, kept], narrow(x[:, kept]))
    assert not found[:, [0, 3, 4]].any()
    assert not norm_of_kept(norm, x, torch.zeros(6)).any()


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", [timm.layers.LayerNorm, timm.layers.RmsNorm])
def test_a_norm_over_soft_masks_has_its_derivatives(kind: Callable[..., nn.Module], affine: bool) -> None:
    norm, x = kind(5, affine=affine).double(), torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    parameters = [parameter.detach().uniform_(0.5, 2).requires_grad_() for parameter in norm.parameters()]
    names = [name for name, _ in norm.named_parameters()]
    mask = torch.tensor([1.0, 0.7, 0.0, 0.2, 1.0], dtype=torch.float64)

    def given(x: Tensor, *parameters: Tensor) -> Tensor:
        for name, parameter in zip(names, parameters, strict=True):
            norm._parameters[name] = parameter
        return norm_of_kept(norm, x, mask)

    assert torch.autograd.gradcheck(given, (x, *parameters))
    assert torch.autograd.gradgradcheck(given, (x, *parameters))
    learned = mask.clone().requires_grad_()
    torch.testing.assert_close(norm_of_kept(norm, x, learned), given(x, *parameters), rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(lambda mask: norm_of_kept(norm, x, mask), (learned,))


def test_a_small_attention_reads_the_angles_of_its_own_pairs_at_any_image_size() -> None:
    dense = tiny_vit(dtype=torch.float64, **ANATOMIES["grouped keys"])
    layout = read_layout(dense)
    masks = _masks(layout, 0.5)
    masked = deepcopy(dense)
    _gated(masked, layout, masks)
    small = apply_cuts(dense, plan_cuts(layout, masks))
    images = torch.randn(1, 3, 48, 40, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(small(images), masked(images), rtol=0, atol=1e-10)
    assert [shape.pairs for shape in branch_shapes(small)][0::2] == [
        tuple(masks[f"blocks.{depth}.attn.head"].nonzero().flatten().tolist()) for depth in range(2)
    ]


def test_stochastic_depth_is_set_on_a_small_model_whose_scale_belongs_to_the_block(tmp_path: Path) -> None:
    folder = save(_small("DINOv3"), tmp_path / "small")
    block = open_saved(folder, {"drop_path_rate": 0.5}).blocks[1]
    assert isinstance(block.drop_path1, DropAndWrite)
    assert block.drop_path1.drop_prob == 0.5
    whole = tiny_vit(**ANATOMIES["DINOv3"])
    for half in family_of(whole).blocks(whole)[0].halves:
        half.set_drop_path(whole.blocks[0], DropPath(0.25))
    assert whole.blocks[0].drop_path2.drop_prob == 0.25


def test_a_constant_that_is_left_of_a_block_holds_its_scale() -> None:
    dense = _tiny("DINOv3")
    layout = read_layout(dense)
    small = apply_cuts(dense, plan_cuts(layout, KINDS["no input"](layout)))
    assert isinstance(small.blocks[0].attn, (ConstantBranch, NoBranch))
    assert small.blocks[0].gamma_1 is None


# --- what is refused, and files of unknown origin


@pytest.mark.parametrize(
    ("name", "dims", "reason"),
    [
        ("eva02_enormous_patch14_clip_224", DEFAULT_DIMS, "blocks.0: EvaBlockPostNorm is not covered"),
        ("vit_small_patch16_rope_mixed_224", STREAMS, "blocks.0.attn: the dimension 'heads' cannot be pruned here"),
        ("vit_pe_core_tiny_patch16_384", STREAMS, "attn_pool: attention pooling is not covered"),
    ],
)
def test_what_is_not_covered_is_refused_in_words(name: str, dims: tuple[str, ...], reason: str) -> None:
    model = tiny_vit(name, embed_dim=48, num_heads=3, **({"attn_pool_num_heads": 3} if "pe_core" in name else {}))
    with pytest.raises(ModelError, match=reason):
        read_layout(model, dims)


@pytest.mark.parametrize("pairs", [[], [0, 0, 1], [1, 0], [0, 99], [0.5], None, "0"])
def test_pairs_of_a_file_are_checked(pairs: object, tmp_path: Path) -> None:
    folder = save(_small("DINOv3"), tmp_path / "small")
    config = json.loads((folder / CONFIG_FILE).read_text())
    config["blocks"][0]["pairs"] = pairs
    (folder / CONFIG_FILE).write_text(sealed(config))
    with pytest.raises(WeightsError, match=r"pairs|incomplete"):
        load(folder)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("rope_type", "other"),
        ("num_kv_heads", [3, 3]),
        ("num_kv_heads", [0]),
        ("ref_feat_shape", [1]),
        ("rope_mrope_section", [1, 1]),
        ("embed_dim", 33),
        ("attn_pool_num_heads", 0),
    ],
)
def test_arguments_of_a_file_are_checked(argument: str, value: Any, tmp_path: Path) -> None:
    folder = save(_small("DINOv3"), tmp_path / "small")
    config = json.loads((folder / CONFIG_FILE).read_text())
    config["network"]["arguments"][argument] = value
    (folder / CONFIG_FILE).write_text(sealed(config))
    with pytest.raises(WeightsError, match="does not describe a model that can be built"):
        load(folder)


@pytest.mark.parametrize("anatomy", ["EVA-02", "Qwen3"])
def test_weights_of_other_classes_are_loaded_by_their_own_names(anatomy: str) -> None:
    source, target = (tiny_vit(seed=seed, **ANATOMIES[anatomy]) for seed in (1, 2))
    report = load_weights(target, source.state_dict(), "file")
    assert report.missing == report.unexpected == ()
    assert all(torch.equal(value, target.state_dict()[key]) for key, value in source.state_dict().items())
    with pytest.raises(WeightsError):
        load_weights(target, tiny_vit(embed_dim=32, num_heads=2).state_dict(), "file")
