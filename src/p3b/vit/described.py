"""Whether a model is what its description says: module for module the one that timm builds from it, cut as its blocks tell.

A file holds a description and the weights, so this is what saving rests on. And it is the allow-list of what can be pruned,
down to every leaf: a layer is covered if timm, given the description, puts a layer of exactly this class, with these tensors
and settings, in this place. What acts in training alone (dropout, stochastic depth, gradient checkpointing) is left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from itertools import chain

import torch
from timm.layers import DropPath, LayerNorm, PatchDropout
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from p3b.errors import ModelError
from p3b.vit.anatomy.shape import BranchShape
from p3b.vit.architecture import BLOCK_ARGUMENTS, build_skeleton, describe_dense
from p3b.vit.compact import reshape_branches
from p3b.vit.coverage import foreign_parts
from p3b.vit.families import width_of
from p3b.vit.families.activations import activation_name
from p3b.vit.layout import require_standard_blocks
from p3b.vit.parts import NoBlock
from p3b.vit.shapes import branch_shapes
from p3b.vit.valueless import NoValues
from p3b.vit.wrappers import is_sharded

_SAME_KIND: dict[type[nn.Module], type[nn.Module]] = {nn.LayerNorm: LayerNorm, DropPath: nn.Identity, PatchDropout: nn.Identity}
"""Classes that compute the same, in evaluation at least, as others that timm may put in their place."""
_IN_TRAINING = {
    "training",
    "fused_attn",
    "inplace",
    "p",
    "grad_checkpointing",
    "fix_init",
    "weight_init_mode",
    "distilled_training",
    "drop_prob",
    "aug_active",
}
_OF_NO_MATTER = _IN_TRAINING | {"num_classes", "init_values", "target_shift_size"}
"""Settings that may differ: they act in training or at the start alone, or follow from something else. Swin's `shift_size` is
what a block shifts by; the target beside it is that of a window that the image may be too small for."""


def require_described(model: VisionTransformer, purpose: str = "saved") -> None:
    """Compare a dense or small model with what its own description gives.

    Args:
        model: in no layout but the compact one; it is not changed.
        purpose: what is to be done with it, for the message.

    Raises:
        ModelError: it cannot be described, or something in it is other than the description says; the message names it.
    """
    if BLOCK_ARGUMENTS not in model.__dict__:
        require_standard_blocks(model)
    description = json.dumps(describe_dense(model))
    try:
        described = _skeleton(description, tuple(branch_shapes(model)), width_of(model))
    except ModelError as error:
        raise ModelError(f"The model cannot be {purpose}: {error}.") from error
    for difference in _differences(model, described):
        raise ModelError(f"The model cannot be {purpose}: {difference}")


@lru_cache(maxsize=4)
def _skeleton(description: str, shapes: tuple[BranchShape, ...], width: int) -> VisionTransformer:
    """What a description gives, cut to shapes and a width; nobody may change it. A run wants the same one at each save."""
    built = build_skeleton(json.loads(description))
    with NoValues():
        reshape_branches(built, shapes, width)
    return built


def _differences(model: nn.Module, described: nn.Module) -> Iterator[str]:
    """What is other than described, each as the rest of a sentence."""
    expected = dict(described.named_modules())
    found = dict(model.named_modules(remove_duplicate=False))
    for name, module in found.items():
        if name not in expected:
            owner, _, part = name.rpartition(".")
            yield (
                f"{owner or 'the model'} has a part '{part}' ({type(module).__name__}) that timm's does not have. "
                + foreign_parts(found[owner])
            )
        else:
            yield from _differences_of_one(name, module, expected[name])
    for name in expected.keys() - found.keys():
        yield f"{name} is missing, where timm's has a {type(expected[name]).__name__}."


def _differences_of_one(name: str, module: nn.Module, expected: nn.Module) -> Iterator[str]:
    place = name or "the model"
    is_activation = name.endswith(".mlp.act")
    if is_activation and (found := activation_name(module)) != (first := activation_name(expected)):
        yield f"{name} is {found}, and {first} in blocks.0: blocks must be alike."
    if not is_activation and (kind := _kind(module)) is not _kind(expected):
        if is_sharded(type(module)):
            yield f"{place} is sharded by FSDP. Hand in the model before fully_shard."
        yield f"{place} is a {kind.__module__}.{kind.__name__}, expected {type(expected).__name__}. {foreign_parts(module)}"
    tensors, known = _tensors(module), _tensors(expected)
    for key in [key for key in {**tensors, **known} if tensors.get(key) != known.get(key)]:
        yield (
            f"{name}.{key}".lstrip(".")
            + f" is {_shape(tensors.get(key))}, and {_shape(known.get(key))} in what timm builds from "
            f"the model's description. {_reason(module, key, known)}"
        )
    settings = {} if isinstance(expected, NoBlock) else vars(expected)  # a block that is gone computes by none
    for key, value in settings.items():
        if (
            key.startswith(("_", "p3b_"))
            or key in _OF_NO_MATTER
            or not isinstance(value, (bool, int, float, str, tuple, type(None)))
        ):
            continue
        if (has := getattr(module, key, None)) != value:
            yield f"{place}.{key} is {has!r}, expected {value!r}: blocks must be alike, and settings as they were built."
    for key, buffer in expected.named_buffers(recurse=False):
        if not buffer.is_meta and not torch.equal(buffer, module.get_buffer(key).cpu()):
            yield f"{place}.{key} is not what the model was cut by."


def _reason(module: nn.Module, key: str, known: dict[str, tuple[int, ...]]) -> str:
    if isinstance(module, nn.LayerNorm) and key in known:
        return "Norms without affine part are not covered."
    return foreign_parts(module) if key not in known else "All blocks must be alike but for what was pruned."


def _kind(module: nn.Module) -> type[nn.Module]:
    return _SAME_KIND.get(type(module), type(module))


def _tensors(module: nn.Module) -> dict[str, tuple[int, ...]]:
    own = chain(module.named_parameters(recurse=False, remove_duplicate=False), module.named_buffers(recurse=False))
    return {key: tuple(tensor.shape) for key, tensor in own}


def _shape(shape: tuple[int, ...] | None) -> str:
    return "no tensor" if shape is None else f"of shape {shape}"
