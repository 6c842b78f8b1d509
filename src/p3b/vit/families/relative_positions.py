"""timm's VisionTransformerRelPos: relative positions from a table or a small network, in each block or shared by all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from timm.layers import LayerScale, RelPosBias, RelPosMlp, get_act_layer
from timm.models.vision_transformer_relpos import RelPosBlock, VisionTransformerRelPos
from torch import nn

from p3b.errors import ModelError
from p3b.vit.anatomy.half import PreNorm
from p3b.vit.anatomy.mlp import PlainMlp
from p3b.vit.anatomy.norms import NORMS
from p3b.vit.anatomy.relative import RelativeAttention
from p3b.vit.families import allowed
from p3b.vit.families.activations import ACTIVATIONS, activation_name
from p3b.vit.families.family import Block, Outside, as_features, ratio_of
from p3b.vit.families.norms import describe_norm, require_describable, take_norm
from p3b.vit.families.stems import describe_patches
from p3b.vit.families.stream import read_outside
from p3b.vit.families.usual import BlocksAlike, PatchesFirst, describe_whole, require_blocks

HALVES = (
    PreNorm("attn", RelativeAttention(), norm="norm1", layer_scale="ls1", drop_path="drop_path1"),
    PreNorm("mlp", PlainMlp(), norm="norm2", layer_scale="ls2", drop_path="drop_path2"),
)
POSITIONS = {"bias": RelPosBias, "mlp": RelPosMlp, "mlp-swin": RelPosMlp}
"""What gives the biases, by the name that timm has for it."""


class RelativePositionsFamily(PatchesFirst, BlocksAlike):
    """`p3b.vit.families.family.Family`"""

    classes: Mapping[str, type[nn.Module]] = {"VisionTransformerRelPos": VisionTransformerRelPos}
    rules: Mapping[str, allowed.Rule] = {
        **allowed.OF_SHAPE,
        "rel_pos_dim": allowed.SIZE,
        "init_values": allowed.NUMBER_OR_NULL,
        **dict.fromkeys(("class_token", "fc_norm", "qkv_bias", "qk_norm", "shared_rel_pos"), allowed.FLAG),
        "global_pool": allowed.one_of(("", "avg", "token"), "a pooling of timm's VisionTransformerRelPos"),
        "rel_pos_type": allowed.one_of(tuple(POSITIONS)),
        "act_layer": allowed.one_of(ACTIVATIONS),
        "norm_layer": allowed.one_of(tuple(NORMS)),
    }
    more_rules: Mapping[str, tuple[allowed.Rule, Any]] = {"final_norm": (allowed.FLAG, True)}

    def blocks(self, model: VisionTransformerRelPos) -> Sequence[Block]:
        return [Block(f"blocks.{depth}", module, HALVES, model.embed_dim) for depth, module in enumerate(model.blocks)]

    def require_blocks_covered(self, model: VisionTransformerRelPos) -> None:
        require_blocks(self.blocks(model), RelPosBlock, "of VisionTransformerRelPos only RelPosBlock is")

    def outside(self, model: VisionTransformerRelPos) -> Outside:
        if model.shared_rel_pos is not None:
            raise ModelError(
                "shared_rel_pos: whole heads cannot be pruned where all blocks share the biases of relative positions; prune "
                "this model by other dimensions, as block_benefit does."
            )
        return read_outside(model, tokens=("cls_token",), norms=("norm", "fc_norm"), heads=("head",))

    def describe_outside(self, model: VisionTransformerRelPos) -> dict[str, Any]:
        require_describable(model, ("norm", "fc_norm"))
        return {
            **describe_patches(model.patch_embed),
            **describe_whole(model),
            "class_token": model.cls_token is not None,
            "fc_norm": not isinstance(model.fc_norm, nn.Identity),
            "final_norm": not (isinstance(model.norm, nn.Identity) and isinstance(model.fc_norm, nn.Identity)),
        }

    def describe_blocks(self, model: VisionTransformerRelPos) -> dict[str, Any]:
        block: RelPosBlock = model.blocks[0]
        positions = model.shared_rel_pos if block.attn.rel_pos is None else block.attn.rel_pos
        swin = getattr(positions, "mode", None) == "swin"
        return {
            "num_heads": block.attn.num_heads,
            "mlp_ratio": ratio_of(block.mlp.fc1, model.embed_dim),
            "qkv_bias": block.attn.qkv.bias is not None,
            "qk_norm": not isinstance(block.attn.q_norm, nn.Identity),
            "shared_rel_pos": model.shared_rel_pos is not None,
            "rel_pos_type": "bias" if isinstance(positions, RelPosBias) else "mlp-swin" if swin else "mlp",
            "rel_pos_dim": positions.mlp.fc1.out_features if isinstance(positions, RelPosMlp) else 1,
            "init_values": 1e-5 if isinstance(block.ls1, LayerScale) else None,
            "act_layer": activation_name(block.mlp.act),
            **describe_norm("blocks.0.norm1", block.norm1),
            "embed_dim": model.embed_dim,
        }

    def check_arguments(self, arguments: Mapping[str, Any]) -> None:
        super().check_arguments(arguments)
        if arguments["global_pool"] == "token" and not arguments["class_token"]:
            raise ModelError("there is no class token to be pooled")

    def build(self, kind: type[nn.Module], arguments: Mapping[str, Any], *, values: bool) -> nn.Module:
        given = dict(arguments)
        norm = take_norm(given)
        given["act_layer"] = get_act_layer(given["act_layer"])
        has_norm = given.pop("final_norm")
        return as_features(kind(**given, norm_layer=norm, **({} if values else {"weight_init": "skip"})), has_norm)


RELATIVE_POSITIONS = RelativePositionsFamily()
