"""Names of torchvision's `VisionTransformer` (vit_b_16 and its like; files of before 0.12 name the MLP's layers otherwise)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from p3b.storage.naming.scheme import Finished, Scheme

_LAYER = r"encoder\.layers\.encoder_layer_(\d+)\."
_KIND = r"\.(weight|bias)"


def _finish(state: Mapping[str, Tensor]) -> Finished:
    finished, notes = dict(state), []
    if any(name.startswith("heads.pre_logits.") for name in state):
        for name in [name for name in state if name.startswith(("head.", "heads.pre_logits."))]:
            del finished[name]
        notes.append("heads.head: left out, for it reads a layer (heads.pre_logits) that timm's models do not have")
    return finished, notes


SCHEMES = (
    Scheme(
        name="torchvision",
        patch="conv_proj.weight",
        blocks=("encoder.layers.encoder_layer_0.ln_1.weight",),
        renames=(
            (r"class_token", r"cls_token"),
            (r"encoder\.pos_embedding", r"pos_embed"),
            (rf"conv_proj{_KIND}", r"patch_embed.proj.\1"),
            (rf"encoder\.ln{_KIND}", r"norm.\1"),
            (rf"heads\.head{_KIND}", r"head.\1"),
            (rf"{_LAYER}ln_([12]){_KIND}", r"blocks.\1.norm\2.\3"),
            (rf"{_LAYER}self_attention\.in_proj_(weight|bias)", r"blocks.\1.attn.qkv.\2"),
            (rf"{_LAYER}self_attention\.out_proj{_KIND}", r"blocks.\1.attn.proj.\2"),
            (rf"{_LAYER}mlp\.(?:0|linear_1){_KIND}", r"blocks.\1.mlp.fc1.\2"),
            (rf"{_LAYER}mlp\.(?:3|linear_2){_KIND}", r"blocks.\1.mlp.fc2.\2"),
            (rf"{_LAYER}(.+)", r"blocks.\1.\2"),
        ),
        finish=_finish,
        pooling="token",
    ),
)
