"""timm's Eva: EVA, EVA-02, DINOv3, Perception Encoder, RoPE-ViT; pre-norm blocks, mostly with rotary positions.

Positions turn the channels of a head in pairs, so that an element of "head" is a pair (`p3b.vit.anatomy.attention`). The table
of angles stays whole, learned frequencies included: each block reads the columns of its own pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from timm.layers import GluMlp, RotaryEmbeddingCat, RotaryEmbeddingDinoV3, RotaryEmbeddingMixed, SwiGLU
from timm.layers.pos_embed_sincos import RotaryEmbeddingMRope
from timm.models.eva import Eva, EvaAttention, EvaBlock
from torch import nn

from p3b.errors import ModelError
from p3b.vit.anatomy.attention import RotaryAttention
from p3b.vit.anatomy.half import GammaPreNorm
from p3b.vit.anatomy.mlp import mlp_of
from p3b.vit.anatomy.norms import NORMS
from p3b.vit.families import allowed
from p3b.vit.families.activations import activation_name
from p3b.vit.families.family import Block, BranchOutline, Outside, ratio_of
from p3b.vit.families.norms import describe_norm, require_describable, take_norm
from p3b.vit.families.stems import describe_patches
from p3b.vit.families.stream import read_outside
from p3b.vit.families.usual import PatchesFirst, branches_of_blocks, describe_whole, require_blocks

ROPES: Mapping[str, type[nn.Module]] = {
    "cat": RotaryEmbeddingCat,
    "dinov3": RotaryEmbeddingDinoV3,
    "mixed": RotaryEmbeddingMixed,
    "mrope": RotaryEmbeddingMRope,
}
"""Rotary positions by timm's names. All but the mixed ones turn every head of every block by the same angles."""
_OF_POSITIONS = {"shift_coords", "jitter_coords", "rescale_coords"}
_IS_COUNT = allowed.is_whole(1, allowed.MOST_CHANNELS)


def _are_counts(value: Any) -> bool:
    return value is None or (isinstance(value, list) and bool(value) and all(map(_IS_COUNT, value)))


