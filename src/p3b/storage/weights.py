"""Weights of any origin: files become flat state dicts, and a state dict is fitted to a model.

A transfer starts from somebody else's file, so nearly everything that can go wrong goes wrong here: another library's names,
another architecture, another image size, another number of classes, a damaged download. A model is filled whole or not
touched. What had to be adapted (a new head, resampled embeddings) is listed by name in a `LoadReport`; what cannot be adapted
is a `WeightsError` that tells the likely cause first.

    a path      -> weights_file: what kind of file, what lies beside it      -> envelope: where in it the weights lie
    a state     -> naming: whose names, under which prefix; timm's names     -> families: is it a plain ViT at all
    a model     -> fitting: positions, patch embedding, and whole or nothing -> load_report: what became of every tensor

Pickles are opened in weights-only mode alone, which runs no code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

from timm.models import (
    beit,
    eva,
    hiera,
    naflexvit,
    qwen3_vit,
    swin_transformer,
    swin_transformer_v2,
    vision_transformer_relpos,
    vision_transformer_sam,
)
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from p3b.errors import ModelError, WeightsError
from p3b.storage.arithmetic import require_same_arithmetic, set_epsilon
from p3b.storage.families import doubts, foreign_family
from p3b.storage.fitting import anatomy, fit, is_head
from p3b.storage.hub_folder import NOTHING_SAID, Facts
from p3b.storage.load_report import LoadReport, first, shapes
from p3b.storage.naming import Renamed, to_timm_names
from p3b.storage.untrusted import READ_ERRORS, first_line
from p3b.storage.weights_file import open_weights
from p3b.vit.families import CLASSES

__all__ = ["LoadReport", "load_weights", "read_weights"]


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a weights file, or the folder of a hub, into a flat state dict on the CPU.

    Args:
        path: a file of torch.save (a state dict, bare or in any envelope; pickles in weights-only mode), safetensors, or `.npz`
            in the layout of the ViT authors, each whatever its ending; or a folder with one of the first two and a config.json.

    Returns:
        Tensors by the names that the file has inside its envelope; timm's names for `.npz`.

    Raises:
        WeightsError: the file is missing, empty, damaged, of an unknown kind, holds code objects, no weights, or values
            that are not finite.
    """
    return open_weights(path).state


_READERS: Mapping[type[nn.Module], Callable[..., dict[str, Tensor]]] = {
    beit.Beit: beit.checkpoint_filter_fn,
    eva.Eva: eva.checkpoint_filter_fn,
    hiera.Hiera: hiera.checkpoint_filter_fn,
    naflexvit.NaFlexVit: naflexvit.checkpoint_filter_fn,
    qwen3_vit.Qwen3VitClassifier: qwen3_vit.checkpoint_filter_fn_classifier,
    qwen3_vit.Qwen3VitEncoder: qwen3_vit.checkpoint_filter_fn_encoder,
    swin_transformer.SwinTransformer: swin_transformer.checkpoint_filter_fn,
    swin_transformer_v2.SwinTransformerV2: swin_transformer_v2.checkpoint_filter_fn,
    vision_transformer_relpos.VisionTransformerRelPos: vision_transformer_relpos.checkpoint_filter_fn,
    vision_transformer_sam.VisionTransformerSAM: vision_transformer_sam.checkpoint_filter_fn,
}
"""timm's own readers of checkpoints, by the class that they read for."""


