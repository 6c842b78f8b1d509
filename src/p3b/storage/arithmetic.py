"""What weights were trained with and no shape shows: the number of heads, the activation, the epsilon of the norms."""

from __future__ import annotations

import torch
from timm.layers import Mlp, get_act_layer
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from p3b.errors import WeightsError
from p3b.storage.hub_folder import Facts
from p3b.vit.families import family_of


def require_same_arithmetic(model: VisionTransformer, label: str, facts: Facts) -> None:
    """Refuse what no shape shows: another number of heads, another activation.

    Raises:
        WeightsError: the model has other heads or another activation than the weights were trained with.
    """
    block = family_of(model).blocks(model)[0].module
    if isinstance(block, Block) and facts.num_heads not in (None, block.attn.num_heads):
        raise WeightsError(
            f"{label} are of a model with {facts.num_heads} attention heads ({facts.said_by}), this one has "
            f"{block.attn.num_heads}: build it with num_heads={facts.num_heads}."
        )
    if facts.activation is None:
        return
    if not is_known_activation(facts.activation):
        raise WeightsError(f"{label} are of a model with the unknown activation '{facts.activation}' ({facts.said_by}).")
    if not same_activation(model, facts.activation):
        raise WeightsError(
            f"{label} are of a model with the activation {facts.activation} ({facts.said_by}), this one has "
            f"{type(block.mlp.act).__name__}: build it with act_layer={facts.activation}."
        )


def is_known_activation(name: str) -> bool:
    """Whether timm has an activation of this name."""
    try:
        return get_act_layer(name) is not None
    except KeyError:
        return False


def same_activation(model: VisionTransformer, name: str) -> bool:
    """Whether the MLPs of a model compute an activation; true of blocks that are built otherwise, which say it themselves."""
    block = family_of(model).blocks(model)[0].module
    if not isinstance(block, Block) or not isinstance(block.mlp, Mlp):
        return True
    points = torch.linspace(-4, 4, 65, device="cpu")
    return torch.allclose(get_act_layer(name)()(points), block.mlp.act(points), atol=1e-6)


def set_epsilon(model: VisionTransformer, facts: Facts) -> list[str]:
    """Give every layer norm the epsilon that the weights were trained with."""
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    if facts.norm_eps is None or all(norm.eps == facts.norm_eps for norm in norms):
        return []
    before = norms[0].eps
    for norm in norms:
        norm.eps = facts.norm_eps
    return [f"layer norms: epsilon {facts.norm_eps:g}, as {facts.said_by} says, in place of {before:g}"]
