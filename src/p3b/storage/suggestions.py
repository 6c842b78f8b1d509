"""What a misspelt model may have been meant to be: names of timm's that can be pruned."""

from __future__ import annotations

import difflib

import timm
import torch

from p3b.errors import ModelError
from p3b.vit.layout import read_layout

_MOST_TRIED, _MOST_SHOWN = 30, 5


def unknown_model(name: str) -> str:
    """Message for a name that timm does not have: the nearest names of models that can be pruned."""
    names = timm.list_models()
    begun = [known for known in names if known.startswith(name)]
    near = [*begun, *difflib.get_close_matches(name, names, n=_MOST_TRIED, cutoff=0.5)]
    shown: list[str] = []
    for known in list(dict.fromkeys(near))[:_MOST_TRIED]:
        if len(shown) < _MOST_SHOWN and can_be_pruned(known):
            shown.append(known)
    if shown:
        return f"Unknown timm model '{name}'. Did you mean {' or '.join(repr(known) for known in shown)}?"
    return (
        f"Unknown timm model '{name}', and none that can be pruned is called alike. Such models are, for instance, "
        "vit_tiny_patch16_224, deit_small_patch16_224 and vit_base_patch14_dinov2."
    )


def can_be_pruned(name: str) -> bool:
    """Whether timm's model of this name can be mapped, found by building it on the meta device."""
    try:
        with torch.device("meta"):
            model = timm.create_model(name, depth=1)  # one block tells, and is built quickly
        read_layout(model)
    except (ModelError, RuntimeError, NotImplementedError, TypeError):
        return False
    return True
