"""Files that somebody has made to harm: saved models, weights of any origin, and configs.

Digests and checksums are right in them, for their author can compute them as well. `HOSTILE` holds one of each kind.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from functools import cache
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

import p3b
from p3b.storage.artifact import CONFIG_FILE, WEIGHTS_FILE, save_checkpoint
from p3b.vit.compact import apply_cuts, plan_cuts
from p3b.vit.layout import read_layout
from tiny import random_masks, tiny_vit

MARK = "executed"
"""Name of the file that hostile code would leave."""


def pruned(**changed: Any) -> nn.Module:
    """A tiny model, shrunk, with every form of block: whole, small, constant and gone."""
    model = tiny_vit(depth=4, **changed)
    layout = read_layout(model)
    masks = random_masks(layout, seed=1)
    for gate, mask in masks.items():
        if gate.startswith("blocks.0.attn"):
            masks[gate] = torch.ones_like(mask)
        elif gate.startswith(("blocks.2", "blocks.3.mlp")) or gate == "blocks.1.mlp.in":
            masks[gate] = torch.zeros_like(mask)
    return apply_cuts(model, plan_cuts(layout, masks))


@cache
def _files(suffix: str) -> dict[str, bytes]:
    """What saving this model into a folder, or a .pth, leaves, by name."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        if suffix:
            save_checkpoint(pruned(), folder / f"model{suffix}")
        else:
            p3b.save(pruned(), folder)
        return {file.name: file.read_bytes() for file in folder.iterdir()}


def saved_pruned(folder: Path, suffix: str = "") -> Path:
    """The saved model in a folder, which is made; with the suffix .pth in a file `model.pth` there."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in _files(suffix).items():
        (folder / name).write_bytes(content)
    return folder / f"model{suffix}" if suffix else folder


class _Call:
    """Pickles as a call of anything at all."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self._call


class _Storage:
    """Pickles as a storage that lies beside the pickle."""

    def __init__(self, numel: int, key: str = "0") -> None:
        self.described = ("storage", torch.FloatStorage, key, "cpu", numel)


class _Pickler(pickle.Pickler):
    def persistent_id(self, thing: object) -> Any:
        return thing.described if isinstance(thing, _Storage) else None


def _pickled(content: object) -> bytes:
    written = BytesIO()
    _Pickler(written, protocol=2).dump(content)
    return written.getvalue()


