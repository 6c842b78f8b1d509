"""Weights of models that a plain Vision Transformer must not be taken for, and by what they are known.

A model may have every tensor that a plain Vision Transformer has, and compute something else: rotary positions are no tensor.
So what a file holds beside the plain tensors, and what it lacks, decides before shapes do.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from torch import Tensor

from p3b.storage.hub_folder import Facts

_ROTARY = (
    "rotary position embeddings (rope: DINOv3, RoPE-ViT, EVA-02, Perception Encoder), which a plain Vision Transformer does "
    "not compute"
)

_TELLTALES: Mapping[str, str] = {
    r"(^|\.)(rope|rope_embed|rotary\w*|freqs\w*|periods|inv_freq)(\.|$)": f"of a model with {_ROTARY}",
    r"(^|\.)storage_tokens$|\.qkv\.bias_mask$|(^|\.)embeddings\.patch_embeddings\.weight$": f"of DINOv3, with {_ROTARY}",
    r"lora_[AB]|lora_embedding|(^|\.)base_layer\.": "of an adapter (LoRA) and not of a whole model: merge the adapter into "
    "the model first",
    r"^blocks\..*(parametrizations\.|weight_orig$|weight_mask$|weight_[gv]$)": "reparametrised (torch.nn.utils): make the "
    "reparametrisation permanent (remove, remove_parametrizations), and save again",
    r"(qweight|qzeros|weight_scale|\.SCB|absmax|quant_state|_packed_params)": "quantised, and quantised weights cannot be "
    "pruned: give the ones they were made from",
    r"relative_position_bias|rel_pos": "of a model with relative positions (BEiT, data2vec, Swin, SAM), which a plain Vision "
    "Transformer does not compute",
    r"attn\.[qv]_bias$": "of BEiT or EVA, which are built otherwise than a plain Vision Transformer",
    r"blocks_token_only\.|attn\.proj_l\.": "of CaiT, which is built otherwise than a plain Vision Transformer",
    r"attn\.temperature$": "of XCiT, which attends over channels",
    r"attn\.gating_param$": "of ConViT, whose attention is gated by positions",
    r"^(.*\.)?layers\.\d+\.blocks\.\d+\.": "of a hierarchical model such as Swin",
    r"^(?!(.*\.)?patch_embed\.)(.*\.)?stages?\.?\d+\.|(^|\.)layer1\.0\.conv1\.": "of a network of stages, such as "
    "ResNet or ConvNeXt",
    r"(^|\.)(word_embeddings|embed_tokens|wte)\.": "of a language model",
    r"(^|\.)embeds\.(proj|pos_embed)": "of NaFlexVit, whose patches are embedded otherwise",
}
_KINDS: Mapping[str, str] = {
    r"rope|dinov3|eva02|_pe_|pe-(core|spatial|lang)": f"of a model with {_ROTARY}",
    r"^(beit|data2vec|eva)": "of BEiT or EVA, which are built otherwise than a plain Vision Transformer",
    r"^(swin|hiera|mvit|convnext|resnet|cait|xcit|sam)": "of another kind of network",
}
_PERCEPTION_ENCODER = f"of Perception Encoder, with {_ROTARY}"


def foreign_family(state: Mapping[str, Tensor], names: Collection[str], facts: Facts, source: str) -> str | None:
    """What weights are of, where that is no plain Vision Transformer: a sentence's end. None: nothing speaks against it.

    Args:
        state: by timm's names.
        names: by the names of the file, of the tower alone where one was found.
        facts: what is said of the weights beside them.
        source: their file's name, which may tell too.
    """
    for pattern, family in _TELLTALES.items():
        if any(re.search(pattern, name) for name in (*state, *names)):
            return family
    kind = (facts.kind or "").lower()
    for pattern, family in _KINDS.items():
        if re.search(pattern, kind):
            return f"{family} ({facts.said_by} says '{facts.kind}')"
    patches, scales = "patch_embed.proj.weight" in state, _has_eva_scales(names)
    if patches and "norm_pre.weight" in state:
        if "attn_pool.latent" in state or any(name.startswith("attn_pool.") for name in state):
            return _PERCEPTION_ENCODER
        if scales or not state.keys() & {"norm.weight", "fc_norm.weight"}:
            return _PERCEPTION_ENCODER
    if patches and scales and "pos_embed" not in state:
        return f"of a model with {_ROTARY}: no position is among them"
    if scales and re.search(r"rope|dinov3", source.lower().rpartition("/")[2]):
        return f"of a model with {_ROTARY}, as the file's name says"
    return None


def doubts(state: Mapping[str, Tensor], names: Collection[str], facts: Facts) -> tuple[str, ...]:
    """What cannot be told from the weights and is taken for the likelier, in words for the report."""
    told = []
    if "norm_pre.weight" in state and facts.activation is None:
        told.append(
            "a guess: the activation is the model's own; some CLIP weights (OpenAI's, DFN's, MetaCLIP's) were trained with "
            "quick GELU, others with GELU, and these do not say. Choose by act_layer=quick_gelu or a model called quickgelu"
        )
    if _has_eva_scales(names):
        told.append(
            "a guess: layer scales called gamma_1 and gamma_2 are taken for DeiT-III's; RoPE-ViT calls them so too and has "
            "rotary positions (rope), which this model does not compute. Do not go on if the weights are RoPE-ViT's"
        )
    elif "patch_embed.proj.weight" in state and "pos_embed" not in state:
        told.append(
            "a guess: no position is among the weights, so the model is taken for one without; models with rotary positions "
            "(rope), which this model does not compute, have none among their weights either"
        )
    return tuple(told)


def _has_eva_scales(names: Collection[str]) -> bool:
    return any(re.search(r"blocks\.\d+\.gamma_[12]$", name) for name in names)
