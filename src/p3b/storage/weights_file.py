"""A path becomes a state dict, whatever the file is called: what lies in it decides, not its ending."""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from p3b.errors import WeightsError
from p3b.storage.authors_archive import convert_npz
from p3b.storage.envelope import Opened, open_envelope
from p3b.storage.hub_folder import NOTHING_SAID, Facts, facts_beside, is_hub_folder, weights_files
from p3b.storage.untrusted import is_finite, read_npz, read_pickle, read_safetensors

_ENDINGS = {".pth": "torch", ".pt": "torch", ".safetensors": "safetensors", ".npz": "npz"}
# Beginnings of files that people give in place of weights, and what is to be done about them.
_OTHERS = {
    b"version https://git-lfs": "is a pointer of git-lfs and not the file itself: fetch it with 'git lfs pull'",
    b"<": "is a web page, as after a download that was refused: fetch the file itself",
    b"\x89HDF": "is an HDF5 file of Keras or TensorFlow, which holds another framework's weights",
    b"GGUF": "is a GGUF file, which holds quantised weights",
    b"\x1f\x8b": "is compressed with gzip: unpack it first",
    b"BZh": "is compressed with bzip2: unpack it first",
    b"\xfd7zXZ": "is compressed with xz: unpack it first",
    b"\x80": "is a plain pickle and not a file of torch.save; opening it would run code: save the weights with "
    "torch.save(model.state_dict(), path)",
}
_AUTHORS = Facts(said_by="the layout of the ViT authors' archives", mean=(0.5,) * 3, std=(0.5,) * 3)
_LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9"


@dataclass(frozen=True)
class Weights:
    """Weights as a file holds them, and what is known of them.

    Attributes:
        source: where they were read from.
        state: tensors by the file's own names (timm's for `.npz`), out of their envelope.
        notes: what was found on the way, for the report.
        facts: what the file, or the config beside it, says of its model.
    """

    source: str
    state: dict[str, Tensor]
    notes: tuple[str, ...] = ()
    facts: Facts = NOTHING_SAID


def open_weights(path: str | Path) -> Weights:
    """Read a weights file, or the folder of a hub, on the CPU.

    Raises:
        WeightsError: it is missing, empty, damaged, of an unknown kind, holds code objects, no weights, or values that are not
            finite.
    """
    path = Path(path)
    files = weights_files(path) if path.is_dir() else [path]
    opened = _read_one(files[0]) if len(files) == 1 else _read_shards(files)
    _check_values(opened.state, path)
    notes = opened.notes
    if path.is_dir():
        names = files[0].name if len(files) == 1 else f"{len(files)} files, {files[0].name} and following"
        notes = (f"read from {names} in the folder", *notes)
    facts = _AUTHORS if _kind(files[0]) == "npz" else facts_beside(files[0])
    if facts.kind is None and opened.kind is not None:
        facts = replace(facts, kind=opened.kind, said_by=facts.said_by or "the checkpoint")
    return Weights(str(path), opened.state, notes, _with_what_the_state_says(facts, opened.state))


def _read_shards(files: list[Path]) -> Opened:
    state: dict[str, Tensor] = {}
    for file in files:
        part = _read_one(file).state
        if twice := state.keys() & part.keys():
            raise WeightsError(f"'{file}' holds '{min(twice)}', which another file of the folder has already.")
        state |= part
    return Opened(state)


def _read_one(file: Path) -> Opened:
    if not file.is_file():
        raise WeightsError(f"There is no weights file '{file}'. Check the path.")
    if file.stat().st_size == 0:
        raise WeightsError(f"'{file}' is empty, as after a broken download. Fetch or save it again.")
    if is_p3b_part(file):
        raise WeightsError(f"'{file}' is part of a model that p3b saved: give its folder, '{file.parent}'.")
    match _kind(file):
        case "npz":
            return Opened(convert_npz(read_npz(file), file))
        case "safetensors":
            return open_envelope(read_safetensors(file), file)
        case _:
            return open_envelope(read_pickle(file), file)


def is_p3b_part(file: Path) -> bool:
    """Whether a file is the weights of a model that p3b saved, which make no sense without its config."""
    config = file.parent / "config.json"
    if file.name != "model.safetensors" or not config.is_file() or is_hub_folder(file.parent):
        return False
    return b'"p3b-model"' in config.read_bytes()[: 1 << 20]


def _kind(file: Path) -> str:
    """What a file is, by its first bytes; by its ending where these are damaged."""
    with file.open("rb") as opened:
        start = opened.read(512)
        size = opened.seek(0, io.SEEK_END)
    if start.startswith(b"PK\x03\x04"):
        (length,) = struct.unpack("<H", start[26:28].ljust(2, b"\0"))
        return "npz" if start[30 : 30 + length].endswith(b".npy") else "torch"
    if start.startswith(_LEGACY):
        return "torch"
    if len(start) > 8 and start[8:9] == b"{" and struct.unpack("<Q", start[:8])[0] <= size - 8:
        return "safetensors"
    for beginning, meaning in _OTHERS.items():
        if start.startswith(beginning):
            raise WeightsError(f"'{file}' {meaning}. Expected a file of torch.save, safetensors or the ViT authors' npz.")
    if start[257:262] == b"ustar":
        raise WeightsError(f"'{file}' is a tar archive: unpack it first, and give the weights file that lies in it.")
    kind = _ENDINGS.get(file.suffix.lower())
    if kind is None:
        raise WeightsError(
            f"'{file}': unknown kind of weights file: its content is none that is known, whatever its ending. Expected a file "
            "of torch.save (.pth, .pt, .bin, .ckpt, .pth.tar), .safetensors or the ViT authors' .npz."
        )
    return kind


def _with_what_the_state_says(facts: Facts, state: Mapping[str, Tensor]) -> Facts:
    """OpenAI's CLIP keeps its sizes among its tensors, which open_clip does not; it computes with the quick GELU."""
    if facts.activation is None and {"input_resolution", "context_length", "vocab_size"} <= state.keys():
        return replace(facts, activation="quick_gelu", said_by=facts.said_by or "its own tensors (OpenAI's CLIP)")
    return facts


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