def _view(storage: _Storage, shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> _Call:
    return _Call(torch._utils._rebuild_tensor_v2, storage, offset, shape, stride, False, {})


def _torch_file(
    file: Path,
    content: object,
    storages: Mapping[str, bytes] | None = None,
    *,
    more: Mapping[str, bytes] | None = None,
    pickled: bytes | None = None,
    method: int = zipfile.ZIP_STORED,
) -> Path:
    """A file as torch.save writes them, of a pickle and storages of one's own."""
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.writestr("weights/data.pkl", _pickled(content) if pickled is None else pickled)
        archive.writestr("weights/byteorder", "little")
        archive.writestr("weights/version", "3\n")
        for key, value in (storages or {}).items():
            archive.writestr(f"weights/data/{key}", value)
        for name, value in (more or {}).items():
            archive.writestr(name, value)
    return file


def _safetensors_file(file: Path, header: Mapping[str, Any] | bytes, content: bytes, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + content)
    return file


def sealed(config: Mapping[str, Any]) -> str:
    """A config's text with the right digest: SHA-256 of the other entries, keys sorted, without spaces."""
    entries = {key: value for key, value in config.items() if key != "digest"}
    text = json.dumps(entries, sort_keys=True, separators=(",", ":"))
    return json.dumps({**entries, "digest": hashlib.sha256(text.encode()).hexdigest()})


def of_schema(entries: Mapping[str, Any], schema: int) -> dict[str, Any]:
    """A config.json of today as schema 1, 2 or 3 had it, without a digest; heads and stream of schemas below 3 were whole."""
    new = {"network", "pretrained_cfg", "digest"}
    new |= {"stream"} if schema < 3 else set()
    new |= {"p3b_version", "weights_digest"} if schema < 2 else set()
    kept = {key: value for key, value in entries.items() if key not in new}
    blocks = [{key: value for key, value in block.items() if key != "heads" or schema == 3} for block in entries["blocks"]]
    return {**kept, "schema": schema, "architecture": entries["network"], "blocks": blocks}


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for key, tensor in sorted(tensors.items()):
        digest.update(json.dumps([key, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def edited(change: Callable[[dict[str, Any]], object], *, schema: int = 4) -> Callable[[Path], Path]:
    """A pruned model whose config was changed by somebody who can compute digests."""

    def make(folder: Path) -> Path:
        path = saved_pruned(folder / "model")
        config = json.loads((path / CONFIG_FILE).read_text())
        if schema < 4:
            config = of_schema(config, schema)
        change(config)
        (path / CONFIG_FILE).write_text(sealed(config) if schema > 1 else json.dumps(config))
        return path

    return make


def _arguments(**changed: Any) -> Callable[[Path], Path]:
    return edited(lambda config: config["network"]["arguments"].update(changed))


def _block(index: int, **changed: Any) -> Callable[[Path], Path]:
    return edited(lambda config: config["blocks"][index].update(changed))


def _channels(change: Callable[[list[Any]], object], side: str = "inputs") -> Callable[[Path], Path]:
    return edited(lambda config: change(config["blocks"][1][side]))


def _tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], Path]:
    """A pruned model whose weights were changed by somebody who can compute digests."""

    def make(folder: Path) -> Path:
        path = saved_pruned(folder / "model")
        config, tensors = json.loads((path / CONFIG_FILE).read_text()), safetensors.torch.load_file(path / WEIGHTS_FILE)
        change(tensors)
        safetensors.torch.save_file(tensors, path / WEIGHTS_FILE)
        (path / CONFIG_FILE).write_text(sealed({**config, "weights_digest": weights_digest(tensors)}))
        return path

    return make


def _replaced(name: str, make: Callable[[Path], object]) -> Callable[[Path], Path]:
    """A pruned model with another file in the place of one of its own."""

    def replaced(folder: Path) -> Path:
        path = saved_pruned(folder / "model")
        (path / name).unlink()
        make(path / name)
        return path

    return replaced


def _weights(make: Callable[[Path], object]) -> Callable[[Path], Path]:
    return _replaced(WEIGHTS_FILE, make)


def _config(make: Callable[[Path], object]) -> Callable[[Path], Path]:
    return _replaced(CONFIG_FILE, make)


def _foreign(make: Callable[[Path], object], suffix: str = ".pth") -> Callable[[Path], Path]:
    """Weights of somebody else."""

    def made(folder: Path) -> Path:
        make(folder / f"weights{suffix}")
        return folder / f"weights{suffix}"

    return made


def _foreign_safetensors(header: Mapping[str, Any] | bytes, length: int | None = None) -> Callable[[Path], Path]:
    return _foreign(lambda file: _safetensors_file(file, header, bytes(16), length), ".safetensors")


def _foreign_torch(content: object, storages: Mapping[str, bytes] | None = None, **more: Any) -> Callable[[Path], Path]:
    return _foreign(lambda file: _torch_file(file, content, storages, **more))


def _ours(change: Callable[[dict[str, Any]], Mapping[str, Any]]) -> Callable[[Path], Path]:
    """A .pth of ours, with another content."""

    def made(folder: Path) -> Path:
        path = saved_pruned(folder, ".pth")
        torch.save(change(torch.load(path, weights_only=True)), path)
        return path

    return made


def _code(file: Path) -> _Call:
    return _Call(os.system, f"touch {file.parent / MARK}")


def _changed_config(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def changed(content: dict[str, Any]) -> dict[str, Any]:
        config = json.loads(content["p3b"])
        change(config)
        return {**content, "p3b": sealed(config)}

    return changed


def _other_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], Path]:
    """A .pth of ours with other tensors, by somebody who can compute digests."""

    def changed(content: dict[str, Any]) -> dict[str, Any]:
        state = dict(content["model"])
        change(state)
        config = {**json.loads(content["p3b"]), "weights_digest": weights_digest(state)}
        return {**content, "model": state, "p3b": sealed(config)}

    return _ours(changed)


def _gigabyte(file: Path) -> None:
    file.touch()
    os.truncate(file, 1 << 30)


def _colliding_keys(file: Path) -> None:
    prime = 2**61 - 1  # Python's hash of a whole number is its remainder by it
    items = b"".join(pickle.dumps(index * prime, protocol=2)[2:-1] + b"K\x00" for index in range(1, 100_000))
    _torch_file(file, None, pickled=b"\x80\x02}(" + items + b"u.")


def _bomb(file: Path) -> None:
    view = _view(_Storage(1 << 25), (1 << 25,), (1,))
    _torch_file(file, {"a": view}, {"0": bytes(1 << 27)}, method=zipfile.ZIP_DEFLATED)


def _overlapping(file: Path) -> None:
    """Ten entries of a list of contents that share the bytes of one."""
    _torch_file(file, None, {str(index): bytes(1 << 16) for index in range(10)})
    content = bytearray(file.read_bytes())
    place = start = content.index(b"PK\x01\x02")
    offsets = []
    while content[place : place + 4] == b"PK\x01\x02":
        name, extra, comment = struct.unpack("<3H", content[place + 28 : place + 34])
        if b"/data/" in content[place + 46 : place + 46 + name]:
            offsets.append(place + 42)
        place += 46 + name + extra + comment
    for offset in offsets[1:]:
        content[offset : offset + 4] = content[offsets[0] : offsets[0] + 4]
    assert start < place
    file.write_bytes(content)


def _inflating_npz(file: Path) -> None:
    with (
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("embedding/kernel.npy", "w", force_zip64=True) as out,
    ):
        np.lib.format.write_array_header_1_0(out, {"descr": "<f4", "fortran_order": False, "shape": (1 << 25,)})
        for _ in range(1 << 7):
            out.write(bytes(1 << 20))


def _lying_npz(file: Path) -> None:
    header = BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40,)})
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("embedding/kernel.npy", header.getvalue() + bytes(64))


