"""Files of unknown origin are looked at before they are opened.

Weights travel: what is read here may be damaged or made to harm. Each kind of file has one door, which compares what the
file says about itself (sizes, shapes, offsets, names) with the bytes that are there, and opens it only where they agree.
Nothing that a file names is run, nothing is allocated that it does not hold, and no time is spent on what it merely claims.
What is wrong is told in one `WeightsError` that names the file.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from p3b.errors import WeightsError
from p3b.storage.pickles import MOST_DIMENSIONS, NotPlainError, Sketch, StorageClaim, sketch

MOST_JSON = 8 << 20
"""Bytes of JSON that are read: a config of the largest ViTs takes one of eight MB, a parser up to thirty times of it."""

_MOST_DIRECTORY = 8 << 20  # bytes of a zip's list of contents: the largest ViTs' take 0.2 MB
_MOST_PICKLE = 16 << 20
_MOST_INFLATION = 20  # an archive of trained weights unpacks to 1.1 times its size, one of zeros to 1000 times
# Where the classes of whole models come from; what else a pickle names lies beside the weights.
_MODULES = re.compile(r"(timm\.(models|layers)|torch\.nn\.(modules|parallel)|torchvision\.models|transformers\.models)\.")
_LEGACY_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
_KINDS = {
    "torch": "a file that torch.save wrote",
    "safetensors": "a safetensors file",
    "npz": "a NumPy archive of plain arrays",
}
# What torch's, safetensors', NumPy's and the standard library's readers raise on contents that they cannot make sense of.
READ_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError, TypeError),
    *(ValueError, SafetensorError, pickle.UnpicklingError, struct.error, zipfile.BadZipFile, zlib.error),
)
_SAFETENSORS_DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
T = TypeVar("T")


class _AnotherKindError(ValueError):
    """The file is whole and of another kind; the argument says of which, and what to do."""


@dataclass(frozen=True)
class Header:
    """What a file says about a tensor. `dtype` is None where it is none of the common ones."""

    dtype: torch.dtype | None
    shape: tuple[int, ...]


# ------------------------------------------------------------------------------------------------------------- JSON


def read_json(file: Path) -> Any:
    """Content of a JSON file.

    Raises:
        WeightsError: it is missing, larger than `MOST_JSON`, or no JSON.
    """
    _require_file(file)
    with file.open("rb") as opened:
        content = opened.read(MOST_JSON + 1)
    try:
        return parse_json(content.decode("utf-8"))
    except ValueError as error:
        raise WeightsError(f"'{file}' is not valid JSON ({first_line(error)}). The file is damaged or edited.") from error


def parse_json(text: str) -> Any:
    """Plain values of a text of JSON.

    Raises:
        ValueError: it is longer than `MOST_JSON`, nested too deep, has a name twice, or is no JSON.
    """
    if len(text) > MOST_JSON:
        raise ValueError(f"more than {MOST_JSON} bytes")
    try:
        return json.loads(text, object_pairs_hook=_without_repeats)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("an entry stands there twice")
    return values


# ----------------------------------------------------------------------------------------------------------- pickles


def inspect_pickle(file: Path) -> Sketch:
    """What a file of torch.save would give, worked out without loading it: claims stand in the place of tensors.

    Raises:
        WeightsError: it is missing, damaged, claims more than it holds, or holds more than tensors and plain values.
    """
    return _opened(file, "torch", _sketch_of)


def read_pickle(file: Path) -> Any:
    """Content of a file of torch.save, on the CPU: tensors of any kind and plain values, in weights-only mode.

    Views of a shared storage, integer tensors and any nesting are taken. Checksums are compared, where the file has them.

    Raises:
        WeightsError: as `inspect_pickle`.
    """
    return _opened(file, "torch", _load_pickle)


def _load_pickle(opened: io.BufferedReader) -> Any:
    _sketch_of(opened)
    if _is_zip(opened):
        _compare_checksums(opened)
    # timm and DeiT keep their command line in the checkpoint; a namespace is data and runs nothing.
    opened.seek(0)
    with torch.serialization.safe_globals([argparse.Namespace]):
        # The file that was looked at, and not its name: by some endings torch takes another reader.
        return torch.load(opened, map_location="cpu", weights_only=True)


def _sketch_of(opened: io.BufferedReader) -> Sketch:
    return _sketch_of_zip(opened) if _is_zip(opened) else _sketch_of_legacy(opened)


def _sketch_of_zip(opened: io.BufferedReader) -> Sketch:
    with closing(_listed(opened, (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        folders = {name.partition("/")[0] for name in entries}
        top = folders.pop()
        if folders:
            raise ValueError("its entries lie in more than one folder")
        _refuse_programs(top, entries)
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
            raise ValueError("its entries are compressed")
        pickled = entries.get(f"{top}/data.pkl")
        if pickled is None:
            raise ValueError("its entry data.pkl is missing")
        if pickled.file_size > _MOST_PICKLE:
            raise ValueError(f"its pickle of {pickled.file_size} bytes is larger than that of any weights")
    content = b"".join(map(bytes, _parts(opened, pickled, memoryview(bytearray(1 << 18)))))
    found = sketch(io.BytesIO(content))
    for storage in found.storages.values():
        entry = entries.get(f"{top}/data/{storage.key}")
        if entry is None or entry.file_size != storage.nbytes:
            there = "is missing" if entry is None else f"has {entry.file_size} bytes"
            raise ValueError(f"storage {storage.key} of {storage.nbytes} bytes {there}")
    return _modest(found, opened)


def _refuse_programs(top: str, names: Collection[str]) -> None:
    if f"{top}/constants.pkl" in names:
        raise _AnotherKindError(
            "is a TorchScript program, not weights (torch.jit.save, OpenAI's CLIP files); programs are not run here. Save its "
            "weights, if you trust it: torch.save(torch.jit.load(path, map_location='cpu').state_dict(), new_path)"
        )
    if f"{top}/archive_format" in names or f"{top}/models/model.json" in names:
        raise _AnotherKindError(
            "is a program of torch.export (.pt2), not weights. Save the weights of the model it was made from"
        )


def _sketch_of_legacy(opened: io.BufferedReader) -> Sketch:
    """The format before torch 1.6: five pickles (magic, version, machine, content, keys), then each key's storage."""
    start = opened.read(_MOST_PICKLE)
    if not start.startswith(_LEGACY_MAGIC):
        raise ValueError("it does not begin as such a file")
    head = io.BytesIO(start)
    head.seek(len(_LEGACY_MAGIC))
    for _ in range(2):
        sketch(head)
    found = sketch(head)
    keys = sketch(head).content
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(found.storages):
        raise ValueError("its list of storages does not fit its content")
    size, place = _size(opened), head.tell()
    for key in keys:
        claim: StorageClaim = found.storages[key]
        opened.seek(place)
        (numel,) = struct.unpack("<q", opened.read(8))
        itemsize = 1 if claim.dtype is None else claim.dtype.itemsize
        place += 8 + claim.nbytes
        if numel * itemsize != claim.nbytes or place > size:
            raise ValueError(f"storage {key} of {claim.nbytes} bytes is not there")
    return _modest(found, opened)


