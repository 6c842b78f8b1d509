"""timm's Hiera: stages of their own width, whose first blocks pool tokens and take the stream from one stage to the next.

Tokens lie unrolled: those that will be pooled to one are as far from each other as they can be, so that a maximum over an axis
pools them (timm's Unroll). What is read as a map has to be rolled up first (`Block.unrolled`).

The residual stream stays whole, each stage has one of its own. So does what takes it from stage to stage.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from timm.layers import LayerScale
from timm.models import hiera
from timm.models.hiera import Hiera, HieraBlock, MaskUnitAttention
from torch import nn

from p3b.errors import ModelError
from p3b.vit.anatomy.half import Half, PreNorm
from p3b.vit.anatomy.mask_unit import MaskUnitSelfAttention, PoolingPreNorm, ProjectedPreNorm
from p3b.vit.anatomy.mlp import PlainMlp
from p3b.vit.anatomy.norms import NORMS
from p3b.vit.families import allowed
from p3b.vit.families.activations import activation_name
from p3b.vit.families.family import Block, BranchOutline, Images, Outside, ratio_of
from p3b.vit.families.norms import describe_norm, require_describable, take_norm
from p3b.vit.families.stream import stream_stays
from p3b.vit.families.usual import require_blocks

_MLP = PreNorm("mlp", PlainMlp(), norm="norm2", layer_scale="ls2", drop_path="drop_path2")


class HieraFamily:
    """`p3b.vit.families.family.Family`"""

    classes: Mapping[str, type[nn.Module]] = {"Hiera": Hiera}
    rules: Mapping[str, allowed.Rule] = {
        **dict.fromkeys(("img_size", "patch_kernel", "patch_stride", "q_stride", "mask_unit_size"), allowed.PAIR),
        "patch_padding": (allowed.is_pair_from_0, f"two whole numbers from 0 to {allowed.MOST_CHANNELS}"),
        **dict.fromkeys(("in_chans", "embed_dim", "num_heads"), allowed.SIZE),
        "num_classes": allowed.CLASSES,
        "stages": allowed.of_stages(allowed.is_whole(1, allowed.MOST_BLOCKS), "numbers of blocks"),
        "mask_unit_attn": allowed.of_stages(allowed.is_flag, "true or false"),
        "q_pool": allowed.COUNT,
        **dict.fromkeys(("mlp_ratio", "norm_eps", "dim_mul", "head_mul"), allowed.NUMBER),
        "init_values": allowed.NUMBER_OR_NULL,
        **dict.fromkeys(("use_expand_proj", "final_norm"), allowed.FLAG),
        "global_pool": allowed.one_of(("", "avg", "avgmax", "max"), "a pooling of timm's Hiera"),
        "norm_layer": allowed.one_of(tuple(NORMS)),
    }
    more_rules: Mapping[str, tuple[allowed.Rule, Any]] = {"global_pos_size": (allowed.PAIR_OR_NULL, None)}

    def blocks(self, model: Hiera) -> Sequence[Block]:
        found, before = [], math.prod(model.tokens_spatial_shape)
        for depth, module in enumerate(model.blocks):
            stage = sum(end < depth for end in model.stage_ends)
            strides, (rows, columns) = model.reroll.schedule[depth]
            pools = isinstance(module, HieraBlock) and module.do_expand
            found.append(
                Block(
                    f"blocks.{depth}",
                    module,
                    (_attention(module, pools, before), _MLP),
                    width=model.feature_info[stage]["num_chs"],
                    stage=stage,
                    grid=(rows, columns),
                    window=_compared(module, before),
                    pools=pools,
                    unrolled=tuple((high, wide) for high, wide in strides),
                )
            )
            before = rows * columns
        return found

    def patch_embed(self, model: Hiera) -> nn.Module:
        return model.patch_embed

    def images(self, model: Hiera) -> Images:
        (rows, columns), (high, wide) = model.tokens_spatial_shape, model.patch_stride
        channels = model.patch_embed.proj.in_channels
        return Images(channels, (rows * high, columns * wide), (high, wide), (rows, columns))

    def require_covered(self, model: Hiera, purpose: str) -> None:
        embed = model.patch_embed
        if type(embed) is not hiera.PatchEmbed or type(embed.proj) is not nn.Conv2d:
            raise ModelError(
                f"patch_embed: a Hiera can be {purpose} if it reads images by timm's own PatchEmbed (a Conv2d), not "
                f"{type(embed).__name__} with {type(getattr(embed, 'proj', None)).__name__}."
            )
        if len(model.blocks) != model.stage_ends[-1] + 1:
            raise ModelError(
                f"blocks: {len(model.blocks)} are left of {model.stage_ends[-1] + 1}, as timm leaves them for features of its "
                "first stages; hand in a Hiera with all of them."
            )
        if model.patch_drop_rate > 0:
            raise ModelError(
                f"patch_drop_rate={model.patch_drop_rate:g}: mask units that are dropped in training are not covered; set "
                "model.patch_drop_rate = 0."
            )
        given = (list(self.images(model).size), model.patch_stride, [model.q_stride] * (len(model.stage_ends) - 1))
        unroll, reroll = hiera.Unroll(*given), hiera.Reroll(*given, model.stage_ends, model.q_pool)
        if (unroll.size, unroll.schedule, reroll.schedule) != (
            model.unroll.size,
            model.unroll.schedule,
            model.reroll.schedule,
        ):
            raise ModelError("unroll: the order of the tokens is not the one that timm gives to a Hiera of these stages.")

    def require_blocks_covered(self, model: Hiera) -> None:
        require_blocks(self.blocks(model), HieraBlock, "of timm's Hiera its own block is")

    def outside(self, model: Hiera) -> Outside:
        raise stream_stays("blocks: each stage of a Hiera has a residual stream of its own width")

    def describe_outside(self, model: Hiera) -> dict[str, Any]:
        patch = model.patch_embed.proj
        require_describable(model, ("head.norm",))
        return {
            "img_size": list(self.images(model).size),
            "patch_kernel": list(patch.kernel_size),
            "patch_stride": list(patch.stride),
            "patch_padding": list(patch.padding),
            "in_chans": patch.in_channels,
            "embed_dim": patch.out_channels,
            "num_classes": model.head.fc.out_features if isinstance(model.head.fc, nn.Linear) else model.num_classes,
            "global_pool": model.head.pool_type,
            "stages": [end - start for start, end in pairwise((-1, *model.stage_ends))],
            "q_pool": model.q_pool,
            "q_stride": list(model.q_stride),
            "mask_unit_size": list(model.mask_unit_size),
            "global_pos_size": None if model.pos_embed_win is None else list(model.pos_embed.shape[2:]),
            "final_norm": not isinstance(model.head.norm, nn.Identity),
        }

    def describe_blocks(self, model: Hiera) -> dict[str, Any]:
        first, ends = model.blocks[0], model.stage_ends
        if (activation := activation_name(first.mlp.act)) != "gelu":
            raise ModelError(f"blocks.0.mlp.act: {activation} cannot be described in config.json.")
        second = model.blocks[ends[0] + 1] if len(ends) > 1 else None
        return {
            "num_heads": first.attn.heads,
            "mask_unit_attn": [_in_mask_units(model.blocks, start + 1, end) for start, end in pairwise((-1, *ends))],
            "use_expand_proj": second is None or second.proj is not None,
            "dim_mul": 2.0 if second is None else second.dim_out / second.dim,
            "head_mul": 2.0 if second is None else second.attn.heads / first.attn.heads,
            "mlp_ratio": ratio_of(first.mlp.fc1, first.dim_out),
            "init_values": 1e-5 if isinstance(first.ls1, LayerScale) else None,
            **describe_norm("blocks.0.norm1", first.norm1),
        }

    def check_arguments(self, arguments: Mapping[str, Any]) -> None:
        stages, stride = arguments["stages"], arguments["q_stride"]
        if len(arguments["mask_unit_attn"]) != len(stages):
            raise ModelError(f"mask_unit_attn has {len(arguments['mask_unit_attn'])} entries for {len(stages)} stages")
        if arguments["q_pool"] >= len(stages):
            raise ModelError(f"q_pool is {arguments['q_pool']} for {len(stages)} stages; expected fewer")
        outlines = self._widths(arguments)
        if sum(stages) > allowed.MOST_BLOCKS or max(width for width, _ in outlines) > allowed.MOST_CHANNELS:
            raise ModelError(f"there are more than {allowed.MOST_BLOCKS} blocks, or {allowed.MOST_CHANNELS} channels")
        if any(later <= width for (width, _), (later, _) in pairwise(outlines)):
            raise ModelError(f"dim_mul is {arguments['dim_mul']}: each stage has to be wider than the one before")
        if not arguments["use_expand_proj"] and any(later != 2 * width for (width, _), (later, _) in pairwise(outlines)):
            raise ModelError(f"dim_mul is {arguments['dim_mul']}; without use_expand_proj each stage is twice as wide")
        for number, (width, heads) in enumerate(outlines):
            if heads < 1 or width % heads:
                raise ModelError(f"{width} channels of stage {number} cannot be shared among {heads} heads")
        for axis in range(2):
            tokens = arguments["img_size"][axis] // arguments["patch_stride"][axis]
            pooled, unit = stride[axis] ** (len(stages) - 1), arguments["mask_unit_size"][axis]
            reach = arguments["img_size"][axis] + 2 * arguments["patch_padding"][axis] - arguments["patch_kernel"][axis]
            if reach < 0 or reach // arguments["patch_stride"][axis] + 1 != tokens or not tokens:
                raise ModelError("img_size, patch_kernel, patch_stride and patch_padding do not go together")
            if tokens % unit or tokens % pooled or unit % stride[axis] ** arguments["q_pool"]:
                raise ModelError(f"{tokens} tokens on a side, mask units of {unit} and {len(stages)} stages do not go together")

    def branches(self, arguments: Mapping[str, Any]) -> list[BranchOutline]:
        found: list[BranchOutline] = []
        before = None
        for blocks, (width, heads) in zip(arguments["stages"], self._widths(arguments), strict=True):
            for number in range(blocks):
                name = f"blocks.{len(found) // 2}"
                reads = before if number == 0 else None
                found += [BranchOutline(f"{name}.attn", heads, 0, width, reads), BranchOutline(f"{name}.mlp", 0, 0, width)]
            before = width
        return found

    def build(self, kind: type[nn.Module], arguments: Mapping[str, Any], *, values: bool) -> nn.Module:
        given = {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}
        norm = take_norm(given)
        has_norm, positions = given.pop("final_norm"), given.pop("global_pos_size")
        if positions is not None:
            given |= {"abs_win_pos_embed": True, "global_pos_size": positions}
        model: Any = kind(**given, norm_layer=norm, **({} if values else {"weight_init": "skip"}))
        if not has_norm:
            model.head.norm = nn.Identity()
        return model

    def _widths(self, arguments: Mapping[str, Any]) -> list[tuple[int, int]]:
        """(channels, heads) of each stage, as timm truncates them."""
        found = [(arguments["embed_dim"], arguments["num_heads"])]
        for _ in arguments["stages"][1:]:
            width, heads = found[-1]
            found.append((int(width * arguments["dim_mul"]), int(heads * arguments["head_mul"])))
        return found


def _attention(block: nn.Module, pools: bool, tokens: int) -> Half:
    """The half that an attention is, which is given so many tokens."""
    kind = PreNorm
    if pools:
        kind = PoolingPreNorm if block.proj is None else ProjectedPreNorm
    return kind("attn", MaskUnitSelfAttention(tokens=tokens), norm="norm1", layer_scale="ls1", drop_path="drop_path1")


def _compared(block: nn.Module, tokens: int) -> tuple[int, int]:
    """(keys of a query, queries); a block whose attention is gone compares nothing."""
    attention = getattr(block, "attn", None)
    if not isinstance(attention, MaskUnitAttention):
        return 0, 0
    keys = attention.q_stride * attention.window_size if attention.use_mask_unit_attn else tokens
    return keys, tokens // attention.q_stride


def _in_mask_units(blocks: Sequence[nn.Module], first: int, last: int) -> bool:
    """Whether a stage was built to attend within mask units: its first block does as the stage before, timm lags by one."""
    if last + 1 < len(blocks):
        return bool(blocks[last + 1].attn.use_mask_unit_attn)
    tells = first == 0 or last > first
    return tells and bool(blocks[last].attn.use_mask_unit_attn)


HIERA = HieraFamily()
