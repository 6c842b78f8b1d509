"""Names of Hugging Face's transformers: ViT, DeiT, ViT-MAE, ViT-MSN, I-JEPA, DINOv2 (with registers), CLIP, SigLIP.

Two styles: ViT's, and CLIP's. Since version 5 the modules of the first are called otherwise than the files, which keep the old
names; a state dict saved with torch.save has the new ones. Source: transformers.models.*.modeling_* of 4.57 and 5.24.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from p3b.storage.naming.scheme import Finished, Renames, Scheme, in_blocks, modules

_LAYER = r"(?:encoder\.layers?|layers)\.(\d+)\."


def _embeddings(table: Mapping[str, str]) -> Renames:
    return tuple((rf"embeddings\.{theirs}", timms) for theirs, timms in table.items())


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
        *_embeddings({"cls_token": "cls_token", "distillation_token": "dist_token", "register_tokens": "reg_token"}),
        *_embeddings({"mask_token": "mask_token", "position_embeddings": "pos_embed"}),
        *modules({r"embeddings\.patch_embeddings\.projection": "patch_embed.proj", "layernorm": "norm"}),
        (rf"{_LAYER}layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
        *in_blocks(
            _LAYER,
            norms=("(?:layernorm_before|norm1)", "(?:layernorm_after|norm2)"),
            proj=r"attention\.(?:output\.dense|o_proj)",
            mlp=(r"(?:intermediate\.dense|mlp\.fc1)", r"(?:output\.dense|mlp\.fc2)"),
            others={
                **{rf"attention\.attention\.{name}": f"attn.{name[0]}" for name in ("query", "key", "value")},
                **{rf"attention\.{part}_proj": f"attn.{part}" for part in "qkv"},
            },
        ),
    ),
    outside=modules({"(?:cls_)?classifier": "head", "distillation_classifier": "head_dist"}),
    finish=_finish_vit,
    pooling="token",
)

_CLIP = Scheme(
    name="Hugging Face (CLIP, SigLIP)",
    patch="embeddings.patch_embedding.weight",
    blocks=("encoder.layers.0.layer_norm1.weight",),
    renames=(
        *in_blocks(
            _LAYER,
            norms=("layer_norm1", "layer_norm2"),
            proj=r"self_attn\.out_proj",
            mlp=(r"mlp\.fc1", r"mlp\.fc2"),
            others={rf"self_attn\.{part}_proj": f"attn.{part}" for part in "qkv"},
        ),
        *_embeddings({"class_embedding": "cls_token", r"position_embedding\.weight": "pos_embed"}),
        *modules({r"embeddings\.patch_embedding": "patch_embed.proj", "pre_layrnorm": "norm_pre", "post_layernorm": "norm"}),
        (r"head\.probe", "attn_pool.latent"),
        (r"head\.attention\.in_proj_(weight|bias)", r"attn_pool.in_proj_\1"),
        *modules({r"head\.attention\.out_proj": "attn_pool.proj", r"head\.layernorm": "attn_pool.norm"}),
        *modules({rf"head\.mlp\.{layer}": f"attn_pool.mlp.{layer}" for layer in ("fc1", "fc2")}),
    ),
    finish=_finish_clip,
)

SCHEMES = (_VIT, _CLIP)
