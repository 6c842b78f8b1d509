"""A model's architecture as plain values: read off the module itself, so that no caller has to remember how it was built.

What there is to say of a model is its family's matter (`p3b.vit.families`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from p3b.errors import ModelError
from p3b.vit.families import CLASSES, family_of, family_of_class
from p3b.vit.families.allowed import is_one_of
from p3b.vit.families.family import BranchOutline, Family
from p3b.vit.valueless import without_values

BLOCK_ARGUMENTS = "p3b_block_arguments"
"""Attribute of a small model that keeps what it was built with where it does not tell: cut blocks, and a narrower stream."""


def check_description(architecture: object) -> None:
    """See that a description, from whatever file, is one that `describe_dense` could have given, before anything is built.

    Raises:
        ModelError: it lacks something, or an argument is of another type or out of its range.
    """
    kind, arguments = (architecture.get(key) if isinstance(architecture, dict) else None for key in ("class", "arguments"))
    if not isinstance(arguments, dict) or not is_one_of(tuple(CLASSES))(kind):
        raise ModelError(f"the architecture is not a class ({', '.join(CLASSES)}) with its arguments")
    family = family_of_class(CLASSES[str(kind)])
    if odd := (family.rules.keys() - arguments.keys()) | (arguments.keys() - family.rules.keys() - family.more_rules.keys()):
        raise ModelError(
            f"the architecture lacks arguments or has others than are known ({', '.join(sorted(map(str, odd))[:5])[:200]})"
        )
    rules = {**family.rules, **{name: rule for name, (rule, _) in family.more_rules.items()}}
    for name, value in arguments.items():
        fits, expected = rules[name]
        if not fits(value):
            raise ModelError(f"the architecture's {name} is {str(value)[:80]}; expected {expected}")
    family.check_arguments(with_defaults(family, arguments))


def with_defaults(family: Family, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a description, with those that it leaves out since they are as usual."""
    return {**{name: default for name, (_, default) in family.more_rules.items()}, **arguments}


def describe_dense(vit: nn.Module) -> dict[str, Any]:
    """Class and constructor arguments of the dense model that this one is or was cut from, read off the module.

    Raises:
        ModelError: a part that the arguments cannot express, or a size that `check_description` would refuse.
    """
    kind = type(vit).__name__
    if type(vit) is not CLASSES.get(kind):
        raise ModelError(f"A {kind} cannot be described in config.json; covered are {', '.join(CLASSES)}.")
    family = family_of(vit)
    arguments = {**family.describe_outside(vit), **describe_blocks(vit)}
    usual = {name: default for name, (_, default) in family.more_rules.items()}
    told = {name: value for name, value in arguments.items() if name not in usual or value != usual[name]}
    description = {"class": kind, "arguments": told}
    check_description(description)
    return description


def describe_blocks(vit: nn.Module) -> dict[str, Any]:
    """What the dense blocks, and the stream between them, were built with: kept on a small model from before it was cut, else
    read off the first block.

    Raises:
        ModelError: an activation or norm that has no name here.
    """
    kept = vit.__dict__.get(BLOCK_ARGUMENTS)
    return dict(kept) if kept is not None else family_of(vit).describe_blocks(vit)


def branches_of(architecture: Mapping[str, Any]) -> list[BranchOutline]:
    """The residual branches of the model that a checked description is of, in order."""
    family = family_of_class(CLASSES[architecture["class"]])
    return family.branches(with_defaults(family, architecture["arguments"]))


def build_dense(architecture: Mapping[str, Any]) -> VisionTransformer:
    """The dense model of a description, freshly initialised.

    Raises:
        ModelError: the description is not one of `describe_dense`.
    """
    return _build(architecture, values=True)


def build_skeleton(architecture: Mapping[str, Any]) -> VisionTransformer:
    """The dense model of a description on the meta device: shapes without memory.

    Raises:
        ModelError: the description is not one of `describe_dense`.
    """
    with without_values():  # drawing values that nobody holds takes most of the time
        return _build(architecture, values=False)


def _build(architecture: Mapping[str, Any], *, values: bool) -> VisionTransformer:
    check_description(architecture)
    kind = CLASSES[architecture["class"]]
    family = family_of_class(kind)
    return cast("VisionTransformer", family.build(kind, with_defaults(family, architecture["arguments"]), values=values))
