"""Data sets by name, folder or archive, in parts: train, val (chooses the best model), test (reported at the end).

Everything a user can get wrong about data is found here, before the first batch. The best model is never chosen on the
test part: where a data set brings no validation part, one is cut from train by seed (`val_share`), or there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from p3b.data.class_table import class_lines, missing_classes
from p3b.data.cut import balanced_subset, stratified_cut
from p3b.data.equal_files import equal_file_lines
from p3b.data.images import LabelledImages
from p3b.data.libraries import Parts, cifar, digits, hugging_face, torchvision_set
from p3b.data.own_images import own_parts
from p3b.errors import DataError, unknown_name

KNOWN_DATA_SETS = ("CIFAR10", "CIFAR100", "IMNET", "INAT18", "INAT19", "IFOOD", "FOLDER", "DIGITS")

_PUBLISHED_FOLDERS = ("IMNET", "INAT18", "INAT19", "IFOOD")
_ITERABLE_READERS = ("hfids", "tfds", "wds")
_DIGITS_VAL_SHARE = 0.125  # of what the test part leaves: a tenth of all
_FOLDER_VAL_SHARE = 0.1


@dataclass(frozen=True)
class DataSplits:
    """A data set in parts.

    Attributes:
        train: to learn from; empty where only an evaluation is wanted and there is no such part.
        val: to choose the best model by; None where there is none.
        test: to report once, at the end; None where there is none.
        class_names: name of class 0, 1, ...; the same in all parts.
        description: one line for the log: from where, how many images and classes in each part, what was taken for which
            part and what was left out.
        notes: further lines for the log: classes with their images in each part, classes that a part lacks, equal files.
        rule: how the parts were cut, in plain JSON values: data_set, val_share (None: nothing was cut), seed,
            max_train_images. With the same files, the same rule gives the same parts.
    """

    train: LabelledImages
    val: LabelledImages | None
    test: LabelledImages | None
    class_names: tuple[str, ...]
    description: str
    notes: tuple[str, ...] = ()
    rule: dict[str, Any] = field(default_factory=dict)


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
    for_evaluation: bool = False,
    class_names: Sequence[str] | None = None,
) -> DataSplits:
    """Open a data set, check it and cut it into parts. Of folders and tars one image of each class is decoded.

    Args:
        data_set: one of `KNOWN_DATA_SETS`, or `hfds/<name>` or `torch/<name>` as timm's `create_dataset` takes them.
            CIFAR10, CIFAR100: torchvision's, under `data_path`; their test part is `test`.
            IMNET, INAT18, INAT19, IFOOD: folders (or tars) `train` and `val`, optionally `test`, of class folders.
            FOLDER: a folder or tar of class folders, with or without the parts train, val and test (`folders`, and
            docs/images.md for the rule).
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
        for_evaluation: nothing will be trained: there need be no training part, and FOLDER is not cut unless `val_share`
            asks for it.
        class_names: of the model that is evaluated, by index; with `for_evaluation`. Folders are matched with them by
            name, and any of them may be absent.

    Raises:
        DataError: unknown name; path missing; no images; one class only; classes of a part that train does not know; a
            class without an image that can be read; parts and classes that cannot be told apart; a library or a download
            that is missing; `val_share` outside [0, 1) or beside a validation part; a setting that this data set does not
            take.
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
    default_share = 0.0
    if takes_part_paths:
        parts = own_parts(
            name, data_path, val_path, test_path, skip_unreadable=skip_unreadable, for_evaluation=for_evaluation,
            class_names=class_names, needs_val=name in _PUBLISHED_FOLDERS and val_share is None and not for_evaluation,
        )  # fmt: skip
        default_share = _FOLDER_VAL_SHARE if name == "FOLDER" and not for_evaluation else 0.0
    elif name in ("CIFAR10", "CIFAR100"):
        parts = cifar(name, _given(data_set, data_path), download, skip_unreadable)
    elif name == "DIGITS":
        if data_path is not None:
            raise DataError(f"DIGITS comes with scikit-learn and takes no data path; got {data_path}. Leave it out.")
        parts, default_share = digits(skip_unreadable), _DIGITS_VAL_SHARE
    elif slash and prefix.lower() == "torch":
        parts = torchvision_set(rest.lower(), _given(data_set, data_path), download, skip_unreadable)
    elif slash and prefix.lower() == "hfds":
        parts = hugging_face(data_set, data_path, skip_unreadable)
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


def _given(data_set: str, data_path: str | Path | None) -> Path:
    if data_path is None:
        raise DataError(f"{data_set} needs a data path: say where it lies with --data-path.")
    return Path(data_path).expanduser()


def _check_classes(data_set: str, class_names: Sequence[str]) -> None:
    if len(class_names) < 2:
        raise DataError(
            f"{data_set} has one class only ({', '.join(map(repr, class_names))}); a classifier needs two or more. The "
            "folder below the part names the class of an image: is the path one level too deep, or one too high?"
        )


def _cut(
    data_set: str,
    parts: Parts,
    val_share: float | None,
    default_share: float,
    seed: int,
    max_train_images: int | None,
) -> DataSplits:
    train, val, share, how = parts.train, parts.val, None, ""
    if val is not None:
        if val_share:
            raise DataError(
                f"{data_set} at {parts.where} has a validation part of {len(val)} images, and val_share = {val_share} asks "
                "to cut another from train. Leave val_share out; or, to report on that part at the end instead, use "
                "--data-set FOLDER with the train part as --data-path and that part as --test-path."
            )
    elif len(train):
        if parts.unlabelled and val_share is None and default_share:
            raise DataError(
                f"{data_set} at {parts.where}: {parts.unlabelled[0]}. Put the official list there, or the images into class "
                "folders; or give --val-share 0.1 to keep a tenth of train back for validation instead."
            )
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
    shown_val = _size(val) + (how if val is not None else "")
    found = "".join(f"; {phrase}" for phrase in parts.said)
    description = f"{data_set} from {parts.where}: train {_size(train)}, val {shown_val}, test {_size(parts.test)}{found}"
    by_name = {"train": train, "val": val, "test": parts.test}
    there = {part: images for part, images in by_name.items() if images is not None and len(images)}
    notes = (
        *class_lines(parts.class_names, there),
        *missing_classes(parts.class_names, there),
        *equal_file_lines(there),
    )
    rule = {
        "data_set": data_set,
        "val_share": share if share and val is not None else None,
        "seed": seed,
        "max_train_images": max_train_images,
    }
    return DataSplits(train, val, parts.test, parts.class_names, description, notes, rule)


def _size(part: LabelledImages | None) -> str:
    return "none" if part is None or not len(part) else f"{len(part)} images of {len(np.unique(part.targets))} classes"
