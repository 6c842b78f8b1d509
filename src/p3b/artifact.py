"""Save and load the small model: `config.json` + `model.safetensors`, never a pickled class.

config.json says everything that is needed to build the network without the training code's arguments: the architecture,
read off the model itself, the channels that each block reads and writes and its inner widths, class names, preprocessing and
provenance. The published `first_sparse_checkpoint.pth` holds the same config beside the same tensors and loads in torch's
weights-only mode.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from p3b.errors import ModelError, RunFolderError, WeightsError
from p3b.files import write_atomically
from p3b.vit.architecture import build_dense, describe_dense
from p3b.vit.compact import GONE, BranchShape, branch_shapes, reshape_branches
from p3b.vit.cost import count_parameters
from p3b.vit.layout import require_vision_transformer

FORMAT, SCHEMA = "p3b-model", 1
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
CHECKPOINT_KEY = "p3b"


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    class_names: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Write a dense or small VisionTransformer so that `load` gives it back in a fresh process, bit for bit.

    Args:
        model: the module; its weights are written in their own dtype.
        folder: made if absent; files of an earlier save are replaced only when the new ones are complete.
        class_names: one for each output of the head.
        preprocessing: how images must be prepared (plain JSON values).
        provenance: where the model comes from (plain JSON values).

    Returns:
        The folder.

    Raises:
        ModelError: the model has a part that its architecture cannot be described with.
        RunFolderError: the folder cannot be written.
    """
    folder = Path(folder)
    config = model_config(model, class_names=class_names, preprocessing=preprocessing, provenance=provenance)
    text = _readable_json(config)
    tensors = {key: tensor.detach().contiguous().cpu() for key, tensor in model.state_dict().items()}

    def write(config_file: Path) -> None:
        config_file.write_text(text)
        # The config lies complete beside its place before the weights take theirs: both files are always of one save.
        write_atomically(folder / WEIGHTS_FILE, lambda path: safetensors.torch.save_file(tensors, path))

    try:
        write_atomically(folder / CONFIG_FILE, write)
    except (OSError, SafetensorError) as error:
        raise RunFolderError(f"Cannot write the model to {folder}: {error}. Choose a folder that can be written.") from error
    return folder


def save_checkpoint(model: nn.Module, file: str | Path, **description: Any) -> Path:
    """The same content as `save` in one .pth file of tensors and plain values (the published checkpoint's form).

    Raises:
        RunFolderError: the file cannot be written.
    """
    content = {CHECKPOINT_KEY: model_config(model, **description), "model": model.state_dict()}
    try:
        write_atomically(Path(file), lambda path: torch.save(content, path))
    except (OSError, RuntimeError) as error:  # torch tells of a full disk by a RuntimeError
        raise RunFolderError(f"Cannot write the checkpoint {file}: {error}. Choose a folder that can be written.") from error
    return Path(file)


def load(path: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """The module that `save` or `save_checkpoint` wrote, in evaluation mode.

    Raises:
        WeightsError: nothing is there, or what is there is damaged or of a schema that this version does not know.
    """
    path = Path(path)
    config, tensors = _read_folder(path) if path.is_dir() else _read_checkpoint(path)
    try:
        with torch.device("meta"):
            model = build_dense(config["architecture"])
        reshape_branches(model, [_shape_from_config(entry, model.embed_dim) for entry in config["blocks"]])
        dtypes = {tensor.dtype for tensor in tensors.values()}
        if len(dtypes) == 1:
            model.to(dtypes.pop())
        model.load_state_dict(tensors, assign=True)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError, AssertionError) as error:
        raise WeightsError(
            f"{path}: config and weights do not fit together: {error}. The files are damaged or edited."
        ) from error
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model.to(device).eval()


def read_config(path: str | Path) -> dict[str, Any]:
    """The config of a saved model: architecture, blocks, class names, preprocessing, provenance."""
    path = Path(path)
    return _read_config_file(path / CONFIG_FILE) if path.is_dir() else _read_checkpoint(path)[0]