class EvaFamily(PatchesFirst):
    """`p3b.vit.families.family.Family`"""

    classes: Mapping[str, type[nn.Module]] = {"Eva": Eva}
    rules: Mapping[str, allowed.Rule] = {
        **allowed.OF_SHAPE,
        "num_reg_tokens": allowed.COUNT,
        "rope_temperature": allowed.NUMBER,
        "rope_grid_offset": (lambda value: type(value) in (int, float) and abs(value) <= allowed.MOST_CHANNELS, "a number"),
        **dict.fromkeys(
            (
                *("init_values", "attn_pool_mlp_ratio"),
                *("rope_shift_coords", "rope_jitter_coords", "rope_rescale_coords"),
            ),
            allowed.NUMBER_OR_NULL,
        ),
        **dict.fromkeys(
            (
                *("qkv_bias", "qkv_fused", "qk_norm", "swiglu_mlp", "swiglu_apart", "scale_mlp", "scale_attn_inner"),
                *("attn_only_layer_scale", "class_token", "no_embed_class", "use_abs_pos_emb", "use_rot_pos_emb"),
                *("rope_rotate_half", "use_pre_transformer_norm", "use_post_transformer_norm", "use_fc_norm"),
                "dynamic_img_size",
            ),
            allowed.FLAG,
        ),
        "attn_type": allowed.one_of(("eva", "rope")),
        "rope_type": allowed.one_of(tuple(ROPES)),
        "rope_grid_indexing": allowed.one_of(("ij", "xy")),
        "ref_feat_shape": (lambda value: value is None or allowed.is_pair(value), "two whole numbers or null"),
        **dict.fromkeys(("num_kv_heads", "rope_mrope_section"), (_are_counts, "a list of whole numbers or null")),
        "attn_pool_num_heads": (lambda value: value is None or _IS_COUNT(value), "a whole number or null"),
        "global_pool": allowed.one_of(("", "avg", "avgmax", "max", "token", "map"), "a pooling of timm"),
        "norm_layer": allowed.one_of(tuple(NORMS)),
    }
    more_rules: Mapping[str, tuple[allowed.Rule, Any]] = {}

    def blocks(self, model: Eva) -> Sequence[Block]:
        return eva_blocks(model, "blocks", by_head=model.rope_mixed)

    def require_covered(self, model: Eva, purpose: str) -> None:
        super().require_covered(model, purpose)
        if model.rope is not None and type(model.rope) not in ROPES.values():
            raise ModelError(f"rope: {type(model.rope).__name__} is not covered; of timm's rotary positions {list(ROPES)} are.")

    def require_blocks_covered(self, model: Eva) -> None:
        covered = "of timm's blocks for Eva EvaBlock is, whose norms come first"
        require_blocks(self.blocks(model), EvaBlock, covered)

    def outside(self, model: Eva) -> Outside:
        return read_outside(
            model,
            tokens=("cls_token", "reg_token", "pos_embed"),
            norms=("norm_pre", "norm", "fc_norm"),
            heads=("head",),
            others=("rope.freqs",),
        )

    def describe_outside(self, model: Eva) -> dict[str, Any]:
        require_describable(model, ("norm_pre", "norm", "fc_norm"))
        pool = model.attn_pool
        return {
            **describe_patches(model.patch_embed),
            **describe_whole(model),
            "class_token": model.cls_token is not None,
            "num_reg_tokens": 0 if model.reg_token is None else model.reg_token.shape[1],
            "no_embed_class": model.no_embed_class,
            "use_abs_pos_emb": model.pos_embed is not None,
            "use_pre_transformer_norm": not isinstance(model.norm_pre, nn.Identity),
            "use_post_transformer_norm": not isinstance(model.norm, nn.Identity),
            "use_fc_norm": not isinstance(model.fc_norm, nn.Identity),
            "attn_pool_num_heads": None if pool is None else pool.num_heads,
            "attn_pool_mlp_ratio": None if pool is None else ratio_of(pool.mlp.fc1, model.embed_dim),
            "dynamic_img_size": model.dynamic_img_size,
            **_describe_rope(model.rope),
        }

    def describe_blocks(self, model: Eva) -> dict[str, Any]:
        block = model.blocks[0]
        attn, mlp = block.attn, block.mlp
        if (activation := activation_name(mlp.act)) != ("silu" if isinstance(mlp, (GluMlp, SwiGLU)) else "gelu"):
            raise ModelError(f"blocks.0.mlp.act: {activation} cannot be described in config.json; timm's Eva has another.")
        fused = attn.qkv is not None
        separate = isinstance(attn, EvaAttention) and fused
        bias = attn.q_bias if separate else (attn.qkv if fused else attn.q_proj).bias
        keys = [each.attn.num_kv_heads if hasattr(each.attn, "num_kv_heads") else attn.num_heads for each in model.blocks]
        return {
            "num_heads": attn.num_heads,
            "num_kv_heads": None if set(keys) == {attn.num_heads} else keys,
            "attn_type": "eva" if isinstance(attn, EvaAttention) else "rope",
            "qkv_bias": bias is not None,
            "qkv_fused": fused,
            "qk_norm": not isinstance(attn.q_norm, nn.Identity),
            "scale_attn_inner": not isinstance(attn.norm, nn.Identity),
            "mlp_ratio": ratio_of(mlp.fc2, model.embed_dim, of="in_features"),
            "swiglu_mlp": isinstance(mlp, (GluMlp, SwiGLU)),
            "swiglu_apart": isinstance(mlp, SwiGLU),
            "scale_mlp": not isinstance(mlp.norm, nn.Identity),
            "init_values": None if block.gamma_1 is None else 1e-5,
            "attn_only_layer_scale": block.gamma_1 is not None and block.gamma_2 is None,
            **describe_norm("blocks.0.norm1", block.norm1),
            "embed_dim": model.embed_dim,
        }

    def check_arguments(self, arguments: Mapping[str, Any]) -> None:
        heads, width = arguments["num_heads"], arguments["embed_dim"]
        unit = 4 if arguments["use_rot_pos_emb"] else 1
        if width % (heads * unit):
            whole = f" in channels that are a multiple of {unit}" if unit > 1 else ""
            raise ModelError(f"{width} channels cannot be shared among {heads} heads{whole}")
        keys = arguments["num_kv_heads"] or [heads] * arguments["depth"]
        if len(keys) != arguments["depth"] or any(heads % count for count in keys):
            raise ModelError(f"{heads} heads of queries in {arguments['depth']} blocks do not go with keys of {keys[:9]} heads")
        section = arguments["rope_mrope_section"]
        if section is not None and (len(section) != 3 or 2 * sum(section) > width):
            raise ModelError(f"the sections {section[:9]} of positions are not three, or more than a head has")
        pool_heads = arguments["attn_pool_num_heads"]
        if arguments["global_pool"] == "map" and (pool_heads is None or width % pool_heads):
            raise ModelError(f"{width} channels cannot be shared among {pool_heads} heads of the pooling")
        if arguments["global_pool"] == "token" and not arguments["class_token"]:
            raise ModelError("a pooling of the class token needs one")

    def branches(self, arguments: Mapping[str, Any]) -> list[BranchOutline]:
        heads, depth = arguments["num_heads"], arguments["depth"]
        keys = arguments["num_kv_heads"] or [heads] * depth
        pairs = arguments["embed_dim"] // heads // 2 if arguments["use_rot_pos_emb"] else 0
        return branches_of_blocks("blocks", keys, pairs)

    def build(self, kind: type[nn.Module], arguments: Mapping[str, Any], *, values: bool) -> nn.Module:
        given = {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}
        norm = take_norm(given)
        align_to = int(given.pop("swiglu_apart"))  # to a multiple of 1: gate and value in layers of their own, no more
        return kind(**given, swiglu_align_to=align_to, norm_layer=norm)


