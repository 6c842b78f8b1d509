"""Names of Hugging Face's transformers: ViT, DeiT, ViT-MAE, ViT-MSN, I-JEPA, DINOv2 (with registers), CLIP, SigLIP.

Two styles: ViT's, and CLIP's. Since version 5 the modules of the first are called otherwise than the files, which keep the old
names; a state dict saved with torch.save has the new ones. Source: transformers.models.*.modeling_* of 4.57 and 5.24.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from p3b.storage.naming.scheme import Finished, Scheme

_LAYER = r"(?:encoder\.layers?|layers)\.(\d+)\."
_KIND = r"\.(weight|bias)"


def _in_blocks(table: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Rows for layers with weight and bias, and a last one that keeps what is not known inside its block."""
    rows = [(f"{_LAYER}{theirs}{_KIND}", rf"blocks.\1.{timms}.\2") for theirs, timms in table.items()]
    return (*rows, (rf"{_LAYER}(.+)", r"blocks.\1.\2"))


def _finish_vit(state: Mapping[str, Tensor]) -> Finished:
    finished, notes = dict(state), []
    if "reg_token" in state:
        positions, token = state["pos_embed"], state["cls_token"]
        finished |= {"cls_token": token + positions[:, :1], "pos_embed": positions[:, 1:]}
        notes.append("cls_token: its position embedding is folded into it, as timm does for DINOv2 with registers")
    head = state.get("head.weight")
    if head is not None and "norm.weight" in state and head.shape[1] == 2 * state["norm.weight"].numel():
        del finished["head.weight"]
        finished.pop("head.bias", None)
        notes.append("classifier: left out, for it reads the class token and the mean of the patches together")
    return finished, notes


def _finish_clip(state: Mapping[str, Tensor]) -> Finished:
    """The attention pool's one projection as timm's two."""
    finished = dict(state)
    for kind in ("weight", "bias"):
        packed = finished.pop(f"attn_pool.in_proj_{kind}", None)
        if packed is not None:
            width = packed.shape[0] // 3
            finished |= {f"attn_pool.q.{kind}": packed[:width], f"attn_pool.kv.{kind}": packed[width:]}
    return finished, []


_VIT = Scheme(
    name="Hugging Face (ViT, DeiT, DINOv2, ViT-MAE)",
    patch="embeddings.patch_embeddings.projection.weight",
    blocks=(
        *("encoder.layer.0.layernorm_before.weight", "encoder.layer.0.norm1.weight", "layers.0.layernorm_before.weight"),
        "encoder.layer.0.attention.attention.query.weight",
    ),
    renames=(
        (r"embeddings\.cls_token", r"cls_token"),
        (r"embeddings\.distillation_token", r"dist_token"),
        (r"embeddings\.register_tokens", r"reg_token"),
        (r"embeddings\.mask_token", r"mask_token"),
        (r"embeddings\.position_embeddings", r"pos_embed"),
        (rf"embeddings\.patch_embeddings\.projection{_KIND}", r"patch_embed.proj.\1"),
        (rf"layernorm{_KIND}", r"norm.\1"),
        (rf"{_LAYER}layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
        *_in_blocks(
            {
                **{rf"attention\.attention\.{name}": f"attn.{name[0]}" for name in ("query", "key", "value")},
                **{rf"attention\.{part}_proj": f"attn.{part}" for part in "qkv"},
                r"attention\.output\.dense": "attn.proj",
                r"attention\.o_proj": "attn.proj",
                r"intermediate\.dense": "mlp.fc1",
                r"output\.dense": "mlp.fc2",
                r"mlp\.fc1": "mlp.fc1",
                r"mlp\.fc2": "mlp.fc2",
                r"layernorm_before": "norm1",
                r"layernorm_after": "norm2",
                r"norm1": "norm1",
                r"norm2": "norm2",
            }
        ),
    ),
    outside=(
        (rf"(?:cls_)?classifier{_KIND}", r"head.\1"),
        (rf"distillation_classifier{_KIND}", r"head_dist.\1"),
    ),
    finish=_finish_vit,
    pooling="token",
)

_CLIP = Scheme(
    name="Hugging Face (CLIP, SigLIP)",
    patch="embeddings.patch_embedding.weight",
    blocks=("encoder.layers.0.layer_norm1.weight",),
    renames=(
        (r"embeddings\.class_embedding", r"cls_token"),
        (r"embeddings\.position_embedding\.weight", r"pos_embed"),
        (rf"embeddings\.patch_embedding{_KIND}", r"patch_embed.proj.\1"),
        (rf"pre_layrnorm{_KIND}", r"norm_pre.\1"),
        (rf"post_layernorm{_KIND}", r"norm.\1"),
        (r"head\.probe", r"attn_pool.latent"),
        (r"head\.attention\.in_proj_(weight|bias)", r"attn_pool.in_proj_\1"),
        (rf"head\.attention\.out_proj{_KIND}", r"attn_pool.proj.\1"),
        (rf"head\.layernorm{_KIND}", r"attn_pool.norm.\1"),
        (rf"head\.mlp\.(fc[12]){_KIND}", r"attn_pool.mlp.\1.\2"),
        *_in_blocks(
            {
                **{rf"self_attn\.{part}_proj": f"attn.{part}" for part in "qkv"},
                r"self_attn\.out_proj": "attn.proj",
                r"mlp\.fc1": "mlp.fc1",
                r"mlp\.fc2": "mlp.fc2",
                r"layer_norm1": "norm1",
                r"layer_norm2": "norm2",
            }
        ),
    ),
    finish=_finish_clip,
)

SCHEMES = (_VIT, _CLIP)
