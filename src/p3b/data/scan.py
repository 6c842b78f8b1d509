"""All images below a folder or in a tar, by the folder they lie in, and what else lies there, by reason.

Nothing is decoded. A tar is read header by header, so that opening one takes seconds whatever its size, and nothing is
written beside the user's data.
"""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from p3b.data.formats import begins_like_an_image, ending_of, has_image_ending, missing_plugin
from p3b.errors import DataError

Folder = tuple[str, ...]
"""Folders from the scanned place down to where a file lies; () is the place itself."""

_TOOL_FOLDERS = frozenset(
    (
        "@eadir", "__macosx", "__pycache__", "$recycle.bin", "#recycle", "@recycle", "#snapshot", "lost+found",
        "system volume information",
    )
)  # fmt: skip
_TOOL_FILES = frozenset(("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"))
_LIST_ENDINGS = (".csv", ".tsv", ".txt", ".json")
_LOOKED_INTO = 8
"""So many files of an unknown ending are looked into before it is taken for no image."""


class Leaf(NamedTuple):
    """A file: its name and, in a tar, where its bytes lie."""

    name: str
    offset: int = 0
    size: int = 0


@dataclass
class LeftOut:
    """What was found and is not used.

    Attributes:
        no_image: files that are no images, by ending.
        hidden: hidden files and folders, and those that tools leave behind.
        links: links that lead nowhere or back to a folder above.
        empty: folders without any file beneath.
        only_others: folders that hold files and no image, with the endings of these files.
    """

    no_image: Counter[str] = field(default_factory=Counter)
    hidden: int = 0
    links: int = 0
    empty: list[Folder] = field(default_factory=list)
    only_others: dict[Folder, Counter[str]] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """One phrase for each reason that there is."""
        said = []
        if self.no_image:
            endings = ", ".join(f"{count} {ending or 'without ending'}" for ending, count in self.no_image.most_common(6))
            hints = {plugin for ending in self.no_image if (plugin := missing_plugin(ending))}
            hint = f"; pip install {' '.join(sorted(hints))} to read them" if hints else ""
            said.append(f"{sum(self.no_image.values()):,} files that are no images here ({endings}{hint})")
        if self.hidden:
            said.append(f"{self.hidden:,} hidden or tool files and folders")
        if self.links:
            said.append(f"{self.links:,} links that lead nowhere or in a circle")
        if self.empty:
            said.append(f"{len(self.empty):,} empty folders ({some(['/'.join(folder) for folder in self.empty])})")
        return said


@dataclass(frozen=True)
class Tree:
    """What lies below a place.

    Attributes:
        place: the folder or tar.
        images: the image files of each folder that has some.
        lists: text files that may say which image is what, by folder.
        left_out: the rest.
    """

    place: Path
    images: dict[Folder, list[Leaf]]
    lists: list[tuple[Folder, Leaf]]
    left_out: LeftOut

    @property
    def is_tar(self) -> bool:
        return self.place.is_file()

    def read_text(self, folder: Folder, leaf: Leaf) -> str:
        """The text of a list; what is no UTF-8 is replaced."""
        if not self.is_tar:
            return self.place.joinpath(*folder, leaf.name).read_text(encoding="utf-8-sig", errors="replace")
        with self.place.open("rb") as file:
            file.seek(leaf.offset)
            return file.read(leaf.size).decode("utf-8-sig", errors="replace")


class PartFiles(NamedTuple):
    """The images of one part, in any order, with the name of each one's class."""

    where: str
    tree: Tree
    files: list[tuple[Folder, Leaf]]
    labels: list[str]


def scan(place: Path) -> Tree:
    """Look through a folder or an uncompressed tar.

    Raises:
        DataError: it is absent, neither of the two, damaged, or a folder that may not be read.
    """
    if not place.exists():
        raise DataError(f"There is no {place}. Expected a folder (or a .tar) of class folders with images in them.")
    return _sorted_out(place, _tar_files(place) if place.is_file() else _folder_files(place))


