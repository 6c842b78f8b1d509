"""A data set that goes away, or turns out to be damaged as a whole, while it is read: told at once, never skipped."""

from __future__ import annotations

import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from p3b.data import Augmentation, DataSplits, Preprocessing, eval_batches, open_data, train_batches
from p3b.data.images import LabelledImages
from p3b.errors import DataError

CPU = torch.device("cpu")
PREPROCESSING = Preprocessing((3, 8, 8), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), crop_pct=1.0)


def photos(root: Path, per_class: int = 30) -> Path:
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for number in range(per_class):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(root / name / f"{number}.png")
    return root


def opened(path: Path, skip: bool) -> DataSplits:
    return open_data("FOLDER", path, val_share=0.0, skip_unreadable=skip)


def gone(folder: Path) -> None:
    """At one stroke, as by an unmount."""
    folder.rename(folder.with_name("elsewhere"))


def unmounted(folder: Path) -> None:
    """What a mount point looks like afterwards: there, and empty."""
    gone(folder)
    folder.mkdir()


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("lose", [gone, unmounted])
def test_a_folder_that_vanishes_in_the_middle_of_an_epoch_is_named_at_once(
    tmp_path: Path, skip: bool, num_workers: int, lose: Callable[[Path], None]
) -> None:
    disk = tmp_path / "disk"
    train = opened(photos(disk / "photos"), skip).train
    batches = train_batches(
        train, PREPROCESSING, Augmentation(enabled=False), batch_size=2, num_workers=num_workers, device=CPU, seed=0
    )
    running = iter(batches)
    next(running)
    lose(disk)
    with pytest.raises(DataError, match=f"[Ff]older {disk} ") as raised:
        list(running)
    assert str(disk / "photos") in str(raised.value) and "--skip-unreadable" not in str(raised.value)
    assert train.unreadable == ()


@pytest.mark.parametrize("skip", [False, True])
def test_a_class_folder_that_vanishes_is_no_single_image(tmp_path: Path, skip: bool) -> None:
    data = opened(photos(tmp_path / "photos"), skip)
    shutil.rmtree(tmp_path / "photos" / "dog")
    with pytest.raises(DataError, match=f"no folder {tmp_path / 'photos' / 'dog'} any more"):
        list(eval_batches(data.train, PREPROCESSING, batch_size=8, num_workers=0, device=CPU))


def test_single_files_that_vanish_are_skipped_as_asked(tmp_path: Path) -> None:
    data = opened(photos(tmp_path / "photos"), skip=True)
    for number in (0, 5, 29):
        (tmp_path / "photos" / "cat" / f"{number}.png").unlink()
    batches = eval_batches(data.train, PREPROCESSING, batch_size=8, num_workers=2, device=CPU)
    assert sum(len(targets) for _, targets in batches) == 57
    assert len(data.train.unreadable) == 3


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("damage", ["deleted", "cut short", "a folder now", "shut"])
def test_a_tar_that_cannot_be_read_any_more_is_named_at_once(tmp_path: Path, skip: bool, damage: str) -> None:
    path = tmp_path / "photos.tar"
    with tarfile.open(path, "w") as tar:
        tar.add(photos(tmp_path / "photos"), arcname=".")
    data = opened(path, skip)
    assert data.train[0][1] == 0
    if damage == "cut short":
        os.truncate(path, 20_000)
    else:
        path.unlink()
    if damage == "a folder now":
        path.mkdir()
    if damage == "shut":
        path.symlink_to(path)
    with pytest.raises(DataError, match=f"The tar {path} ") as raised:
        list(eval_batches(data.train, PREPROCESSING, batch_size=8, num_workers=0, device=CPU))
    assert "--skip-unreadable" not in str(raised.value)
    assert data.train.unreadable == ()


class Bad:
    """Images of which some cannot be decoded."""

    def __init__(self, readable: list[bool]) -> None:
        self.readable = readable

    def __len__(self) -> int:
        return len(self.readable)

    def open(self, index: int) -> Image.Image:
        if not self.readable[index]:
            raise OSError("image file is truncated")
        return Image.new("RGB", (8, 8))

    def name(self, index: int) -> str:
        return f"image-{index}.jpg"


def readable_until_stopped(readable: list[bool], num_workers: int = 0) -> LabelledImages:
    dataset = LabelledImages(Bad(readable), np.zeros(len(readable), dtype=int), skip_unreadable=True)
    list(eval_batches(dataset, PREPROCESSING, batch_size=4, num_workers=num_workers, device=CPU))
    return dataset


@pytest.mark.parametrize("num_workers", [0, 1])
def test_skipping_stops_where_more_than_half_of_the_images_cannot_be_read(num_workers: int) -> None:
    with pytest.raises(DataError, match=r"^17 of the first 32 images cannot be read, the last of them image-31\.jpg"):
        readable_until_stopped([True] * 15 + [False] * 85, num_workers)
    with pytest.raises(DataError, match=r"^32 of the first 32 images"):
        readable_until_stopped([False] * 100, num_workers)
    with pytest.raises(DataError, match=r"^51 of the first 101 images"):
        readable_until_stopped([True] * 50 + [False] * 60, num_workers)


def test_skipping_goes_on_up_to_half_and_in_small_data_sets() -> None:
    for readable in ([True, False] * 50, [True] * 16 + [False] * 16, [False] * 30 + [True]):
        assert len(readable_until_stopped(readable).unreadable) == readable.count(False)


def test_an_image_that_is_tried_again_counts_once() -> None:
    dataset = readable_until_stopped([True] * 25 + [False] * 24)
    for _ in range(3):
        list(eval_batches(dataset, PREPROCESSING, batch_size=4, num_workers=0, device=CPU))
    assert len(dataset.unreadable) == 24
