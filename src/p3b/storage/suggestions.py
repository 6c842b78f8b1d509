"""What a misspelt model may have been meant to be: names of timm's that can be pruned."""

from __future__ import annotations

import difflib

import timm

from p3b.storage.outline import can_be_pruned

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