def some(names: list[str] | tuple[str, ...], most: int = 6) -> str:
    """The first few names, for a message."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


class _File(NamedTuple):
    """One thing that was found; `leaf` None stands for the folder itself."""

    folder: Folder
    leaf: Leaf | None
    kind: str  # file, hidden, link, folder
    first_bytes: Callable[[], bytes] = bytes


def _sorted_out(place: Path, files: Iterator[_File]) -> Tree:
    images: dict[Folder, list[Leaf]] = {}
    lists: list[tuple[Folder, Leaf]] = []
    left_out, folders, others = LeftOut(), set(), dict[Folder, Counter[str]]()
    by_content = _ByContent()
    for folder, leaf, kind, first_bytes in files:
        if kind == "hidden":
            left_out.hidden += 1
        elif kind == "link":
            left_out.links += 1
        elif leaf is None:
            folders.add(folder)
        else:
            ending = ending_of(leaf.name)
            if has_image_ending(ending) or by_content.is_image(ending, first_bytes):
                images.setdefault(folder, []).append(leaf)
                continue
            left_out.no_image[ending] += 1
            others.setdefault(folder, Counter())[ending] += 1
            if ending in _LIST_ENDINGS:
                lists.append((folder, leaf))
    filled = {folder[:depth] for folder in images for depth in range(len(folder) + 1)}
    for folder, endings in others.items():
        if folder not in filled:
            left_out.only_others[folder] = endings
    empty = folders - filled - {folder[:depth] for folder in others for depth in range(len(folder) + 1)}
    left_out.empty = sorted(folder for folder in empty if folder and folder[:-1] not in empty)
    return Tree(place, images, lists, left_out)


class _ByContent:
    """Tells images of unknown endings by their first bytes, and gives an ending up that had none among its first files."""

    def __init__(self) -> None:
        self._looked: Counter[str] = Counter()
        self._found: set[str] = set()

    def is_image(self, ending: str, first_bytes: Callable[[], bytes]) -> bool:
        if ending and ending not in self._found and self._looked[ending] >= _LOOKED_INTO:
            return False
        self._looked[ending] += 1
        found = begins_like_an_image(first_bytes())
        if found:
            self._found.add(ending)
        return found


def is_hidden(name: str, is_folder: bool) -> bool:
    """Whether a name is that of something hidden, or of what tools leave behind."""
    return name.startswith(".") or name.lower() in (_TOOL_FOLDERS if is_folder else _TOOL_FILES)


# --- folders ----------------------------------------------------------------------------------------------------------


def _folder_files(place: Path) -> Iterator[_File]:
    def below(path: str, folder: Folder, above: frozenset[tuple[int, int]]) -> Iterator[_File]:
        identity = _identity(path)
        if identity in above:
            yield _File(folder, None, "link")
            return
        yield _File(folder, None, "folder")
        try:
            with os.scandir(path) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(
                f"The folder {path} cannot be read ({error.strerror}). Mend its permissions, or move it away."
            ) from error
        for entry in entries:
            is_folder = entry.is_dir()
            if is_hidden(entry.name, is_folder):
                yield _File(folder, None, "hidden")
            elif is_folder:
                yield from below(entry.path, (*folder, entry.name), above | {identity})
            elif entry.is_file():
                yield _File(folder, Leaf(entry.name), "file", partial(_first_bytes, entry.path))
            elif entry.is_symlink():
                yield _File(folder, None, "link")

    return below(str(place), (), frozenset())


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)  # noqa: PTH116 - one call for a folder that is known by its text
    return status.st_dev, status.st_ino


def _first_bytes(path: str) -> bytes:
    try:
        with Path(path).open("rb", buffering=0) as file:
            return file.read(16)
    except OSError:
        return b""


# --- tars -------------------------------------------------------------------------------------------------------------


def _tar_files(place: Path) -> Iterator[_File]:
    if place.suffix.lower() != ".tar":
        raise DataError(f"{place} is neither a folder nor a .tar file. Unpack it, or repack it as an uncompressed .tar.")
    members: dict[str, _File] = {}  # by name: where a tar was appended to, the last one counts, as in tar itself
    try:
        with tarfile.open(place, mode="r:") as tar:
            for info in tar:
                parts = tuple(part for part in PurePosixPath(info.name).parts if part != "/")
                members[info.name] = _member(place, info, parts)
    except (tarfile.TarError, EOFError) as error:
        raise DataError(
            f"{place} cannot be read as an uncompressed tar ({error}). Is it compressed or cut short? Unpack it, or make it "
            "again with: tar -cf"
        ) from error
    return iter(members.values())


def _member(place: Path, info: tarfile.TarInfo, parts: Folder) -> _File:
    folder, name = parts[:-1], parts[-1] if parts else ""
    if any(is_hidden(part, is_folder=True) for part in folder) or is_hidden(name, info.isdir()):
        return _File(folder, None, "hidden")
    if info.isdir():
        return _File(parts, None, "folder")
    if not info.isfile():
        return _File(folder, None, "link")
    leaf = Leaf(name, info.offset_data, info.size)

    def first_bytes() -> bytes:
        with place.open("rb") as file:
            file.seek(leaf.offset)
            return file.read(min(16, leaf.size))

    return _File(folder, leaf, "file", first_bytes)