def load_weights(
    model: nn.Module, state_dict: Mapping[str, Tensor], source: str = "", facts: Facts = NOTHING_SAID
) -> LoadReport:
    """Load a state dict into a timm `VisionTransformer`, adapting what can be adapted.

    Heads of another size or absent from the state dict stay as they are in the model. Position embeddings are
    resampled to the model's grid, patch kernels to its patch size and channels. Rows of position embeddings that belong to
    prefix tokens are selected, or, where one side has none of them, folded into or out of the tokens, which changes no output.

    Args:
        model: filled in place; untouched when an error is raised.
        state_dict: tensors by the names of timm, transformers, torchvision, CLIP or research code, under any prefix.
        source: names the weights in report and errors.
        facts: what is said of the weights beside them: the number of heads is compared, the norms take their epsilon.

    Raises:
        ModelError: the model is not a `VisionTransformer`.
        WeightsError: the weights belong to another architecture: they do not cover everything but the heads, or hold what
            the model would leave out of its computation (a layer scale, a norm, further blocks), or compute otherwise.
    """
    if not isinstance(model, tuple(CLASSES.values())):
        raise ModelError(f"Weights can be loaded into a VisionTransformer of timm; this is a {type(model).__name__}.")
    model = cast("VisionTransformer", model)  # whatever its family, it is used as one
    label = f"Weights '{source}'" if source else "The weights"
    renamed = _renamed(state_dict, model, label, facts, source)
    require_same_arithmetic(model, label, facts)
    state, head_notes = _without_false_heads(renamed, model)
    said = f"({'; '.join(renamed.notes)}.) " if renamed.notes else ""
    fitted = fit(state, model, label, said, facts.grid)

    target = model.state_dict()
    taken = {key: value for key, value in fitted.state.items() if key in target and value.shape == target[key].shape}
    model.load_state_dict(taken, strict=False)
    notes = (
        *renamed.notes,
        *head_notes,
        *set_epsilon(model, facts),
        *doubts(renamed.state, _tower_names(state_dict, renamed), facts),
    )
    return LoadReport(
        source=source or "state dict",
        loaded=len(taken.keys() - {note.split(":")[0] for note in fitted.adapted}),
        replaced=tuple(
            f"{key}: {shapes(value, target[key])}: kept as newly initialised"
            for key, value in fitted.state.items()
            if key in target and key not in taken
        ),
        resampled=fitted.adapted,
        missing=tuple(key for key in target if key not in fitted.state),
        unexpected=tuple(key for key in (*fitted.state, *renamed.outside) if key not in target),
        notes=notes,
    )


def _renamed(state: Mapping[str, Tensor], model: VisionTransformer, label: str, facts: Facts, source: str) -> Renamed:
    """By timm's names, and of a plain Vision Transformer as far as names can tell; those of others as timm reads them."""
    if (reader := _READERS.get(type(model))) is not None:
        return _as_timm_reads(state, lambda: reader(dict(state), model), label)
    try:
        renamed = to_timm_names(state)
    except WeightsError as error:
        raise WeightsError(f"{label}: {error}") from error
    family = foreign_family(renamed.state, _tower_names(state, renamed), facts, source)
    if family is not None:
        names = f"the first names are {first(list(state), count=3)}"
        beside = f"The checkpoint looks like {anatomy(renamed.state)}; {names}."
        raise WeightsError(f"{label} are {family}. {beside} Give weights of a plain ViT or DeiT.")
    if renamed.tower is not None:
        return renamed
    # Layouts that only timm's own reader knows (AIMv2, BEiT-3, RADIO, TIPS).
    return _as_timm_reads(state, lambda: checkpoint_filter_fn(dict(state), model, adapt_layer_scale=True), label)


def _as_timm_reads(state: Mapping[str, Tensor], read: Callable[[], dict[str, Tensor]], label: str) -> Renamed:
    """The names that timm's own reader of a model makes of a state dict's."""
    try:
        return Renamed(read(), None)
    except READ_ERRORS as error:
        raise WeightsError(
            f"{label} belong to another architecture (timm: {first_line(error)}). The checkpoint looks like {anatomy(state)}."
        ) from error


def _tower_names(state: Mapping[str, Tensor], renamed: Renamed) -> list[str]:
    """The file's own names of the tower, without its prefix; all names where there is no tower."""
    prefix = renamed.tower.prefix if renamed.tower else ""
    return [name.removeprefix(prefix) for name in state if name.startswith(prefix)]


def _without_false_heads(renamed: Renamed, model: VisionTransformer) -> tuple[dict[str, Tensor], list[str]]:
    """Without what is called a head and is no classifier of this model, whatever its size."""
    state = dict(renamed.state)
    bias = state.get("head.bias")
    pooling = renamed.tower.scheme.pooling if renamed.tower else None
    is_clip = "norm_pre.weight" in state and "head.weight" in state
    if is_clip and (bias is None or not bool(bias.any())):
        why = "a projection into the space shared with text is no classifier"
    elif "head.weight" in state and "cls_token" in state and pooling not in (None, model.global_pool):
        why = f"it reads the class token and not what this model pools ({model.global_pool})"
    else:
        return state, []
    for key in [key for key in state if is_head(key)]:
        del state[key]
    return state, [f"head: left out, for {why}"]
