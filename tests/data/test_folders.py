"""Laws of folders: parts by their usual names, classes below them, nothing silently left out or mixed up."""

from __future__ import annotations

import tarfile
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from p3b.data import DataSplits, open_data
from p3b.data.names import like_a_part, part_of
from p3b.errors import DataError


def photos(root: Path, *places: str, count: int = 2) -> Path:
    """So many different images in each folder."""
    for place in places:
        (root / place).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            colour = zlib.crc32(f"{place}/{number}".encode())
            Image.new("RGB", (3, 2), (colour & 255, colour >> 8 & 255, colour >> 16 & 255)).save(root / place / f"{number}.png")
    return root


def sizes(data: DataSplits) -> list[int]:
    return [0 if part is None else len(part) for part in (data.train, data.val, data.test)]


def refusal(root: Path, **options: object) -> str:
    with pytest.raises(DataError) as raised:
        open_data("FOLDER", root, **options)  # type: ignore[arg-type]
    return str(raised.value)


USUAL_NAMES = {
    "val": (("TRAIN", "VAL"), ("train", "dev"), ("train", "holdout"), ("train_set", "val_set"), ("train2017", "val2017")),
    "test": (("Train", "Test"), ("training", "testing"), ("Training Images", "Evaluation")),
}
"""Of the training part and of the other, by what the other is."""


@pytest.mark.parametrize("wrapped", ["", "photos/", "photos/2024/"])
@pytest.mark.parametrize(("train", "other", "part"), [(*names, part) for part, pairs in USUAL_NAMES.items() for names in pairs])
def test_parts_by_any_usual_name_in_a_folder_and_its_tar(
    tmp_path: Path, train: str, other: str, part: str, wrapped: str
) -> None:
    root = photos(tmp_path / "data", *(f"{wrapped}{folder}/{name}" for folder in (train, other) for name in ("cat", "dog")))
    tar = tmp_path / "data.tar"
    with tarfile.open(tar, "w") as file:
        file.add(root, arcname=".")
    for place in (root, tar):
        data = open_data("FOLDER", place, val_share=0.0 if part == "test" else None)
        assert sizes(data) == ([4, 4, 0] if part == "val" else [4, 0, 4])
        assert data.class_names == ("cat", "dog")
        assert f"train = {train}/" in data.description and f"{part} = {other}/" in data.description


def test_names_of_parts() -> None:
    assert [part_of(name) for name in ("VALID", "Dev-Set", "test_images", "images_train", "train2017")] == [
        "val",
        "val",
        "test",
        "train",
        "train",
    ]
    assert not any(map(part_of, ("cat", "testosterone", "trains", "train_mini", "value", "train2", "devil")))
    assert like_a_part("train_mini") == "train" and like_a_part("test2") == "test" and like_a_part("trainspotting") is None


def test_the_folder_below_the_part_is_the_class_whatever_lies_beneath(tmp_path: Path) -> None:
    root = photos(
        tmp_path, "train/cats/indoor", "train/cats/outdoor/2020", "train/dogs", "val/cats/indoor", "val/dogs/far/away"
    )
    data = open_data("FOLDER", root)
    assert data.class_names == ("cats", "dogs") and sizes(data) == [6, 4, 0]
    assert "cats/indoor" in data.description


def test_hidden_folders_and_those_of_tools_never_count(tmp_path: Path) -> None:
    tools = (".thumbnails", "cat/.ipynb_checkpoints", "dog/@eaDir", "__MACOSX/cat", "$RECYCLE.BIN", ".git/objects")
    root = photos(tmp_path, "cat", "dog", *tools)
    (root / "cat" / "._0.png").write_bytes(b"AppleDouble")
    (root / "dog" / "Thumbs.db").write_bytes(b"")
    data = open_data("FOLDER", root, val_share=0.0)
    assert data.class_names == ("cat", "dog") and len(data.train) == 4
    assert "8 hidden or tool files and folders" in data.description
    tar = tmp_path.parent / f"{tmp_path.name}.tar"
    with tarfile.open(tar, "w") as file:
        file.add(root, arcname="d")
    assert len(open_data("FOLDER", tar, val_share=0.0).train) == 4


def test_what_is_left_out_is_counted_by_reason(tmp_path: Path) -> None:
    root = photos(tmp_path, "cat", "dog")
    (root / "cow" / "brown").mkdir(parents=True)
    for name in ("readme.txt", "cat/0.xml", "cat/1.xml"):
        (root / name).write_text("-")
    (root / "dog" / "gone.png").symlink_to(root / "nowhere.png")
    said = open_data("FOLDER", root, val_share=0.0).description
    assert "3 files that are no images here (2 .xml, 1 .txt)" in said
    assert "1 empty folders (cow)" in said and "1 links that lead nowhere" in said


def test_a_class_folder_without_an_image_is_refused_by_name(tmp_path: Path) -> None:
    root = photos(tmp_path, "cat", "dog")
    (root / "cow").mkdir()
    (root / "cow" / "moo.mp4").write_bytes(b"film")
    assert "cow" in (said := refusal(root)) and "1 .mp4" in said


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    elsewhere = photos(tmp_path / "elsewhere", "birds")
    root = photos(tmp_path / "data", "cat", "dog")
    (root / "bird").symlink_to(elsewhere / "birds")
    (root / "dog" / "again").symlink_to(root)
    (root / "cat" / "itself").symlink_to(root / "cat")
    data = open_data("FOLDER", root, val_share=0.0)
    assert data.class_names == ("bird", "cat", "dog") and len(data.train) == 6
    assert "2 links that lead nowhere or in a circle" in data.description


