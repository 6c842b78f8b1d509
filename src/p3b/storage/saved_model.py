"""Save and load the small model: `config.json` + `model.safetensors`, never a pickled class.

config.json says everything that is needed to build the network without the training code's arguments: the architecture,
read off the model itself, the channels that each block reads and writes and its inner widths, class names, preprocessing and
provenance. A model that has lost whole attention heads or channels of its residual stream is of schema 3, which says how many
are left; any other is of schema 2. The published `first_sparse_checkpoint.pth` holds the same text beside the same tensors and
loads in torch's weights-only mode.

Two digests tell damage: `digest` is of the other entries of the config, `weights_digest` of the tensors (names, dtypes, shapes,
bytes), so that the config also tells which weights it belongs to. Files of schema 1 have none and load with every other check:
before any tensor is read, the config has to describe a model that can be built, and the file has to claim this model's tensors.

    config.json.new     the next config, complete: there while `save` puts both files in their places, and after a crash of it
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from p3b import __version__
from p3b.errors import ModelError, RunFolderError, WeightsError
from p3b.storage.files import flush_to_disk, write_atomically
from p3b.storage.hub_folder import is_hub_folder
from p3b.storage.pickles import Sketch, TensorClaim
from p3b.storage.untrusted import (
    MOST_JSON,
    READ_ERRORS,
    Header,
    first_line,
    inspect_pickle,
    inspect_safetensors,
    is_finite,
    parse_json,
    read_json,
    read_pickle,
    read_safetensors,
)
from p3b.vit.architecture import build_skeleton, check_description, describe_dense
from p3b.vit.compact import BranchShape, branch_shapes, reshape_branches, shapes_from_plain
from p3b.vit.cost import count_parameters
from p3b.vit.deployment import compact_of
from p3b.vit.layout import require_vision_transformer

FORMAT = "p3b-model"
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
CHECKPOINT_KEY = "p3b"
_NEW_CONFIG_FILE = "config.json.new"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ENTRIES_OF_SCHEMA = {
    1: {"format", "schema", "architecture", "blocks", "params", "class_names", "preprocessing", "provenance"},
}
_ENTRIES_OF_SCHEMA[2] = _ENTRIES_OF_SCHEMA[1] | {"p3b_version", "weights_digest", "digest"}
_ENTRIES_OF_SCHEMA[3] = _ENTRIES_OF_SCHEMA[2] | {"stream"}


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    class_names: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Write a dense or small VisionTransformer so that `load` gives it back in a fresh process, bit for bit.

    Wherever the process or the machine stops, the folder holds the earlier model or the new one, whole.

    Args:
        model: the module; its weights are written in their own dtype. Of a model in a layout the compact one is written.
        folder: made if absent; files of an earlier save are replaced only when the new ones are complete.
        class_names: one for each output of the head.
        preprocessing: how images must be prepared (plain JSON values).
        provenance: where the model comes from (plain JSON values).

    Returns:
        The folder.

    Raises:
        ModelError: the model has a part that its architecture cannot be described with, or values that are not finite.
        RunFolderError: the folder cannot be written.
    """
    folder, model = Path(folder), compact_of(require_vision_transformer(model))
    config = model_config(model, class_names=class_names, preprocessing=preprocessing, provenance=provenance)
    tensors = _tensors_of(model)
    text = _sealed(config, tensors)
    try:
        _settle(folder)
        write_atomically(folder / _NEW_CONFIG_FILE, lambda path: path.write_text(text, encoding="utf-8"))
        _replace_weights(folder, tensors)
        (folder / _NEW_CONFIG_FILE).replace(folder / CONFIG_FILE)
        flush_to_disk(folder)
    except (OSError, SafetensorError) as error:
        raise RunFolderError(f"Cannot write the model to {folder}: {error}. Choose a folder that can be written.") from error
    return folder


def save_checkpoint(model: nn.Module, file: str | Path, **description: Any) -> Path:
    """The same content as `save` in one .pth file of tensors and a text (the published checkpoint's form).

    Raises:
        ModelError: as for `save`.
        RunFolderError: the file cannot be written.
    """
    model = compact_of(require_vision_transformer(model))
    tensors = _tensors_of(model)
    content = {CHECKPOINT_KEY: _sealed(model_config(model, **description), tensors), "model": tensors}
    try:
        write_atomically(Path(file), lambda path: torch.save(content, path))
    except (OSError, RuntimeError) as error:  # torch tells of a full disk by a RuntimeError
        raise RunFolderError(f"Cannot write the checkpoint {file}: {error}. Choose a folder that can be written.") from error
    return Path(file)


