"""Position embeddings for another grid of patches or another set of prefix tokens, each change in words.

Rows that belong to prefix tokens (class, distillation, registers) are selected, or, where one side has none of them, folded
into or out of the tokens, which changes no output. The rest is a grid, and is resampled as timm does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from p3b.errors import WeightsError
from p3b.vit.families import images_of, width_of

_WITHOUT = {
    "cls_token": "class_token=False with global_pool=avg, or a model such as SigLIP's that pools otherwise",
    "dist_token": "for instance deit_tiny_patch16_224 in place of deit_tiny_distilled_patch16_224",
    "reg_token": "reg_tokens=0, or as many as they have",
}
_Fitted = tuple[dict[str, Tensor], list[str]]


def fit_positions(state: Mapping[str, Tensor], model: VisionTransformer, label: str, grid: tuple[int, int] | None) -> _Fitted:
    """The state with positions for the model's tokens, and a note for every tensor that was changed, with its name in front.

    Args:
        state: by timm's names; it stays as it is.
        model: whose tokens and grid are wanted.
        label: names the weights in errors.
        grid: patches (rows, columns) that the positions are for, where that is known.

    Raises:
        WeightsError: tokens that the model has are not there, or the positions form no grid.
    """
    fitted, positions = dict(state), state.get("pos_embed")
    if positions is None or positions.ndim != 3 or model.pos_embed is None or positions.shape[2] != width_of(model):
        return fitted, []
    has, wants = _prefix_tokens(state), _prefix_tokens(model.state_dict())
    absent = dict.fromkeys(token[0] for token in wants if token not in has)
    if absent:
        mend = _WITHOUT[next(iter(absent))]
        raise WeightsError(
            f"{label} lack tokens that the model has ({', '.join(absent)}). Build a model without them ({mend}), or give "
            "weights that have them."
        )
    patches = math.prod(images_of(model).grid)
    counts = (math.prod(grid),) if grid else ()
    rows = next((n for n in (len(has), 0) if positions.shape[1] - n in counts), None)
    if rows is None:
        rows = next((n for n in (len(has), 0) if positions.shape[1] - n == patches or _is_square(positions.shape[1] - n)), None)
    if rows is None:
        raise WeightsError(
            f"{label}: pos_embed has {positions.shape[1]} positions, which is neither a square grid nor the model's "
            f"{patches} patches after {len(has)} prefix tokens. Build the model with the image size of the weights."
        )
    fitted, notes = _fit_prefix(fitted, model, has, wants, rows)
    return _fit_grid(fitted, model, notes, _grid_of(positions.shape[1] - rows, model, grid))


def _fit_prefix(
    fitted: dict[str, Tensor], model: VisionTransformer, has: list[tuple[str, int]], wants: list[tuple[str, int]], rows: int
) -> _Fitted:
    positions = fitted["pos_embed"]
    model_rows = model.pos_embed.shape[1] - math.prod(images_of(model).grid)
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


def _fit_grid(fitted: dict[str, Tensor], model: VisionTransformer, notes: list[str], old: tuple[int, int]) -> _Fitted:
    new = images_of(model).grid
    if old == new:
        return fitted, notes
    before = fitted["pos_embed"]
    rows = model.pos_embed.shape[1] - math.prod(images_of(model).grid)
    fitted["pos_embed"] = resample_abs_pos_embed(before, new_size=list(new), old_size=list(old), num_prefix_tokens=rows)
    taken = ", the checkpoint's taken for square as timm does" if old[0] == old[1] and math.prod(old) == math.prod(new) else ""
    shown = f"checkpoint {tuple(before.shape)}, model {tuple(model.pos_embed.shape)}"
    how = f"{shown}: interpolated from a grid of {old[0]}x{old[1]} to {new[0]}x{new[1]}{taken}"
    return fitted, [*notes, f"pos_embed: {how}"]


def _grid_of(count: int, model: VisionTransformer, known: tuple[int, int] | None) -> tuple[int, int]:
    """The grid that so many positions are for: as it is said, else a square as timm takes it, else the model's own."""
    if known is not None and math.prod(known) == count:
        return known
    if _is_square(count):
        return math.isqrt(count), math.isqrt(count)
    return images_of(model).grid


def _prefix_tokens(state: Mapping[str, Tensor]) -> list[tuple[str, int]]:
    """Prefix tokens in the order of their position embeddings, as (tensor, index inside it)."""
    names = [name for name in ("cls_token", "dist_token", "reg_token") if name in state]
    return [(name, index) for name in names for index in range(state[name].shape[1])]


def _is_square(count: int) -> bool:
    return count > 0 and math.isqrt(count) ** 2 == count
