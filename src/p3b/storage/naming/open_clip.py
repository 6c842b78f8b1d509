"""Names of OpenAI's CLIP and of open_clip's own towers (`visual.`); its timm towers have timm's names (`visual.trunk.`).

The image tower ends in a projection into the space that it shares with the text: no classifier, whatever its size.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from p3b.storage.naming.scheme import Finished, Scheme, in_blocks, modules

_LAYER = r"transformer\.resblocks\.(\d+)\."


def _finish(state: Mapping[str, Tensor]) -> Finished:
    finished = {name: tensor for name, tensor in state.items() if name != "proj"}
    notes = ["proj: left out, for it projects into the space shared with text and is no classifier"] if "proj" in state else []
    return finished, notes


SCHEME = Scheme(
    name="CLIP (OpenAI, open_clip)",
    patch="conv1.weight",
    blocks=("transformer.resblocks.0.ln_1.weight",),
    renames=(
        ("class_embedding", "cls_token"),
        ("positional_embedding", "pos_embed"),
        *modules({"conv1": "patch_embed.proj", "ln_pre": "norm_pre", "ln_post": "norm"}),
        (rf"{_LAYER}ls_([12])\.gamma", r"blocks.\1.ls\2.gamma"),
        (rf"{_LAYER}attn\.in_proj_(weight|bias)", r"blocks.\1.attn.qkv.\2"),
        *in_blocks(_LAYER, norms=("ln_1", "ln_2"), proj=r"attn\.out_proj", mlp=(r"mlp\.c_fc", r"mlp\.c_proj")),
    ),
    finish=_finish,
)
