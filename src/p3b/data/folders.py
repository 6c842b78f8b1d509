"""Parts and classes of a folder or tar; the rule is one for both, and docs/images.md tells it to users.

1. Folders with a part's usual name, in any case, are the parts: train, val, test (`names`). They may lie in one outer folder.
2. Where there are none, lists beside the images say the parts (`lists`); else everything is for training.
3. The folder below the part is the class, whatever lies beneath it. Hidden folders and those of tools never count.
4. What could be either part or class, or could let images for evaluation into training, is refused with the way to say it.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from timm.utils.misc import natural_key

from p3b.data.images import LabelledImages
from p3b.data.lists import listed_parts, table_labels
from p3b.data.names import like_a_part, looks_like_train_and_val, part_of
from p3b.data.scan import Folder, PartFiles, Tree, scan, some
from p3b.data.stores import FileStore, ImageStore, TarStore
from p3b.errors import DataError

_HEAP_NAMES = ("images", "image", "imgs", "img")
"""A part whose only folder has such a name holds its images in one heap."""


@dataclass(frozen=True)
class FoundImages:
    """The images of one part with the class name of each, in a stable order.

    Attributes:
        where: the folder or tar, and the folder inside the tar, for messages.
        store: the images.
        labels: (n,) class name of each, in Unicode's composed form (NFC).
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
        """The images with class indices by `class_names`, which must hold all of this part's classes."""
        index_of = {name: index for index, name in enumerate(class_names)}
        targets = [index_of[label] for label in self.labels.tolist()]
        return LabelledImages(self.store, targets, skip_unreadable=skip_unreadable)


@dataclass(frozen=True)
class FoundParts:
    """What a place holds.

    Attributes:
        parts: images by part: train, val, test as far as they are there.
        said: what was taken for which part, and what was left out, in phrases.
        unlabelled: parts that are there and cannot be used, each with what mends it.
    """

    parts: dict[str, FoundImages]
    said: tuple[str, ...]
    unlabelled: dict[str, str]


def find_parts(path: Path) -> FoundParts:
    """Everything under a folder or in a tar, by part. Without parts the path's own class folders are `train`.

    Raises:
        DataError: the path is absent, neither folder nor tar, damaged, or has no image; an image is in no class folder; a
            class folder has no image; parts and classes cannot be told apart.
    """
    tree = scan(path)
    tars = _part_tars(path)
    plan = _Plan(tree)
    plan.choose(tars)
    parts = {part: _found(files) for part, files in plan.parts.items()}
    for tar in tars:
        part = part_of(tar.stem)
        assert part is not None
        if part in parts:
            raise DataError(_twice(path, part, parts[part].where, str(tar)))
        parts[part] = find_images(tar)
        plan.said.append(f"{part} = {tar.name}")
    if tars:
        tree.left_out.no_image[".tar"] -= len(tars)
        tree.left_out.no_image = +tree.left_out.no_image
    left_out = tree.left_out.lines()
    said = plan.said + ([f"left out: {'; '.join(left_out)}"] if left_out else [])
    return FoundParts(parts, tuple(said), plan.unlabelled)


def find_images(path: Path, known_classes: Collection[str] = ()) -> FoundImages:
    """All images of one part: under one folder of class folders, or in one tar of them.

    Args:
        path: the folder or tar.
        known_classes: of the training part, where there is one. A folder of such a name is a class, not an outer folder.

    Raises:
        DataError: as `find_parts`; also if there are parts inside.
    """
    tree = scan(path)
    root: Folder = ()
    while (inner := _outer_folder(tree, root)) is not None and _nfc(inner) not in known_classes:
        root = (*root, inner)
    inside = {part: child for child in _children(tree, root) if (part := part_of(child)) and not _is_heap(tree, (*root, child))}
    if inside and not set(map(_nfc, inside.values())) & set(known_classes):
        raise DataError(
            f"{path} is named as one part and holds {some([f'{child}/' for child in inside.values()])}, parts of its own. Give "
            "the folder of one part, or give this folder as --data-path alone."
        )
    part = part_of(path.name) or "val"
    if _is_heap(tree, root) and tree.images and (found := _from_table(tree, root, root[:-1] if root else root, part)):
        return _found(found)
    return _found(_class_folders(tree, root, str(path)))


