"""What the installed timm offers: which of its models can be pruned, how far, and why the others cannot.

Nothing of it is a list kept by hand: each model is built on the meta device and looked at as `p3b.Pruner` looks at one.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import TYPE_CHECKING, cast

import timm
from timm.models import split_model_name_tag
from torch import nn

from p3b.core.allocation import largest_prune_ratio
from p3b.errors import ModelError
from p3b.storage.outline import outline, require_prunable
from p3b.storage.suggestions import unknown_model
from p3b.storage.untrusted import first_line
from p3b.vit.cost import count_parameters, dense_params
from p3b.vit.wrappers import COVERED

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

_SIZE = re.compile(
    r"\d.*|(patch|window|win|reg|r|s|p|h|so|nb|resnet)\d.*|x*(xs|small|large)|tiny|base|huge|giant|gigantic|medium|nano|pico|"
    r"plus|xx?[sl]|[smlbh]|test|wee|little|pwee|dwee|dpwee|dlittle|mediumd|betwixt|gap|r"
)
"""Words of a name that tell a size, and no family."""


@dataclass(frozen=True)
class Entry:
    """A model of timm's.

    Attributes:
        name: without a tag.
        family: its name without the words that tell sizes.
        kind: its class; "" where it was not built.
        weights: tags of the pretrained weights that timm knows for it.
        params: all its parameters, 0 where it was not built.
        prunable_params: those in blocks that can shrink; 0 where none can.
        has_attention: whether some layer of it attends, by its class and the names of its layers' classes.
        refusal: why it cannot be pruned; "" where it can.
    """

    name: str
    family: str
    kind: str
    weights: tuple[str, ...]
    params: int
    prunable_params: int
    has_attention: bool
    refusal: str

    @property
    def prunable(self) -> bool:
        return not self.refusal

    @property
    def largest_ratio(self) -> float | None:
        """The largest ratio of all parameters that can go; None where none can."""
        return largest_prune_ratio(self.prunable_params, self.params - self.prunable_params) if self.prunable else None


def matching(pattern: str) -> list[str]:
    """timm's names that a pattern means, in timm's order; all of them for "".

    Args:
        pattern: with wildcards, of a name or of a name with its tag (`vit_*.dino*`); without, part of a name.

    Raises:
        ModelError: there is none; the message names some that are called alike.
    """
    wild = pattern if re.search(r"[*?\[]", pattern) else f"*{pattern}*"
    found = [
        name
        for name in timm.list_models()
        if fnmatchcase(name, wild) or any(fnmatchcase(f"{name}.{tag}", wild) for tag in _tags().get(name, ()))
    ]
    if not found:
        raise ModelError(unknown_model(pattern))
    return found


def may_be_covered(name: str) -> bool:
    """Whether timm's module of this model knows a class that can be pruned at all; the model need not be of it."""
    known = vars(sys.modules[timm.model_entrypoint(name).__module__]).values()
    return any(value in COVERED for value in known if isinstance(value, type))


@cache
def entry(name: str, num_classes: int = 1000, built: bool = True) -> Entry:
    """What is known of one of timm's models; found once in a process.

    Args:
        name: without a tag.
        num_classes: of the head of a model that can be pruned; others are as timm builds them.
        built: False: it is not one that can be pruned (`may_be_covered`), and nothing else is asked.
    """
    tags = _tags().get(name, ())
    if not built:
        return Entry(name, family_of(name), "", tags, 0, 0, False, "another kind of network")
    try:
        model = outline(name)
    except Exception as error:  # whatever timm raises: this model asks for values, or for a package that is not there
        return Entry(name, family_of(name), "", tags, 0, 0, False, f"timm cannot outline it ({first_line(error)})")
    kind, attends = type(model).__name__, _has_attention(model)
    try:
        layout = require_prunable(model)
    except ModelError as error:
        return Entry(name, family_of(name), kind, tags, count_parameters(model), 0, attends, _in_short(model, error))
    if hasattr(model, "reset_classifier"):  # a tower has no head
        cast("VisionTransformer", model).reset_classifier(num_classes)
    inside = sum(map(dense_params, layout.blocks))
    return Entry(name, family_of(name), kind, tags, count_parameters(model), inside, attends, "")


def family_of(name: str) -> str:
    """A name without the words that tell sizes: "vit_small_patch14_reg4_dinov2" -> "vit dinov2"."""
    first, *words = name.split("_")
    return " ".join([first, *(word for word in words if not _SIZE.fullmatch(word))])


def summary(entries: Sequence[Entry], of: str = "entries") -> str:
    """How many of them can be pruned, in a line."""
    prunable = [each for each in entries if each.prunable]
    with_weights, all_weights = (sum(len(each.weights) for each in some) for some in (prunable, entries))
    return f"{len(prunable):,} of {len(entries):,} {of}, {with_weights:,} of {all_weights:,} pretrained weights can be pruned"


def _in_short(model: nn.Module, error: ModelError) -> str:
    """Why a model is refused, in a few words: its class, or the layer."""
    if type(model) not in COVERED:
        return f"built as {type(model).__name__}"
    told = str(error).removeprefix("The model cannot be pruned: ")
    return told.split(". ", maxsplit=1)[0].removesuffix(".")


def _has_attention(model: nn.Module) -> bool:
    return type(model) in COVERED or any(re.search(r"Attention|Attn", type(module).__name__) for module in model.modules())


@cache
def _tags() -> dict[str, tuple[str, ...]]:
    """Tags of the pretrained weights of every model that has any."""
    found: dict[str, list[str]] = {}
    for full in timm.list_pretrained():
        name, tag = split_model_name_tag(full)
        found.setdefault(name, []).append(tag)
    return {name: tuple(tags) for name, tags in found.items()}
