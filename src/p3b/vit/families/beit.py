"""timm's Beit: BEiT and BEiT v2; blocks whose scales are parameters of their own, and relative positions in every block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from timm.layers import SwiGLU
from timm.models.beit import Beit
from timm.models.beit import Block as BeitBlock
from torch import nn

from p3b.errors import ModelError
from p3b.vit.anatomy.half import GammaPreNorm
from p3b.vit.anatomy.mlp import mlp_of
from p3b.vit.anatomy.norms import NORMS
from p3b.vit.anatomy.relative import BeitSelfAttention
from p3b.vit.families import allowed
from p3b.vit.families.family import Block, Outside, as_features, ratio_of
from p3b.vit.families.norms import describe_norm, require_describable, take_norm
from p3b.vit.families.stems import describe_patches
from p3b.vit.families.stream import read_outside
from p3b.vit.families.usual import BlocksAlike, PatchesFirst, describe_whole, require_blocks
from p3b.vit.parts import InPlaceOfBranch


@dataclass(frozen=True)
class BeitHalf(GammaPreNorm):
    """A half of BEiT's blocks, which ask the first scale whether there are scales: one that is not needed is the number 1."""

    def replace(self, block: nn.Module, replacement: InPlaceOfBranch) -> None:
        scaled = self.scale(block) is not None
        super().replace(block, replacement)
        if scaled:
            del block._parameters[self.gamma]
            setattr(block, self.gamma, 1.0)


class BeitFamily(PatchesFirst, BlocksAlike):
    """`p3b.vit.families.family.Family`"""

    classes: Mapping[str, type[nn.Module]] = {"Beit": Beit}
    rules: Mapping[str, allowed.Rule] = {
        **allowed.OF_SHAPE,
        "init_values": allowed.NUMBER_OR_NULL,
        **dict.fromkeys(
            ("qkv_bias", "swiglu_mlp", "scale_mlp", "use_abs_pos_emb", "use_rel_pos_bias", "use_fc_norm"), allowed.FLAG
        ),
        "global_pool": allowed.one_of(("", "avg", "token"), "a pooling of timm's Beit"),
        "norm_layer": allowed.one_of(tuple(NORMS)),
    }
    more_rules: Mapping[str, tuple[allowed.Rule, Any]] = {"final_norm": (allowed.FLAG, True)}

    def blocks(self, model: Beit) -> Sequence[Block]:
        attn = BeitHalf("attn", BeitSelfAttention(), norm="norm1", gamma="gamma_1", drop_path="drop_path1")
        mlp = partial(BeitHalf, "mlp", norm="norm2", gamma="gamma_2", drop_path="drop_path2")
        return [
            Block(f"blocks.{depth}", block, (attn, mlp(mlp_of(getattr(block, "mlp", None)))), model.embed_dim)
            for depth, block in enumerate(model.blocks)
        ]

    def require_covered(self, model: Beit, purpose: str) -> None:
        super().require_covered(model, purpose)
        if model.rel_pos_bias is not None:
            raise ModelError(
                "rel_pos_bias: relative positions that all blocks share are not covered for BEiT, only those of each block "
                "(use_rel_pos_bias=True)."
            )

    def require_blocks_covered(self, model: Beit) -> None:
        require_blocks(self.blocks(model), BeitBlock, "of Beit only timm's own Block is")

    def outside(self, model: Beit) -> Outside:
        return read_outside(model, tokens=("cls_token", "pos_embed"), norms=("norm", "fc_norm"), heads=("head",))

    def describe_outside(self, model: Beit) -> dict[str, Any]:
        require_describable(model, ("norm", "fc_norm"))
        return {
            **describe_patches(model.patch_embed),
            **describe_whole(model),
            "use_abs_pos_emb": model.pos_embed is not None,
            "use_fc_norm": not isinstance(model.fc_norm, nn.Identity),
            "final_norm": not (isinstance(model.norm, nn.Identity) and isinstance(model.fc_norm, nn.Identity)),
        }

    def describe_blocks(self, model: Beit) -> dict[str, Any]:
        block: BeitBlock = model.blocks[0]
        gated = isinstance(block.mlp, SwiGLU)
        return {
            "num_heads": block.attn.num_heads,
            "mlp_ratio": ratio_of(block.mlp.fc1_x if gated else block.mlp.fc1, model.embed_dim),
            "qkv_bias": block.attn.q_bias is not None,
            "swiglu_mlp": gated,
            "scale_mlp": not isinstance(block.mlp.norm, nn.Identity),
            "init_values": None if block.gamma_1 is None else 1e-5,
            "use_rel_pos_bias": block.attn.window_size is not None,
            **describe_norm("blocks.0.norm1", block.norm1),
            "embed_dim": model.embed_dim,
        }

    def build(self, kind: type[nn.Module], arguments: Mapping[str, Any], *, values: bool) -> nn.Module:
        given = dict(arguments)
        norm = take_norm(given)
        has_norm = given.pop("final_norm")
        return as_features(kind(**given, norm_layer=norm), has_norm)


BEIT = BeitFamily()
