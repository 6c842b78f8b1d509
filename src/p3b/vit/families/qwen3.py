"""timm's Qwen3VitEncoder, the image tower of Qwen3-VL, and Qwen3VitClassifier, which puts a head on it.

Blocks are pre-norm, with rotary positions. The classifier has the tower inside, as `encoder`. Where the projector for the
language model (`merger`) is kept, it stays whole, and the residual stream, which it reads, cannot be pruned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from timm.layers import get_act_layer
from timm.models.eva import EvaBlock
from timm.models.qwen3_vit import Qwen3VitClassifier, Qwen3VitEncoder
from torch import nn

from p3b.errors import ModelError
from p3b.vit.anatomy.attention import RotaryAttention
from p3b.vit.anatomy.half import GammaPreNorm
from p3b.vit.anatomy.mlp import PlainMlp
from p3b.vit.families import allowed
from p3b.vit.families.activations import ACTIVATIONS, activation_name
from p3b.vit.families.family import Block, BranchOutline, Outside, classes_of, ratio_of
from p3b.vit.families.stems import describe_patches, require_patch_embed
from p3b.vit.families.stream import read_outside
from p3b.vit.families.usual import PatchesFirst, branches_of_blocks, require_blocks

HALVES = (
    GammaPreNorm("attn", RotaryAttention(), norm="norm1", gamma="gamma_1", drop_path="drop_path1"),
    GammaPreNorm("mlp", PlainMlp(), norm="norm2", gamma="gamma_2", drop_path="drop_path2"),
)


_TOWER: Mapping[str, allowed.Rule] = {
    **allowed.OF_SHAPE,
    **dict.fromkeys(("merge_size", "pos_embed_grid_size"), allowed.SIZE),
    "out_features": allowed.COUNT,
    "rope_temperature": allowed.NUMBER,
    "act_layer": allowed.one_of(ACTIVATIONS),
}


@dataclass(frozen=True)
class Qwen3Family(PatchesFirst):
    """`p3b.vit.families.family.Family`

    Attributes:
        prefix: what the names of the tower's parts begin with: "encoder.", or nothing where the model is the tower.
    """

    classes: Mapping[str, type[nn.Module]]
    rules: Mapping[str, allowed.Rule]
    prefix: str
    more_rules: Mapping[str, tuple[allowed.Rule, Any]] = field(default_factory=dict)

    def tower(self, model: nn.Module) -> Qwen3VitEncoder:
        """The tower itself."""
        return cast("Qwen3VitEncoder", model.get_submodule(self.prefix.rstrip(".")))

    def blocks(self, model: nn.Module) -> Sequence[Block]:
        blocks = enumerate(self.tower(model).blocks)
        return [Block(f"{self.prefix}blocks.{depth}", block, HALVES, model.embed_dim) for depth, block in blocks]

    def patch_embed(self, model: nn.Module) -> nn.Module:
        return self.tower(model).patch_embed

    def require_covered(self, model: nn.Module, purpose: str) -> None:
        require_patch_embed(self.tower(model).patch_embed, f"{self.prefix}patch_embed")

    def require_blocks_covered(self, model: nn.Module) -> None:
        require_blocks(self.blocks(model), EvaBlock, "only timm's EvaBlock is")

    def outside(self, model: nn.Module) -> Outside:
        norms, heads = (("norm",), ("head",)) if self.prefix else ((), ())
        return read_outside(model, tokens=(f"{self.prefix}pos_embed",), norms=norms, heads=heads, encoder=self.prefix)

    def describe_outside(self, model: nn.Module) -> dict[str, Any]:
        tower = self.tower(model)
        described = {
            **describe_patches(tower.patch_embed),
            "num_classes": 0,
            "global_pool": model.global_pool,
            "out_features": tower.out_features,
            "merge_size": tower.merge_size,
            "embed_dim": model.embed_dim,
            "depth": len(tower.blocks),
            "pos_embed_grid_size": tower.pos_embed_grid_size,
            "rope_temperature": tower.rope.temperature,
        }
        if not self.prefix:
            return described
        final_norm = not isinstance(model.norm, nn.Identity)
        return described | {
            "num_classes": classes_of(model),
            "encoder_pool": model.encoder_pool,
            "final_norm": final_norm,
        }

    def describe_blocks(self, model: nn.Module) -> dict[str, Any]:
        block: EvaBlock = self.tower(model).blocks[0]
        return {
            "num_heads": block.attn.num_heads,
            "mlp_ratio": ratio_of(block.mlp.fc1, model.embed_dim),
            "act_layer": activation_name(block.mlp.act),
            "norm_eps": block.norm1.eps,
            "embed_dim": model.embed_dim,
        }

    def check_arguments(self, arguments: Mapping[str, Any]) -> None:
        heads, width = arguments["num_heads"], arguments["embed_dim"]
        if width % (4 * heads):
            raise ModelError(f"{width} channels cannot be shared among {heads} heads in channels that are a multiple of 4")

    def branches(self, arguments: Mapping[str, Any]) -> list[BranchOutline]:
        heads = arguments["num_heads"]
        pairs = arguments["embed_dim"] // heads // 2
        return branches_of_blocks(f"{self.prefix}blocks", [heads] * arguments["depth"], pairs)

    def build(self, kind: type[nn.Module], arguments: Mapping[str, Any], *, values: bool) -> nn.Module:
        given = {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}
        given["act_layer"] = get_act_layer(given["act_layer"])
        if not self.prefix:
            del given["num_classes"]
        return kind(**given)


QWEN3 = Qwen3Family(
    {"Qwen3VitClassifier": Qwen3VitClassifier},
    {
        **_TOWER,
        "final_norm": allowed.FLAG,
        "global_pool": allowed.one_of(("", "avg"), "avg or nothing"),
        "encoder_pool": allowed.one_of(("", "merge"), "merge or nothing"),
    },
    "encoder.",
)
QWEN3_TOWER = Qwen3Family(
    {"Qwen3VitEncoder": Qwen3VitEncoder},
    {**_TOWER, "global_pool": allowed.one_of(("", "avg", "merge"), "avg, merge or nothing")},
    "",
)