# --- the choice of parts ----------------------------------------------------------------------------------------------


class _Plan:
    """The decision what is which part of one tree. Nothing is read but lists."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.parts: dict[str, PartFiles] = {}
        self.said: list[str] = []
        self.unlabelled: dict[str, str] = {}

    def choose(self, tars: Sequence[Path]) -> None:
        """Fill `parts`, from the outermost folder inwards."""
        root: Folder = ()
        while not (self._named_parts(root, bool(tars)) or self._listed_parts(root)):
            inner = None if tars else _outer_folder(self.tree, root)
            if inner is None:
                if not tars:
                    _refuse_classes_like_parts(self.tree, root)
                    self.parts = {"train": _class_folders(self.tree, root, _place(self.tree, root))}
                    self._say_what_lies_deeper(root)
                break
            root = (*root, inner)
        if root:
            self.said.append(f"inside the outer folder {'/'.join(root)}")

    def _named_parts(self, root: Folder, beside_tars: bool) -> bool:
        children = _children(self.tree, root)
        named = {child: part for child in children if (part := part_of(child)) is not None}
        heaps = [child for child in named if _is_heap(self.tree, (*root, child))]
        whole = {child: part for child, part in named.items() if child not in heaps}
        others = [child for child in children if child not in named]
        if not named or (not whole and not beside_tars and self._heaps_are_classes(root, heaps, others)):
            return False
        if whole and "train" not in whole.values() and others and not beside_tars:
            raise DataError(
                f"{_place(self.tree, root)} holds {some([f'{child}/' for child in whole])} beside {some(others)}: parts beside "
                "classes? Put the class folders for training into a folder train beside it, or give the parts one by one with "
                "--data-path, --val-path and --test-path; if it is a class, rename it."
            )
        for child, part in whole.items():
            self._take(part, child, _class_folders(self.tree, (*root, child), _place(self.tree, (*root, child))))
        for child in heaps:
            self._take_heap(root, child, named[child], bool(whole))
        self.said += [self._unused(root, child) for child in others]
        for child in (*whole, *heaps):
            self._say_what_lies_deeper((*root, child))
        return True

    def _take(self, part: str, child: str, files: PartFiles) -> None:
        if part in self.parts:
            raise DataError(_twice(self.tree.place, part, self.parts[part].where, files.where))
        self.parts[part] = files
        self.said.append(f"{part} = {child}/")

    def _heaps_are_classes(self, root: Folder, heaps: list[str], others: list[str]) -> bool:
        """Whether folders with names of parts that hold images and no folder are classes: `train` among vehicles."""
        if [name.casefold() for name in heaps] == ["train"] and others:
            return True
        if others:
            raise DataError(
                f"{_place(self.tree, root)} holds {some([f'{child}/' for child in heaps])}, named as a part and without class "
                f"folders, beside {some(others)}. If it is a part, move it out and give it with --test-path, in class folders; "
                "if it is a class, rename it."
            )
        return False

    def _take_heap(self, root: Folder, child: str, part: str, beside_whole: bool) -> None:
        """A part that holds its images in one heap: labelled by a table, or told."""
        place = (*root, child)
        labelled = _from_table(self.tree, place, root, part)
        if labelled is not None:
            self._take(part, child, labelled)
            missing = sum(len(leaves) for folder, leaves in self.tree.images.items() if folder[: len(place)] == place) - len(
                labelled.files
            )
            self.said[-1] += f", labelled by {labelled.where.rpartition('(')[2].rstrip(')')}"
            if missing:
                self.said.append(f"not used: {missing:,} images of {child}/ that no table labels")
            return
        count = sum(len(leaves) for folder, leaves in self.tree.images.items() if folder[: len(place)] == place)
        if part == "train":
            raise DataError(
                f"{_place(self.tree, place)} holds {count:,} images in no class folder, and no list beside it says their "
                "classes. Put the official list there (a table of image and label, such as train_labels.csv), or move each "
                "image to <class>/<image>."
            )
        self.unlabelled[part] = f"{child}/ holds {count:,} images in no class folder, and no list says their classes"
        self.said.append(f"not used: {self.unlabelled[part]}")

    def _listed_parts(self, root: Folder) -> bool:
        listed = listed_parts(self.tree, root)
        if listed is None:
            return False
        self.parts, said = listed
        self.said += said
        return True

    def _unused(self, root: Folder, child: str) -> str:
        place = (*root, child)
        count = sum(len(leaves) for folder, leaves in self.tree.images.items() if folder[: len(place)] == place)
        return f"not used: {child}/ beside the parts ({count:,} images)"

    def _say_what_lies_deeper(self, root: Folder) -> None:
        deeper = sorted(folder for folder in self.tree.images if folder[: len(root)] == root and len(folder) > len(root) + 1)
        if deeper:
            shown = some(["/".join(folder[len(root) :]) for folder in deeper], 4)
            self.said.append(f"{len(deeper):,} folders lie below class folders and count for these ({shown})")


def _from_table(tree: Tree, place: Folder, root: Folder, part: str) -> PartFiles | None:
    files = [(folder, leaf) for folder, leaves in tree.images.items() if folder[: len(place)] == place for leaf in leaves]
    found = table_labels(tree, root, part, files)
    if found is None:
        return None
    labels, name = found
    pairs = [(file, labels[stem]) for file in files if (stem := PurePosixPath(file[1].name).stem) in labels]
    where = f"{_place(tree, place)} ({name})"
    return PartFiles(where, tree, [file for file, _ in pairs], [label for _, label in pairs])


def _refuse_classes_like_parts(tree: Tree, root: Folder) -> None:
    """Stop where what would become a class may be a part, or where parts lie below the classes."""
    children = _children(tree, root)
    alike = {child: part for child in children if (part := like_a_part(child)) is not None}
    if looks_like_train_and_val(children) or len(set(alike.values())) > 1 or (len(alike) > 1 and len(alike) == len(children)):
        raise DataError(
            f"The class folders of {_place(tree, root)} would be {some(children)}, which look like parts. Name them train, val "
            "and test; or give them one by one with --data-path, --val-path and --test-path; if they are classes, rename them."
        )
    below = {
        part: "/".join(folder[: len(root) + 2]) for folder in tree.images if (part := _part_below(folder, root)) is not None
    }
    if len(below) > 1:
        raise DataError(
            f"{_place(tree, root)} has parts below the folders that name classes ({some(sorted(below.values()))}); images for "
            "evaluation would be trained on. Put the part above the class (train/<class>/<image>), or give parts one by one "
            "with --data-path, --val-path and --test-path."
        )


def _part_below(folder: Folder, root: Folder) -> str | None:
    is_below = folder[: len(root)] == root and len(folder) >= len(root) + 2
    return part_of(folder[len(root) + 1]) if is_below else None


# --- classes ----------------------------------------------------------------------------------------------------------


def _class_folders(tree: Tree, root: Folder, where: str) -> PartFiles:
    """All images below a folder; the folder below it names the class."""
    depth = len(root)
    files = [(folder, leaf) for folder, leaves in tree.images.items() if folder[:depth] == root for leaf in leaves]
    empty_of_images: dict[str, Counter[str]] = {}
    classes = {folder[depth] for folder, _ in files if len(folder) > depth}
    for folder, endings in tree.left_out.only_others.items():
        if folder[:depth] == root and len(folder) > depth and folder[depth] not in classes:
            empty_of_images.setdefault(folder[depth], Counter()).update(endings)
    if not files:
        left_out = tree.left_out.lines()
        raise DataError(
            f"{where} has no image{' but ' + '; '.join(left_out) if left_out else ''}. Expected class folders with images in "
            "them, for instance cat/0001.jpg; every format counts that the installed Pillow decodes."
        )
    if empty_of_images:
        name, endings = next(iter(empty_of_images.items()))
        kinds = ", ".join(f"{count} {ending or 'without ending'}" for ending, count in endings.most_common(4))
        raise DataError(
            f"The class folders {some(sorted(empty_of_images))} of {where} hold files and no image (in {name}: {kinds}). Every "
            "format counts that the installed Pillow decodes (photos of iPhones: pip install pillow-heif). Add images, or move "
            "the folder out of the data set."
        )
    stray = [leaf.name for folder, leaf in files if len(folder) == depth]
    if stray:
        raise DataError(
            f"{where} has {len(stray)} images that lie in no class folder, for instance {stray[0]}. The folder of an image "
            "names its class: move each to <class>/<image>."
        )
    return PartFiles(where, tree, files, [folder[depth] for folder, _ in files])


def _found(part: PartFiles) -> FoundImages:
    """The images in timm's order, behind a store."""
    paths = ["/".join((*folder, leaf.name)) for folder, leaf in part.files]
    by_text = sorted(range(len(paths)), key=paths.__getitem__)  # timm's key takes Cat and cat for equal
    order = sorted(by_text, key=lambda number: natural_key(paths[number]))
    names, leaves = [paths[number] for number in order], [part.files[number][1] for number in order]
    place = part.tree.place
    store: ImageStore
    if part.tree.is_tar:
        store = TarStore(place, names, [leaf.offset for leaf in leaves], [leaf.size for leaf in leaves])
    else:
        store = FileStore([f"{place}/{name}" for name in names])
    one_form = _one_form(set(part.labels), part.where)
    return FoundImages(part.where, store, np.array([one_form[part.labels[number]] for number in order]))