def is_artifact(path: str | Path) -> bool:
    """Whether `load` is the one to read this path: a folder with our config.json, or a .pth that holds one."""
    path = Path(path)
    if path.is_dir():
        return (path / CONFIG_FILE).is_file()
    if path.suffix not in (".pth", ".pt") or not path.is_file():
        return False
    try:
        content = torch.load(path, map_location="meta", weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, pickle.UnpicklingError):
        return False  # not readable as a checkpoint: whoever reads it as plain weights says why
    return isinstance(content, dict) and CHECKPOINT_KEY in content


def model_config(
    model: nn.Module,
    *,
    class_names: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What config.json holds, as plain values.

    Raises:
        ModelError: the architecture cannot be described, or the class names are not as many as the head's outputs.
    """
    vit = require_vision_transformer(model)
    if class_names is not None and len(class_names) != vit.num_classes:
        raise ModelError(f"Got {len(class_names)} class names for a head of {vit.num_classes} outputs.")
    shapes = branch_shapes(vit)
    return {
        "format": FORMAT,
        "schema": SCHEMA,
        "architecture": describe_dense(vit),
        "blocks": [{key: list(v) if isinstance(v, tuple) else v for key, v in asdict(shape).items()} for shape in shapes],
        "params": count_parameters(vit),
        "class_names": None if class_names is None else list(class_names),
        "preprocessing": None if preprocessing is None else dict(preprocessing),
        "provenance": None if provenance is None else dict(provenance),
    }


def _readable_json(config: Mapping[str, Any]) -> str:
    """One line for each entry, and for each block: the lists of channels would fill pages otherwise."""
    entries = {key: json.dumps(value) for key, value in config.items()}
    entries["blocks"] = "[\n  " + ",\n  ".join(json.dumps(block) for block in config["blocks"]) + "\n ]"
    return "{\n" + ",\n".join(f' "{key}": {value}' for key, value in entries.items()) + "\n}\n"


def _shape_from_config(entry: Mapping[str, Any], width: int) -> BranchShape:
    """One block's shape; ValueError where its channels are not rising indices into the residual stream."""
    for side in ("inputs", "outputs"):
        channels = entry[side]
        if channels != sorted(set(channels) & set(range(width))):
            raise ValueError(f"the {side} of {entry['name']} are not rising channels within 0..{width - 1}")
    if entry["form"] == GONE and entry["outputs"]:
        raise ValueError(f"{entry['name']} is gone, yet writes to channels")
    return BranchShape(entry["name"], entry["form"], tuple(entry["inputs"]), entry["inner"], tuple(entry["outputs"]))


def _read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = _read_config_file(folder / CONFIG_FILE)
    weights = folder / WEIGHTS_FILE
    try:
        # Tensors lie in the file at any offset, and some kernels round by how their memory is aligned: copies are aligned.
        return config, {key: tensor.clone() for key, tensor in safetensors.torch.load_file(weights).items()}
    except FileNotFoundError as error:
        raise WeightsError(f"{weights} is missing; a saved model is a folder with {CONFIG_FILE} and {WEIGHTS_FILE}.") from error
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{weights} is damaged: {error}. Save the model again.") from error


def _read_config_file(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text())
    except OSError as error:
        raise WeightsError(f"{file} cannot be read; expected a folder that p3b.save wrote: {error}") from error
    except ValueError as error:
        raise WeightsError(f"{file} is not valid JSON: {error}. The file is damaged or edited.") from error
    return _check_config(config, file)


def _read_checkpoint(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise WeightsError(f"{file} is missing; expected a folder or checkpoint that p3b saved.") from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise WeightsError(f"{file} cannot be read as a checkpoint of tensors and plain values: {error}") from error
    if not isinstance(content, dict) or CHECKPOINT_KEY not in content or not isinstance(content.get("model"), dict):
        raise WeightsError(f"{file} is not a checkpoint that p3b saved: it lacks the entries '{CHECKPOINT_KEY}' and 'model'.")
    return _check_config(content[CHECKPOINT_KEY], file), content["model"]


def _check_config(config: object, file: Path) -> dict[str, Any]:
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise WeightsError(f"{file} is not the config of a model that p3b saved (its format is not '{FORMAT}').")
    if config.get("schema") != SCHEMA:
        raise WeightsError(f"{file} has schema {config.get('schema')}, this version of p3b reads schema {SCHEMA}. Update p3b.")
    return config
