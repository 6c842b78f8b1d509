"""Finds images and classes in folders and tars: <class>/<image> at any depth, with parts train, val and test or without.

The class of an image is the name of the folder it lies in, as in timm's readers. Nothing is decoded here; a tar is
read header by header, so that opening one takes seconds whatever its size, and nothing is written beside the user's
data.
"""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from timm.data.readers.img_extensions import get_img_extensions
from timm.data.readers.reader_image_folder import find_images_and_targets
from timm.utils.misc import natural_key

from p3b.data.images import FileStore, ImageStore, LabelledImages, TarStore
from p3b.errors import DataError

PART_NAMES = {"train": "train", "val": "val", "validation": "val", "valid": "val", "test": "test"}


@dataclass(frozen=True)
class FoundImages:
    """The images of one part with the class name of each, in a stable order.

    Attributes:
        where: the folder or tar, and the folder inside the tar, for messages.
        store: the images.
        labels: (n,) class name of each.
    """

    where: str
    store: ImageStore
    labels: NDArray[np.str_]

    @property
    def class_names(self) -> tuple[str, ...]:
        """Sorted the way timm sorts: numbers inside names by value."""
        names = sorted(set(self.labels.tolist()))  # sorted twice: timm's key takes Cat and cat for equal
        return tuple(sorted(names, key=natural_key))

    def labelled(self, class_names: Sequence[str], skip_unreadable: bool) -> LabelledImages:
        """The images with class indices by `class_names`, which must be this part's classes, no more and no fewer."""
        index_of = {name: index for index, name in enumerate(class_names)}
        targets = [index_of[label] for label in self.labels.tolist()]
        return LabelledImages(self.store, targets, skip_unreadable=skip_unreadable)


def find_parts(path: Path) -> dict[str, FoundImages]:
    """Everything under a folder or in a tar, by part: `train`, `val` and `test` as far as they are there.

    A part is a folder `train`, `val`, `validation`, `valid` or `test` of class folders, or (beside others in a
    folder) a tar of that name. Without such parts the path's own class folders are `train`. A folder named `train`
    that holds images directly is a class of that name.

    Raises:
        DataError: the path is absent, neither folder nor tar, damaged, or has no image; an image is in no class folder.
    """
    if not path.exists():
        raise DataError(f"There is no {path}. Expected a folder (or a .tar) of class folders, or one with train and val in it.")
    if path.is_file():
        return _tar_parts(path)
    parts: dict[str, FoundImages] = {}
    for name, part in PART_NAMES.items():
        for candidate in (path / name, path / f"{name}.tar"):
            if candidate.is_file() or _has_folders(candidate):
                if part in parts:
                    raise DataError(
                        f"{path} has the part {part!r} twice: {parts[part].where} and {candidate}. Keep one of them."
                    )
                parts[part] = find_images(candidate)
    return parts or {"train": find_images(path)}


def find_images(path: Path) -> FoundImages:
    """All images under one folder of class folders, or in one tar of class folders. Raises as `find_parts` does."""
    if not path.exists():
        raise DataError(f"There is no {path}. Expected a folder (or a .tar) of class folders with images in them.")
    if path.is_file():
        return _in_tar(path, str(path), _tar_members(path))
    images, index_of = find_images_and_targets(str(path))
    class_of = {index: name for name, index in index_of.items()}
    files = [(file, class_of[target]) for file, target in images if not Path(file).name.startswith(".")]
    names, labels = [file for file, _ in files], [label for _, label in files]
    _check(str(path), names, labels)
    return FoundImages(str(path), FileStore(names), np.array(labels))


def _has_folders(path: Path) -> bool:
    return path.is_dir() and any(child.is_dir() for child in path.iterdir())


def _tar_parts(path: Path) -> dict[str, FoundImages]:
    members = _without_common_folder(_tar_members(path))
    by_part: dict[str, list[_Member]] = {}
    for member in members:
        first, *rest = member.folders or ("",)
        if first in PART_NAMES and rest:
            by_part.setdefault(PART_NAMES[first], []).append(member)
    if not by_part:
        return {"train": _in_tar(path, str(path), members)}
    return {part: _in_tar(path, f"{path}:{part}", found) for part, found in by_part.items()}


@dataclass(frozen=True)
class _Member:
    name: str
    folders: tuple[str, ...]
    offset: int
    size: int

    @property
    def label(self) -> str:
        return self.folders[-1] if self.folders else ""


def _tar_members(path: Path) -> list[_Member]:
    if path.suffix.lower() != ".tar":
        raise DataError(f"{path} is neither a folder nor a .tar file. Unpack it, or repack it as an uncompressed .tar.")
    extensions = get_img_extensions(as_set=True)
    members: dict[str, _Member] = {}  # by name: where a tar was appended to, the last one counts, as in tar itself
    try:
        with tarfile.open(path, mode="r:") as tar:
            for info in tar:
                inner = PurePosixPath(info.name)
                if info.isfile() and inner.suffix.lower() in extensions and not inner.name.startswith("."):
                    members[info.name] = _Member(info.name, inner.parts[:-1], info.offset_data, info.size)
    except (tarfile.TarError, EOFError) as error:
        raise DataError(
            f"{path} cannot be read as an uncompressed tar ({error}). Is it compressed or cut short? Unpack it, or make it "
            "again with: tar -cf"
        ) from error
    return sorted(members.values(), key=lambda member: natural_key(member.name))


def _without_common_folder(members: list[_Member]) -> list[_Member]:
    """A tar often wraps everything in one folder; that one says nothing about parts, unless it is a part itself."""
    tops = {member.folders[:1] for member in members}
    if len(tops) != 1 or any(len(member.folders) < 2 for member in members) or next(iter(tops))[0] in PART_NAMES:
        return members
    return [_Member(member.name, member.folders[1:], member.offset, member.size) for member in members]


def _in_tar(path: Path, where: str, members: list[_Member]) -> FoundImages:
    names = [member.name for member in members]
    _check(where, names, [member.label for member in members])
    store = TarStore(path, names, [member.offset for member in members], [member.size for member in members])
    return FoundImages(where, store, np.array([member.label for member in members]))


def _check(where: str, names: list[str], labels: list[str]) -> None:
    if not names:
        raise DataError(
            f"{where} has no image. Expected class folders with images in them, for instance cat/0001.jpg; known endings: "
            f"{', '.join(get_img_extensions())}."
        )
    if "" in labels:
        stray = [name for name, label in zip(names, labels, strict=True) if label == ""]
        raise DataError(
            f"{where} has {len(stray)} images that lie in no class folder, for instance {stray[0]}. The folder of an image "
            "names its class: move each to <class>/<image>."
        )
