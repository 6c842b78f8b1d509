"""The text of a saved model's config: what it holds, its digests, and the checks of one that somebody else may have written.

Two digests tell damage: `digest` is of the other entries of the config, `weights_digest` of the tensors (names, dtypes, shapes,
bytes), so that the config also tells which weights it belongs to. Files of schema 1 have none and are read with every other
check.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from p3b import __version__
from p3b.errors import ModelError, WeightsError
from p3b.storage.timm_form import from_timm_form, require_agreement, to_timm_form
from p3b.storage.untrusted import MOST_JSON, READ_ERRORS, first_line, read_json
from p3b.vit.anatomy.shape import BranchShape
from p3b.vit.architecture import branches_of, build_skeleton, check_description
from p3b.vit.compact import reshape_branches
from p3b.vit.cost import count_parameters
from p3b.vit.shapes import shapes_from_plain
from p3b.vit.valueless import NoValues

FORMAT = "p3b-model"
TRAINING_IMAGES = "training_images"
"""Entry of a provenance that only p3b reads: a sketch of the images that the model was trained on."""
_ENTRIES_OF_SCHEMA = {
    1: {"format", "schema", "architecture", "blocks", "params", "class_names", "preprocessing", "provenance"},
}
_ENTRIES_OF_SCHEMA[2] = _ENTRIES_OF_SCHEMA[1] | {"p3b_version", "weights_digest", "digest"}
_ENTRIES_OF_SCHEMA[3] = _ENTRIES_OF_SCHEMA[4] = _ENTRIES_OF_SCHEMA[2] | {"stream"}
LATEST_SCHEMA = 4
"""By our names it has the entries of schema 3; in the file they stand in the form that timm reads (`p3b.storage.timm_form`)."""


def sealed(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """The config with its digests, as the text of config.json."""
    # Digests are of what will be read: JSON has lists for tuples and text for every key.
    plain = json.loads(json.dumps({**to_timm_form(config), "weights_digest": weights_digest(tensors)}))
    text = _readable_json({**plain, "digest": _config_digest(plain)})
    if len(text) > MOST_JSON:
        raise ModelError(f"The config would take {len(text)} bytes, expected at most {MOST_JSON}: shorten the provenance.")
    return text


def read_config_file(file: Path) -> dict[str, Any]:
    if not file.exists():
        raise WeightsError(f"{file} is missing; expected a folder that p3b.save wrote.")
    return checked_config(read_json(file), file)


def checked_config(entries: object, file: Path) -> dict[str, Any]:
    """A config by our names, from the entries of a file: of a schema that is known, unaltered, every entry in its range."""
    if not isinstance(entries, dict) or entries.get("format") != FORMAT:
        raise WeightsError(f"{file} is not the config of a model that p3b saved (its format is not '{FORMAT}').")
    schema = entries.get("schema")
    *earlier, latest = _ENTRIES_OF_SCHEMA
    if type(schema) is not int or schema not in _ENTRIES_OF_SCHEMA:
        writer = str(entries.get("p3b_version", "of unknown version"))[:40]
        raise WeightsError(
            f"{file} has schema {repr(schema)[:40]}, written by p3b {writer}. This is p3b {__version__}, which reads schemas "
            f"{', '.join(map(str, earlier))} and {latest}: install the version that wrote it, or a newer one."
        )
    try:
        if schema > 1 and entries.get("digest") != _config_digest(entries):
            raise WeightsError(
                f"{file} is damaged or was edited by hand: its content does not match its digest. Copy it again from where it "
                "was whole; to change class names or preprocessing, load the model with p3b.load and p3b.save it with others."
            )
        config = entries if schema < LATEST_SCHEMA else from_timm_form(entries)
        _check_entries(config, _ENTRIES_OF_SCHEMA[schema])
        if schema == LATEST_SCHEMA:
            require_agreement(entries, config)
    except (ModelError, *READ_ERRORS) as error:
        raise error if isinstance(error, WeightsError) else _unbuildable(file, error) from error
    return config


def _check_entries(config: Mapping[str, Any], names: set[str]) -> None:
    """ModelError where an entry is missing, unknown, of another type or out of its range."""
    if config.keys() != names:
        raise ModelError(f"it lacks entries or has unknown ones ({', '.join(sorted(config.keys() ^ names)[:5])[:200]})")
    check_description(config["architecture"])
    arguments = config["architecture"]["arguments"]
    _shapes_of(config)
    classes = config["class_names"]
    if classes is not None and not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        raise ModelError("class_names is not a list of names")
    if classes is not None and len(classes) != arguments["num_classes"]:
        raise ModelError(f"there are {len(classes)} class names for a head of {arguments['num_classes']} outputs")
    for key in ("preprocessing", "provenance"):
        if config[key] is not None and not isinstance(config[key], dict):
            raise ModelError(f"{key} is a {type(config[key]).__name__}")


def _shapes_of(config: Mapping[str, Any]) -> tuple[list[BranchShape], int]:
    """Shapes of the blocks and width of the residual stream; ModelError where one of them cannot be."""
    arguments, tells_heads = config["architecture"]["arguments"], config["schema"] >= 3
    dense_width = arguments["embed_dim"]
    width = config["stream"] if tells_heads else dense_width
    if type(width) is not int or not 1 <= width <= dense_width:
        raise ModelError(f"stream is {str(width)[:40]}; expected a whole number of channels from 1 to {dense_width}")
    shapes = shapes_from_plain(config["blocks"], branches_of(config["architecture"]), width, tells_heads=tells_heads)
    return shapes, width


def skeleton_of(config: Mapping[str, Any], file: Path) -> VisionTransformer:
    """The model that a checked config describes, without memory for its weights."""
    try:
        model = build_skeleton(config["architecture"])
        with NoValues():
            reshape_branches(model, *_shapes_of(config))
        if config["params"] != count_parameters(model):
            raise ModelError(f"params is {str(config['params'])[:40]}, the model has {count_parameters(model)}")
    except (ModelError, *READ_ERRORS) as error:
        raise _unbuildable(file, error) from error
    return model


def _unbuildable(file: Path, error: BaseException) -> WeightsError:
    why = str(error) if isinstance(error, ModelError) else first_line(error)
    return WeightsError(f"{file} does not describe a model that can be built: {why}. It is damaged or edited.")


def _readable_json(config: Mapping[str, Any]) -> str:
    """One line for each entry, and for each block: the lists of channels would fill pages otherwise."""
    entries = {key: json.dumps(value) for key, value in config.items()}
    entries["blocks"] = "[\n  " + ",\n  ".join(json.dumps(block) for block in config["blocks"]) + "\n ]"
    return "{\n" + ",\n".join(f' "{key}": {value}' for key, value in entries.items()) + "\n}\n"


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the tensors' content: independent of the file that they lie in and of their order."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key]
        digest.update(json.dumps([key, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _config_digest(config: Mapping[str, Any]) -> str:
    """SHA-256 of all entries but the digest itself, independent of their order and spacing."""
    entries = {key: value for key, value in config.items() if key != "digest"}
    return hashlib.sha256(json.dumps(entries, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
