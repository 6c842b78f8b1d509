"""Equal files in two parts are counted; a saved record tells images that were trained on, wherever they lie now."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from p3b.data import TrainRecord, keep_decoded, open_data, record_training, seen_in_training
from p3b.data.equal_files import MOST_READ, equal_files
from p3b.errors import DataError


def noise(root: Path, count: int, seed: int, ending: str = "png") -> Path:
    rng = np.random.default_rng(seed)
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).save(root / name / f"{number}.{ending}")
    return root


def test_equal_files_are_counted_by_their_bytes(tmp_path: Path) -> None:
    noise(tmp_path / "train", 6, 0)
    noise(tmp_path / "val", 3, 1)
    data = open_data("FOLDER", tmp_path)
    assert data.val is not None and equal_files(data.val, data.train) is None
    shutil.copy(tmp_path / "train" / "cat" / "4.png", tmp_path / "val" / "cat" / "copy.png")
    shutil.copy(tmp_path / "train" / "cat" / "5.png", tmp_path / "val" / "dog" / "other.png")
    note = open_data("FOLDER", tmp_path).notes[-1]
    assert "2 of 8 files of val are identical to files of train" in note and "copy.png" in note
    assert "at least" not in note


def test_a_cut_of_one_folder_is_looked_through_too(tmp_path: Path) -> None:
    noise(tmp_path, 4, 0)
    for number in range(4, 40):
        shutil.copy(tmp_path / "cat" / "0.png", tmp_path / "cat" / f"{number}.png")
    assert "identical" in open_data("FOLDER", tmp_path, val_share=0.3).notes[-1]


def test_many_files_of_equal_size_are_sampled_and_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise(tmp_path / "train", 20, 0, "bmp")
    shutil.copytree(tmp_path / "train", tmp_path / "val")
    shutil.rmtree(tmp_path / "val" / "dog")
    noise(tmp_path / "val", 20, 0)
    assert MOST_READ > 1000
    monkeypatch.setattr("p3b.data.equal_files.MOST_READ", 10)
    said = open_data("FOLDER", tmp_path).notes
    assert not any("identical" in note and "at least" not in note for note in said)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("most", [512, 15])
def test_a_record_knows_what_was_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool, most: int) -> None:
    monkeypatch.setattr("p3b.data.train_record.MOST_KEPT", most)
    noise(tmp_path / "d", 40, 0, "bmp" if packed else "png")
    data = open_data("FOLDER", tmp_path / "d", val_share=0.25)
    record = record_training(data.train)
    assert record is not None and data.val is not None and len(record.digests) <= max(most, 15)
    assert record.complete == (most == 512)
    again = TrainRecord.from_dict(json.loads(json.dumps(record.to_dict())))
    assert again == record
    shutil.move(tmp_path / "d", tmp_path / "moved")
    keep_decoded(moved := open_data("FOLDER", tmp_path / "moved", val_share=0.0), "auto")
    train, val = (seen_in_training(again, part) for part in (data_moved(tmp_path, 0.25).train, data_moved(tmp_path, 0.25).val))
    assert train is not None and val is not None
    assert train.share == 1.0 and val.share in (0.0, None)
    everything = seen_in_training(again, moved.train)
    assert everything is not None and everything.share is not None
    if record.complete:
        assert len(everything.trained_on) == len(data.train) and len(everything.looked_at) == len(moved.train)
    else:
        assert 0 < len(everything.looked_at) < len(moved.train) and everything.share == pytest.approx(0.75, abs=0.25)


def data_moved(tmp_path: Path, share: float) -> object:
    return open_data("FOLDER", tmp_path / "moved", val_share=share)


def test_digits_in_memory_have_a_record_too() -> None:
    pytest.importorskip("sklearn")
    data, other = open_data("DIGITS", None, seed=0), open_data("DIGITS", None, seed=1)
    record = record_training(data.train)
    assert record is not None and data.val is not None and other.val is not None
    own, of_other = seen_in_training(record, data.val), seen_in_training(record, other.val)
    assert own is not None and own.share is not None and own.share < 0.05  # some digits are there twice
    assert of_other is not None and of_other.share is not None and of_other.share > 0.5


def test_the_rule_of_a_cut_gives_the_same_parts_again(tmp_path: Path) -> None:
    noise(tmp_path, 12, 0)
    data = open_data("FOLDER", tmp_path, seed=5, max_train_images=9)
    assert data.rule == {"data_set": "FOLDER", "val_share": 0.1, "seed": 5, "max_train_images": 9}
    again = open_data(data_path=tmp_path, **data.rule)
    assert again.train.indices.tolist() == data.train.indices.tolist()


def test_a_damaged_record_is_refused() -> None:
    with pytest.raises(DataError, match="damaged"):
        TrainRecord.from_dict({"images": 3})
