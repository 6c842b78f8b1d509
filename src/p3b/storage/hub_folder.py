"""A folder as model hubs give it: config.json beside the weights, of transformers, timm or open_clip.

Such a folder says what a state dict cannot: how many heads share the width, which activation and which epsilon are computed
with, and how images are prepared. Nothing of it is believed further than that; the weights are read as any others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from p3b.errors import WeightsError
from p3b.storage.untrusted import read_json

CONFIG = "config.json"
_FILES = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.bin")
_CONFIGS = (CONFIG, "open_clip_config.json")
_HUB_KEYS = ("model_type", "architectures", "architecture", "model_cfg", "pretrained_cfg")
_ENDINGS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".tar", ".npz")
# timm's names of the activations of transformers; others are named as they are.
_ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
# What transformers takes where a config does not say; CLIP's own is left out of its published files.
_DEFAULT_ACTIVATION = {"clip": "quick_gelu", "siglip": "gelu_pytorch_tanh"}
_RESAMPLING = {0: "nearest", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming", 1: "lanczos"}


@dataclass(frozen=True)
class Facts:
    """What is said of the model that weights belong to, beside the weights. None: it is not said.

    Attributes:
        said_by: who says it, for reports.
        kind: transformers' model_type or timm's architecture.
        num_heads: attention heads.
        activation: of the MLP, by timm's name.
        norm_eps: of the layer norms.
        grid: patches (rows, columns) of the images that the positions are for.
        mean, std: per channel, in [0, 1] units.
        crop_pct: side of the crop / side of the resized image.
        interpolation: of the resize.
    """

    said_by: str = ""
    kind: str | None = None
    num_heads: int | None = None
    activation: str | None = None
    norm_eps: float | None = None
    grid: tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop_pct: float | None = None
    interpolation: str | None = None


NOTHING_SAID = Facts()


def is_hub_folder(folder: Path) -> bool:
    """Whether a folder has the config of a hub, and so not the config of a model that p3b saved."""
    if not folder.is_dir():
        return False
    for name in _CONFIGS:
        if (folder / name).is_file():
            try:
                config = read_json(folder / name)
            except WeightsError:
                continue
            if isinstance(config, dict) and "format" not in config and any(key in config for key in _HUB_KEYS):
                return True
    return False


def weights_files(folder: Path) -> list[Path]:
    """The file with a folder's weights, or all shards of it, in the order of their names.

    Raises:
        WeightsError: there is none, several that could be meant, or an index that names what is not there.
    """
    folder = _snapshot(folder)
    for name in _FILES:
        if (folder / name).is_file():
            return [folder / name]
        if (folder / f"{name}.index.json").is_file():
            return _shards(folder / f"{name}.index.json")
    others = sorted(file for file in folder.iterdir() if file.is_file() and file.suffix.lower() in _ENDINGS)
    if len(others) == 1:
        return others
    if others:
        raise WeightsError(
            f"'{folder}' holds several weights files ({', '.join(file.name for file in others)}): give one of them."
        )
    raise WeightsError(
        f"'{folder}' is a folder without a model that p3b saved (its config.json), and without weights of another library "
        f"({', '.join(_FILES[:2])}); expected such a folder or a weights file."
    )


def facts_beside(file: Path) -> Facts:
    """What the configs in a weights file's folder say; nothing where the file is not named as hubs name theirs.

    Raises:
        WeightsError: a config cannot be read, or has a value of another type than it should.
    """
    if not file.name.startswith(("model", "pytorch_model", "open_clip")) or not is_hub_folder(file.parent):
        return NOTHING_SAID
    folder, facts = file.parent, NOTHING_SAID
    try:
        if (folder / CONFIG).is_file():
            config = read_json(folder / CONFIG)
            facts = facts_of_transformers(config) if "model_type" in config else _of_timm(config)
        if (folder / "open_clip_config.json").is_file():
            facts = _merged(facts, _of_open_clip(read_json(folder / "open_clip_config.json")))
        if (folder / "preprocessor_config.json").is_file():
            facts = _merged(facts, facts_of_preprocessor(read_json(folder / "preprocessor_config.json")))
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"'{folder}': a config of the folder has a value that makes no sense ({error}).") from error
    return facts


def _snapshot(folder: Path) -> Path:
    """The one snapshot of a folder of Hugging Face's cache (models--org--name), else the folder itself."""
    snapshots = folder / "snapshots"
    inside = sorted(path for path in snapshots.iterdir() if path.is_dir()) if snapshots.is_dir() else []
    if len(inside) > 1:
        raise WeightsError(f"'{folder}' holds {len(inside)} snapshots: give one of {', '.join(str(path) for path in inside)}.")
    return inside[0] if inside else folder


