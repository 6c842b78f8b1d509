"""timm's SwinTransformer and SwinTransformerV2: stages of their own width, whose blocks compare tokens in windows.

The blocks of the second one have their norms last and compare directions (`p3b.vit.anatomy.post_norm`).

What lies between the stages (`downsample`) stays whole, and so does the residual stream: each stage has one of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2, SwinTransformerV2Block
from torch import nn

from p3b.errors import ModelError
from p3b.vit.anatomy.half import Half, PlainPreNorm
from p3b.vit.anatomy.mlp import PlainMlp
from p3b.vit.anatomy.norms import NORMS
from p3b.vit.anatomy.post_norm import CosineAttention, PostNorm, WindowPostNorm
from p3b.vit.anatomy.window import WindowPreNorm, WindowSelfAttention, tokens_in_windows
from p3b.vit.families import allowed
from p3b.vit.families.activations import activation_name
from p3b.vit.families.family import Block, BranchOutline, Outside, as_features, ratio_of
from p3b.vit.families.norms import describe_norm, require_describable, take_norm
from p3b.vit.families.stems import describe_patches
from p3b.vit.families.stream import stream_stays
from p3b.vit.families.usual import PatchesFirst, require_blocks

_BLOCKS = (SwinTransformerBlock, SwinTransformerV2Block)
HALVES = (
    WindowPreNorm("attn", WindowSelfAttention(), norm="norm1", drop_path="drop_path1"),
    PlainPreNorm("mlp", PlainMlp(), norm="norm2", drop_path="drop_path2"),
)
POST_NORM_HALVES = (
    WindowPostNorm("attn", CosineAttention(), norm="norm1", drop_path="drop_path1"),
    PostNorm("mlp", PlainMlp(), norm="norm2", drop_path="drop_path2"),
)


class SwinFamily(PatchesFirst):
    """`p3b.vit.families.family.Family`"""

    classes: Mapping[str, type[nn.Module]] = {"SwinTransformer": SwinTransformer}
    rules: Mapping[str, allowed.Rule] = {
        **dict.fromkeys(("img_size", "patch_size"), allowed.PAIR),
        **dict.fromkeys(("in_chans", "embed_dim"), allowed.SIZE),
        "num_classes": allowed.CLASSES,
        "depths": allowed.of_stages(allowed.is_whole(1, allowed.MOST_BLOCKS), "numbers of blocks"),
        "num_heads": allowed.of_stages(allowed.is_whole(1, allowed.MOST_CHANNELS), "numbers of heads"),
        "window_size": allowed.of_stages(allowed.is_pair, "two sizes"),
        **dict.fromkeys(("mlp_ratio", "norm_eps"), allowed.NUMBER),
        **dict.fromkeys(("qkv_bias", "always_partition", "strict_img_size"), allowed.FLAG),
        "global_pool": allowed.one_of(("", "avg", "avgmax", "max", "catavgmax"), "a pooling of timm's Swin"),
        "norm_layer": allowed.one_of(tuple(NORMS)),
    }
    more_rules: Mapping[str, tuple[allowed.Rule, Any]] = {"final_norm": (allowed.FLAG, True)}
    halves: tuple[Half, ...] = HALVES
    block: type[nn.Module] = SwinTransformerBlock

    def blocks(self, model: SwinTransformer) -> Sequence[Block]:
        return [
            Block(
                f"layers.{number}.blocks.{depth}",
                block,
                self.halves,
                width=info["num_chs"],
                stage=number,
                grid=stage.output_resolution,
                window=_window(stage.output_resolution, block),
            )
            for number, (stage, info) in enumerate(zip(model.layers, model.feature_info, strict=False))
            for depth, block in enumerate(stage.blocks)
        ]

    def require_blocks_covered(self, model: SwinTransformer) -> None:
        require_blocks(self.blocks(model), self.block, f"of timm's {type(model).__name__} its own block is")

    def outside(self, model: SwinTransformer) -> Outside:
        raise stream_stays("layers: each stage of a Swin Transformer has a residual stream of its own width")

    def describe_outside(self, model: SwinTransformer) -> dict[str, Any]:
        require_describable(model, ("patch_embed.norm", "norm"))
        return {
            **describe_patches(model.patch_embed),
            "num_classes": model.head.fc.out_features if isinstance(model.head.fc, nn.Linear) else model.num_classes,
            "global_pool": model.global_pool,
            "embed_dim": model.embed_dim,
            "depths": [len(stage.blocks) for stage in model.layers],
            "window_size": [_window_size(stage.blocks) for stage in model.layers],
            "strict_img_size": model.patch_embed.strict_img_size,
            "final_norm": not isinstance(model.norm, nn.Identity),
        }

    def describe_blocks(self, model: SwinTransformer) -> dict[str, Any]:
        firsts: list[SwinTransformerBlock] = [stage.blocks[0] for stage in model.layers]
        first = firsts[0]
        for number, block in enumerate(firsts):
            if (activation := activation_name(block.mlp.act)) != "gelu":
                raise ModelError(f"layers.{number}.blocks.0.mlp.act: {activation} cannot be described in config.json.")
        return {
            "num_heads": [block.attn.num_heads for block in firsts],
            "always_partition": first.always_partition,
            "mlp_ratio": ratio_of(first.mlp.fc1, model.embed_dim),
            "qkv_bias": self.has_biases(first.attn),
            **describe_norm("layers.0.blocks.0.norm1", first.norm1),
        }

    def has_biases(self, attention: nn.Module) -> bool:
        """Whether queries and values have biases."""
        return attention.qkv.bias is not None

    def check_arguments(self, arguments: Mapping[str, Any]) -> None:
        stages = len(arguments["depths"])
        for name in ("num_heads", "window_size"):
            if len(arguments[name]) != stages:
                raise ModelError(f"{name} has {len(arguments[name])} entries for {stages} stages")
        if sum(arguments["depths"]) > allowed.MOST_BLOCKS or arguments["embed_dim"] << stages > 2 * allowed.MOST_CHANNELS:
            raise ModelError(f"there are more than {allowed.MOST_BLOCKS} blocks, or {allowed.MOST_CHANNELS} channels")
        for number, heads in enumerate(arguments["num_heads"]):
            if (width := arguments["embed_dim"] << number) % heads:
                raise ModelError(f"{width} channels of stage {number} cannot be shared among {heads} heads")

    def branches(self, arguments: Mapping[str, Any]) -> list[BranchOutline]:
        return [
            BranchOutline(f"layers.{number}.blocks.{index}.{half}", heads, width=arguments["embed_dim"] << number)
            for number, depth in enumerate(arguments["depths"])
            for index in range(depth)
            for half, heads in (("attn", arguments["num_heads"][number]), ("mlp", 0))
        ]

    def build(self, kind: type[nn.Module], arguments: Mapping[str, Any], *, values: bool) -> nn.Module:
        given = {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}
        given["window_size"] = tuple(map(tuple, given["window_size"]))
        norm = take_norm(given)
        has_norm = given.pop("final_norm")
        return as_features(kind(**given, norm_layer=norm, **({} if values else {"weight_init": "skip"})), has_norm)


class SwinV2Family(SwinFamily):
    """`p3b.vit.families.family.Family`"""

    classes: Mapping[str, type[nn.Module]] = {"SwinTransformerV2": SwinTransformerV2}
    rules: Mapping[str, allowed.Rule] = {
        **SwinFamily.rules,
        "pretrained_window_sizes": allowed.of_stages(allowed.is_pair_from_0, "two sizes, each a whole number from 0"),
    }
    halves: tuple[Half, ...] = POST_NORM_HALVES
    block: type[nn.Module] = SwinTransformerV2Block

    def has_biases(self, attention: nn.Module) -> bool:
        return attention.q_bias is not None

    def describe_blocks(self, model: SwinTransformerV2) -> dict[str, Any]:  # type: ignore[override]
        sizes = [list(stage.blocks[0].attn.pretrained_window_size) for stage in model.layers]
        return {**super().describe_blocks(model), "pretrained_window_sizes": sizes}

    def check_arguments(self, arguments: Mapping[str, Any]) -> None:
        super().check_arguments(arguments)
        if len(arguments["pretrained_window_sizes"]) != len(arguments["depths"]):
            raise ModelError("pretrained_window_sizes has not one entry for each stage")

    def build(self, kind: type[nn.Module], arguments: Mapping[str, Any], *, values: bool) -> nn.Module:
        sizes = tuple(map(tuple, arguments["pretrained_window_sizes"]))
        return super().build(kind, {**arguments, "pretrained_window_sizes": sizes}, values=True)


def _window_size(blocks: Sequence[nn.Module]) -> list[int]:
    """(height, width) of a stage's windows; where all its blocks are gone it has none, and any size does."""
    return next((list(block.window_size) for block in blocks if isinstance(block, _BLOCKS)), [1, 1])


def _window(grid: tuple[int, int], block: nn.Module) -> tuple[int, int]:
    """As `tokens_in_windows`; a block that is gone compares nothing."""
    return tokens_in_windows(grid, block.window_size) if isinstance(block, _BLOCKS) else (0, 0)


SWIN, SWIN_V2 = SwinFamily(), SwinV2Family()
