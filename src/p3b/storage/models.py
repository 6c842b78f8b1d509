"""Build a timm Vision Transformer, with fresh weights, timm's own, a file's, or as a small model that p3b saved.

timm takes some arguments without a word and computes nonsense from them (an image size that its patches do not divide, a
probability above one, a default in place of None). What a user can get wrong is checked here before anything large is
built, read or downloaded; whatever timm itself refuses is passed on with the name and the arguments it was given.
"""

from __future__ import annotations

import ast
import inspect
import re
import types
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

import timm
import torch
from timm.layers import Attention, AttentionRope, DropPath, PatchEmbed, calculate_drop_path_rates, to_2tuple
from timm.models import get_pretrained_cfg, split_model_name_tag
from timm.models.eva import EvaAttention
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from timm.models.vision_transformer import VisionTransformer, init_weights_vit_timm
from torch import nn

from p3b.errors import ConfigError, ModelError, WeightsError, unknown_name
from p3b.storage import artifact
from p3b.storage.arithmetic import is_known_activation, same_activation
from p3b.storage.fitting import is_head
from p3b.storage.hub_folder import Facts
from p3b.storage.load_report import LoadReport, shapes
from p3b.storage.suggestions import unknown_model
from p3b.storage.untrusted import first_line
from p3b.storage.weights import load_weights
from p3b.storage.weights_file import Weights, open_weights
from p3b.vit.families import CLASSES, family_of, patch_embed_of, width_of
from p3b.vit.fresh import initialise
from p3b.vit.parts import ConstantBranch, NoBlock, NoBranch
from p3b.vit.valueless import without_values

