"""Names of torchvision's `VisionTransformer` (vit_b_16 and its like; files of before 0.12 name the MLP's layers otherwise)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from p3b.storage.naming.scheme import Finished, Scheme, in_blocks, modules, without_head_behind

_LAYER = r"encoder\.layers\.encoder_layer_(\d+)\."


def _finish(state: Mapping[str, Tensor]) -> Finished:
    finished = without_head_behind("heads.pre_logits.", state)
    note = "heads.head: left out, for it reads a layer (heads.pre_logits) that timm's models do not have"
    return finished, [note] if len(finished) < len(state) else []


SCHEME = Scheme(
    name="torchvision",
    patch="conv_proj.weight",
    blocks=("encoder.layers.encoder_layer_0.ln_1.weight",),
    pooling="token",
    renames=(
        ("class_token", "cls_token"),
        (r"encoder\.pos_embedding", "pos_embed"),
        *modules({"conv_proj": "patch_embed.proj", r"encoder\.ln": "norm", r"heads\.head": "head"}),
        (rf"{_LAYER}self_attention\.in_proj_(weight|bias)", r"blocks.\1.attn.qkv.\2"),
        *in_blocks(
            _LAYER,
            norms=("ln_1", "ln_2"),
            proj=r"self_attention\.out_proj",
            mlp=(r"mlp\.(?:0|linear_1)", r"mlp\.(?:3|linear_2)"),
        ),
    ),
    finish=_finish,
)
