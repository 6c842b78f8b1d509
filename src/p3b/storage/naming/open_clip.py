"""Names of OpenAI's CLIP and of open_clip's own towers (`visual.`); its timm towers have timm's names (`visual.trunk.`).

The image tower ends in a projection into the space that it shares with the text: no classifier, whatever its size.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from p3b.storage.naming.scheme import Finished, Scheme

_LAYER = r"transformer\.resblocks\.(\d+)\."
_KIND = r"\.(weight|bias)"


def _finish(state: Mapping[str, Tensor]) -> Finished:
    finished = {name: tensor for name, tensor in state.items() if name != "proj"}
    notes = ["proj: left out, for it projects into the space shared with text and is no classifier"] if "proj" in state else []
    return finished, notes


SCHEMES = (
    Scheme(
        name="CLIP (OpenAI, open_clip)",
        patch="conv1.weight",
        blocks=("transformer.resblocks.0.ln_1.weight",),
        renames=(
            (r"class_embedding", r"cls_token"),
            (r"positional_embedding", r"pos_embed"),
            (rf"conv1{_KIND}", r"patch_embed.proj.\1"),
            (rf"ln_pre{_KIND}", r"norm_pre.\1"),
            (rf"ln_post{_KIND}", r"norm.\1"),
            (rf"{_LAYER}ln_([12]){_KIND}", r"blocks.\1.norm\2.\3"),
            (rf"{_LAYER}ls_([12])\.gamma", r"blocks.\1.ls\2.gamma"),
            (rf"{_LAYER}attn\.in_proj_(weight|bias)", r"blocks.\1.attn.qkv.\2"),
            (rf"{_LAYER}attn\.out_proj{_KIND}", r"blocks.\1.attn.proj.\2"),
            (rf"{_LAYER}mlp\.c_fc{_KIND}", r"blocks.\1.mlp.fc1.\2"),
            (rf"{_LAYER}mlp\.c_proj{_KIND}", r"blocks.\1.mlp.fc2.\2"),
            (rf"{_LAYER}(.+)", r"blocks.\1.\2"),
        ),
        finish=_finish,
    ),
)
