"""Laws of opening data: which images land in which part, and what each mistake is told."""

from __future__ import annotations

import io
import logging
import pickle
import tarfile
import time
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image
from torch.utils.data import DataLoader

from p3b.data.cut import balanced_subset, stratified_cut
from p3b.data.datasets import open_data
from p3b.data.images import LabelledImages
from p3b.data.prepare import prepare_image
from p3b.data.stores import ArrayStore
from p3b.errors import DataError

SHARED_TARS = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def write_image(path: Path, colour: int, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (6, 5), colour if mode == "L" else (colour,) * 3).save(path)


def class_folders(root: Path, sizes: dict[str, int], offset: int = 0) -> Path:
    """Images whose grey value says which they are: offset + 20 * class + number."""
    for class_index, (name, size) in enumerate(sizes.items()):
        for number in range(size):
            write_image(root / name / f"{number}.png", offset + 20 * class_index + number)
    return root


def tar_of(folder: Path, tar_path: Path, arcname: str) -> Path:
    with tarfile.open(tar_path, "w") as tar:
        tar.add(folder, arcname=arcname)
    return tar_path


def grey_values(dataset: LabelledImages | None) -> list[tuple[int, int]]:
    assert dataset is not None
    return [(image.getpixel((0, 0))[0], label) for image, label in dataset]


def test_a_folder_and_its_tar_are_the_same_data_set(tmp_path: Path) -> None:
    folder = tmp_path / "pets"
    for part, offset in (("train", 0), ("validation", 60), ("test", 120)):
        class_folders(folder / part, {"cat": 3, "dog": 2, "10": 2, "9": 1}, offset)
    from_folder = open_data("FOLDER", folder)
    wrapped = open_data("FOLDER", tar_of(folder, tmp_path / "wrapped.tar", "pets"))
    bare = open_data("FOLDER", tar_of(folder, tmp_path / "bare.tar", "."))
    for data in (from_folder, wrapped, bare):
        assert data.class_names == ("9", "10", "cat", "dog")  # by value, as timm sorts
        for part in ("train", "val", "test"):
            assert grey_values(getattr(data, part)) == grey_values(getattr(from_folder, part))
    assert grey_values(from_folder.val) == [(120, 0), (100, 1), (101, 1), (60, 2), (61, 2), (62, 2), (80, 3), (81, 3)]


def test_parts_may_be_tars_in_a_folder_or_named_by_path(tmp_path: Path) -> None:
    sizes = {"cat": 4, "dog": 4}
    train, test = class_folders(tmp_path / "a", sizes), class_folders(tmp_path / "b", sizes, 100)
    parts = tmp_path / "parts"
    parts.mkdir()
    tar_of(train, parts / "train.tar", ".")
    tar_of(test, parts / "test.tar", ".")
    beside = open_data("FOLDER", parts, val_share=0.0)
    named = open_data("FOLDER", parts / "train.tar", test_path=test, val_share=0.0)
    assert beside.val is None
    assert named.val is None
    assert grey_values(beside.train) == grey_values(named.train)
    assert grey_values(beside.test) == grey_values(named.test)
    assert str(test) in named.description
    assert "8 images of 2 classes" in named.description


def test_a_folder_named_train_that_holds_images_is_a_class(tmp_path: Path) -> None:
    class_folders(tmp_path, {"plane": 4, "train": 4})
    assert open_data("FOLDER", tmp_path).class_names == ("plane", "train")
    tar = tar_of(tmp_path, tmp_path.parent / "vehicles.tar", ".")
    assert open_data("FOLDER", tar).class_names == ("plane", "train")


