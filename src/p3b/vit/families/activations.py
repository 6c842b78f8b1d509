"""Activations by the names that timm has for them."""

from __future__ import annotations

from timm.layers import get_act_layer
from torch import nn

from p3b.errors import ModelError

ACTIVATIONS = (
    "gelu",
    "gelu_tanh",
    "quick_gelu",
    "relu",
    "relu6",
    "silu",
    "mish",
    "hard_swish",
    "elu",
    "celu",
    "selu",
    "tanh",
    "sigmoid",
)


def activation_name(activation: nn.Module) -> str:
    """timm's name of an activation. Its default is torch's own GELU, its named ones are classes of its own.

    Raises:
        ModelError: it has no name here, or other settings (a slope) than the one of that name.
    """
    if type(activation) is nn.GELU:
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    for name in ACTIVATIONS:
        if type(known := get_act_layer(name)()) is type(activation) and _settings(known) == _settings(activation):
            return name
    raise ModelError(f"mlp.act: {activation} cannot be described in config.json; covered are {', '.join(ACTIVATIONS)}.")


def _settings(activation: nn.Module) -> dict[str, object]:
    """What an activation was built with; whether it works in place makes no difference."""
    return {
        key: value for key, value in vars(activation).items() if not key.startswith("_") and key not in ("training", "inplace")
    }
