"""A state dict by timm's names is fitted to a model: what can be adapted is, the rest is refused, its likely cause first."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from timm.layers import resample_patch_embed
from timm.models._manipulate import adapt_input_conv
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from p3b.errors import WeightsError
from p3b.storage.load_report import first, shapes
from p3b.storage.positions import fit_positions

_MOST_PATCH_PIXELS = 64 * 64  # timm resamples a kernel by one image for each of its pixels
_KERNEL = "patch_embed.proj.weight"
# Tensors that cannot be left out without changing what is computed; heads and tokens can be a choice.
_ESSENTIAL = re.compile(r"(encoder\.)?(blocks|layers|embeds|patch_embed|norm_pre|norm|fc_norm)\.|pos_embed$")
# Tensors that a model has or has not by one of its arguments.
_ARGUMENTS = {
    r"blocks\.\d+\.ls[12]\.gamma$": "init_values=1e-5",
    r"blocks\.\d+\.attn\.[qk]_norm\.": "qk_norm=True",
    r"blocks\.\d+\.attn\.norm\.": "scale_attn_norm=True",
    r"blocks\.\d+\.mlp\.norm\.": "scale_mlp_norm=True",
    r"blocks\.\d+\.attn\.qkv\.bias$": "qkv_bias=True",
    r"blocks\.\d+\.(attn\.proj|mlp\.fc[12])\.bias$": "proj_bias=True",
    r"norm_pre\.": "pre_norm=True",
    r"norm\.": "fc_norm=False",
    r"fc_norm\.": "global_pool=avg",
    r"pos_embed$": "pos_embed=learn",
}
_SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge", 1408: "giant"}


@dataclass(frozen=True)
class Fitted:
    """Tensors of a model's shapes, and a note for each that was adapted, which begins with its name and a colon."""

    state: dict[str, Tensor]
    adapted: tuple[str, ...]


def fit(
    state: Mapping[str, Tensor], model: VisionTransformer, label: str, said: str, grid: tuple[int, int] | None = None
) -> Fitted:
    """Fit a state dict to a model, heads aside: they keep their size.

    Args:
        state: by timm's names; it stays as it is.
        model: it stays as it is.
        label: names the weights, at the beginning of a sentence.
        said: what was found about the weights' names, for errors; "" where there is nothing to say.
        grid: patches (rows, columns) that the position embeddings are for, where that is known.

    Raises:
        WeightsError: they belong to another architecture.
    """
    target = model.state_dict()
    _require_same_tower(state, target, label)
    prepared, notes = fit_positions(state, model, label, grid)
    prepared, more = _fit_kernel(prepared, model, label)
    _require_whole(
        prepared, target, label, f"{said}The checkpoint looks like {anatomy(state)}; the model has {anatomy(target)}."
    )
    return Fitted(prepared, (*notes, *more))


def anatomy(state: Mapping[str, Tensor]) -> str:
    """What the shapes of a state dict tell about its model."""
    norm, kernel, positions = (state.get(key) for key in ("blocks.0.norm1.weight", _KERNEL, "pos_embed"))
    facts = []
    if norm is not None:
        facts.append(f"embed_dim {norm.numel()}")
    if depth := _depth(state):
        facts.append(f"depth {depth}")
    if kernel is not None and kernel.ndim == 4:
        facts.append(f"patch size {kernel.shape[2]}x{kernel.shape[3]}, {kernel.shape[1]} input channels")
    if positions is not None and positions.ndim == 3:
        facts.append(f"{positions.shape[1]} positions")
    return ", ".join(facts) or "nothing that is known of a VisionTransformer"


def is_head(key: str) -> bool:
    """Whether a tensor belongs to the classifier, which is replaced where the classes are others."""
    return key.startswith(("head.", "head_dist."))


def _depth(state: Mapping[str, Tensor]) -> int:
    blocks = [int(match[1]) for key in state if (match := re.match(r"blocks\.(\d+)\.", key))]
    return 1 + max(blocks, default=-1)


def _require_same_tower(state: Mapping[str, Tensor], target: Mapping[str, Tensor], label: str) -> None:
    """Refuse what differs in one number by that number: width, depth, channels."""
    beside = f"The checkpoint looks like {anatomy(state)}; the model has {anatomy(target)}."
    norm, wanted = (tensors.get("blocks.0.norm1.weight") for tensors in (state, target))
    if norm is not None and wanted is not None and norm.numel() != wanted.numel():
        raise WeightsError(
            f"{label} are of another width: embed_dim {norm.numel()}{_size_word(norm.numel())}, the model's is {wanted.numel()}"
            f"{_size_word(wanted.numel())}. {beside} Choose the model of that width (--model), or give weights of this one."
        )
    depth, wants = _depth(state), _depth(target)
    numbers = {int(key.split(".")[1]) for key in state if re.match(r"blocks\.\d+\.", key)}
    if depth and depth != wants and norm is not None:
        surplus = first([key for key in state if key not in target] or [key for key in target if key not in state])
        raise WeightsError(
            f"{label} are of another depth: {depth} blocks, the model has {wants} ({surplus}). {beside} Build the model with "
            f"depth={depth}, or give weights of this one."
        )
    if depth and len(numbers) != depth:
        raise WeightsError(f"{label} lack blocks between the first and the last: {len(numbers)} of {depth} are there. {beside}")