def test_validation_is_cut_from_train_by_seed_alike_in_every_class(tmp_path: Path) -> None:
    class_folders(tmp_path, {"cat": 20, "dog": 10})
    data = open_data("FOLDER", tmp_path, seed=3)
    assert np.bincount(data.val.targets).tolist() == [2, 1]
    everything = set(grey_values(open_data("FOLDER", tmp_path, val_share=0.0).train))
    assert set(grey_values(data.train)) | set(grey_values(data.val)) == everything
    assert not set(grey_values(data.train)) & set(grey_values(data.val))
    assert grey_values(open_data("FOLDER", tmp_path, seed=3).val) == grey_values(data.val)
    assert any(grey_values(open_data("FOLDER", tmp_path, seed=s).val) != grey_values(data.val) for s in range(5))
    # The subset of the training images leaves the validation part as it was.
    small = open_data("FOLDER", tmp_path, seed=3, max_train_images=6)
    assert np.bincount(small.train.targets).tolist() == [3, 3]
    assert set(grey_values(small.train)) < set(grey_values(data.train))
    assert grey_values(small.val) == grey_values(data.val)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.37, 0.9, 0.999])
def test_stratified_cut_is_a_partition_with_the_share_of_every_class(share: float) -> None:
    sizes = [1, 2, 3, 7, 40, 101]
    targets = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    stays, goes = stratified_cut(targets, share, seed=1)
    assert sorted([*stays, *goes]) == list(range(len(targets)))
    assert len(goes) >= min(max(1, round(share * len(targets))), len(targets) - len(sizes))
    assert np.bincount(targets[goes], minlength=len(sizes))[1:].min() >= 1, "of every class that has two"
    assert np.bincount(targets[stays], minlength=len(sizes)).min() >= 1
    for size, gone in zip(sizes, np.bincount(targets[goes], minlength=len(sizes)), strict=True):
        assert (
            share > 0.5 or gone == (size > 1) or abs(gone - share * size) <= 1
        )  # above that, the last images that stay change the balance


def test_balanced_subset_takes_from_every_class_until_it_has_no_more() -> None:
    targets = np.repeat([0, 1, 2], [2, 9, 30])
    assert np.bincount(targets[balanced_subset(targets, 20, seed=0)]).tolist() == [2, 9, 9]
    assert np.bincount(targets[balanced_subset(targets, 12, seed=0)]).tolist() == [2, 5, 5]


def test_digits_have_three_parts_and_a_fixed_test_part() -> None:
    pytest.importorskip("sklearn")
    data, other = open_data("DIGITS", None, seed=0), open_data("DIGITS", None, seed=1)
    assert [len(part) for part in (data.train, data.val, data.test)] == [1258, 180, 359]
    for part in (data.train, data.val, data.test):
        share_of_class = np.bincount(part.targets) / len(part)
        assert share_of_class == pytest.approx(np.full(10, 0.1), abs=0.02)
    digest = {name: [part[i][0].tobytes() for i in range(9)] for name, part in (("a", data.test), ("b", other.test))}
    assert digest["a"] == digest["b"]
    assert data.val.name(0) != other.val.name(0) or data.val.name(1) != other.val.name(1)
    image, label = data.train[0]
    assert (image.mode, image.size, type(label)) == ("RGB", (8, 8), int)
    assert max(high for _, high in image.getextrema()) > 200


def test_published_sets_train_on_all_of_train(tmp_path: Path) -> None:
    for part in ("train", "val"):
        class_folders(tmp_path / part, {"apple_pie": 3, "beignets": 2})
    data = open_data("IFOOD", tmp_path)
    assert (len(data.train), len(data.val), data.test) == (5, 5, None)


def test_subsets_have_a_transform_of_their_own(tmp_path: Path) -> None:
    class_folders(tmp_path, {"cat": 4, "dog": 4})
    data = open_data("FOLDER", tmp_path, val_share=0.25)
    data.train.transform = lambda image: image.size
    assert data.train[0][0] == (6, 5)
    assert isinstance(data.val[0][0], Image.Image)


def broken_set(tmp_path: Path) -> tuple[Path, Path]:
    class_folders(tmp_path, {"cat": 3, "dog": 3})
    bad = tmp_path / "cat" / "1.png"
    bad.write_bytes(bad.read_bytes()[:40])
    return tmp_path, bad