def _deep_npz(file: Path) -> None:
    """A few numbers in shapes that speak of a million blocks of a million channels."""
    arrays = {
        "embedding/kernel": np.zeros((1, 1, 1, 1 << 18), np.float32),
        "Transformer/posembed_input/pos_embedding": np.zeros((1, 4, 1), np.float32),
        "Transformer/encoderblock/LayerNorm_0/scale": np.zeros((1 << 20, 1), np.float32),
        "Transformer/encoderblock/MultiHeadDotProductAttention_0/query/kernel": np.zeros((1, 1, 1, 1), np.float32),
        "Transformer/encoderblock/MlpBlock_0/Dense_0/kernel": np.zeros((1, 1, 1 << 18), np.float32),
    }
    np.savez(file, **arrays)


def _legacy(claimed: int) -> Callable[[Path], object]:
    """The format before torch 1.6, whose storage claims more elements than follow."""

    def make(file: Path) -> None:
        storage = ("storage", torch.FloatStorage, "0", "cpu", claimed, None)
        thing = _Storage(claimed)
        thing.described = storage
        content = _pickled({"a": _view(thing, (claimed,), (1,))})
        head = b"".join(pickle.dumps(value, protocol=2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
        file.write_bytes(head + content + pickle.dumps(["0"], protocol=2) + struct.pack("<q", claimed) + bytes(64))

    return make


_ONE = {"0": bytes(16)}
_FLOATS = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
HOSTILE: dict[str, Callable[[Path], Path]] = {
    # safetensors
    "a header that claims 2^60 bytes": _weights(lambda f: _safetensors_file(f, {}, b"", length=1 << 60)),
    "weights whose header claims 2^60 bytes": _foreign_safetensors({}, length=1 << 60),
    "a tensor of 2^60 elements": _foreign_safetensors({"a": {**_FLOATS, "shape": [1 << 30, 1 << 30]}}),
    "a tensor of a million dimensions": _foreign_safetensors({"a": {**_FLOATS, "shape": [2] * 1_000_000}}),
    "two tensors on the same bytes": _foreign_safetensors({"a": _FLOATS, "b": _FLOATS}),
    "a tensor behind the end": _foreign_safetensors({"a": {**_FLOATS, "data_offsets": [1 << 40, (1 << 40) + 16]}}),
    "a negative offset": _foreign_safetensors({"a": {**_FLOATS, "data_offsets": [-16, 0]}}),
    "a header nested a million deep": _foreign_safetensors(b'{"a":' * 1_000_000),
    "a header that is a list": _foreign_safetensors(b"[1, 2]"),
    "a tensor of a name that climbs": _tensors(lambda t: t.update({"../../escape": torch.zeros(1)})),
    # pickles
    "a pickle that runs a command": _foreign(lambda f: _torch_file(f, {"a": _code(f)})),
    "a bare pickle that runs a command": _foreign(lambda f: f.write_bytes(pickle.dumps(_code(f)))),
    "an old file that runs a command": _foreign(
        lambda f: f.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2) + pickle.dumps(_code(f), protocol=2))
    ),
    "a saved model's .pth that runs a command": lambda folder: _torch_file(
        folder / "model.pth", {"p3b": _code(folder / "x"), "model": {}}
    ),
    "a pickle in place of safetensors": _weights(lambda f: f.write_bytes(pickle.dumps(_code(f)))),
    "a torch file in place of safetensors": _foreign(lambda f: _torch_file(f, {"a": _code(f)}), ".safetensors"),
    "a pickle in place of the config": _config(lambda f: f.write_bytes(pickle.dumps(_code(f)))),
    "a byte array of 2^40 zeros": _foreign_torch({"a": _Call(bytearray, 1 << 40)}),
    "a storage of 2^40 elements": _foreign_torch({"a": _Call(torch.FloatStorage, 1 << 40)}),
    "a tensor larger than its storage": _foreign_torch({"a": _view(_Storage(4), (1 << 28,), (1,))}, _ONE),
    "zero strides that claim 2^40 elements": _foreign_torch({"a": _view(_Storage(4), (1 << 20, 1 << 20), (0, 0))}, _ONE),
    "a negative stride": _foreign_torch({"a": _view(_Storage(4), (4,), (-1,), 3)}, _ONE),
    "an offset behind the end": _foreign_torch({"a": _view(_Storage(4), (4,), (1,), 1 << 40)}, _ONE),
    "a storage that is larger than its entry": _foreign_torch({"a": _view(_Storage(1 << 38), (4,), (1,))}, _ONE),
    "a storage whose key climbs": _foreign_torch({"a": _view(_Storage(4, "../../../etc/passwd"), (4,), (1,))}, _ONE),
    "a hundred thousand views of everything": _foreign_torch(
        dict(enumerate([_view(_Storage(1 << 18), (1 << 18,), (1,)) for _ in range(2000)])), {"0": bytes(1 << 20)}
    ),
    "keys that all collide": _foreign(_colliding_keys),
    "a key nested a hundred thousand deep": _foreign_torch(None, pickled=b"\x80\x02})" + b"\x85" * 100_000 + b"K\x00s."),
    "a pickle of ten million instructions": _foreign(lambda f: _torch_file(f, None, pickled=b"\x80\x02" + b"}" * 10_000_000)),
    "a pickle that is larger than any": _foreign(lambda f: _torch_file(f, "x" * (20 << 20))),
    "an old file that claims 2^38 elements": _foreign(_legacy(1 << 38)),
    # zip
    "a zip bomb": _foreign(_bomb),
    "zip entries that overlap": _foreign(_overlapping),
    "a zip entry that climbs": _foreign_torch({}, more={f"../{MARK}": b"x"}),
    "a zip entry of an absolute name": _foreign_torch({}, more={f"/tmp/{MARK}": b"x"}),
    "a TorchScript program": _foreign_torch({}, more={"weights/constants.pkl": b"\x80\x02)."}),
    "an archive of arrays that is a bomb": _foreign(_inflating_npz, ".npz"),
    "an array of 2^40 elements": _foreign(_lying_npz, ".npz"),
    "arrays that speak of a million blocks": _foreign(_deep_npz, ".npz"),
    "an archive of objects": _foreign(lambda f: np.savez(f, a=np.array([_code(f)], dtype=object)), ".npz"),
    # our .pth
    "a .pth with tensors that share memory": _other_tensors(lambda state: state.update({"norm.bias": state["norm.weight"]})),
    "a .pth with zero strides": _other_tensors(lambda state: state.update({"norm.weight": torch.ones(1).expand(24)})),
    "a .pth of a huge architecture": _ours(
        _changed_config(lambda config: config["network"]["arguments"].update(embed_dim=49152, num_heads=1))
    ),
    "a .pth whose config is a number": _ours(lambda content: {**content, "p3b": 7}),
    "a .pth whose tensors are text": _ours(lambda content: {**content, "model": dict.fromkeys(content["model"], "x")}),
    # config.json
    "JSON nested a million deep": _config(lambda f: f.write_text("[" * 1_000_000)),
    "JSON of nested entries": _config(lambda f: f.write_text('{"a":' * 1_000_000)),
    "a number of a million digits": _config(lambda f: f.write_text('{"schema": ' + "9" * 1_000_000 + "}")),
    "a config of a gigabyte": _config(_gigabyte),
    "a config that is a folder": _config(lambda f: f.mkdir()),
    "a config that is a pipe": _config(os.mkfifo),
    "a config without an end": _config(lambda f: f.symlink_to("/dev/zero")),
    "weights that are a pipe": _weights(os.mkfifo),
    "an entry twice": _config(lambda f: f.write_text('{"schema": 2, "format": "p3b-model", "schema": 1}')),
    "a depth of a million": _arguments(depth=1_000_000),
    "a million blocks": edited(
        lambda config: (
            config["network"]["arguments"].update(depth=30_000),
            config.update(blocks=[{**config["blocks"][4], "name": f"blocks.{i // 2}.attn"} for i in range(60_000)]),
        )
    ),
    "a width of 2^40": _arguments(embed_dim=1 << 40),
    "a width of 2^16": _arguments(embed_dim=1 << 16, num_heads=1),
    "images of 2^40 pixels": _arguments(img_size=[1 << 40, 1 << 40]),
    "images of a million patches": _arguments(img_size=[65536, 65536], patch_size=[1, 1]),
    "2^60 classes": _arguments(num_classes=1 << 60),
    "no heads": _arguments(num_heads=0),
    "heads that do not divide the width": _arguments(num_heads=5),
    "a width that is a word": _arguments(embed_dim="24"),
    "a width that is a truth": _arguments(embed_dim=True),
    "a width that is infinite": _arguments(mlp_ratio=float("inf")),
    "an activation from anywhere": _arguments(act_layer="os.system"),
    "an argument that timm would take": _arguments(weight_init="jax"),
    "a class from anywhere": edited(lambda config: config["network"].update({"class": "os.system"})),
    "channels out of range": _channels(lambda channels: channels.__setitem__(-1, 24)),
    "channels far out of range": _channels(lambda channels: channels.__setitem__(-1, 1 << 62), "outputs"),
    "channels that are negative": _channels(lambda channels: channels.__setitem__(0, -1)),
    "channels that are no whole numbers": _channels(lambda channels: channels.__setitem__(0, 0.0)),
    "channels that are truths": _channels(lambda channels: channels.__setitem__(slice(0, 2), [False, True])),
    "channels out of order": _channels(lambda channels: channels.reverse()),
    "channels twice": _channels(lambda channels: channels.__setitem__(1, channels[0])),
    "channels that are a text": _block(1, inputs="0123"),
    "a million channels": _block(1, inputs=list(range(1_000_000))),
    "an inner width of 2^40": _block(1, inner=1 << 40),
    "an inner width of nothing": _block(1, inner=0),
    "a block of an unknown form": _block(1, form="huge"),
    "a block that is gone yet writes": _block(4, outputs=[1, 2]),
    "a constant that reads": _block(3, inputs=[1, 2]),
    "blocks in another order": edited(lambda config: config["blocks"].reverse()),
    "fewer blocks": edited(lambda config: config["blocks"].pop()),
    "parameters that were miscounted": edited(lambda config: config.update(params=1)),
    "class names that are numbers": edited(lambda config: config.update(class_names=[1, 2, 3, 4, 5])),
    "a class name too many": edited(lambda config: config.update(class_names=list("abcdef"))),
    "preprocessing that is a list": edited(lambda config: config.update(preprocessing=[1])),
    "another entry": edited(lambda config: config.update(colour="red")),
    "a schema of the future": edited(lambda config: config.update(schema=5, p3b_version="9.9")),
    "another entry point of timm": edited(lambda config: config.update(architecture="resnet50")),
    "another story for timm": edited(lambda config: config["pretrained_cfg"].update(num_classes=7)),
    "a story for timm that is a text": edited(lambda config: config.update(pretrained_cfg="num_classes")),
    "a schema that is a truth": edited(lambda config: config.update(schema=True)),
    "a schema that is a word": edited(lambda config: config.update(schema="2")),
    "schema 1 of channels out of order": edited(lambda config: config["blocks"][1]["inputs"].reverse(), schema=1),
    "schema 1 of a huge width": edited(lambda config: config["architecture"]["arguments"].update(embed_dim=49152), schema=1),
    # values
    "weights that are not numbers": _tensors(lambda t: t["norm.weight"].__setitem__(3, float("nan"))),
    "weights that are infinite": _tensors(lambda t: t["norm.weight"].__setitem__(3, float("inf"))),
    "weights that are whole numbers": _tensors(lambda t: t.update({"norm.weight": torch.ones(24, dtype=torch.int32)})),
    "weights of another shape": _tensors(lambda t: t.update({"norm.weight": torch.ones(25)})),
    "weights fewer": _tensors(lambda t: t.pop("norm.weight")),
}
"""Files made to harm, by what they do: each makes one in a folder and says where. All are refused."""