def _one_form(names: Collection[str], where: str) -> dict[str, str]:
    """Class names in Unicode's composed form: the same letters are one class, however a system spells them.

    Raises:
        DataError: names that differ and yet look the same (full-width letters, ligatures, other spaces).
    """
    composed = {name: _nfc(name) for name in names}
    alike: dict[str, set[str]] = {}
    for name in composed.values():
        alike.setdefault(unicodedata.normalize("NFKC", name).strip(), set()).add(name)
    for same in alike.values():
        if len(same) > 1:
            raise DataError(
                f"{where} has class folders whose names look the same: {', '.join(map(ascii, sorted(same)))}. Rename one, or "
                "put their images together."
            )
    return composed


def _nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)


# --- the shape of a tree ----------------------------------------------------------------------------------------------


def _children(tree: Tree, root: Folder) -> list[str]:
    """Folders right below `root` that hold images somewhere beneath."""
    depth = len(root)
    return sorted({folder[depth] for folder in tree.images if folder[:depth] == root and len(folder) > depth}, key=natural_key)


def _outer_folder(tree: Tree, root: Folder) -> str | None:
    """The only folder of `root`, if it wraps others and nothing lies beside it."""
    children = _children(tree, root)
    if len(children) != 1 or root in tree.images:
        return None
    place = (*root, children[0])
    return children[0] if _children(tree, place) and place not in tree.images else None


def _is_heap(tree: Tree, place: Folder) -> bool:
    """Whether a folder holds its images in no class folder: directly, or in one folder `images`."""
    children = _children(tree, place)
    if not children:
        return True
    return len(children) == 1 and children[0].casefold() in _HEAP_NAMES and not _children(tree, (*place, children[0]))


def _part_tars(path: Path) -> list[Path]:
    if not path.is_dir():
        return []
    return sorted(file for file in path.glob("*.[tT][aA][rR]") if file.is_file() and part_of(file.stem) and file.name[0] != ".")


def _place(tree: Tree, root: Folder) -> str:
    return str(tree.place) if not root else f"{tree.place}{':' if tree.is_tar else '/'}{'/'.join(root)}"


def _twice(path: Path, part: str, first: str, second: str) -> str:
    return f"{path} has the part {part!r} twice: {first} and {second}. Keep one of them."