def load(path: str | Path, device: str | torch.device = "cpu") -> VisionTransformer:
    """The module that `save` or `save_checkpoint` wrote, in evaluation mode.

    Args:
        path: a folder, or a .pth file.
        device: where the model is to be.

    Raises:
        WeightsError: nothing is there, or what is there is damaged, edited or of a schema that this version does not know.
    """
    path = Path(path)
    _, model, tensors = _read_folder(path) if path.is_dir() else _read_checkpoint(path)
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) == 1:
        model.to(dtypes.pop())
    model.load_state_dict(tensors, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model.to(device).eval()


def read_config(path: str | Path) -> dict[str, Any]:
    """The config of a saved model: architecture, blocks, class names, preprocessing, provenance.

    Raises:
        WeightsError: nothing is there, or what is there is damaged, edited or of a schema that this version does not know.
    """
    path = Path(path)
    if not path.is_dir():
        return _config_in(_sketch(path), path)
    if (path / _NEW_CONFIG_FILE).exists():  # which config belongs to the weights is only told by the weights
        return _read_folder(path)[0]
    return _read_config_file(path / CONFIG_FILE)


def is_artifact(path: str | Path) -> bool:
    """Whether `load` is the one to read this path: a folder with our config.json, or a .pth that holds one."""
    path = Path(path)
    if path.is_dir():
        return any((path / name).is_file() for name in (CONFIG_FILE, _NEW_CONFIG_FILE)) and not is_hub_folder(path)
    if path.suffix not in (".pth", ".pt") or not path.is_file():
        return False
    try:
        content = inspect_pickle(path).content
    except WeightsError:
        return False  # not readable as a checkpoint: whoever reads it as plain weights says why
    return isinstance(content, dict) and CHECKPOINT_KEY in content


def model_config(
    model: nn.Module,
    *,
    class_names: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What config.json holds, as plain values, without the digests.

    Raises:
        ModelError: the architecture cannot be described, so that `load` would not give the model back, or the class names are
            not as many as the head's outputs.
    """
    vit = compact_of(require_vision_transformer(model))
    if class_names is not None and len(class_names) != vit.num_classes:
        raise ModelError(f"Got {len(class_names)} class names for a head of {vit.num_classes} outputs.")
    shapes, architecture = branch_shapes(vit), describe_dense(vit)
    dense = architecture["arguments"]
    # What schema 2 can say is said in it: every version that reads it can read such a model.
    narrower = vit.embed_dim != dense["embed_dim"] or any(shape.heads not in (0, dense["num_heads"]) for shape in shapes)
    blocks = [{key: list(v) if isinstance(v, tuple) else v for key, v in asdict(shape).items()} for shape in shapes]
    if not narrower:
        for block in blocks:
            del block["heads"]
    config = {
        "format": FORMAT,
        "schema": 3 if narrower else 2,
        "p3b_version": __version__,
        "architecture": architecture,
        **({"stream": vit.embed_dim} if narrower else {}),
        "blocks": blocks,
        "params": sum(value.numel() for _, value in vit.named_parameters(remove_duplicate=False)),  # ties are cut by saving
        "class_names": None if class_names is None else list(class_names),
        "preprocessing": None if preprocessing is None else dict(preprocessing),
        "provenance": None if provenance is None else dict(provenance),
    }
    _require_described(vit, config)
    return config


def _require_described(model: VisionTransformer, config: Mapping[str, Any]) -> None:
    """ModelError where what the config describes has other tensors than the model."""
    described = build_skeleton(config["architecture"])
    reshape_branches(described, *_shapes_of(config))
    found, expected = ({key: tuple(t.shape) for key, t in each.state_dict().items()} for each in (model, described))
    if odd := [key for key in {**found, **expected} if found.get(key) != expected.get(key)]:
        key = odd[0]
        raise ModelError(
            f"{key} cannot be described in config.json: the model has {found.get(key, 'no such tensor')}, one built from its "
            f"description {expected.get(key, 'none')}. Blocks that differ in more than what was pruned, and norms without "
            "affine part, cannot be saved."
        )


# ----------------------------------------------------------------------------------------------------------- writing


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Tensors of the state dict on the CPU, each with memory of its own that it fills; ModelError where they cannot be used."""
    tensors = {}
    for key, value in model.state_dict().items():
        if value.dtype not in _DTYPES:
            raise ModelError(
                f"'{key}' holds {value.dtype}, which cannot be saved; give the model a dtype, as with model.float()."
            )
        if not is_finite(value):
            raise ModelError(
                f"'{key}' holds NaN or infinite values, as after a training run that diverged: such a model computes nothing "
                "and is not saved."
            )
        tensor = value.detach().cpu().contiguous()
        whole = tensor.storage_offset() == 0 and tensor.untyped_storage().nbytes() == tensor.nbytes
        tensors[key] = tensor if whole else tensor.clone()
    places = [tensor.data_ptr() for tensor in tensors.values() if tensor.numel()]
    return tensors if len(set(places)) == len(places) else {key: tensor.clone() for key, tensor in tensors.items()}


def _sealed(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """The config with its digests, as text."""
    # Digests are of what will be read: JSON has lists for tuples and text for every key.
    plain = json.loads(json.dumps({**config, "weights_digest": _weights_digest(tensors)}))
    text = _readable_json({**plain, "digest": _config_digest(plain)})
    if len(text) > MOST_JSON:
        raise ModelError(f"The config would take {len(text)} bytes, expected at most {MOST_JSON}: shorten the provenance.")
    return text


def _replace_weights(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Put new weights into their place; where that fails, the config that waits for them goes."""
    weights = folder / WEIGHTS_FILE
    before = _identity(weights)
    try:
        write_atomically(weights, lambda path: safetensors.torch.save_file(tensors, path))
    except BaseException:
        if _identity(weights) == before:
            (folder / _NEW_CONFIG_FILE).unlink(missing_ok=True)
        raise


def _identity(file: Path) -> tuple[int, ...] | None:
    if not file.exists():
        return None
    found = file.stat()
    return found.st_dev, found.st_ino, found.st_mtime_ns


def _settle(folder: Path) -> None:
    """End what a crash has interrupted: a config that waits for its place would be overwritten by the next one's."""
    waiting = folder / _NEW_CONFIG_FILE
    if not waiting.exists():
        return
    try:
        if _read_folder(folder)[0] == _read_config_file(waiting):
            waiting.replace(folder / CONFIG_FILE)
    except WeightsError:
        return  # nothing complete is there: nothing is lost


def _readable_json(config: Mapping[str, Any]) -> str:
    """One line for each entry, and for each block: the lists of channels would fill pages otherwise."""
    entries = {key: json.dumps(value) for key, value in config.items()}
    entries["blocks"] = "[\n  " + ",\n  ".join(json.dumps(block) for block in config["blocks"]) + "\n ]"
    return "{\n" + ",\n".join(f' "{key}": {value}' for key, value in entries.items()) + "\n}\n"


# ----------------------------------------------------------------------------------------------------------- digests


def _weights_digest(tensors: Mapping[str, Tensor]) -> str:
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


# ----------------------------------------------------------------------------------------------------------- reading


def _read_folder(folder: Path) -> tuple[dict[str, Any], VisionTransformer, dict[str, Tensor]]:
    """The config that belongs to the weights, the model without weights, and the weights."""
    weights = folder / WEIGHTS_FILE
    configs, problems = [], []
    for file in (folder / CONFIG_FILE, folder / _NEW_CONFIG_FILE):
        if file.exists() or file.name == CONFIG_FILE:
            try:
                configs.append((_read_config_file(file), file))
            except WeightsError as error:
                problems.append(error)
    if configs and not weights.exists():
        raise WeightsError(
            f"{weights} is missing: nothing complete is here, perhaps because a save was interrupted. A saved model is a "
            f"folder with {CONFIG_FILE} and {WEIGHTS_FILE}; save it again."
        )
    # A config of schema 1 cannot prove that the weights are its own: one that can goes first.
    for config, file in sorted(configs, key=lambda found: found[0]["schema"] == 1):
        try:
            model = _skeleton(config, file)
            _compare_claims(inspect_safetensors(weights), model, weights)
            tensors = read_safetensors(weights)
            _check_values(tensors, config, weights)
        except WeightsError as error:
            problems.append(error)
        else:
            return config, model, tensors
    raise problems[0]


def _read_checkpoint(file: Path) -> tuple[dict[str, Any], VisionTransformer, dict[str, Tensor]]:
    sketch = _sketch(file)
    config = _config_in(sketch, file)
    model = _skeleton(config, file)
    claims = sketch.content["model"]
    for key, claim in claims.items():
        if not isinstance(claim, TensorClaim) or not claim.is_whole:
            raise WeightsError(f"{file} is damaged: '{key}' is no tensor with memory of its own.")
    if len({claim.storage.key for claim in claims.values()}) != len(claims):
        raise WeightsError(f"{file} is damaged: two of its tensors share their memory.")
    _compare_claims({key: Header(claim.dtype, claim.shape) for key, claim in claims.items()}, model, file)
    tensors = {key: tensor.contiguous() for key, tensor in read_pickle(file)["model"].items()}
    _check_values(tensors, config, file)
    return config, model, tensors


def _sketch(file: Path) -> Sketch:
    """What a checkpoint of ours holds, without reading its tensors."""
    sketch = inspect_pickle(file)
    content = sketch.content
    if not isinstance(content, dict) or CHECKPOINT_KEY not in content or not isinstance(content.get("model"), dict):
        raise WeightsError(f"{file} is not a checkpoint that p3b saved: it lacks the entries '{CHECKPOINT_KEY}' and 'model'.")
    return sketch


def _config_in(sketch: Sketch, file: Path) -> dict[str, Any]:
    config = sketch.content[CHECKPOINT_KEY]
    if isinstance(config, str):
        try:
            config = parse_json(config)
        except ValueError as error:
            raise WeightsError(f"{file}: its config is not valid JSON ({first_line(error)}). The file is damaged.") from error
    return _checked_config(config, file)


def _read_config_file(file: Path) -> dict[str, Any]:
    if not file.exists():
        raise WeightsError(f"{file} is missing; expected a folder that p3b.save wrote.")
    return _checked_config(read_json(file), file)


def _checked_config(config: object, file: Path) -> dict[str, Any]:
    """A config of a schema that is known, unaltered, with every entry in its range."""
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise WeightsError(f"{file} is not the config of a model that p3b saved (its format is not '{FORMAT}').")
    schema = config.get("schema")
    *earlier, latest = _ENTRIES_OF_SCHEMA
    if type(schema) is not int or schema not in _ENTRIES_OF_SCHEMA:
        writer = str(config.get("p3b_version", "of unknown version"))[:40]
        raise WeightsError(
            f"{file} has schema {repr(schema)[:40]}, written by p3b {writer}. This is p3b {__version__}, which reads schemas "
            f"{', '.join(map(str, earlier))} and {latest}: install the version that wrote it, or a newer one."
        )
    try:
        if schema > 1 and config.get("digest") != _config_digest(config):
            raise WeightsError(
                f"{file} is damaged or was edited by hand: its content does not match its digest. Copy it again from where it "
                "was whole; to change class names or preprocessing, load the model with p3b.load and p3b.save it with others."
            )
        _check_entries(config, _ENTRIES_OF_SCHEMA[schema])
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
    shapes = shapes_from_plain(config["blocks"], arguments["depth"], width, arguments["num_heads"], tells_heads=tells_heads)
    return shapes, width


def _skeleton(config: Mapping[str, Any], file: Path) -> VisionTransformer:
    """The model that a checked config describes, without memory for its weights."""
    try:
        model = build_skeleton(config["architecture"])
        reshape_branches(model, *_shapes_of(config))
        if config["params"] != count_parameters(model):
            raise ModelError(f"params is {str(config['params'])[:40]}, the model has {count_parameters(model)}")
    except (ModelError, *READ_ERRORS) as error:
        raise _unbuildable(file, error) from error
    return model


def _unbuildable(file: Path, error: BaseException) -> WeightsError:
    why = str(error) if isinstance(error, ModelError) else first_line(error)
    return WeightsError(f"{file} does not describe a model that can be built: {why}. It is damaged or edited.")


def _compare_claims(found: Mapping[str, Header], model: nn.Module, file: Path) -> None:
    """See that a file claims exactly the tensors that its config makes necessary, before they are read."""
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    if expected.keys() != found.keys():
        odd = ", ".join(sorted(map(str, expected.keys() ^ found.keys()))[:5])
        raise WeightsError(
            f"{file} does not fit the config: it lacks tensors or has unknown ones ({odd[:300]}). It is damaged."
        )
    for key, shape in expected.items():
        if found[key].shape != shape:
            raise WeightsError(
                f"{file} does not fit the config: '{key}' is {found[key].shape}, expected {shape}. It is damaged."
            )
        if found[key].dtype not in _DTYPES:
            raise WeightsError(
                f"{file}: '{key}' holds {found[key].dtype or 'an unknown dtype'}, expected floating-point numbers."
            )


def _check_values(tensors: Mapping[str, Tensor], config: Mapping[str, Any], file: Path) -> None:
    for key, tensor in tensors.items():
        if not is_finite(tensor):
            raise WeightsError(f"{file}: '{key}' holds NaN or infinite values. The file is damaged, or of a run that diverged.")
    if config["schema"] > 1 and config["weights_digest"] != _weights_digest(tensors):
        raise WeightsError(
            f"{file} is damaged, or of another model than the config: the tensors do not match the config's digest. Copy both "
            "from where they were whole, or save the model again."
        )
