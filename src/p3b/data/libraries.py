"""Data sets that libraries bring: torchvision's, scikit-learn's digits, Hugging Face's by timm's names."""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torchvision.datasets
from timm.data.dataset_factory import create_dataset

from p3b.data.cifar import read_images, read_names
from p3b.data.cut import stratified_cut
from p3b.data.images import LabelledImages
from p3b.data.prepare import read_image
from p3b.data.stores import ArrayStore, ReaderStore, TorchvisionStore
from p3b.errors import DataError, unknown_name

# torchvision sets that timm opens and whose labels are known without decoding; the value is the name of the part
# beside train.
TORCH_SETS = {
    "cifar10": "test",
    "cifar100": "test",
    "mnist": "test",
    "kmnist": "test",
    "fashion_mnist": "test",
    "imagenet": "validation",
    "places365": "validation",
}
_DIGITS_TEST_SHARE = 0.2


@dataclass(frozen=True)
class Parts:
    """Parts as they were found, before any cut.

    Attributes:
        where: from where, for the log.
        class_names: name of class 0, 1, ...; the same in all parts.
        train, val, test: the parts; `train` is empty where only an evaluation is wanted and there is none.
        said: what the log should tell of how they were found, in phrases.
        unlabelled: parts that are there and cannot be used, each with the reason.
    """

    where: str
    class_names: tuple[str, ...]
    train: LabelledImages
    val: LabelledImages | None = None
    test: LabelledImages | None = None
    said: tuple[str, ...] = ()
    unlabelled: tuple[str, ...] = ()


def cifar(name: str, root: Path, download: bool, skip_unreadable: bool) -> Parts:
    """CIFAR10 or CIFAR100, torchvision's files; their test part is `test`. Raises `DataError`."""
    opener = {"CIFAR10": torchvision.datasets.CIFAR10, "CIFAR100": torchvision.datasets.CIFAR100}[name]
    parts, where = {}, str(root)
    for part, is_train in (("train", True), ("test", False)):
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=r".*align should be passed", category=Warning)  # old pickles
                opened = opener(str(root), train=is_train, download=download)
            pixels, labels, class_names = opened.data, opened.targets, opened.classes
        except (RuntimeError, OSError) as error:
            folder = root / opener.base_folder
            if not (folder / opener.meta["filename"]).is_file():
                raise DataError(_not_there(name, root, download, error)) from error
            where = f"{root} (its checksums are not the published ones; it is read as it is)"
            files = [folder / file for file, _ in (opener.train_list if is_train else opener.test_list)]
            pixels, labels = read_images(files, "labels" if name == "CIFAR10" else "fine_labels")
            class_names = read_names(folder / opener.meta["filename"], opener.meta["key"])
            if not labels or not 0 <= min(labels) <= max(labels) < len(class_names):
                raise DataError(
                    f"{files[0]}: expected images with labels in 0..{len(class_names) - 1}, as its meta file says."
                ) from error
        parts[part] = LabelledImages(ArrayStore(pixels, f"{name} {part} part"), labels, skip_unreadable=skip_unreadable)
    return Parts(where, tuple(class_names), parts["train"], test=parts["test"])


def _not_there(name: str, root: Path, download: bool, error: Exception) -> str:
    if download:
        return f"{name} could not be downloaded to {root} ({error}). Fetch it by hand and unpack it there."
    return f"{name} is not at {root} ({error}). Fetch it with --download, or give the folder that has it as --data-path."


def digits(skip_unreadable: bool) -> Parts:
    """scikit-learn's handwritten digits; a fifth, the same for every seed, is `test`. Raises `DataError`."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("DIGITS comes with scikit-learn, which is missing: pip install 'p3b[demo]'") from error
    loaded = load_digits()
    pixels = np.rint(loaded.images * (255 / 16)).astype(np.uint8)
    everything = LabelledImages(ArrayStore(pixels, "DIGITS"), loaded.target, skip_unreadable=skip_unreadable)
    rest, test = stratified_cut(everything.targets, _DIGITS_TEST_SHARE, seed=0)
    names = tuple(str(name) for name in loaded.target_names)
    return Parts("scikit-learn", names, everything.subset(rest), test=everything.subset(test))


def torchvision_set(name: str, root: Path, download: bool, skip_unreadable: bool) -> Parts:
    """One of `TORCH_SETS`. Raises `DataError`."""
    if name not in TORCH_SETS:
        raise DataError(unknown_name("torchvision data set", f"torch/{name}", [f"torch/{known}" for known in TORCH_SETS]))
    parts: dict[str, LabelledImages] = {}
    for split in ("train", TORCH_SETS[name]):
        try:
            opened = create_dataset(f"torch/{name}", root=str(root), split=split, download=download)
        except (RuntimeError, OSError) as error:
            raise DataError(_not_there(f"torch/{name}", root, download, error)) from error
        if "loader" in vars(opened):  # of the sets that lie in files; torchvision's own knows no orientation and no alpha
            opened.loader = read_image
        part = {"train": "train", "test": "test", "validation": "val"}[split]
        store = TorchvisionStore(opened, f"torch/{name} {split} part")
        parts[part] = LabelledImages(store, np.asarray(opened.targets), skip_unreadable=skip_unreadable)
    names = tuple(str(name) for name in opened.classes)
    return Parts(str(root), names, parts["train"], parts.get("val"), parts.get("test"))


def hugging_face(name: str, cache: str | Path | None, skip_unreadable: bool) -> Parts:
    """A Hugging Face data set by timm's name, hfds/<name>. Raises `DataError`."""
    if importlib.util.find_spec("datasets") is None:
        raise DataError(f"{name} needs the Hugging Face library, which is missing: pip install datasets")
    found = {"train": _hugging_face_split(name, cache, "train")}
    splits = found["train"].reader.dataset.info.splits or {}
    for part, split_names in (("val", ("validation", "val", "valid")), ("test", ("test",))):
        split = next((split for split in split_names if split in splits), None)
        if split is not None:
            found[part] = _hugging_face_split(name, cache, split)
    targets = {part: np.asarray(list(opened.reader.iter_targets())) for part, opened in found.items()}
    if targets.get("test") is not None and targets["test"].min(initial=0) < 0:
        del found["test"]  # a benchmark that keeps its test labels to itself writes -1
    labelled = {
        part: LabelledImages(ReaderStore(opened.reader, f"{name} {part} part"), targets[part], skip_unreadable=skip_unreadable)
        for part, opened in found.items()
    }
    names = {index: str(class_name) for class_name, index in found["train"].reader.class_to_idx.items()}
    num_classes = max(int(targets["train"].max()) + 1, len(names))
    where = "Hugging Face datasets" + ("" if cache is None else f", kept in {cache}")
    class_names = tuple(names.get(index, str(index)) for index in range(num_classes))
    return Parts(where, class_names, labelled["train"], labelled.get("val"), labelled.get("test"))


def _hugging_face_split(name: str, cache: str | Path | None, split: str) -> Any:
    try:
        return create_dataset(name, root=None if cache is None else str(cache), split=split)
    except (OSError, ValueError, KeyError, AssertionError, RuntimeError) as error:
        raise DataError(
            f"Cannot open the {split} split of {name} ({type(error).__name__}: {error}). Expected a Hugging Face data set "
            "with a split train, a column image and a column label; check the name on the hub and the connection."
        ) from error
