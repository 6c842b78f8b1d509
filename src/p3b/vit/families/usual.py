"""What most families say in the same way: patches by timm's PatchEmbed, all blocks of one class, all of them alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from p3b.errors import ModelError
from p3b.vit.families.family import Block, BranchOutline, Images, classes_of
from p3b.vit.families.stems import images_of_stem, require_patch_embed


class PatchesFirst:
    """Of models that begin with timm's PatchEmbed (`p3b.vit.families.family.Family`)."""

    def patch_embed(self, model: Any) -> nn.Module:
        embed: nn.Module = model.patch_embed
        return embed

    def images(self, model: Any) -> Images:
        return images_of_stem(self.patch_embed(model))

    def require_covered(self, model: Any, purpose: str) -> None:
        require_patch_embed(self.patch_embed(model))


class BlocksAlike:
    """Of models described by `depth` blocks, each an attention of `num_heads` heads and an MLP, and by `embed_dim` channels."""

    def check_arguments(self, arguments: Mapping[str, Any]) -> None:
        width, heads = arguments["embed_dim"], arguments["num_heads"]
        if width % heads:
            raise ModelError(f"{width} channels cannot be shared among {heads} heads")

    def branches(self, arguments: Mapping[str, Any]) -> list[BranchOutline]:
        return branches_of_blocks("blocks", [arguments["num_heads"]] * arguments["depth"])


def describe_whole(model: Any) -> dict[str, Any]:
    """Arguments of the head, the residual stream and the number of blocks, as most of timm's models have them."""
    return {
        "num_classes": classes_of(model),
        "global_pool": model.global_pool,
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
    }


def branches_of_blocks(name: str, heads: Sequence[int], pairs: int = 0) -> list[BranchOutline]:
    """Branches of blocks that are an attention and an MLP.

    Args:
        name: of the blocks in the model, "blocks".
        heads: of each block (`BranchOutline`).
        pairs: that positions turn a head's channels in.
    """
    return [
        outline
        for index, count in enumerate(heads)
        for outline in (BranchOutline(f"{name}.{index}.attn", count, pairs), BranchOutline(f"{name}.{index}.mlp", 0))
    ]


def require_blocks(blocks: Iterable[Block], kind: type[nn.Module], covered: str) -> None:
    """ModelError where a block is of another class; `covered` says in words which blocks are covered."""
    for block in blocks:
        if type(block.module) is not kind:
            raise ModelError(f"{block.name}: {type(block.module).__name__} is not covered; {covered}.")
