"""Weights of any origin: files become flat state dicts, and a state dict is fitted to a model.

A transfer starts from somebody else's file, so nearly everything that can go wrong goes wrong here: another
architecture, another image size, another number of classes, a damaged download. A model is filled whole or not touched.
What had to be adapted (a new head, resampled embeddings) is listed by name in a `LoadReport`; what cannot be adapted is a
`WeightsError` that tells what the file looks like beside what the model expects.

Layouts are timm's business: renaming, resampling and the `.npz` files of the ViT authors go through timm's own readers.
What is added is what timm leaves out: checks before anything is copied, and prefix tokens (class, distillation,
registers) that differ between file and model. Pickles are opened in weights-only mode alone, which runs no code.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models import clean_state_dict
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from p3b.errors import ModelError, WeightsError
from p3b.storage.untrusted import READ_ERRORS, first_line, is_finite, read_npz, read_pickle, read_safetensors
from p3b.vit.architecture import MOST_BLOCKS

_SUFFIXES = (".pth", ".pt", ".safetensors", ".npz")
_MOST_PATCH_PIXELS = 64 * 64  # timm resamples a kernel by one image for each of its pixels
# Where training scripts put the weights inside a checkpoint, the trained ones before their moving average.
_WRAPPERS = ("model", "state_dict", "model_ema", "state_dict_ema")
# Tensors that cannot be left out without changing what is computed; heads and tokens can be a choice.
_ESSENTIAL = re.compile(r"(blocks|patch_embed|norm_pre|norm|fc_norm)\.|pos_embed$")
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


@dataclass(frozen=True)
class LoadReport:
    """What became of every tensor when weights were loaded, each mismatch by name."""

    source: str
    """Where the weights came from."""
    loaded: int
    """Tensors taken as they are."""
    replaced: tuple[str, ...] = ()
    """Heads of another size, with both shapes: kept as newly initialised."""
    resampled: tuple[str, ...] = ()
    """Position and patch embeddings that were adapted to another grid, patch or set of prefix tokens."""
    missing: tuple[str, ...] = ()
    """In the model, not in the file (only heads can be)."""
    unexpected: tuple[str, ...] = ()
    """In the file, not in the model (only heads, prefix tokens and what belongs to training can be)."""

    def lines(self) -> list[str]:
        """The report for a log, one line a fact."""
        return [
            f"{self.source}: {self.loaded} tensors taken as they are",
            *(f"replaced {item}" for item in self.replaced),
            *(f"resampled {item}" for item in self.resampled),
            *(f"missing {name}: kept as newly initialised" for name in self.missing),
            *(f"unexpected {name}: left out" for name in self.unexpected),
        ]


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a weights file into a flat state dict on the CPU.

    Args:
        path: `.pth` or `.pt` (a state dict, bare or under `model`, `state_dict` or, where those are absent, `model_ema` or
            `state_dict_ema`; pickles in weights-only mode), `.safetensors`, or `.npz` in the layout of the ViT authors.

    Returns:
        Tensors by name, without the prefixes of DDP and `torch.compile`; timm's names for `.npz`.

    Raises:
        WeightsError: the file is missing, empty, damaged, of an unknown kind, holds code objects, no weights, or values
            that are not finite.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if path.is_dir():
        raise WeightsError(
            f"'{path}' is a folder without a model that p3b saved (its config.json); expected such a folder or a weights "
            f"file ({', '.join(_SUFFIXES)})."
        )
    if not path.is_file():
        raise WeightsError(f"There is no weights file '{path}'. Check the path.")
    if suffix not in _SUFFIXES:
        raise WeightsError(f"'{path}': unknown kind of weights file '{suffix}'; expected {', '.join(_SUFFIXES)}.")
    if path.stat().st_size == 0:
        raise WeightsError(f"'{path}' is empty, as after a broken download. Fetch or save it again.")
    if suffix == ".npz":
        state = _convert_npz(read_npz(path), path)
    else:
        state = _unwrap(read_safetensors(path) if suffix == ".safetensors" else read_pickle(path), path)
    _check_values(state, path)
    return state


def load_weights(model: nn.Module, state_dict: Mapping[str, Tensor], source: str = "") -> LoadReport:
    """Load a state dict into a timm `VisionTransformer`, adapting what can be adapted.

    Heads of another size or absent from the state dict stay as they are in the model. Position embeddings are
    resampled to the model's grid, patch kernels to its patch size. Rows of position embeddings that belong to prefix
    tokens are selected, or, where one side has none of them, folded into or out of the tokens, which changes no output.

    Args:
        model: filled in place; untouched when an error is raised.
        state_dict: tensors by timm's names, or a layout that timm's own filter renames (DeiT-III, DINOv2, CLIP, ...).
        source: names the weights in report and errors.

    Raises:
        ModelError: the model is not a `VisionTransformer`.
        WeightsError: the weights belong to another architecture: they do not cover everything but the heads, or hold what
            the model would leave out of its computation (a layer scale, a norm, further blocks).
    """
    if not isinstance(model, VisionTransformer):
        raise ModelError(f"Weights can be loaded into a VisionTransformer of timm; this is a {type(model).__name__}.")
    label = f"Weights '{source}'" if source else "The weights"
    target = model.state_dict()
    beside = f"The checkpoint looks like {_anatomy(state_dict)}; the model has {_anatomy(target)}."

    kernel = state_dict.get("patch_embed.proj.weight")
    if kernel is not None and kernel.ndim == 4 and kernel[0, 0].numel() > _MOST_PATCH_PIXELS:
        raise WeightsError(f"{label} are for patches of {kernel.shape[2]}x{kernel.shape[3]} pixels, which cannot be resampled.")
    prepared, prefix_notes = _fit_prefix_tokens(state_dict, model, label)
    try:
        fitted = checkpoint_filter_fn(prepared, model, adapt_layer_scale=True)
    except READ_ERRORS as error:
        raise WeightsError(f"{label} belong to another architecture (timm: {first_line(error)}). {beside}") from error
    _require_fit(fitted, target, label, beside)

    taken = {key: value for key, value in fitted.items() if key in target and value.shape == target[key].shape}
    resampled = prefix_notes + [
        f"{key}: {shapes(prepared[key], taken[key])}: interpolated"
        for key in ("pos_embed", "patch_embed.proj.weight")
        if key in taken and key in prepared and prepared[key].shape != taken[key].shape
    ]
    model.load_state_dict(taken, strict=False)
    return LoadReport(
        source=source or "state dict",
        loaded=len(taken.keys() - {note.split(":")[0] for note in resampled}),
        replaced=tuple(
            f"{key}: {shapes(value, target[key])}: kept as newly initialised"
            for key, value in fitted.items()
            if key in target and key not in taken
        ),
        resampled=tuple(resampled),
        missing=tuple(key for key in target if key not in fitted),
        unexpected=tuple(key for key in fitted if key not in target),
    )


def is_head(key: str) -> bool:
    """Whether a tensor belongs to the classifier, which is replaced where the classes are others."""
    return key.startswith(("head.", "head_dist."))


def shapes(found: Tensor, expected: Tensor) -> str:
    """Both shapes of one tensor, for a report."""
    return f"checkpoint {tuple(found.shape)}, model {tuple(expected.shape)}"


# --------------------------------------------------------------------------------------------- what a file holds


def _unwrap(content: object, path: Path) -> dict[str, Tensor]:
    """The state dict inside a checkpoint."""
    expected = f"expected a state dict, bare or under one of {', '.join(_WRAPPERS)}"
    if not isinstance(content, Mapping):
        raise WeightsError(f"'{path}' holds a {type(content).__name__}; {expected}.")
    inside = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), content)
    tensors = {str(key): value for key, value in inside.items() if isinstance(value, Tensor)}
    if not tensors:
        raise WeightsError(f"'{path}' holds no weights but {_first([str(key) for key in content])}; {expected}.")
    return clean_state_dict(tensors)


def _check_values(state: Mapping[str, Tensor], path: Path) -> None:
    floating = {key: value for key, value in state.items() if value.is_floating_point()}
    if not floating:
        raise WeightsError(f"'{path}' holds no floating-point tensors, so no weights. Give the weights of a model.")
    for key, value in floating.items():
        if not is_finite(value):
            raise WeightsError(
                f"'{path}': '{key}' holds NaN or infinite values, as after a training run that diverged. Give an earlier "
                "checkpoint."
            )


def _convert_npz(arrays: Mapping[str, np.ndarray], path: Path) -> dict[str, Tensor]:
    """Give the ViT authors' archive timm's names, with timm's reader, by way of a model of the archive's own shape.

    So a model of another grid or head meets it like any other state dict, and everything adapted is reported the same way.
    """
    prefix = next((p for p in ("", "opt/target/", "params/img/", "params/") if f"{p}embedding/kernel" in arrays), None)
    if prefix is None or f"{prefix}conv_root/kernel" in arrays:
        raise WeightsError(
            f"'{path}' is not in the layout of the ViT authors' archives (embedding/kernel, Transformer/encoderblock_0/...): "
            f"its first names are {_first(list(arrays))}. Give a .pth or .safetensors file instead."
        )
    try:
        arguments = _npz_arguments(arrays, prefix)
        _require_room(arguments, arrays)
        with torch.random.fork_rng(devices=[]):  # its first values are all overwritten: they should cost no random numbers
            model = VisionTransformer(**arguments)
        model.load_pretrained(str(path), prefix=prefix)
    except READ_ERRORS as error:
        raise WeightsError(
            f"'{path}' begins like an archive of the ViT authors, but is not complete ({first_line(error)}). Fetch it "
            "again, or give a .pth or .safetensors file instead."
        ) from error
    return model.state_dict()


def _require_room(arguments: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """ValueError where the shapes of a few arrays speak of a model that is larger than all of them."""
    if not 1 <= arguments["depth"] <= MOST_BLOCKS:
        raise ValueError(f"it speaks of {arguments['depth']} blocks")
    with torch.device("meta"):
        wanted = sum(parameter.numel() for parameter in VisionTransformer(**arguments, weight_init="skip").parameters())
    held = sum(array.size for array in arrays.values())
    if wanted > held:
        raise ValueError(f"its shapes are of a model of {wanted} parameters, it holds {held}")


def _npz_arguments(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, Any]:
    """Arguments of the `VisionTransformer` whose weights an archive holds."""
    names = {key.removeprefix(prefix): array.shape for key, array in arrays.items() if key.startswith(prefix)}
    stacked = names.get("Transformer/encoderblock/LayerNorm_0/scale")  # big_vision: all blocks in one array, index first
    depth = stacked[0] if stacked else len({key.split("/")[1] for key in names if "/encoderblock_" in key})
    block = "Transformer/encoderblock/" if stacked else "Transformer/encoderblock_0/"
    inside = {"/".join(key.split("/")[-2:]): shape for key, shape in names.items() if key.startswith(block)}

    patch_h, patch_w, in_chans, embed_dim = names["embedding/kernel"]
    positions = {key.split("/")[-1]: shape[-2] for key, shape in names.items() if len(shape) > 1}["pos_embedding"]
    class_token = "cls" in names
    no_embed_class = class_token and _is_square(positions)
    side = math.isqrt(positions - (class_token and not no_embed_class))
    pooled = any(key.startswith("MAPHead_0/") for key in names)
    return {
        "img_size": (side * patch_h, side * patch_w),
        "patch_size": (patch_h, patch_w),
        "in_chans": in_chans,
        "embed_dim": embed_dim,
        "depth": depth,
        "num_heads": inside["query/kernel"][-2],
        # timm truncates the product: the half keeps rounding from losing a unit
        "mlp_ratio": (inside["Dense_0/kernel"][-1] + 0.5) / embed_dim,
        "class_token": class_token,
        "no_embed_class": no_embed_class,
        "global_pool": "map" if pooled else "token" if class_token else "avg",
        "fc_norm": False,
        "num_classes": names["head/bias"][-1] if "head/bias" in names else 0,
    }


# ------------------------------------------------------------------------------------------- fitting a state dict


def _require_fit(fitted: Mapping[str, Tensor], target: Mapping[str, Tensor], label: str, beside: str) -> None:
    """Refuse weights that leave anything but a head unfilled, or that the model would compute something else with."""
    common = [key for key in target if key in fitted]
    integers = [key for key in common if not fitted[key].is_floating_point()]
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
        problems.append(f"have {len(misshapen)} tensors of another shape ({_first(misshapen, '; ')})")
    if lost:
        problems.append(f"lack {len(lost)} tensors that the model has ({_first(lost)})")
    if essential or (lost and unexpected):
        surplus = unexpected if lost else essential
        problems.append(f"hold {len(surplus)} tensors that the model has no place for ({_first(surplus)})")
    if problems:
        arguments = [next((arg for name, arg in _ARGUMENTS.items() if re.match(name, key)), "") for key in essential]
        model = "the model that the weights were trained with"
        if all(arguments) and not misshapen:
            model = " ".join(["the model with", *dict.fromkeys(arguments)]) if arguments else model
        raise WeightsError(f"{label} {' and '.join(problems)}. {beside} Build {model}, or give weights of this model.")
    if integers:
        raise WeightsError(
            f"{label}: '{integers[0]}' holds {fitted[integers[0]].dtype}, expected floating-point numbers. Quantised weights "
            "cannot be pruned: give the ones they were made from."
        )


def _anatomy(state: Mapping[str, Tensor]) -> str:
    """What the shapes of a state dict tell about its model."""
    norm, kernel, positions = (state.get(key) for key in ("blocks.0.norm1.weight", "patch_embed.proj.weight", "pos_embed"))
    blocks = [int(match[1]) for key in state if (match := re.match(r"blocks\.(\d+)\.", key))]
    facts = []
    if norm is not None:
        facts.append(f"embed_dim {norm.numel()}")
    if blocks:
        facts.append(f"depth {1 + max(blocks)}")
    if kernel is not None and kernel.ndim == 4:
        facts.append(f"patch size {kernel.shape[2]}x{kernel.shape[3]}, {kernel.shape[1]} input channels")
    if positions is not None and positions.ndim == 3:
        facts.append(f"{positions.shape[1]} positions")
    return ", ".join(facts) or "nothing that is known of a VisionTransformer"


def _fit_prefix_tokens(
    state: Mapping[str, Tensor], model: VisionTransformer, label: str
) -> tuple[dict[str, Tensor], list[str]]:
    """Give position embeddings the rows that the model's prefix tokens have; the grid is left to timm's filter.

    Returns a copy of the state dict and a note for every tensor that was changed, which begins with its name and a colon.
    """
    fitted = dict(state)
    positions = state.get("pos_embed")
    # mask_token marks DINOv2's own layout, which timm's filter converts as a whole.
    if positions is None or positions.ndim != 3 or model.pos_embed is None or "mask_token" in state:
        return fitted, []
    has, wants = _prefix_tokens(state), _prefix_tokens(model.state_dict())
    absent = dict.fromkeys(token[0] for token in wants if token not in has)
    if absent:
        raise WeightsError(
            f"{label} lack tokens that the model has ({', '.join(absent)}). Build a model without them (for instance "
            "deit_tiny_patch16_224 in place of deit_tiny_distilled_patch16_224), or give weights that have them."
        )
    patches = model.patch_embed.num_patches
    rows = next((n for n in (len(has), 0) if positions.shape[1] - n == patches or _is_square(positions.shape[1] - n)), None)
    if rows is None:
        raise WeightsError(
            f"{label}: pos_embed has {positions.shape[1]} positions, which is neither a square grid nor the model's "
            f"{patches} patches after {len(has)} prefix tokens. Build the model with the image size of the weights."
        )

    model_rows = model.pos_embed.shape[1] - patches
    row_of, grid = dict(zip(has, positions.unbind(1), strict=False)), positions[:, rows:]
    if model_rows == 0 and rows > 0:
        for name, index in wants:
            fitted[name] = fitted[name].clone() if index == 0 else fitted[name]
            fitted[name][:, index] += row_of[name, index]
        fitted["pos_embed"] = grid
        names = dict.fromkeys(name for name, _ in wants)
        notes = [
            f"{name}: its position embedding is folded into it, for the model has none for prefix tokens" for name in names
        ]
        return fitted, [*notes, f"pos_embed: {rows} rows of prefix tokens left out, for the model has none"]
    if model_rows > 0 and rows == 0:
        fitted["pos_embed"] = torch.cat((grid.new_zeros(1, model_rows, grid.shape[2]), grid), dim=1)
        return fitted, [f"pos_embed: {model_rows} rows of zeros added for prefix tokens, for the checkpoint has none"]
    if model_rows > 0 and has != wants:
        fitted["pos_embed"] = torch.cat((torch.stack([row_of[token] for token in wants], dim=1), grid), dim=1)
        left = dict.fromkeys(name for name, index in has if (name, index) not in wants)
        return fitted, [f"pos_embed: rows of {', '.join(left)} left out"]
    return fitted, []


def _prefix_tokens(state: Mapping[str, Tensor]) -> list[tuple[str, int]]:
    """Prefix tokens in the order of their position embeddings, as (tensor, index inside it)."""
    names = [name for name in ("cls_token", "dist_token", "reg_token") if name in state]
    return [(name, index) for name in names for index in range(state[name].shape[1])]


def _is_square(count: int) -> bool:
    return count > 0 and math.isqrt(count) ** 2 == count


def _first(names: Sequence[str], separator: str = ", ", count: int = 5) -> str:
    rest = len(names) - count
    return separator.join(names[:count]) + (f"{separator}and {rest} more" if rest > 0 else "")
