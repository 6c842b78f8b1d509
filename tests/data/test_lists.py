"""Data sets as they are handed out, with their lists: the official parts and classes, or a refusal."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from p3b.data import DataSplits, open_data
from p3b.errors import DataError


def put(root: Path, *files: str) -> None:
    for number, file in enumerate(files):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (3, 2), (number % 256, len(file), sum(file.encode()) % 256)).save(root / file)


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def labels(data: DataSplits, part: str) -> dict[str, str]:
    """Class by file name."""
    images = getattr(data, part)
    return {
        images.name(number).rpartition("/")[2]: data.class_names[target]
        for number, target in enumerate(images.targets.tolist())
    }


def tar_of(root: Path) -> Path:
    with tarfile.open(root.with_suffix(".tar"), "w") as tar:
        tar.add(root, arcname=root.name)
    return root.with_suffix(".tar")


def food_101(root: Path) -> None:
    names = {"train": range(6), "test": (6, 7)}
    for kind in ("apple_pie", "baklava"):
        put(root, *(f"images/{kind}/{number}.jpg" for number in range(8)))
    for part, numbers in names.items():
        write(
            root / "meta" / f"{part}.txt",
            "\n".join(f"{kind}/{number}" for kind in ("apple_pie", "baklava") for number in numbers),
        )


def describable_textures(root: Path) -> None:
    for kind in ("banded", "dotted"):
        put(root, *(f"images/{kind}/{kind}_{number}.jpg" for number in range(4)))
        for number in (2, 1):
            for part, image in (("train", (number, 0)), ("val", (3,)), ("test", (3 - number,))):
                with_labels = "".join(f"{kind}/{kind}_{which}.jpg\n" for which in image)
                file = root / "labels" / f"{part}{number}.txt"
                write(file, (file.read_text() if file.exists() else "") + with_labels)


def birds(root: Path) -> None:
    files = [f"{kind}/{number}.jpg" for kind in ("001.Albatross", "002.Auklet") for number in range(3)]
    put(root, *(f"images/{file}" for file in files))
    write(root / "images.txt", "".join(f"{number} {file}\n" for number, file in enumerate(files, 1)))
    write(root / "train_test_split.txt", "".join(f"{number} {int(number % 3 > 0)}\n" for number in range(1, 7)))
    write(root / "classes.txt", "1 001.Albatross\n2 002.Auklet\n")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("make", "train", "val", "test"), [(food_101, 12, 0, 4), (describable_textures, 4, 2, 2), (birds, 4, 0, 2)]
)
def test_lists_of_class_folders(tmp_path: Path, make: object, train: int, val: int, test: int, packed: bool) -> None:
    root = tmp_path / "set"
    make(root)  # type: ignore[operator]
    data = open_data("FOLDER", tar_of(root) if packed else root, val_share=None if val else 0.0)
    assert (len(data.train), len(data.val or ()), len(data.test or ())) == (train, val, test)
    assert len(data.class_names) == 2 and data.class_names[0] in ("apple_pie", "banded", "001.Albatross")
    assert not set(labels(data, "train")) & set(labels(data, "test")) or make is food_101
    assert ".txt" in data.description


def test_the_official_test_part_is_found_from_one_folder_above(tmp_path: Path) -> None:
    food_101(tmp_path / "food-101")
    data = open_data("FOLDER", tmp_path, val_share=0.0)
    assert data.test is not None and set(labels(data, "test")) == {"6.jpg", "7.jpg"}


@pytest.mark.parametrize("name", ["FOLDER", "INAT18"])
def test_inaturalist_by_its_json_lists(tmp_path: Path, name: str) -> None:
    files = {kind: [f"train_val2018/{kind}/{number}.jpg" for number in range(4)] for kind in ("Plantae/7477", "Aves/12")}
    put(tmp_path, *(file for some in files.values() for file in some))
    for part, numbers in (("train", (0, 1, 2)), ("val", (3,))):
        chosen = [(10 * c + n, some[n], c) for c, some in enumerate(files.values()) for n in numbers]
        listed = {
            "images": [{"id": number, "file_name": file} for number, file, _ in chosen],
            "annotations": [{"image_id": number, "category_id": category} for number, _, category in chosen],
            "categories": [{"id": 0, "name": "Rosa"}, {"id": 1, "name": "Turdus"}],
        }
        write(tmp_path / f"{part}2018.json", json.dumps(listed))
    data = open_data(name, tmp_path)
    assert data.class_names == ("Rosa", "Turdus") and (len(data.train), len(data.val or ())) == (6, 2)
    assert labels(data, "val") == {"3.jpg": "Rosa"} or set(labels(data, "val").values()) == {"Rosa", "Turdus"}
    (tmp_path / "val2018.json").unlink()
    (tmp_path / "train2018.json").write_text("{}")
    with pytest.raises(DataError, match=r"train2018\.json"):
        open_data(name, tmp_path)


def test_ifood_by_its_tables(tmp_path: Path) -> None:
    for part in ("train", "val", "test"):
        put(tmp_path, *(f"{part}_set/{part}_{number:06d}.jpg" for number in range(6)))
    for part in ("train", "val"):
        rows = "".join(f"{part}_{number:06d}.jpg,{number % 3}\n" for number in range(6))
        write(tmp_path / f"{part}_labels.csv", "img_name,label\n" + rows)
    write(tmp_path / "class_list.txt", "0 macaron\n1 beignets\n2 cruller\n")
    data = open_data("IFOOD", tmp_path)
    assert (len(data.train), len(data.val or ()), data.test) == (6, 6, None)
    assert labels(data, "val")["val_000003.jpg"] == "macaron" and labels(data, "train")["train_000002.jpg"] == "cruller"
    assert "test_set/ holds 6 images in no class folder" in data.description


@pytest.mark.parametrize("with_list", [False, True])
def test_imagenet_of_kaggle_has_its_labels_beside_it(tmp_path: Path, with_list: bool) -> None:
    root = tmp_path / "ILSVRC" / "Data" / "CLS-LOC"
    for number, kind in enumerate(("n01440764", "n01443537")):
        put(root, *(f"train/{kind}/{kind}_{image}.JPEG" for image in range(3)), f"val/ILSVRC2012_val_0000000{number}.JPEG")
    put(root, "test/ILSVRC2012_test_00000001.JPEG")
    if with_list:
        rows = "ILSVRC2012_val_00000000,n01443537 1 2 3 4 \nILSVRC2012_val_00000001,n01440764 1 2 3 4 n01440764 5 6 7 8 \n"
        write(tmp_path / "LOC_val_solution.csv", "ImageId,PredictionString\n" + rows)
    for path in (root, root.parent, root.parent.parent):
        if with_list:
            data = open_data("IMNET", path)
            assert labels(data, "val")["ILSVRC2012_val_00000000.JPEG"] == "n01443537" and len(data.val or ()) == 2
        else:
            with pytest.raises(DataError, match="no list says their classes"):
                open_data("IMNET", path)


def test_tiny_imagenet_by_its_annotations(tmp_path: Path) -> None:
    for number, kind in enumerate(("n01443537", "n01629819")):
        put(tmp_path, *(f"train/{kind}/images/{kind}_{image}.JPEG" for image in range(3)), f"val/images/val_{number}.JPEG")
    write(
        tmp_path / "val" / "val_annotations.txt",
        "val_0.JPEG\tn01629819\t0\t32\t44\t62\nval_1.JPEG\tn01443537\t52\t55\t57\t59\n",
    )
    data = open_data("FOLDER", tmp_path)
    assert labels(data, "val") == {"val_0.JPEG": "n01629819", "val_1.JPEG": "n01443537"}
    assert data.class_names == ("n01443537", "n01629819") and np.bincount(data.train.targets).tolist() == [3, 3]


def test_a_table_of_many_columns_is_no_guess(tmp_path: Path) -> None:
    """One column for each class: the second column is not the label."""
    put(tmp_path, *(f"train/{number}.jpg" for number in range(4)), "test/9.jpg")
    write(tmp_path / "train.csv", "image_id,healthy,scab,rust\n" + "".join(f"{number},1,0,0\n" for number in range(4)))
    with pytest.raises(DataError, match="no list beside it says their classes"):
        open_data("FOLDER", tmp_path)
    write(tmp_path / "train.csv", "id,author,breed\n" + "".join(f"{number},me,{'ab'[number % 2]}\n" for number in range(4)))
    data = open_data("FOLDER", tmp_path, val_share=0.0)
    assert labels(data, "train") == {"0.jpg": "a", "1.jpg": "b", "2.jpg": "a", "3.jpg": "b"}


def test_lists_that_name_an_image_for_two_parts_are_refused(tmp_path: Path) -> None:
    food_101(tmp_path)
    (tmp_path / "meta" / "test.txt").write_text("apple_pie/0\nbaklava/1\n")
    with pytest.raises(DataError, match="same images for two parts"):
        open_data("FOLDER", tmp_path)