def _size_word(width: int) -> str:
    return f" (ViT-{_SIZES[width]}'s)" if width in _SIZES else ""


def _fit_kernel(state: dict[str, Tensor], model: VisionTransformer, label: str) -> tuple[dict[str, Tensor], list[str]]:
    """The patch embedding for the model's channels and patch size, both adapted as timm does."""
    kernel = state.get(_KERNEL)
    if kernel is None or kernel.ndim != 4 or _KERNEL not in model.state_dict():
        return state, []
    wanted, notes, adapted = model.patch_embed.proj.weight, [], kernel
    if kernel[0, 0].numel() > _MOST_PATCH_PIXELS:
        raise WeightsError(f"{label} are for patches of {kernel.shape[2]}x{kernel.shape[3]} pixels, which cannot be resampled.")
    channels = wanted.shape[1]
    if kernel.shape[1] == 3 and channels != 3:
        adapted = adapt_input_conv(channels, adapted)
        how = "summed over the three colours" if channels == 1 else f"three colours repeated for {channels} channels and scaled"
        notes.append(f"{_KERNEL}: {shapes(kernel, wanted)}: {how}, as timm does")
    if adapted.shape[2:] != wanted.shape[2:]:
        adapted = resample_patch_embed(adapted, list(wanted.shape[2:]), interpolation="bicubic", antialias=True)
        notes.append(f"{_KERNEL}: {shapes(kernel, wanted)}: interpolated")
    return {**state, _KERNEL: adapted}, notes


def _require_whole(fitted: Mapping[str, Tensor], target: Mapping[str, Tensor], label: str, beside: str) -> None:
    """Refuse weights that leave anything but a head unfilled, or that the model would compute something else with."""
    common = [key for key in target if key in fitted]
    integers = [key for key in common if not fitted[key].is_floating_point() and target[key].is_floating_point()]
    misshapen = [
        f"{key}: {shapes(fitted[key], target[key])}"
        for key in common
        if fitted[key].shape != target[key].shape and not is_head(key)
    ]
    lost = [key for key in target if key not in fitted and not is_head(key)]
    unexpected = [key for key in fitted if key not in target]
    essential = [key for key in unexpected if _ESSENTIAL.match(key) and fitted[key].is_floating_point()]

    problems = []
    if misshapen:
        problems.append(f"have {len(misshapen)} tensors of another shape ({first(misshapen, '; ')})")
    if lost:
        problems.append(f"lack {len(lost)} tensors that the model has ({first(lost)})")
    if essential or (lost and unexpected):
        surplus = unexpected if lost else essential
        problems.append(f"hold {len(surplus)} tensors that the model has no place for ({first(surplus)})")
    if problems:
        arguments = [next((arg for name, arg in _ARGUMENTS.items() if re.match(name, key)), "") for key in essential]
        model = "the model that the weights were trained with"
        if all(arguments) and not misshapen:
            model = " ".join(["the model with", *dict.fromkeys(arguments)]) if arguments else model
        cause = _cause(fitted, target, misshapen, lost)
        raise WeightsError(f"{label} {cause}{' and '.join(problems)}. {beside} Build {model}, or give weights of this model.")
    if integers:
        raise WeightsError(
            f"{label}: '{integers[0]}' holds {fitted[integers[0]].dtype}, expected floating-point numbers. Quantised weights "
            "cannot be pruned: give the ones they were made from."
        )


def _cause(fitted: Mapping[str, Tensor], target: Mapping[str, Tensor], misshapen: list[str], lost: list[str]) -> str:
    """The likeliest reason why weights do not fit, in front of what does not."""
    if not fitted.keys() & target.keys() - {key for key in target if is_head(key)}:
        return "are of another kind of network, none of whose names are known here (no prefix, no family that p3b reads): they "
    kernel, wanted = fitted.get(_KERNEL), target.get(_KERNEL)
    if kernel is not None and wanted is not None and kernel.ndim != 4:
        return "embed patches by a linear layer (as NaFlexVit and NaFlex SigLIP 2), where the model convolves: they "
    if kernel is not None and wanted is not None and kernel.shape[1] != wanted.shape[1]:
        return f"are for images of {kernel.shape[1]} input channels, the model's have {wanted.shape[1]} (in_chans): they "
    if any(".mlp." in item for item in misshapen):
        return "are of a model with another width of the MLP (mlp_ratio), or with a gated one: they "
    if any(".mlp.fc1." in name for name in lost):
        return "have another kind of MLP (a gated one, SwiGLU, as DINOv2's giant): they "
    if lost and all(name.startswith("attn_pool.") for name in lost):
        return "have no attention pooling (global_pool=map): they "
    if lost and any(".ls1." in name or ".ls2." in name for name in lost):
        return "are of a model without layer scale (init_values): they "
    return ""
