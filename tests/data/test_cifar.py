"""CIFAR files that are not the published ones: read as torchvision reads them, and never trusted."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision

from p3b.data import open_data
from p3b.data.cifar import read_images, read_names
from p3b.errors import DataError
from runs import CIFAR100_NAMES, write_cifar100


@pytest.fixture
def as_torchvision(monkeypatch: pytest.MonkeyPatch) -> type[Any]:
    """torchvision's class, told that these files are the ones it expects."""
    monkeypatch.setattr(torchvision.datasets.CIFAR100, "_check_integrity", lambda _self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_args: True)
    return torchvision.datasets.CIFAR100


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_we_read_what_torchvision_reads(tmp_path: Path, as_torchvision: type[Any], protocol: int) -> None:
    pixels = write_cifar100(tmp_path, protocol=protocol)
    for part in ("train", "test"):
        found, labels = read_images([tmp_path / "cifar-100-python" / part], "fine_labels")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = as_torchvision(str(tmp_path), train=part == "train")
        assert np.array_equal(found, theirs.data) and labels == theirs.targets
        assert np.array_equal(found[1, :, :, 2], pixels[part][1, 2048:].reshape(32, 32)), "blue comes last"
    assert read_names(tmp_path / "cifar-100-python" / "meta", "fine_label_names") == theirs.classes


def test_several_batches_follow_each_other(tmp_path: Path) -> None:
    files = []
    for number in range(3):
        files.append(tmp_path / f"data_batch_{number}")
        files[-1].write_bytes(pickle.dumps({"data": np.full((2, 3072), number, np.uint8), "labels": [number, 9]}))
    pixels, labels = read_images(files, "labels")
    assert pixels.shape == (6, 32, 32, 3) and pixels[:, 0, 0, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert labels == [0, 9, 1, 9, 2, 9]


def test_a_data_set_of_other_checksums_opens(tmp_path: Path) -> None:
    write_cifar100(tmp_path, train=6, test=4)
    data = open_data("CIFAR100", tmp_path)
    assert data.test is not None and (len(data.train), len(data.test)) == (6, 4) and data.val is None
    assert data.class_names == tuple(CIFAR100_NAMES) and data.train.targets.tolist() == [0, 7, 14, 21, 28, 35]


class Malicious:
    """A pickle that runs a command when it is loaded in good faith."""

    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return (Path.touch, (self.touched,))


def test_a_malicious_pickle_executes_nothing(tmp_path: Path) -> None:
    write_cifar100(tmp_path / "data")
    touched = tmp_path / "touched"
    for file in ("train", "test", "meta"):
        victim = tmp_path / "data" / "cifar-100-python" / file
        good = victim.read_bytes()
        victim.write_bytes(pickle.dumps({"data": Malicious(touched), "fine_labels": [0]}))
        with pytest.raises(DataError, match=r"cannot be read as a CIFAR file.*no CIFAR file needs"):
            open_data("CIFAR100", tmp_path / "data")
        assert not touched.exists()
        victim.write_bytes(good)
    pickle.loads(pickle.dumps(Malicious(touched)))
    assert touched.exists(), "the pickle is as malicious as it says"


@pytest.mark.parametrize("smuggled", [eval, __import__, np.load, np.lib.format.open_memmap, pickle.loads])
def test_nothing_but_parts_of_arrays_is_loaded(tmp_path: Path, smuggled: Any) -> None:
    file = tmp_path / "train"
    file.write_bytes(pickle.dumps({"data": smuggled}))
    with pytest.raises(DataError, match="which no CIFAR file needs"):
        read_images([file], "fine_labels")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "cannot be read as a CIFAR file"),
        (b"not a pickle", "cannot be read as a CIFAR file"),
        (pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "fine_labels": [0, 1]})[:-40], "cannot be read as a CIFAR file"),
        (pickle.dumps([1, 2]), "does not hold a CIFAR batch"),
        (pickle.dumps({"data": np.zeros((2, 3072), np.uint8)}), "published format"),
        (pickle.dumps({"data": np.zeros((2, 3071), np.uint8), "fine_labels": [0, 1]}), "published format"),
        (pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "fine_labels": [0]}), "published format"),
    ],
    ids=["empty", "foreign", "truncated", "list", "no labels", "wrong size", "too few labels"],
)
def test_damaged_files_are_refused(tmp_path: Path, content: bytes, said: str) -> None:
    write_cifar100(tmp_path)
    (tmp_path / "cifar-100-python" / "train").write_bytes(content)
    with pytest.raises(DataError, match=said):
        open_data("CIFAR100", tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    write_cifar100(tmp_path)
    (tmp_path / "cifar-100-python" / "test").unlink()
    with pytest.raises(DataError, match=r"test.*cannot be read.*--download"):
        open_data("CIFAR100", tmp_path)
    with pytest.raises(DataError, match=r"CIFAR100 is not at .*--download"):
        open_data("CIFAR100", tmp_path / "nowhere")


def test_class_names_come_from_the_meta_file(tmp_path: Path) -> None:
    (tmp_path / "meta").write_bytes(pickle.dumps({"label_names": "cat"}))
    with pytest.raises(DataError, match="no list 'label_names' of class names"):
        read_names(tmp_path / "meta", "label_names")
