"""Save and load the small model: `config.json` + `model.safetensors`, never a pickled class.

config.json says everything that is needed to build the network without the training code's arguments: the architecture,
read off the model itself, the channels that each block reads and writes and its inner widths, class names, preprocessing and
provenance. The file is in the form of timm's folders too, for timm.create_model (`p3b.storage.timm_form`); earlier schemas,
which are not, are read as ever. The published `first_sparse_checkpoint.pth` holds the same text beside the same tensors and
loads in torch's weights-only mode.

What is saved is what its description says, layer by layer (`p3b.vit.described`); what a file cannot hold, such as a hook, is
refused. When a model is loaded, its config has to be whole (`p3b.storage.model_config`) and to describe a model that can be
built, and the file has to claim this model's tensors, before any tensor is read.

    config.json.new     the next config, complete: there while `save` puts both files in their places, and after a crash of it
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from p3b.storage.model_config import (
    FORMAT,
    LATEST_SCHEMA,
    checked_config,
    read_config_file,
    sealed,
    skeleton_of,
    weights_digest,
)
from p3b.storage.pickles import Sketch, TensorClaim
from p3b.storage.untrusted import (
    Header,
    first_line,
    inspect_pickle,
    inspect_safetensors,
    is_finite,
    parse_json,
    read_pickle,
    read_safetensors,
)
from p3b.vit.architecture import describe_dense
from p3b.vit.coverage import require_saveable_layers
from p3b.vit.deployment import compact_of
from p3b.vit.described import require_described
from p3b.vit.families import width_of
from p3b.vit.families.family import classes_of
from p3b.vit.fresh import fill_buffers
from p3b.vit.shapes import branch_shapes, plain_shape
from p3b.vit.wrappers import require_vision_transformer

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
CHECKPOINT_KEY = "p3b"
_NEW_CONFIG_FILE = "config.json.new"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
        model: the module; its weights are written in their own dtype. Of a wrapped one (torch.compile, DistributedDataParallel,
            an average) the model inside is written, of a model in a layout the compact one.
        folder: made if absent; files of an earlier save are replaced only when the new ones are complete.
        class_names: one for each output of the head.
        preprocessing: how images must be prepared (plain JSON values).
        provenance: where the model comes from (plain JSON values).

    Returns:
        The folder.

    Raises:
        ModelError: the model has a part that its architecture cannot be described with, something that a file cannot hold (a
            hook, a pruner that is still attached), or values that are not finite.
        RunFolderError: the folder cannot be written.
    """
    folder, vit = Path(folder), _saveable(model)
    config = _config_of(vit, class_names=class_names, preprocessing=preprocessing, provenance=provenance)
    tensors = _tensors_of(vit)
    text = sealed(config, tensors)
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
    vit = _saveable(model)
    tensors = _tensors_of(vit)
    content = {CHECKPOINT_KEY: sealed(_config_of(vit, **description), tensors), "model": tensors}
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
    model.load_state_dict(tensors, assign=True)
    fill_buffers(model)
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) == 1:
        model.to(
            dtypes.pop()
        )  # what is not in the file is computed in float32, and brought to the dtype like the dense model's
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
    return read_config_file(path / CONFIG_FILE)


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
    """What config.json holds, by our names (`p3b.storage.timm_form`), as plain values, without the digests.

    Raises:
        ModelError: the architecture cannot be described, so that `load` would not give the model back, or the class names are
            not as many as the head's outputs.
    """
    return _config_of(_saveable(model), class_names=class_names, preprocessing=preprocessing, provenance=provenance)


def _config_of(
    vit: VisionTransformer,
    class_names: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The same of a model that has been looked at."""
    if class_names is not None and len(class_names) != classes_of(vit):
        raise ModelError(f"Got {len(class_names)} class names for a head of {classes_of(vit)} outputs.")
    shapes, architecture = branch_shapes(vit), describe_dense(vit)
    blocks = [plain_shape(shape) for shape in shapes]
    return {
        "format": FORMAT,
        "schema": LATEST_SCHEMA,
        "p3b_version": __version__,
        "architecture": architecture,
        "stream": width_of(vit),
        "blocks": blocks,
        "params": sum(value.numel() for _, value in vit.named_parameters(remove_duplicate=False)),  # ties are cut by saving
        "class_names": None if class_names is None else list(class_names),
        "preprocessing": None if preprocessing is None else dict(preprocessing),
        "provenance": None if provenance is None else dict(provenance),
    }


def _saveable(model: nn.Module) -> VisionTransformer:
    """The model inside its wrappers and layouts, all of which a file can hold."""
    vit = compact_of(require_vision_transformer(model, "saved"))
    require_described(vit)
    require_saveable_layers(vit)
    return vit


# ----------------------------------------------------------------------------------------------------------- writing


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Tensors of the state dict on the CPU, each with memory of its own that it fills; ModelError where they cannot be used."""
    tensors = {}
    for key, value in model.state_dict().items():
        if value.dtype not in _dtypes_of(key):
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


def _dtypes_of(key: str) -> tuple[torch.dtype, ...]:
    """Dtypes that a tensor may have: a batch norm in front of the blocks counts its batches in whole numbers."""
    return (torch.int64,) if key.endswith(".num_batches_tracked") else _DTYPES


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
        if _read_folder(folder)[0] == read_config_file(waiting):
            waiting.replace(folder / CONFIG_FILE)
    except WeightsError:
        return  # nothing complete is there: nothing is lost


# ----------------------------------------------------------------------------------------------------------- reading


def _read_folder(folder: Path) -> tuple[dict[str, Any], VisionTransformer, dict[str, Tensor]]:
    """The config that belongs to the weights, the model without weights, and the weights."""
    weights = folder / WEIGHTS_FILE
    configs, problems = [], []
    for file in (folder / CONFIG_FILE, folder / _NEW_CONFIG_FILE):
        if file.exists() or file.name == CONFIG_FILE:
            try:
                configs.append((read_config_file(file), file))
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
            model = skeleton_of(config, file)
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
    model = skeleton_of(config, file)
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
    return checked_config(config, file)


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
        if found[key].dtype not in _dtypes_of(key):
            raise WeightsError(
                f"{file}: '{key}' holds {found[key].dtype or 'an unknown dtype'}, expected floating-point numbers."
            )


def _check_values(tensors: Mapping[str, Tensor], config: Mapping[str, Any], file: Path) -> None:
    for key, tensor in tensors.items():
        if not is_finite(tensor):
            raise WeightsError(f"{file}: '{key}' holds NaN or infinite values. The file is damaged, or of a run that diverged.")
    if config["schema"] > 1 and config["weights_digest"] != weights_digest(tensors):
        raise WeightsError(
            f"{file} is damaged, or of another model than the config: the tensors do not match the config's digest. Copy both "
            "from where they were whole, or save the model again."
        )