_BUILD_ERRORS = (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


def build_model(
    name: str,
    *,
    num_classes: int,
    model_kwargs: Mapping[str, object] | None = None,
    pretrained: bool = False,
    weights: str | Path | Weights | None = None,
    drop_path: float = 0.0,
    seed: int | None = None,
) -> tuple[nn.Module, LoadReport | None]:
    """Build a timm `VisionTransformer` on the CPU, with fresh, timm's or given weights.

    Args:
        name: a timm model name, with or without a pretrained tag, that builds a `VisionTransformer`.
        num_classes: classes of the head, >= 1; a head of another size in the weights is replaced by a new one.
        model_kwargs: arguments of `VisionTransformer` that differ from the named model's.
        pretrained: let timm download and load its weights for this name.
        weights: a file or a hub's folder with weights for this architecture, by any of the names that `load_weights` knows
            (opened already, or its path); or a small model that p3b saved (folder or sparse checkpoint). The latter is
            returned itself: its shape wins over that of `name`, and `model_kwargs` may only repeat it.
        drop_path: stochastic depth of the last block, in [0, 1); it grows linearly from 0 at the first.
        seed: seed of everything that is newly initialised, heads included; the global generator stays as it was.

    Returns:
        The model in training mode, and a report of the loading (None without `weights`; timm logs its own).

    Raises:
        ModelError: the name is unknown or of another kind, or a keyword argument does not fit.
        WeightsError: weights that cannot be had, are damaged, or belong to another architecture.
        ConfigError: a number out of range, or arguments that contradict each other.
    """
    if pretrained and weights is not None:
        raise ConfigError(
            f"Got pretrained weights and a weights file ('{weights}') at once. Give one of them: pretrained for timm's "
            "own weights, or the path."
        )
    if num_classes < 1:
        raise ConfigError(f"num_classes is {num_classes!r}; expected an integer of at least 1.")
    _check_drop_path(drop_path)
    _require_known(name, pretrained)
    kwargs = _without_own_arguments(model_kwargs or {}, num_classes=num_classes, drop_path_rate=drop_path)

    # The CPU generator alone: this model is born on the CPU, and devices' generators are none of our business.
    with torch.random.fork_rng(devices=[]) if seed is not None else nullcontext():
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        if isinstance(weights, (str, Path)) and artifact.is_artifact(weights):
            return _open_artifact(Path(weights), num_classes, kwargs, drop_path)
        _check_kwargs(name, kwargs)
        # Read before building: a damaged file should not cost the seconds that a large model takes.
        opened = open_weights(weights) if isinstance(weights, (str, Path)) else weights
        implied = {} if opened is None else _implied(name, opened.facts, kwargs)
        whole = {**kwargs, **implied}
        model = _build(name, whole, pretrained=pretrained, num_classes=num_classes, drop_path_rate=drop_path)
    if opened is None:
        return model, None
    report = load_weights(model, opened.state, source=opened.source, facts=opened.facts)
    said = [f"{key}={value}, as {opened.facts.said_by} says" for key, value in implied.items()]
    return model, replace(report, notes=(*opened.notes, *said, *report.notes))


def parse_model_kwargs(items: Sequence[str]) -> dict[str, object]:
    """Turn `["img_size=32", "class_token=False", "act_layer=gelu"]` into keyword arguments.

    Values are Python literals; a bare word is a string. Whether a model knows an argument is checked where it is built.

    Raises:
        ConfigError: an item without '=', a name twice, or a value that is neither a literal nor a word.
    """
    parsed: dict[str, object] = {}
    for item in items:
        name, _, text = (part.strip() for part in item.partition("="))
        if not name.isidentifier() or not text:
            raise ConfigError(f"Model argument '{item}' is not of the form name=value, such as img_size=32.")
        if name in parsed:
            raise ConfigError(f"Model argument '{name}' is given twice ({parsed[name]!r} and {text}). Give it once.")
        if text in ("true", "false", "none"):
            raise ConfigError(f"Model argument '{item}': write {name}={text.capitalize()}; values are Python literals.")
        try:
            parsed[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
            if not re.fullmatch(r"[A-Za-z_][\w.\-]*", text):
                raise ConfigError(
                    f"Model argument '{item}': '{text}' is neither a Python literal (32, 0.5, False, (32, 64), 'text') nor "
                    "a word."
                ) from error
            parsed[name] = text
    return parsed


# ------------------------------------------------------------------------------------------------- before building


def _check_drop_path(drop_path: float) -> None:
    if not 0.0 <= drop_path < 1.0:
        raise ConfigError(f"drop_path is {drop_path!r}; expected a number in [0, 1).")


def _require_known(name: str, pretrained: bool) -> None:
    architecture, tag = split_model_name_tag(name)
    if not timm.is_model(architecture):
        raise ModelError(unknown_model(name))
    tagged = timm.list_models(f"{architecture}.*", pretrained=True)
    try:
        cfg = get_pretrained_cfg(name)
    except RuntimeError as error:
        known = [split_model_name_tag(full)[1] for full in tagged]
        raise ModelError(unknown_name(f"pretrained tag of {architecture}", tag, known)) from error
    if pretrained and (cfg is None or not cfg.has_weights):
        raise WeightsError(
            f"timm has no pretrained weights for '{name}'"
            + (f", but for {', '.join(tagged)}: choose one of these" if tagged else ". Choose another model")
            + ", give a file (--model-path), or start without weights."
        )


def _without_own_arguments(kwargs: Mapping[str, object], **own: object) -> dict[str, object]:
    """Drop what `build_model` takes itself, provided it says the same."""
    for key, value in own.items():
        if key in kwargs and kwargs[key] != value:
            raise ConfigError(
                f"The model argument {key}={kwargs[key]!r} contradicts the {value!r} that is given for it directly. "
                "Leave it out of the model arguments."
            )
    return {key: tuple(value) if isinstance(value, list) else value for key, value in kwargs.items() if key not in own}


def _check_kwargs(name: str, kwargs: Mapping[str, Any]) -> None:
    """Refuse names and types that do not fit, and what timm would take without a word and compute nonsense from."""
    plain = _outline(name)
    kind = next((kind for kind in CLASSES.values() if isinstance(plain, kind)), None)
    if kind is None:
        raise ModelError(
            f"'{name}' is a {type(plain).__name__}; only models that timm builds as {', '.join(CLASSES)} can be pruned, "
            "such as vit_tiny_patch16_224, deit_small_patch16_224 or deit_tiny_distilled_patch16_224."
        )
    hints = get_type_hints(kind.__init__)
    own = {"self", "num_classes", "drop_path_rate", "device", "dtype", "cfg", "kwargs"}
    if kind is NaFlexVit:  # which takes what its configuration has
        hints |= get_type_hints(NaFlexVitCfg)
    known = [key for key in {**inspect.signature(kind.__init__).parameters, **hints} if key not in {*own, "return"}]
    for key, value in kwargs.items():
        if key not in known:
            raise ModelError(unknown_name("model argument", key, known))
        if value is None:
            raise ModelError(f"The model argument {key}=None means the model's default to timm: leave it out.")
        both_sides = to_2tuple(value) if key == "img_size" else value  # every class of timm's takes one for both
        if not any(_fits_type(each, hints[key]) for each in (value, both_sides)):
            wanted = hints[key].__name__ if isinstance(hints[key], type) else str(hints[key]).replace("typing.", "")
            raise ModelError(f"The model argument {key}={value!r} is a {type(value).__name__}; expected {wanted}.")
        if key.endswith("_rate") and not 0.0 <= value < 1.0:
            raise ModelError(f"The model argument {key}={value!r} must lie in [0, 1).")
    for key in ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "depths", "num_heads", "mlp_ratio"):
        if key in kwargs and min(to_2tuple(kwargs[key])) <= 0:
            raise ModelError(f"The model argument {key}={kwargs[key]!r} must be positive.")
    if kwargs.get("weight_init") == "skip":
        raise ModelError("weight_init='skip' leaves memory as it was found in place of weights: leave it out.")
    _check_sizes(name, cast("VisionTransformer", plain), kwargs)
    _check_pooling(name, cast("VisionTransformer", plain), kwargs)


@lru_cache(maxsize=16)
def _outline(name: str) -> nn.Module:
    """The model as timm builds it by default, on the meta device: its class and sizes are known before anything is allocated.

    Only to be read, and kept for the next to ask.
    """
    with without_values():
        return _build(name, {})


def _check_sizes(name: str, plain: VisionTransformer, kwargs: Mapping[str, Any]) -> None:
    embed = patch_embed_of(plain)
    padded = kwargs.get("dynamic_img_pad", False)
    # Sizes that a model comes with are timm's choice (some crop a few pixels); the ones given here should divide.
    if isinstance(embed, PatchEmbed) and ("img_size" in kwargs or "patch_size" in kwargs) and not padded:
        img_size = to_2tuple(kwargs.get("img_size", embed.img_size))
        patch_size = to_2tuple(kwargs.get("patch_size", embed.patch_size))
        if any(image % patch for image, patch in zip(img_size, patch_size, strict=True)):
            raise ModelError(
                f"{name}: img_size {img_size[0]}x{img_size[1]} is not divisible by patch_size "
                f"{patch_size[0]}x{patch_size[1]}; choose an img_size that is a multiple of patch_size, or another patch_size."
            )
    embed_dim = kwargs.get("embed_dim", width_of(plain))
    heads = [module.num_heads for module in plain.modules() if isinstance(module, (Attention, AttentionRope, EvaAttention))]
    num_heads = kwargs.get("num_heads", heads[0] if heads else 1)
    if isinstance(num_heads, int) and embed_dim % num_heads:
        raise ModelError(
            f"{name}: embed_dim {embed_dim} is not divisible by num_heads {num_heads}; choose an embed_dim that is a "
            "multiple of num_heads, or another num_heads."
        )


def _check_pooling(name: str, plain: VisionTransformer, kwargs: Mapping[str, Any]) -> None:
    pooling = kwargs.get("global_pool", getattr(plain, "global_pool", "avg"))
    if pooling == "token" and not kwargs.get("class_token", _has_class_token(plain)):
        raise ModelError(f"{name}: without a class token (class_token=False) it cannot be pooled: add global_pool=avg.")
    if pooling == "":
        raise ModelError(f"{name}: global_pool='' gives no class scores; use 'token', 'avg' or another pooling.")


def _has_class_token(plain: nn.Module) -> bool:
    return bool(getattr(plain, "has_class_token", getattr(plain, "cls_token", None) is not None))


def _fits_type(value: object, hint: Any) -> bool:
    """Whether a value suits an annotation, with Python's numeric tower but without bool counting as a number."""
    if get_origin(hint) in (Union, types.UnionType):
        return any(_fits_type(value, choice) for choice in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        if not isinstance(value, tuple):
            return False
        if kinds[-1] is Ellipsis:
            return all(_fits_type(each, kinds[0]) for each in value)
        return len(value) == len(kinds) and all(map(_fits_type, value, kinds))
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return not isinstance(hint, type) or isinstance(value, hint)  # a layer's class or factory: timm calls it and sees


# -------------------------------------------------------------------------------------------------------- building


def _build(name: str, kwargs: Mapping[str, Any], *, pretrained: bool = False, **own: Any) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=pretrained, **own, **kwargs)
    except OSError as error:
        raise WeightsError(
            f"timm's pretrained weights for '{name}' could not be fetched ({first_line(error)}). Check the network and try "
            "again, set HF_HUB_OFFLINE=1 to take only what has been fetched before, or bring a file: "
            f"{_where_weights_lie(name)}and give it here with --model-path. --from-scratch starts from random weights."
        ) from error
    except _BUILD_ERRORS as error:
        given = ", ".join(f"{key}={value!r}" for key, value in kwargs.items())
        raise ModelError(
            f"timm cannot build '{name}'{' with its pretrained weights' if pretrained else ''} from "
            f"{f'these arguments: {given}' if given else 'its own arguments'} ({first_line(error)})."
        ) from error


def _where_weights_lie(name: str) -> str:
    cfg = get_pretrained_cfg(name)
    if cfg is None or not cfg.hf_hub_id:
        return "fetch weights of this model elsewhere, "
    return f"fetch https://huggingface.co/{cfg.hf_hub_id}/resolve/main/model.safetensors elsewhere, "


def _implied(name: str, facts: Facts, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that the weights need and nobody gave: the activation, where the model of that name has another one."""
    if facts.activation is None or "act_layer" in kwargs or not is_known_activation(facts.activation):
        return {}
    with without_values():
        plain = _build(name, {})
    return {} if same_activation(plain, facts.activation) else {"act_layer": facts.activation}


# --------------------------------------------------------------------------------------------- small models of ours


def open_saved(path: Path, arguments: Mapping[str, Any], *, fresh: bool = False) -> VisionTransformer:
    """A model that p3b saved, in training mode, as timm's arguments change it.

    Args:
        path: its folder, or a checkpoint of ours.
        arguments: of timm: num_classes (another number gets a new head) and drop_path_rate change the model; any other may
            repeat what it is.
        fresh: newly initialised, in place of its weights.

    Raises:
        WeightsError: what is there is damaged, or an argument contradicts it.
        ConfigError: drop_path_rate is out of range.
    """
    has = artifact.read_config(path)["architecture"]["arguments"]
    others = {key: value for key, value in arguments.items() if key not in ("num_classes", "drop_path_rate")}
    drop_path = arguments.get("drop_path_rate", 0.0)
    _check_drop_path(drop_path)
    model, _ = _open_artifact(path, arguments.get("num_classes", has["num_classes"]), others, drop_path)
    return initialise(model) if fresh else model


def _open_artifact(
    path: Path, num_classes: int, kwargs: Mapping[str, Any], drop_path: float
) -> tuple[VisionTransformer, LoadReport]:
    _check_repeats(kwargs, path)
    model = artifact.load(path).train()
    before = model.state_dict()
    new: list[str] = []
    if model.num_classes != num_classes:
        model.reset_classifier(num_classes)
        # reset_classifier leaves torch's default; a new head should start as in a model that timm builds.
        for name, module in model.named_modules():
            if is_head(f"{name}."):
                init_weights_vit_timm(module)
        new = [key for key in model.state_dict() if is_head(key)]
    _set_drop_path(model, drop_path)
    after = model.state_dict()
    return model, LoadReport(
        source=f"{path} (saved by p3b)",
        loaded=len(after) - len(new),
        replaced=tuple(f"{key}: {shapes(before[key], after[key])}: kept as newly initialised" for key in new if key in before),
        missing=tuple(key for key in new if key not in before),
    )


def _check_repeats(kwargs: Mapping[str, Any], path: Path) -> None:
    """A saved model brings its shape along: arguments may repeat it, not change it."""
    has = artifact.read_config(path)["architecture"]["arguments"]
    for key, value in kwargs.items():
        if key not in has:
            raise WeightsError(
                f"The model argument {key}={value!r} cannot be applied to the model saved in '{path}', which is built "
                f"already. Leave it out. Known of it: {', '.join(has)}."
            )
        if not _repeats(key, value, has):
            raise WeightsError(
                f"The model argument {key}={value!r} contradicts the model saved in '{path}', which has {key}={has[key]!r}. "
                "Leave it out: a saved model brings its own shape."
            )


def _repeats(key: str, value: Any, has: Mapping[str, Any]) -> bool:
    if key in ("img_size", "patch_size"):
        return to_2tuple(value) == to_2tuple(has[key])
    if key == "mlp_ratio":  # saved as a quotient of widths, which timm truncated
        return int(value * has["embed_dim"]) == round(has[key] * has["embed_dim"])
    if key == "init_values":  # only whether there is a layer scale outlives the first training step
        return has[key] is not None
    return bool(value == has[key])


def _set_drop_path(model: VisionTransformer, drop_path: float) -> None:
    blocks = family_of(model).blocks(model)
    rates = cast("list[float]", calculate_drop_path_rates(drop_path, len(blocks)))
    for block, rate in zip(blocks, rates, strict=True):
        if isinstance(block.module, NoBlock):
            continue
        for half in block.halves:
            # A constant or vanished half depends on no input: there is no path to drop.
            if not isinstance(block.module.get_submodule(half.name), (ConstantBranch, NoBranch)):
                half.set_drop_path(block.module, DropPath(rate) if rate > 0.0 else nn.Identity())
