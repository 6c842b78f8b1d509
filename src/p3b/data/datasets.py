"""Data sets by name, folder or archive, in parts: train, val (chooses the best model), test (reported at the end).

Everything a user can get wrong about data is found here, before the first batch. The best model is never chosen on the
test part: where a data set brings no validation part, one is cut from train by seed (`val_share`), or there is none.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torchvision.datasets
from numpy.typing import NDArray
from timm.data.dataset_factory import create_dataset

from p3b.data.cifar import read_images, read_names
from p3b.data.folders import FoundImages, find_images, find_parts
from p3b.data.images import ArrayStore, LabelledImages, ReaderStore, TorchvisionStore
from p3b.errors import DataError, unknown_name

KNOWN_DATA_SETS = ("CIFAR10", "CIFAR100", "IMNET", "INAT18", "INAT19", "IFOOD", "FOLDER", "DIGITS")

_PUBLISHED_FOLDERS = ("IMNET", "INAT18", "INAT19", "IFOOD")
# torchvision sets that timm opens and whose labels are known without decoding; the value is the name of the part
# beside train.
_TORCH_SETS = {
    "cifar10": "test",
    "cifar100": "test",
    "mnist": "test",
    "kmnist": "test",
    "fashion_mnist": "test",
    "imagenet": "validation",
    "places365": "validation",
}
_ITERABLE_READERS = ("hfids", "tfds", "wds")
_DIGITS_TEST_SHARE = 0.2
_DIGITS_VAL_SHARE = 0.125  # of what the test part leaves: a tenth of all
_FOLDER_VAL_SHARE = 0.1


@dataclass(frozen=True)
class DataSplits:
    """A data set in parts.

    Attributes:
        train: to learn from.
        val: to choose the best model by; None where there is none.
        test: to report once, at the end; None where there is none.
        class_names: name of class 0, 1, ...; the same in all parts.
        description: one line for the log: from where, how many images and classes in each part.
    """

    train: LabelledImages
    val: LabelledImages | None
    test: LabelledImages | None
    class_names: tuple[str, ...]
    description: str


def open_data(
    data_set: str,
    data_path: str | Path | None,
    *,
    val_path: str | Path | None = None,
    test_path: str | Path | None = None,
    val_share: float | None = None,
    seed: int = 0,
    download: bool = False,
    max_train_images: int | None = None,
    skip_unreadable: bool = False,
) -> DataSplits:
    """Open a data set, check it and cut it into parts. No image is decoded yet.

    Args:
        data_set: one of `KNOWN_DATA_SETS`, or `hfds/<name>` or `torch/<name>` as timm's `create_dataset` takes them.
            CIFAR10, CIFAR100: torchvision's, under `data_path`; their test part is `test`.
            IMNET, INAT18, INAT19, IFOOD: folders (or tars) `train` and `val`, optionally `test`, of class folders.
            FOLDER: a folder or tar of class folders, with or without the parts train, val and test.
            DIGITS: scikit-learn's 1797 handwritten digits; needs no path.
        data_path: where it lies; for `hfds/` the cache folder, or None.
        val_path: folder or tar of class folders to validate on, instead of a part found under `data_path` (folder
            sets only).
        test_path: likewise for the test part.
        val_share: share of train, in [0, 1), that is cut off as `val`, the same in each class as nearly as possible.
            None: 0.1 for FOLDER without a validation part, a tenth of all for DIGITS, 0 for the rest.
        seed: of that cut and of `max_train_images`. The test part of DIGITS does not depend on it.
        download: fetch CIFAR10, CIFAR100 and `torch/` sets if they are not there.
        max_train_images: take at most so many training images (after the cut), equally many of each class as nearly
            as possible.
        skip_unreadable: see `LabelledImages`.

    Raises:
        DataError: unknown name; path missing; no images; one class only; classes that differ between parts; a library
            or a download that is missing; `val_share` outside [0, 1) or beside a validation part; a setting that this
            data set does not take.
    """
    if val_share is not None and not 0 <= val_share < 1:
        raise DataError(f"val_share is {val_share}; expected a share of the training images in [0, 1), such as 0.1.")
    if max_train_images is not None and max_train_images < 1:
        raise DataError(f"max_train_images is {max_train_images}; expected at least 1, or none for all images.")
    name = data_set.upper()
    prefix, slash, rest = data_set.partition("/")
    takes_part_paths = name == "FOLDER" or name in _PUBLISHED_FOLDERS
    if not takes_part_paths and (val_path is not None or test_path is not None):
        raise DataError(
            f"--val-path and --test-path go with folders of images; {data_set} brings its own parts. Use --data-set "
            "FOLDER, or leave them out."
        )
    if takes_part_paths:
        parts, default_share = _folder_parts(name, data_path, val_path, test_path, skip_unreadable)
    elif name in ("CIFAR10", "CIFAR100"):
        parts, default_share = _cifar(name, _given(data_set, data_path), download, skip_unreadable), 0.0
    elif name == "DIGITS":
        if data_path is not None:
            raise DataError(f"DIGITS comes with scikit-learn and takes no data path; got {data_path}. Leave it out.")
        parts, default_share = _digits(skip_unreadable), _DIGITS_VAL_SHARE
    elif slash and prefix.lower() == "torch":
        parts = _torchvision(rest.lower(), _given(data_set, data_path), download, skip_unreadable)
        default_share = 0.0
    elif slash and prefix.lower() == "hfds":
        parts, default_share = _hugging_face(data_set, data_path, skip_unreadable), 0.0
    elif slash and prefix.lower() in _ITERABLE_READERS:
        raise DataError(
            f"{data_set} is read as a stream, without access by number; repeated augmentation, an exact resume and an "
            "exact evaluation over several processes need that. Use hfds/<name> for a Hugging Face data set, or unpack it "
            "into class folders and use --data-set FOLDER."
        )
    else:
        raise DataError(
            unknown_name("data set", data_set, KNOWN_DATA_SETS)
            + " Folders of your own images: FOLDER. Others by timm's names: hfds/<name>, torch/<name>."
        )
    _check_classes(data_set, parts.class_names)
    return _cut(data_set, parts, val_share, default_share, seed, max_train_images)


@dataclass(frozen=True)
class _Parts:
    where: str
    class_names: tuple[str, ...]
    train: LabelledImages
    val: LabelledImages | None = None
    test: LabelledImages | None = None


def _given(data_set: str, data_path: str | Path | None) -> Path:
    if data_path is None:
        raise DataError(f"{data_set} needs a data path: say where it lies with --data-path.")
    return Path(data_path).expanduser()


def _check_classes(data_set: str, class_names: Sequence[str]) -> None:
    if len(class_names) < 2:
        raise DataError(
            f"{data_set} has one class only ({', '.join(map(repr, class_names))}); a classifier needs two or more. The "
            "folder an image lies in names its class: is the path one level too deep, or one too high?"
        )


# --- the cut ----------------------------------------------------------------------------------------------------------


def _cut(
    data_set: str,
    parts: _Parts,
    val_share: float | None,
    default_share: float,
    seed: int,
    max_train_images: int | None,
) -> DataSplits:
    train, val = parts.train, parts.val
    if val is not None:
        if val_share:
            raise DataError(
                f"{data_set} at {parts.where} has a validation part of {len(val)} images, and val_share = {val_share} asks "
                "to cut another from train. Leave val_share out; or, to report on that part at the end instead, use "
                "--data-set FOLDER with the train part as --data-path and that part as --test-path."
            )
        how = ""
    else:
        share = default_share if val_share is None else val_share
        how = f" ({share:.3g} of train, seed {seed})"
        if share > 0:
            kept, cut_off = stratified_cut(train.targets, share, seed)
            if len(cut_off):
                train, val = train.subset(kept), train.subset(cut_off)
            elif val_share:
                raise DataError(
                    f"val_share is {val_share}, but {data_set} at {parts.where} has one training image a class, and each "
                    "class keeps one. Give more images, a validation part of its own (--val-path), or val_share = 0."
                )
    if max_train_images is not None and max_train_images < len(train):
        train = train.subset(balanced_subset(train.targets, max_train_images, seed))

    def size(part: LabelledImages | None) -> str:
        return "none" if part is None else f"{len(part)} images of {len(np.unique(part.targets))} classes"

    shown_val = size(val) + (how if val is not None else "")
    description = f"{data_set} from {parts.where}: train {size(train)}, val {shown_val}, test {size(parts.test)}"
    return DataSplits(train, val, parts.test, parts.class_names, description)


def stratified_cut(targets: NDArray[np.int64], share: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cut a share of the images off, the same share of every class as nearly as whole images allow.

    Args:
        targets: (n,) class indices.
        share: in (0, 1).
        seed: decides which images of a class go.

    Returns:
        Positions that stay and positions that go, both ascending, together 0 .. n-1. max(1, round(share * n)) go,
        unless that would take a class's last image: every class keeps at least one.
    """
    rank, class_size, order = _rank_in_class(targets, seed)
    # The k-th of n images of a class stands at (k + 1/2) / n: the lowest share of all are round(share * n) of each
    # class.
    place = np.where(rank == class_size - 1, np.inf, (rank + 0.5) / class_size)
    wanted = min(max(1, round(share * len(targets))), int(np.isfinite(place).sum()))
    goes = np.zeros(len(targets), dtype=bool)
    goes[np.lexsort((order, place))[:wanted]] = True
    return np.flatnonzero(~goes), np.flatnonzero(goes)