def _modest(found: Sketch, opened: io.BufferedReader) -> Sketch:
    """Views may share storages, but a hundred thousand views of everything would be looked through one by one."""
    if sum(tensor.nbytes for tensor in found.tensors) > 8 * _size(opened) + (16 << 20):
        raise ValueError("its tensors claim many times what it holds")
    return found


# ------------------------------------------------------------------------------------------------------- safetensors


def inspect_safetensors(file: Path) -> dict[str, Header]:
    """Names, dtypes and shapes of a safetensors file, of which each tensor has its bytes.

    Raises:
        WeightsError: the file is missing or damaged.
    """
    return _opened(file, "safetensors", _headers)


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, each in memory of its own.

    Raises:
        WeightsError: the file is missing or damaged.
    """

    def load(opened: io.BufferedReader) -> dict[str, Tensor]:
        names = _headers(opened)
        with safe_open(file, framework="pt") as tensors:
            # Tensors lie in the file at any offset, and some kernels round by how their memory is aligned: copies are aligned.
            return {name: tensors.get_tensor(name).clone() for name in names}

    return _opened(file, "safetensors", load)


def _headers(opened: io.BufferedReader) -> dict[str, Header]:
    size = _size(opened)
    (length,) = struct.unpack("<Q", opened.read(8))
    if length > min(size - 8, MOST_JSON):
        raise ValueError(f"its header claims {length} bytes")
    header = parse_json(opened.read(length).decode("utf-8"))
    header.pop("__metadata__", None)
    place = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        dtype = _SAFETENSORS_DTYPES.get(entry["dtype"])
        shape = entry["shape"]
        if len(shape) > MOST_DIMENSIONS or not all(type(n) is int and 0 <= n < 1 << 63 for n in (begin, end, *shape)):
            raise ValueError(f"'{name}' has sizes that make no sense")
        if begin != place or end < begin or (dtype is not None and math.prod(shape) * dtype.itemsize != end - begin):
            raise ValueError(f"'{name}' does not have the bytes of its shape")
        place = end
    if place != size - 8 - length:
        raise ValueError(f"its tensors take {place} bytes, it holds {size - 8 - length}")
    return {name: Header(_SAFETENSORS_DTYPES.get(entry["dtype"]), tuple(entry["shape"])) for name, entry in header.items()}


# --------------------------------------------------------------------------------------------------------------- npz


def read_npz(file: Path) -> dict[str, np.ndarray]:
    """Arrays of a NumPy archive; objects are refused.

    Raises:
        WeightsError: the file is missing, damaged, holds objects, or unpacks to many times its size.
    """

    def load(opened: io.BufferedReader) -> dict[str, np.ndarray]:
        with closing(_listed(opened, (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > _MOST_INFLATION * _size(opened) + (16 << 20):
                raise ValueError("it would unpack to many times its size")
            for entry in archive.infolist():
                with archive.open(entry) as packed:
                    _check_array(packed, entry)
        opened.seek(0)
        with np.load(opened, allow_pickle=False) as arrays:
            return dict(arrays)

    return _opened(file, "npz", load)


def _check_array(packed: Any, entry: zipfile.ZipInfo) -> None:
    version = np.lib.format.read_magic(packed)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"'{entry.filename}' is of version {version} of NumPy's format")
    shape, _, dtype = read(packed)
    if dtype.hasobject:
        raise ValueError(f"'{entry.filename}' holds objects")
    if math.prod(shape) * dtype.itemsize + packed.tell() != entry.file_size:
        raise ValueError(f"'{entry.filename}' does not have the bytes of its shape")


# --------------------------------------------------------------------------------------------------------------- zip


def _is_zip(opened: io.BufferedReader) -> bool:
    opened.seek(0)
    start = opened.read(4)
    opened.seek(0)
    return start == b"PK\x03\x04"


def _listed(opened: io.BufferedReader, methods: tuple[int, ...]) -> zipfile.ZipFile:
    """The archive, whose list of contents leaves no two readers of opinions: whole, in its place, plain names, no overlaps."""
    size = _size(opened)
    opened.seek(max(0, size - 22 - 20 - 56))
    tail = opened.read()
    *_, listed, start, comment = struct.unpack("<4s4H2LH", tail[-22:])
    records = 22
    if tail[-42:-38] == b"PK\x06\x07" and tail[-98:-94] == b"PK\x06\x06":
        listed, start = struct.unpack("<2Q", tail[-58:-42])
        records = 98
    if tail[-22:-18] != b"PK\x05\x06" or comment or start + listed + records != size:
        raise ValueError("it is cut short, or something was added to its end")
    if listed > _MOST_DIRECTORY:
        raise ValueError(f"its list of contents takes {listed} bytes")
    archive = zipfile.ZipFile(opened)
    entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    names = {entry.filename for entry in entries}
    if not entries or len(names) != len(entries):
        raise ValueError("its list of contents is empty or has a name twice")
    end = 0
    for entry in entries:
        if entry.filename != entry.orig_filename or not _is_plain_path(entry.filename):
            raise ValueError(f"it has an entry of the name {entry.orig_filename[:80]!r}")
        if entry.compress_type not in methods or entry.flag_bits & 1:
            raise ValueError(f"its entry '{entry.filename}' is compressed or encrypted")
        if entry.compress_type == zipfile.ZIP_STORED and entry.compress_size != entry.file_size:
            raise ValueError(f"its entry '{entry.filename}' has two sizes")
        opened.seek(entry.header_offset)
        name_length, extra_length = struct.unpack("<2H", opened.read(30)[26:])
        if entry.header_offset < end:
            raise ValueError("its entries overlap")
        end = entry.header_offset + 30 + name_length + extra_length + entry.compress_size
    if entries[0].header_offset != 0 or end > start:
        raise ValueError("its entries overlap or do not begin at its start")
    return archive


def _is_plain_path(name: str) -> bool:
    parts = name.split("/")
    return name.isprintable() and "\\" not in name and not {"", ".", ".."} & set(parts)


def _parts(opened: io.BufferedReader, entry: zipfile.ZipInfo, buffer: memoryview) -> Iterator[memoryview]:
    """The bytes of a stored entry, part by part in one buffer; ValueError at their end where their checksum is another one."""
    opened.seek(entry.header_offset)
    opened.seek(sum(struct.unpack("<2H", opened.read(30)[26:])), io.SEEK_CUR)
    left, checksum = entry.file_size, 0
    while left:
        count = opened.readinto(buffer[: min(left, len(buffer))])
        if not count:
            raise ValueError(f"its entry '{entry.filename}' is cut short")
        checksum = zlib.crc32(buffer[:count], checksum)
        left -= count
        yield buffer[:count]
    if checksum != entry.CRC and entry.CRC != 0:  # torch.serialization.set_crc32_options(False) leaves 0
        raise ValueError(f"the checksum of its entry '{entry.filename}' does not match")


def _compare_checksums(opened: io.BufferedReader) -> None:
    """ValueError where bytes have changed since their checksum was taken; torch does not look."""
    with closing(_listed(opened, (zipfile.ZIP_STORED,))) as archive:
        entries = archive.infolist()
    buffer = memoryview(bytearray(1 << 18))  # stays in the processor's cache
    for entry in entries:
        for _ in _parts(opened, entry, buffer):
            pass


# ------------------------------------------------------------------------------------------------------------ opening


def _opened(file: Path, kind: str, read: Callable[[io.BufferedReader], T]) -> T:
    """What `read` makes of the opened file, its errors as one that names the file."""
    _require_file(file)
    try:
        with file.open("rb") as opened:
            return read(opened)
    except (NotPlainError, pickle.UnpicklingError) as error:
        _refuse_objects(file, error)
    except _AnotherKindError as error:
        raise WeightsError(f"'{file}' {error}.") from error
    except READ_ERRORS as error:
        raise WeightsError(
            f"'{file}' is damaged or not {_KINDS[kind]} ({first_line(error)}). Fetch or save it again."
        ) from error


def _refuse_objects(file: Path, error: Exception) -> NoReturn:
    found = f" ({error})" if isinstance(error, NotPlainError) else ""
    if _MODULES.match(str(error)):
        raise WeightsError(
            f"'{file}' is a whole pickled model{found}, not weights; pickles are only read in weights-only mode, which runs no "
            "code. Save its weights, if you trust it: torch.save(torch.load(path, weights_only=False).state_dict(), new_path)."
        ) from error
    raise WeightsError(
        f"'{file}' holds objects that are not weights{found}; pickles are only read in weights-only mode, which runs no code. "
        "Save the weights alone, with torch.save(model.state_dict(), path) or as safetensors."
    ) from error


def is_finite(tensor: Tensor) -> bool:
    """Whether a floating-point tensor holds neither NaN nor infinity."""
    if tensor.numel() == 0:
        return True
    # The extremes are NaN where any element is, and take a tenth of the time that a look at each takes.
    return all(math.isfinite(extreme) for extreme in torch.aminmax(tensor if tensor.dtype.itemsize > 1 else tensor.float()))


def _require_file(file: Path) -> None:
    if not file.exists():
        raise WeightsError(f"There is no file '{file}'. Check the path.")
    if not file.is_file():  # a pipe or a device would never come to an end
        raise WeightsError(f"'{file}' is not a file.")


def _size(opened: io.BufferedReader) -> int:
    place = opened.tell()
    size = opened.seek(0, io.SEEK_END)
    opened.seek(place)
    return size


def first_line(error: BaseException) -> str:
    """An error of a library in one line: its messages go on for many."""
    return f"{type(error).__name__}: {error}".strip(": \n").splitlines()[0]