def eva_blocks(tower: nn.Module, name: str, *, by_head: bool) -> list[Block]:
    """Blocks of timm's EvaBlock.

    Args:
        tower: holds `blocks`, `rope` and `embed_dim`.
        name: of the blocks in the model.
        by_head: whether each head has angles of its own.
    """
    attention = RotaryAttention(turned=tower.rope is not None, by_head=by_head)
    attn = GammaPreNorm("attn", attention, norm="norm1", gamma="gamma_1", drop_path="drop_path1")
    mlp = partial(GammaPreNorm, "mlp", norm="norm2", gamma="gamma_2", drop_path="drop_path2")
    return [
        Block(f"{name}.{depth}", block, (attn, mlp(mlp_of(getattr(block, "mlp", None)))), tower.embed_dim)
        for depth, block in enumerate(tower.blocks)
    ]


def _describe_rope(rope: nn.Module | None) -> dict[str, Any]:
    """Arguments of the rotary positions; timm's defaults where there are none."""

    def read(name: str, usual: Any) -> Any:
        return getattr(rope, name, usual)

    section, shape = read("mrope_section", None), read("ref_feat_shape", None)
    return {
        "use_rot_pos_emb": rope is not None,
        "rope_type": next((name for name, kind in ROPES.items() if type(rope) is kind), "cat"),
        "rope_temperature": read("temperature", 10000.0),
        "rope_grid_offset": read("grid_offset", 0.0),
        "rope_grid_indexing": read("grid_indexing", "ij"),
        "rope_rotate_half": read("rotate_half", False),
        "rope_mrope_section": None if section is None else list(section),
        "ref_feat_shape": None if shape is None else list(shape),
        **{f"rope_{name}": read(name, None) for name in sorted(_OF_POSITIONS)},
    }


EVA = EvaFamily()