def balanced_subset(targets: NDArray[np.int64], size: int, seed: int) -> NDArray[np.int64]:
    """Positions (ascending) of `size` images, equally many of each class until a class has no more."""
    rank, _, order = _rank_in_class(targets, seed)
    return np.sort(np.lexsort((order, rank))[:size])


def _rank_in_class(targets: NDArray[np.int64], seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """For each image its random rank within its class, its class's size, and its random rank among all (to break
    ties)."""
    shuffled = np.random.default_rng(seed).permutation(len(targets))
    by_class = shuffled[np.argsort(targets[shuffled], kind="stable")]
    _, first, inverse, counts = np.unique(targets[by_class], return_index=True, return_inverse=True, return_counts=True)
    rank, class_size, order = (np.empty(len(targets), dtype=np.int64) for _ in range(3))
    rank[by_class] = np.arange(len(targets)) - first[inverse]
    class_size[by_class] = counts[inverse]
    order[shuffled] = np.arange(len(targets))
    return rank, class_size, order


# --- folders and tars -------------------------------------------------------------------------------------------------


def _folder_parts(
    name: str,
    data_path: str | Path | None,
    val_path: str | Path | None,
    test_path: str | Path | None,
    skip_unreadable: bool,
) -> tuple[_Parts, float]:
    path = _given(name, data_path)
    if name in _PUBLISHED_FOLDERS and not path.exists():
        raise DataError(
            f"There is no {path}. {name} must be fetched by hand (its owners' terms) and unpacked into {path / 'train'} "
            f"and {path / 'val'}, each a folder of class folders."
        )
    found = find_parts(path)
    for part, explicit in (("val", val_path), ("test", test_path)):
        if explicit is not None:
            found[part] = find_images(Path(explicit).expanduser())
    if "train" not in found:
        raise DataError(
            f"{path} has {' and '.join(sorted(found))} but no train part. Expected a folder {path / 'train'} of class folders."
        )
    if name in _PUBLISHED_FOLDERS and "val" not in found:
        raise DataError(
            f"{name} at {path} has no val part. Expected {path / 'train'} and {path / 'val'}, each a folder of class "
            "folders; for another layout use --data-set FOLDER with --val-path."
        )
    class_names = found["train"].class_names
    for part in ("val", "test"):
        if part in found:
            _check_same_classes(class_names, found["train"], part, found[part])
    labelled = {part: images.labelled(class_names, skip_unreadable) for part, images in found.items()}
    where = ", ".join(dict.fromkeys([str(path), *(str(p) for p in (val_path, test_path) if p is not None)]))
    return _Parts(where, class_names, **labelled), _FOLDER_VAL_SHARE if name == "FOLDER" else 0.0


def _check_same_classes(class_names: Sequence[str], train: FoundImages, part: str, other: FoundImages) -> None:
    missing = [name for name in class_names if name not in set(other.class_names)]
    extra = [name for name in other.class_names if name not in set(class_names)]
    if missing or extra:
        differences = [
            f"{len(names)} {kind} ({_some(names)})" for kind, names in (("missing", missing), ("extra", extra)) if names
        ]
        raise DataError(
            f"The classes of the {part} part ({other.where}) differ from those of train ({train.where}, {len(class_names)} "
            f"classes): {' and '.join(differences)}. Both need the same class folders."
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


# --- data sets of libraries -------------------------------------------------------------------------------------------


def _cifar(name: str, root: Path, download: bool, skip_unreadable: bool) -> _Parts:
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
    return _Parts(where, tuple(class_names), parts["train"], test=parts["test"])


def _not_there(name: str, root: Path, download: bool, error: Exception) -> str:
    if download:
        return f"{name} could not be downloaded to {root} ({error}). Fetch it by hand and unpack it there."
    return f"{name} is not at {root} ({error}). Fetch it with --download, or give the folder that has it as --data-path."


def _digits(skip_unreadable: bool) -> _Parts:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("DIGITS comes with scikit-learn, which is missing: pip install 'p3b[demo]'") from error
    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    everything = LabelledImages(ArrayStore(pixels, "DIGITS"), digits.target, skip_unreadable=skip_unreadable)
    rest, test = stratified_cut(everything.targets, _DIGITS_TEST_SHARE, seed=0)
    names = tuple(str(name) for name in digits.target_names)
    return _Parts("scikit-learn", names, everything.subset(rest), test=everything.subset(test))


def _torchvision(name: str, root: Path, download: bool, skip_unreadable: bool) -> _Parts:
    if name not in _TORCH_SETS:
        raise DataError(unknown_name("torchvision data set", f"torch/{name}", [f"torch/{known}" for known in _TORCH_SETS]))
    parts: dict[str, LabelledImages] = {}
    for split in ("train", _TORCH_SETS[name]):
        try:
            opened = create_dataset(f"torch/{name}", root=str(root), split=split, download=download)
        except (RuntimeError, OSError) as error:
            raise DataError(_not_there(f"torch/{name}", root, download, error)) from error
        part = {"train": "train", "test": "test", "validation": "val"}[split]
        store = TorchvisionStore(opened, f"torch/{name} {split} part")
        parts[part] = LabelledImages(store, np.asarray(opened.targets), skip_unreadable=skip_unreadable)
    return _Parts(str(root), tuple(str(name) for name in opened.classes), **parts)


def _hugging_face(name: str, cache: str | Path | None, skip_unreadable: bool) -> _Parts:
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
    return _Parts(where, tuple(names.get(index, str(index)) for index in range(num_classes)), **labelled)


def _hugging_face_split(name: str, cache: str | Path | None, split: str) -> Any:
    try:
        return create_dataset(name, root=None if cache is None else str(cache), split=split)
    except (OSError, ValueError, KeyError, AssertionError, RuntimeError) as error:
        raise DataError(
            f"Cannot open the {split} split of {name} ({type(error).__name__}: {error}). Expected a Hugging Face data set "
            "with a split train, a column image and a column label; check the name on the hub and the connection."
        ) from error
