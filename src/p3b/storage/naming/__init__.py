"""Whose names the tensors of a state dict wear, under which prefix, and what timm calls them.

A Vision Transformer of another library is timm's up to names. Each origin is a table of patterns (`Scheme`) in a file of its
own; what they have in common is here. A scheme is recognised by two tensors that only it has, the patch embedding and one of
the first block, and whatever stands before them is the prefix. So prefixes need no list: wrappers, trainers and larger models
nest in any depth.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from p3b.errors import WeightsError
from p3b.storage.naming import hugging_face, open_clip, timm_names, torchvision
from p3b.storage.naming.scheme import Scheme

SCHEMES: tuple[Scheme, ...] = (timm_names.SCHEME, *hugging_face.SCHEMES, torchvision.SCHEME, open_clip.SCHEME)

# Among several copies of a model: the trained one, then the teacher (DINO, iBOT), then what averages or follows it.
_LATER = (("teacher",), ("ema", "momentum", "target", "shadow", "averaged", "avg"), ("student",))
_NO_TOWER = {"decoder", "predictor", "text", "discriminator", "optimizer"}
# Among envelopes of equal standing the first of these, as it was always done.
_ORDER = ("model", "state_dict", "model_state_dict", "model_ema", "state_dict_ema")


@dataclass(frozen=True)
class Tower:
    """A Vision Transformer inside a state dict.

    Attributes:
        prefix: what its names begin with.
        scheme: whose names they are.
    """

    prefix: str
    scheme: Scheme


@dataclass(frozen=True)
class Renamed:
    """A state dict by timm's names, what was found on the way, and what is known of its origin."""

    state: dict[str, Tensor]
    tower: Tower | None
    """None: nothing that is known; the names are as they were."""
    outside: tuple[str, ...] = ()
    """Tensors that lie outside the tower and are left out."""
    notes: tuple[str, ...] = ()


def choose_tower(names: Iterable[str]) -> Tower | None:
    """The Vision Transformer that names speak of; the trained one where there are several copies.

    Raises:
        WeightsError: several of equal standing.
    """
    known = set(names)
    towers = sorted(
        (
            Tower(name.removesuffix(scheme.patch), scheme)
            for scheme in SCHEMES
            for name in known
            if name.endswith(scheme.patch) and scheme.is_at(name.removesuffix(scheme.patch), known)
        ),
        key=lambda tower: (_standing(tower.prefix), tower.prefix),
    )
    if not towers:
        return None
    equals = [tower.prefix for tower in towers if _standing(tower.prefix) == _standing(towers[0].prefix)]
    if len(equals) > 1:
        raise WeightsError(
            f"Several Vision Transformers are in it, under {', '.join(map(repr, equals))}; which one is meant cannot be told. "
            "Save the one that you want alone, with torch.save(model.state_dict(), path)."
        )
    return towers[0]


def other_towers(names: Iterable[str], chosen: Tower) -> list[str]:
    """Prefixes of further copies of the same scheme that were passed over."""
    scheme = chosen.scheme
    known = set(names)
    prefixes = {name.removesuffix(scheme.patch) for name in known if name.endswith(scheme.patch)}
    return sorted(prefix for prefix in prefixes - {chosen.prefix} if scheme.is_at(prefix, known))


def to_timm_names(state: Mapping[str, Tensor]) -> Renamed:
    """Give a state dict timm's names, with q, k and v in one tensor. The tensors that are given stay as they are.

    Raises:
        WeightsError: several Vision Transformers of equal standing.
    """
    tower = choose_tower(state)
    if tower is None:
        return Renamed(dict(state), None)
    prefix, scheme = tower.prefix, tower.scheme
    notes = [] if scheme.is_timm else [f"names of {scheme.name}: renamed to timm's"]
    if prefix:
        notes.insert(0, f"prefix '{prefix}' taken off the names")
    notes += [f"another copy under '{other}': not taken" for other in other_towers(state, tower)]
    inside = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    renamed = {scheme.rename(name): tensor for name, tensor in inside.items()}

    around = prefix[: prefix.rstrip(".").rfind(".") + 1]
    outside = []
    for name in state:
        if name.startswith(prefix):
            continue
        belongs = name.startswith(around) and scheme.rename_outside(name.removeprefix(around))
        if belongs:
            renamed.setdefault(belongs, state[name])
        else:
            outside.append(name)
    finished, more = scheme.finish(_with_fused_qkv(_in_shape(renamed)))
    return Renamed(finished, tower, tuple(outside), (*notes, *more))


def _standing(prefix: str) -> tuple[int, int]:
    """Smaller is better: by what the words of a prefix say, then by the usual order of envelopes."""
    words = set(re.split(r"[._]+", prefix.lower()))
    rank = next((number for number, later in enumerate(_LATER, 1) if words & set(later)), 0)
    first = prefix.split(".", maxsplit=1)[0]
    order = _ORDER.index(first) if first in _ORDER else len(_ORDER)
    return (len(_LATER) + 1 if words & _NO_TOWER else rank), order


def _in_shape(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tokens as (1, N, D): some write the class token as (D,), the positions as (N, D)."""
    tokens = ("cls_token", "dist_token", "reg_token", "pos_embed", "attn_pool.latent")
    return {
        name: tensor.reshape(1, -1, tensor.shape[-1]) if name in tokens and 0 < tensor.ndim < 3 else tensor
        for name, tensor in state.items()
    }


_PART = re.compile(r"(?P<at>.*attn\.)(?P<part>[qkv])\.(?P<kind>weight|bias)")


def _with_fused_qkv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """blocks.N.attn.{q,k,v} as one blocks.N.attn.qkv. A bias that one of them lacks is zero, which is the same."""
    fused, parts = {}, dict[tuple[str, str], dict[str, Tensor]]()
    for name, tensor in state.items():
        match = _PART.fullmatch(name)
        if match is None or not name.startswith("blocks."):
            fused[name] = tensor
        else:
            parts.setdefault((match["at"], match["kind"]), {})[match["part"]] = tensor
    for (at, kind), found in parts.items():
        if kind == "bias":
            some = next(iter(found.values()))
            found = {part: found.get(part, torch.zeros_like(some)) for part in "qkv"}
        if found.keys() == set("qkv"):
            fused[f"{at}qkv.{kind}"] = torch.cat([found[part] for part in "qkv"])
        else:
            fused.update({f"{at}{part}.{kind}": tensor for part, tensor in found.items()})
    return fused
