"""timm's Qwen3VitClassifier: the vision tower of Qwen3-VL and Qwen3.5 under a classifier; blocks of Eva with rotary positions.

The tower lies in `encoder`, and so do its blocks. Its projector (`encoder.merger`) stays whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from timm.layers import RotaryEmbeddingCat, get_act_layer
from timm.models.qwen3_vit import Qwen3VitClassifier
from torch import nn

from p3b.errors import ModelError
from p3b.vit.families.activations import ACTIVATIONS, activation_name
from p3b.vit.families.eva import eva_blocks, require_eva_blocks
from p3b.vit.families.family import (
    CLASSES,
    COUNT,
    DEPTH,
    FLAG,
    NUMBER,
    PAIR,
    SIZE,
    Block,
    BranchOutline,
    Outside,
    Rule,
    classes_of,
    one_of,
    ratio_of,
)
from p3b.vit.families.vision_transformer import require_patch_embed


class Qwen3Family:
    """`p3b.vit.families.family.Family`"""

    classes: Mapping[str, type[nn.Module]] = {"Qwen3VitClassifier": Qwen3VitClassifier}
    rules: Mapping[str, Rule] = {
        **dict.fromkeys(("img_size", "patch_size"), PAIR),
        **dict.fromkeys(("in_chans", "embed_dim", "num_heads", "merge_size", "pos_embed_grid_size"), SIZE),
        "num_classes": CLASSES,
        "out_features": COUNT,
        "depth": DEPTH,
        **dict.fromkeys(("mlp_ratio", "norm_eps", "rope_temperature"), NUMBER),
        "final_norm": FLAG,
        "global_pool": one_of(("", "avg"), "a pooling of timm"),
        "encoder_pool": one_of(("", "merge"), "merge or nothing"),
        "act_layer": one_of(ACTIVATIONS),
    }
    more_rules: Mapping[str, tuple[Rule, Any]] = {}

    def patch_embed(self, model: Qwen3VitClassifier) -> nn.Module:
        return model.encoder.patch_embed

    def blocks(self, model: Qwen3VitClassifier) -> Sequence[Block]:
        return eva_blocks(model.encoder, "encoder.blocks", by_head=False)

    def require_covered(self, model: Qwen3VitClassifier, purpose: str) -> None:
        require_patch_embed(self.patch_embed(model), "encoder.patch_embed")
        if type(model.encoder.rope) is not RotaryEmbeddingCat:
            raise ModelError(f"encoder.rope: {type(model.encoder.rope).__name__} is not covered, only RotaryEmbeddingCat is.")

    def require_blocks_covered(self, model: Qwen3VitClassifier) -> None:
        require_eva_blocks(model.encoder, "encoder.blocks")

    def outside(self, model: Qwen3VitClassifier) -> Outside:
        raise ModelError(
            "encoder: the residual stream of a Qwen3VitClassifier cannot be pruned, only its blocks can. Choose a method that "
            "leaves the stream whole."
        )

    def describe_outside(self, model: Qwen3VitClassifier) -> dict[str, Any]:
        encoder, rope = model.encoder, model.encoder.rope
        return {
            "img_size": list(encoder.patch_embed.img_size),
            "patch_size": list(encoder.patch_embed.patch_size),
            "in_chans": encoder.patch_embed.proj.in_channels,
            "num_classes": classes_of(model),
            "global_pool": model.global_pool,
            "encoder_pool": "" if encoder.merger is None else "merge",
            "out_features": encoder.out_features,
            "embed_dim": model.embed_dim,
            "depth": len(encoder.blocks),
            "merge_size": encoder.merge_size,
            "pos_embed_grid_size": encoder.pos_embed_grid_size,
            "rope_temperature": rope.temperature,
            "final_norm": not isinstance(model.norm, nn.Identity),
        }

    def describe_blocks(self, model: Qwen3VitClassifier) -> dict[str, Any]:
        block = model.encoder.blocks[0]
        return {
            "num_heads": block.attn.num_heads,
            "mlp_ratio": ratio_of(block.mlp.fc2, model.embed_dim, of="in_features"),
            "norm_eps": block.norm1.eps,
            "act_layer": activation_name(block.mlp.act),
        }

    def check_arguments(self, arguments: Mapping[str, Any]) -> None:
        heads, width = arguments["num_heads"], arguments["embed_dim"]
        if width % (4 * heads):
            raise ModelError(f"{width} channels cannot be shared among {heads} heads in channels that are a multiple of 4")

    def branches(self, arguments: Mapping[str, Any]) -> list[BranchOutline]:
        heads = arguments["num_heads"]
        attn, mlp = (heads, arguments["embed_dim"] // heads // 2), (0, 0)
        halves = {"attn": attn, "mlp": mlp}
        return [
            BranchOutline(f"encoder.blocks.{i}.{half}", *of) for i in range(arguments["depth"]) for half, of in halves.items()
        ]

    def build(self, kind: type[nn.Module], arguments: Mapping[str, Any], *, values: bool) -> nn.Module:
        given = {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}
        return kind(**{**given, "act_layer": get_act_layer(given["act_layer"])})


QWEN3 = Qwen3Family()
