"""timm's VisionTransformerSAM, the image tower of Segment Anything: blocks over a map of tokens, most of them in windows.

The convolutions behind the blocks (`neck`) stay whole, and the residual stream, which they read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from timm.layers import ClassifierHead, LayerScale, get_act_layer
from timm.models.vision_transformer_sam import Block as SamBlock
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import nn

from p3b.errors import ModelError
from p3b.vit.anatomy.half import PreNorm
from p3b.vit.anatomy.mlp import PlainMlp
from p3b.vit.anatomy.norms import NORMS
from p3b.vit.anatomy.relative import DecomposedAttention
from p3b.vit.anatomy.window import MapPreNorm, tokens_in_windows
from p3b.vit.families import allowed
from p3b.vit.families.activations import ACTIVATIONS, activation_name
from p3b.vit.families.family import Block, Outside, as_features, ratio_of
from p3b.vit.families.norms import describe_norm, require_describable, take_norm
from p3b.vit.families.stems import describe_patches
from p3b.vit.families.stream import stream_stays
from p3b.vit.families.usual import BlocksAlike, PatchesFirst, require_blocks

HALVES = (
    MapPreNorm("attn", DecomposedAttention(), norm="norm1", layer_scale="ls1", drop_path="drop_path1"),
    PreNorm("mlp", PlainMlp(), norm="norm2", layer_scale="ls2", drop_path="drop_path2"),
)
_IS_BLOCK = allowed.is_whole(0, allowed.MOST_BLOCKS)


class SamFamily(PatchesFirst, BlocksAlike):
    """`p3b.vit.families.family.Family`"""

    classes: Mapping[str, type[nn.Module]] = {"VisionTransformerSAM": VisionTransformerSAM}
    rules: Mapping[str, allowed.Rule] = {
        **allowed.OF_SHAPE,
        **dict.fromkeys(("window_size", "neck_chans"), allowed.COUNT),
        "init_values": allowed.NUMBER_OR_NULL,
        **dict.fromkeys(("qkv_bias", "qk_norm", "pre_norm", "use_abs_pos", "use_rel_pos"), allowed.FLAG),
        "global_attn_indexes": (
            lambda value: isinstance(value, list) and len(value) <= allowed.MOST_BLOCKS and all(map(_IS_BLOCK, value)),
            "a list of numbers of blocks",
        ),
        "global_pool": allowed.one_of(("", "avg", "avgmax", "max", "catavgmax"), "a pooling of timm's convolutional networks"),
        "act_layer": allowed.one_of(ACTIVATIONS),
        "norm_layer": allowed.one_of(tuple(NORMS)),
    }
    more_rules: Mapping[str, tuple[allowed.Rule, Any]] = {"final_norm": (allowed.FLAG, True)}

    def blocks(self, model: VisionTransformerSAM) -> Sequence[Block]:
        grid = model.patch_embed.grid_size
        return [
            Block(f"blocks.{depth}", module, HALVES, model.embed_dim, **_compared(module, grid))
            for depth, module in enumerate(model.blocks)
        ]

    def require_covered(self, model: VisionTransformerSAM, purpose: str) -> None:
        super().require_covered(model, purpose)
        if type(model.head) is not ClassifierHead:
            raise ModelError(f"head: {type(model.head).__name__} is not covered; of SAM's heads timm's ClassifierHead is.")

    def require_blocks_covered(self, model: VisionTransformerSAM) -> None:
        require_blocks(self.blocks(model), SamBlock, "of SAM's blocks only timm's own is")

    def outside(self, model: VisionTransformerSAM) -> Outside:
        raise stream_stays("neck: the convolutions behind the blocks read the residual stream")

    def describe_outside(self, model: VisionTransformerSAM) -> dict[str, Any]:
        require_describable(model, ("norm_pre",))
        return {
            **describe_patches(model.patch_embed),
            "num_classes": model.head.fc.out_features if isinstance(model.head.fc, nn.Linear) else model.num_classes,
            "global_pool": model.head.global_pool.pool_type,
            "embed_dim": model.embed_dim,
            "depth": len(model.blocks),
            "pre_norm": not isinstance(model.norm_pre, nn.Identity),
            "use_abs_pos": model.pos_embed is not None,
            "neck_chans": model.neck[0].out_channels if isinstance(model.neck, nn.Sequential) else 0,
            "final_norm": not isinstance(model.neck, nn.Identity),
        }

    def describe_blocks(self, model: VisionTransformerSAM) -> dict[str, Any]:
        block: SamBlock = model.blocks[0]
        windows: list[int] = [each.window_size for each in model.blocks]
        return {
            "num_heads": block.attn.num_heads,
            "mlp_ratio": ratio_of(block.mlp.fc1, model.embed_dim),
            "qkv_bias": block.attn.qkv.bias is not None,
            "qk_norm": not isinstance(block.attn.q_norm, nn.Identity),
            "use_rel_pos": block.attn.use_rel_pos,
            "window_size": max(windows),
            "global_attn_indexes": [depth for depth, window in enumerate(windows) if not window],
            "init_values": 1e-5 if isinstance(block.ls1, LayerScale) else None,
            "act_layer": activation_name(block.mlp.act),
            **describe_norm("blocks.0.norm1", block.norm1),
        }

    def build(self, kind: type[nn.Module], arguments: Mapping[str, Any], *, values: bool) -> nn.Module:
        given = {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}
        norm = take_norm(given)
        has_norm = given.pop("final_norm")
        return as_features(kind(**given | {"act_layer": get_act_layer(given["act_layer"])}, norm_layer=norm), has_norm)


def _compared(block: nn.Module, grid: tuple[int, int]) -> dict[str, Any]:
    """What the tokens of a block are compared with; a block that is gone compares nothing."""
    if not isinstance(block, SamBlock):
        return {}
    relative = getattr(block.attn, "use_rel_pos", False)
    if not block.window_size:
        return {"distances": sum(grid) if relative else 0}
    window = (block.window_size, block.window_size)
    return {"window": tokens_in_windows(grid, window), "distances": sum(window) if relative else 0}


SAM = SamFamily()