def test_one_name_in_two_unicode_forms_is_one_class(tmp_path: Path) -> None:
    composed, split = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    root = photos(tmp_path / "one", composed, "x")
    photos(root, split, count=3)
    data = open_data("FOLDER", root, val_share=0.0)
    assert data.class_names == (composed, "x") and np.bincount(data.train.targets).tolist() == [5, 2]
    parts = photos(tmp_path / "parts", f"train/{composed}", "train/x", f"val/{split}", "val/x")
    assert sizes(open_data("FOLDER", parts)) == [4, 4, 0]
    assert "look the same" in refusal(photos(tmp_path / "alike", "fish", "\ufb01sh"))


@pytest.mark.parametrize(
    ("places", "told"),
    [
        (("train_mini/cat", "test2/cat"), "look like parts"),
        (("train_full", "train_small"), "look like parts"),
        (("cat/train", "cat/test", "dog/train", "dog/test"), "parts below the folders that name classes"),
        (("cat", "dog", "test"), "rename it"),
        (("cat/a", "dog", "val/cat"), "parts beside classes"),
        (("train", "val"), "no class folder"),
        (("train_val2018/Plantae/7", "train_val2018/Aves/9"), "train2018.json"),
        (("train/cat", "train/dog", "Training/cat", "Training/dog"), "twice"),
    ],
)
def test_what_could_mix_parts_and_classes_is_refused(tmp_path: Path, places: tuple[str, ...], told: str) -> None:
    assert told in refusal(photos(tmp_path, *places))


def test_what_lies_beside_the_parts_is_said(tmp_path: Path) -> None:
    data = open_data("FOLDER", photos(tmp_path, "train/a", "train/b", "val/a", "val/b", "train_mini/a", "extra"))
    assert sizes(data) == [4, 4, 0]
    assert "not used: extra/ beside the parts (2 images)" in data.description and "train_mini/" in data.description


def test_a_part_without_labels_is_not_used_and_said_or_refused(tmp_path: Path) -> None:
    root = photos(tmp_path, "train/a", "train/b", "test", count=10)
    data = open_data("FOLDER", root)
    assert sizes(data) == [18, 2, 0] and "test/ holds 10 images in no class folder" in data.description
    photos(root, "val")
    assert "--val-share" in refusal(root)
    assert sizes(open_data("FOLDER", root, val_share=0.2)) == [16, 4, 0]


def test_the_path_of_one_part_with_parts_inside_is_refused(tmp_path: Path) -> None:
    root = photos(tmp_path / "d", "train/a", "train/b", "test/a", "test/b")
    assert "parts of its own" in refusal(root / "train", test_path=root)


@pytest.mark.parametrize("places", [("test/a", "test/b"), ("val/a", "val/b"), ("a", "b")])
def test_an_evaluation_needs_no_training_part(tmp_path: Path, places: tuple[str, ...]) -> None:
    data = open_data("FOLDER", photos(tmp_path, *places), for_evaluation=True)
    assert sum(sizes(data)) == 4 and data.class_names == ("a", "b")
    if places[0] != "a":
        assert "no train part" in refusal(tmp_path)
        named = open_data("FOLDER", None, test_path=tmp_path / places[0][:-2], for_evaluation=True)
        assert sizes(named) == [0, 0, 4]


def test_an_evaluation_matches_the_classes_of_the_model_by_name(tmp_path: Path) -> None:
    root = photos(tmp_path, "cat", "deer")
    data = open_data("FOLDER", root, for_evaluation=True, class_names=("deer", "bird", "cat"))
    assert data.class_names == ("deer", "bird", "cat") and data.train.targets.tolist() == [2, 2, 0, 0]
    assert any("no image of 1 of 3 classes: bird" in note for note in data.notes)
    assert "1 extra (deer)" in refusal(root, for_evaluation=True, class_names=("bird", "cat"))
    single = open_data("FOLDER", photos(tmp_path / "one", "cat"), for_evaluation=True, class_names=("bird", "cat"))
    assert single.train.targets.tolist() == [1, 1]


def test_a_part_short_of_a_class_is_said(tmp_path: Path) -> None:
    data = open_data("FOLDER", photos(tmp_path, "train/a", "train/b", "val/b"))
    assert data.val is not None and data.val.targets.tolist() == [1, 1]
    assert "val has no image of 1 of 2 classes: a" in data.notes


def test_the_classes_stand_in_the_notes(tmp_path: Path) -> None:
    few = open_data("FOLDER", photos(tmp_path / "few", "train/cat", "train/dog", "val/cat", "val/dog"))
    assert few.notes[:3] == ("classes (train / val images):", "  cat  2 / 2", "  dog  2 / 2")
    many = photos(tmp_path / "many", *(f"c{number}" for number in range(30)))
    photos(many, "c7", count=9)
    notes = open_data("FOLDER", many, val_share=0.0).notes
    assert "the 5 smallest and the 5 largest of 30" in notes[0] and len(notes) == 11 and notes[10] == "  c7   9"


def test_a_validation_cut_has_every_class_or_says_which_it_lacks(tmp_path: Path) -> None:
    root = photos(photos(photos(tmp_path, "many", count=30), "few", count=2), "single", count=1)
    data = open_data("FOLDER", root, val_share=0.05)
    assert data.val is not None and np.bincount(data.val.targets, minlength=3)[0] == 1
    assert set(data.val.targets.tolist()) == {0, 1} and "val has no image of 1 of 3 classes: single" in data.notes