def test_an_unreadable_image_is_an_error_that_names_it(tmp_path: Path) -> None:
    root, bad = broken_set(tmp_path)
    data = open_data("FOLDER", root, val_share=0.0)
    with pytest.raises(DataError, match="--skip-unreadable") as raised:
        data.train[1]
    assert str(bad) in str(raised.value)


def test_skipping_takes_the_next_image_and_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root, bad = broken_set(tmp_path)
    train = open_data("FOLDER", root, val_share=0.0, skip_unreadable=True).train
    assert train.unreadable == ()
    with caplog.at_level(logging.WARNING, "p3b.data"):
        assert grey_values(train) == [(0, 0), (2, 0), (2, 0), (20, 1), (21, 1), (22, 1)]
        assert train[1][1] == 0
    assert train.unreadable == (str(bad),)
    assert [str(bad) in record.getMessage() for record in caplog.records] == [True]


def test_what_workers_skip_is_known_in_the_main_process(tmp_path: Path) -> None:
    root, bad = broken_set(tmp_path)
    train = open_data("FOLDER", root, val_share=0.0, skip_unreadable=True).train
    train.transform = np.array
    assert len(list(DataLoader(train, batch_size=2, num_workers=1))) == 3
    assert train.unreadable == (str(bad),)


def test_a_set_without_any_readable_image_is_an_error(tmp_path: Path) -> None:
    for name in ("cat/1.jpg", "dog/1.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"not an image")
    with pytest.raises(DataError, match="No image of the class folders cat, dog of train"):
        open_data("FOLDER", tmp_path, val_share=0.0, skip_unreadable=True).train[0]


def test_a_tar_that_was_read_before_workers_start_reads_right_in_them(tmp_path: Path) -> None:
    tar = tar_of(class_folders(tmp_path / "x", {"a": 12, "b": 12}), tmp_path / "x.tar", ".")
    train = open_data("FOLDER", tar, val_share=0.0).train
    expected = [value for value, _ in grey_values(train)]
    train.transform = lambda image: image.getpixel((0, 0))[0]
    loaded = [int(v) for values, _ in DataLoader(train, batch_size=2, num_workers=2) for v in values]
    assert loaded == expected


def test_a_data_set_sent_to_another_process_shares_what_it_finds_unreadable(tmp_path: Path) -> None:
    """As under the start methods spawn and forkserver, which pickle the data set."""
    root, bad = broken_set(tmp_path)
    train = open_data("FOLDER", root, val_share=0.0, skip_unreadable=True).train
    sent = pickle.loads(ForkingPickler.dumps(train))
    assert grey_values(sent) == [(0, 0), (2, 0), (2, 0), (20, 1), (21, 1), (22, 1)]
    assert train.unreadable == (str(bad),)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    grey = np.full((4, 4), 255 if mode == "1" else 200, dtype=np.uint8)
    image = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(grey).convert(mode)
    if mode == "P":
        image.info["transparency"] = b"\xff" * 200
    buffer = io.BytesIO()
    image.save(buffer, "TIFF" if mode == "CMYK" else "PNG")
    rgb = prepare_image(Image.open(buffer))
    assert rgb.mode == "RGB"
    expected = 255 if mode == "1" else 200
    assert np.abs(np.asarray(rgb).astype(int) - expected).max() <= 1


def test_labelled_images_end_where_they_end() -> None:
    dataset = LabelledImages(ArrayStore(np.zeros((3, 4, 4), dtype=np.uint8), "three"), [0, 1, 0])
    assert len(list(dataset)) == 3
    with pytest.raises(IndexError):
        dataset[3]


def test_mistakes_are_named_before_training(tmp_path: Path) -> None:
    good = class_folders(tmp_path / "good", {"cat": 2, "dog": 2})
    one = class_folders(tmp_path / "one", {"cat": 2})
    other = class_folders(tmp_path / "other", {"cat": 2, "cow": 2})
    split = tmp_path / "split"
    class_folders(split / "train", {"cat": 2, "dog": 2})
    class_folders(split / "val", {"cat": 2, "dog": 2})
    only_test = class_folders(tmp_path / "only" / "test", {"cat": 2, "dog": 2}).parent
    (tmp_path / "empty").mkdir()
    stray = class_folders(tmp_path / "stray", {"cat": 2, "dog": 2})
    write_image(stray / "lost.png", 0)
    twice = class_folders(tmp_path / "twice" / "val", {"cat": 1, "dog": 1}).parent
    class_folders(twice / "validation", {"cat": 1, "dog": 1})
    damaged = tmp_path / "damaged.tar"
    damaged.write_bytes(b"x" * 5000)
    (tmp_path / "data.zip").write_bytes(b"PK")

    def told(*args: object, **options: object) -> str:
        with pytest.raises(DataError) as raised:
            open_data(*args, **options)  # type: ignore[arg-type]
        return str(raised.value)

    assert "CIFAR10" in told("CIFAR11", tmp_path)
    assert "absent" in told("FOLDER", tmp_path / "absent")
    assert "--data-path" in told("FOLDER", None)
    assert "no image" in told("FOLDER", tmp_path / "empty")
    assert "one class only" in told("FOLDER", one)
    message = told("FOLDER", good, test_path=other)
    assert "missing (dog)" in message
    assert "extra (cow)" in message
    assert "no train part" in told("FOLDER", only_test)
    assert "lost.png" in told("FOLDER", stray)
    assert "twice" in told("FOLDER", twice)
    assert "uncompressed" in told("FOLDER", damaged)
    assert "neither a folder nor a .tar" in told("FOLDER", tmp_path / "data.zip")
    assert "[0, 1)" in told("FOLDER", good, val_share=1.0)
    assert "validation part" in told("FOLDER", split, val_share=0.1)
    assert "at least 1" in told("FOLDER", good, max_train_images=0)
    assert "no val part" in told("IMNET", good)
    assert "by hand" in told("INAT19", tmp_path / "absent")
    assert "--download" in told("CIFAR100", tmp_path)
    assert "--download" in told("torch/mnist", tmp_path)
    assert "torch/mnist" in told("torch/mnits", tmp_path)
    assert "hfds/" in told("wds/imagenet", tmp_path)
    assert "no data path" in told("DIGITS", tmp_path)
    assert "--val-path" in told("DIGITS", None, val_path=good)


def test_cifar_comes_from_torchvision_with_its_test_part_as_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few images in CIFAR-10's own file format; only the published checksums are set aside."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rows = np.arange(4 * 3072, dtype=np.int64).reshape(4, 3072).astype(np.uint8)
    names = [f"class {index}" for index in range(10)]
    for name in [*(f"data_batch_{index}" for index in range(1, 6)), "test_batch"]:
        (folder / name).write_bytes(pickle.dumps({"data": rows, "labels": [0, 1, 2, 9]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    data = open_data("CIFAR10", tmp_path)
    assert (len(data.train), data.val, len(data.test)) == (20, None, 4)
    assert data.class_names == tuple(names)
    image, label = data.test[3]
    assert label == 9
    assert np.asarray(image)[0, 0].tolist() == [rows[3, 0], rows[3, 1024], rows[3, 2048]]
    assert len(open_data("CIFAR10", tmp_path, val_share=0.25).val) == 5
    assert len(open_data("torch/cifar10", tmp_path).test) == 4


@pytest.mark.skipif(not SHARED_TARS.exists(), reason="needs the project's shared data")
def test_a_tar_of_thirty_thousand_images_opens_in_seconds() -> None:
    started = time.process_time()
    data = open_data("FOLDER", SHARED_TARS / "cifar10-animals-train.tar", test_path=SHARED_TARS / "cifar10-animals-test.tar")
    assert time.process_time() - started < 20
    assert (len(data.train), len(data.val), len(data.test)) == (27000, 3000, 6000)
    assert data.class_names == ("bird", "cat", "deer", "dog", "frog", "horse")
    assert np.bincount(data.val.targets).tolist() == [500] * 6
    assert data.train[26999][0].size == (32, 32)
