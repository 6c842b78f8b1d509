"""timm's own names, and those of the research code that timm's grew out of: DeiT, DINO, DINOv2, MAE, MoCo v3, iBOT.

They differ in little: DeiT-III names a layer scale otherwise, DINOv2 its registers, its SwiGLU and, where it was trained with
FSDP, its blocks; pretraining leaves mask tokens. Sources: facebookresearch/{deit,dino,dinov2,mae,moco-v3}, bytedance/ibot.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from p3b.storage.naming.scheme import Finished, Scheme, without_head_behind

OUTGROWN_HEAD = "pre_logits."
"""A layer between pooling and head that old ViTs have and timm's no longer."""


def _finish(state: Mapping[str, Tensor]) -> Finished:
    finished, notes = dict(state), []
    if "reg_token" in state and "mask_token" in state:
        # DINOv2 has positions for its class token and none for its registers, which come after; timm has them for neither.
        positions, token = state["pos_embed"], state["cls_token"]
        finished |= {"cls_token": token + positions[:, :1], "pos_embed": positions[:, 1:]}
        notes.append("cls_token: its position embedding is folded into it, as timm does for DINOv2 with registers")
    kept = without_head_behind(OUTGROWN_HEAD, finished)
    if len(kept) < len(finished):
        notes.append("head.*: left out, for it reads the pre_logits layer, which timm's models no longer have")
    return kept, notes


SCHEME = Scheme(
    name="timm",
    patch="patch_embed.proj.weight",
    blocks=("blocks.0.attn.qkv.weight", "blocks.0.0.attn.qkv.weight", "blocks.0.attn.q_proj.weight"),
    renames=(
        (r"blocks\.(\d+)\.gamma_([12])", r"blocks.\1.ls\2.gamma"),
        # DINOv2 groups its blocks for FSDP: blocks.<group>.<number>, numbers going on from group to group.
        (r"blocks\.\d+\.(\d+)\.mlp\.w12\.(\w+)", r"blocks.\1.mlp.fc1.\2"),
        (r"blocks\.\d+\.(\d+)\.mlp\.w3\.(\w+)", r"blocks.\1.mlp.fc2.\2"),
        (r"blocks\.\d+\.(\d+)\.(.+)", r"blocks.\1.\2"),
        (r"blocks\.(\d+)\.mlp\.w12\.(\w+)", r"blocks.\1.mlp.fc1.\2"),
        (r"blocks\.(\d+)\.mlp\.w3\.(\w+)", r"blocks.\1.mlp.fc2.\2"),
        (r"register_tokens", r"reg_token"),
    ),
    finish=_finish,
    is_timm=True,
)
