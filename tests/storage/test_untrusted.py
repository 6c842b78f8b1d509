"""Files of unknown origin: hostile ones are refused before they cost anything, ordinary ones give what torch gives."""

from __future__ import annotations

import argparse
import time
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from faults.opening import fingerprint, open_any
from hostile import HOSTILE, edited
from p3b.errors import WeightsError
from p3b.storage.pickles import TensorClaim
from p3b.storage.untrusted import (
    inspect_pickle,
    inspect_safetensors,
    is_finite,
    parse_json,
    read_json,
    read_npz,
    read_pickle,
    read_safetensors,
)

# --- made to harm


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_made_to_harm_is_refused(name: str, tmp_path: Path) -> None:
    path = HOSTILE[name](tmp_path)
    begun = time.perf_counter()
    with pytest.raises(WeightsError) as caught:
        open_any(path)
    assert time.perf_counter() - begun < 10.0
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.rglob("executed")) == []


@pytest.mark.parametrize("schema", [1, 2, 3, 4])
def test_the_hostile_files_are_refused_for_what_was_done_to_them(schema: int, tmp_path: Path) -> None:
    """Made in the same way without a change, they load."""
    path = edited(lambda _config: None, schema=schema)(tmp_path)
    assert sum(parameter.numel() for parameter in open_any(path).parameters()) > 0


# --- pickles


def ordinary() -> dict[str, Any]:
    """What checkpoints hold: state dicts, optimizer state, random states, numbers of any kind, and views of one storage."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    flat = torch.arange(12.0)
    shared = torch.arange(3)
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "parameter": torch.nn.Parameter(torch.ones(2, dtype=torch.float16)),
        "views": [flat[:4], flat[4:].reshape(2, 4), flat.reshape(3, 4).T, flat],
        "tied": (shared, shared),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "integers": torch.arange(5),
        "small": torch.zeros(3, dtype=torch.uint16),
        "complex": torch.ones(2, dtype=torch.complex64),
        "truths": torch.tensor([True, False]),
        "random": torch.get_rng_state(),
        "plain": [None, True, -1, 2**40, 2**70, 1.5, "text", b"bytes", bytearray(b"x"), (1, (2,)), {"a", "b"}, 1 + 2j],
        "counts": Counter({10: 1, 20: 2}),
        "ordered": OrderedDict([("b", 1), ("a", 2)]),
        "size": torch.Size([1, 2]),
        "device": torch.device("cpu"),
        "dtype": torch.bfloat16,
        "args": argparse.Namespace(lr=0.1),
        3: "a key that is a number",
    }


def test_what_a_checkpoint_holds_comes_back(tmp_path: Path) -> None:
    content = ordinary()
    torch.save(content, tmp_path / "a.pth")
    found = read_pickle(tmp_path / "a.pth")
    plain = content.keys() - {"plain", "args"}
    assert fingerprint({key: found[key] for key in sorted(plain, key=str)}) == fingerprint(
        {key: content[key] for key in sorted(plain, key=str)}
    )
    assert found["plain"] == content["plain"] and found["args"] == content["args"]
    assert found["views"][0].untyped_storage().data_ptr() == found["views"][3].untyped_storage().data_ptr()
    assert found["tied"][0].data_ptr() == found["tied"][1].data_ptr()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_sketch_tells_what_loading_gives(zipped: bool, tmp_path: Path) -> None:
    content = {key: value for key, value in ordinary().items() if zipped or key != "small"}  # uint16 came after the old format
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    found, told = read_pickle(tmp_path / "a.pth"), inspect_pickle(tmp_path / "a.pth").content
    assert list(told) == list(found)

    def compare(claim: Any, value: Any) -> int:
        if isinstance(value, Tensor):
            assert isinstance(claim, TensorClaim)
            assert (claim.shape, claim.dtype, claim.offset) == (tuple(value.shape), value.dtype, value.storage_offset())
            assert claim.stride == value.stride() and claim.storage.nbytes == value.untyped_storage().nbytes()
            return 1
        if isinstance(value, dict):
            assert list(claim) == list(value)
            return sum(compare(claim[key], inner) for key, inner in value.items())
        if isinstance(value, (list, tuple)):
            assert len(claim) == len(value)
            return sum(map(compare, claim, value))
        if isinstance(value, (str, bytes, int, float, complex, set)):
            assert claim == value
        return 0

    assert compare(told, found) > 15


def test_files_without_checksums_load(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(3)}, tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(read_pickle(tmp_path / "a.pth")["a"], torch.ones(3))


def test_a_bit_that_flipped_in_a_tensor_is_found_by_its_checksum(tmp_path: Path) -> None:
    torch.save({"a": torch.full((1000,), 3.0)}, tmp_path / "a.pth")
    content = bytearray((tmp_path / "a.pth").read_bytes())
    content[content.index(torch.tensor(3.0).numpy().tobytes() * 100) + 401] ^= 1
    (tmp_path / "a.pth").write_bytes(content)
    assert not torch.equal(
        torch.load(tmp_path / "a.pth", weights_only=True)["a"], torch.full((1000,), 3.0)
    )  # torch does not look
    with pytest.raises(WeightsError, match="checksum"):
        read_pickle(tmp_path / "a.pth")


def test_an_object_of_somebodys_own_is_named(tmp_path: Path) -> None:
    torch.save({"a": Path("x")}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=r"pathlib\.PosixPath.*weights-only"):
        read_pickle(tmp_path / "a.pth")


# --- safetensors, arrays, JSON


def test_safetensors_come_back_and_are_told_before(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(2, 3), "a": torch.arange(4), "c": torch.ones(1, dtype=torch.bfloat16), "d": torch.empty(0, 3)}
    tensors["e"] = torch.ones(2, dtype=torch.float8_e4m3fn)
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    found, told = read_safetensors(tmp_path / "a.safetensors"), inspect_safetensors(tmp_path / "a.safetensors")
    assert found.keys() == told.keys() == tensors.keys()
    for key, value in tensors.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key].view(torch.uint8), value.view(torch.uint8))
        assert told[key].shape == tuple(value.shape)
        assert told[key].dtype == (None if key == "e" else value.dtype)


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_arrays_come_back(write: Any, tmp_path: Path) -> None:
    arrays = {"a/kernel": np.arange(12.0).reshape(3, 4), "b": np.asfortranarray(np.ones((2, 3), np.float32)), "c": np.array(7)}
    write(tmp_path / "a.npz", **arrays)
    found = read_npz(tmp_path / "a.npz")
    assert found.keys() == arrays.keys()
    assert all(np.array_equal(found[key], value) and found[key].dtype == value.dtype for key, value in arrays.items())


def test_json_comes_back_and_what_is_none_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": [1, 2.5, null, "ü"]}', encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"a": [1, 2.5, None, "ü"]}
    for text, why in (
        ("{", "Expecting"),
        ('{"a": 1, "a": 2}', "twice"),
        ("[" * 100_000, "deep"),
        (" " * (9 << 20), "more than"),
    ):
        with pytest.raises(ValueError, match=why):
            parse_json(text)
    with pytest.raises(WeightsError, match="no file"):
        read_json(tmp_path / "b.json")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_one_value_that_is_not_finite_is_seen(dtype: torch.dtype) -> None:
    assert is_finite(torch.full((7, 5), torch.finfo(dtype).max, dtype=dtype))
    assert is_finite(torch.empty(0, dtype=dtype))
    for bad in (float("nan"), float("inf"), -float("inf")):
        tensor = torch.randn(7, 5).to(dtype)
        tensor[6, 2] = bad
        assert not is_finite(tensor)