def _shards(index: Path) -> list[Path]:
    named = read_json(index)
    parts = named.get("weight_map") if isinstance(named, dict) else None
    if not isinstance(parts, dict) or not all(isinstance(name, str) and Path(name).name == name for name in parts.values()):
        raise WeightsError(f"'{index}' is not an index of weights: it should name files of its own folder under 'weight_map'.")
    files = [index.parent / name for name in sorted(set(parts.values()))]
    absent = [file.name for file in files if not file.is_file()]
    if absent or not files:
        raise WeightsError(f"'{index}' names files that are not there: {', '.join(absent) or 'none at all'}. Fetch them too.")
    return files


def facts_of_transformers(config: Mapping[str, Any]) -> Facts:
    kind = str(config["model_type"])
    vision = config.get("vision_config") or config
    family = kind.split("_", maxsplit=1)[0]
    act = vision.get("hidden_act", _DEFAULT_ACTIVATION.get(family, "gelu"))
    image, patch = (_pair(vision.get(key)) for key in ("image_size", "patch_size"))
    return Facts(
        said_by=CONFIG,
        kind=kind,
        num_heads=_number(vision.get("num_attention_heads"), int),
        activation=_ACTIVATIONS.get(act, act) if isinstance(act, str) else None,
        norm_eps=_number(vision.get("layer_norm_eps"), float),
        grid=(image[0] // patch[0], image[1] // patch[1]) if image and patch else None,
    )


def _of_timm(config: Mapping[str, Any]) -> Facts:
    data = config.get("pretrained_cfg") or config
    known = {key: data[key] for key in ("mean", "std", "crop_pct", "interpolation") if data.get(key) is not None}
    kind = config.get("architecture")
    heads = (config.get("model_args") or {}).get("num_heads")
    return _prepared(Facts(said_by=CONFIG, kind=kind and str(kind), num_heads=_number(heads, int)), known)


def _of_open_clip(config: Mapping[str, Any]) -> Facts:
    tower, data = config["model_cfg"], config.get("preprocess_cfg") or {}
    quick = tower.get("quick_gelu")
    facts = Facts(
        said_by="open_clip_config.json",
        kind="open_clip",
        activation=None if quick is None else "quick_gelu" if quick else "gelu",
    )
    return _prepared(facts, {key: data[key] for key in ("mean", "std") if data.get(key) is not None})


def facts_of_preprocessor(config: Mapping[str, Any]) -> Facts:
    known: dict[str, Any] = {}
    if config.get("do_normalize", True):
        known = {key: config[f"image_{key}"] for key in ("mean", "std") if config.get(f"image_{key}") is not None}
    if (resample := _RESAMPLING.get(config.get("resample", -1))) is not None:
        known["interpolation"] = resample
    size, crop = config.get("size"), config.get("crop_size")
    if config.get("do_center_crop") and isinstance(size, dict) and isinstance(crop, dict) and "shortest_edge" in size:
        known["crop_pct"] = crop["height"] / size["shortest_edge"]
    return _prepared(Facts(said_by="preprocessor_config.json"), known)


def _prepared(facts: Facts, known: Mapping[str, Any]) -> Facts:
    mean, std = (tuple(float(value) for value in known[key]) if key in known else None for key in ("mean", "std"))
    crop = known.get("crop_pct")
    interpolation = known.get("interpolation")
    return replace(facts, mean=mean, std=std, crop_pct=crop and min(float(crop), 1.0), interpolation=interpolation)


def _merged(first: Facts, second: Facts) -> Facts:
    """What either says; where both do, the second, which is there for it."""
    said = {name: value for name, value in vars(second).items() if value is not None and name != "said_by"}
    by = " and ".join(filter(None, (first.said_by, second.said_by)))
    return replace(first, **said, said_by=by)


def _pair(value: Any) -> tuple[int, int] | None:
    values = value if isinstance(value, list) else [value, value]
    if len(values) != 2 or not all(type(number) is int and number > 0 for number in values):
        return None
    return values[0], values[1]


def _number(value: Any, kind: type) -> Any:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, kind)):
        raise ValueError(f"{value!r} in place of a number")
    return kind(value)
