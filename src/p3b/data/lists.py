"""Parts and labels from lists that lie beside the images, as data sets are officially handed out.

- JSON of iNaturalist's form (images, annotations, categories), one file a part: iNaturalist 2017 to 2019.
- `images.txt` with `train_test_split.txt`: CUB-200-2011 and its relatives.
- Text files named for a part, one image of a class folder a line: Food-101, DTD, MIT Indoor.
- Tables of image and label for a part that holds its images in one heap: iFood, Kaggle, the validation parts of ImageNet
  (`LOC_val_solution.csv`) and Tiny ImageNet (`val_annotations.txt`).
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from timm.utils.misc import natural_key

from p3b.data.formats import ending_of, has_image_ending
from p3b.data.names import looks_like_train_and_val, part_of
from p3b.data.scan import Folder, Leaf, PartFiles, Tree
from p3b.errors import DataError

Parts = tuple[dict[str, PartFiles], list[str]]
"""The parts that were found, and what is to be said about them."""

_LABEL_COLUMNS = ("label", "labels", "class", "class_name", "class_id", "category", "category_id", "breed", "predictionstring")
_LABELS_OF_TINY_IMAGENET = "val_annotations.txt"
_LABELS_OF_IMAGENET = "LOC_val_solution.csv"
_DEEPEST = 2
"""Lists are looked for so many folders below the images' root."""


def listed_parts(tree: Tree, root: Folder) -> Parts | None:
    """Parts as lists below `root` say; None where no list speaks of these images.

    Raises:
        DataError: the images are of a form that only lists can divide, and there are none.
    """
    return _inaturalist(tree, root) or _birds(tree, root) or _text_lists(tree, root)


def table_labels(
    tree: Tree, root: Folder, part: str, files: Sequence[tuple[Folder, Leaf]]
) -> tuple[dict[str, str], str] | None:
    """Labels by file name of a part whose images lie in one heap, and the table that has them; None where none has.

    Args:
        tree, root: where tables are looked for.
        part: train, val or test; a table that is named for another part does not count.
        files: the part's images.
    """
    stems = {PurePosixPath(leaf.name).stem for _, leaf in files}
    best: tuple[dict[str, str], str] | None = None
    for name, text in _tables(tree, root):
        of_part = part_of(PurePosixPath(name).stem, with_lists=True)
        if of_part is not None and of_part != part:
            continue
        labels = {stem: label for stem, label in _rows(name, text) if stem in stems}
        if labels and (best is None or len(labels) > len(best[0])):
            best = labels, name
    if best is None:
        return None
    names = _class_list(tree, root)
    return {stem: names.get(label, label) for stem, label in best[0].items()}, best[1]


# --- tables of image and label ----------------------------------------------------------------------------------------


def _tables(tree: Tree, root: Folder) -> Iterator[tuple[str, str]]:
    for folder, leaf in _lists_below(tree, root):
        if ending_of(leaf.name) != ".json":
            yield leaf.name, tree.read_text(folder, leaf)
    if not tree.is_tar:  # Kaggle's ImageNet keeps it beside ILSVRC/, three folders above the images
        for above in list(Path(tree.place).absolute().parents)[:4]:
            if (above / _LABELS_OF_IMAGENET).is_file():
                yield _LABELS_OF_IMAGENET, (above / _LABELS_OF_IMAGENET).read_text(encoding="utf-8-sig", errors="replace")


def _rows(name: str, text: str) -> Iterator[tuple[str, str]]:
    """Image (without ending) and label of each line of a table; nothing where it does not say which column is the label."""
    lines = text.splitlines()
    comma = bool(lines) and "," in lines[0]
    rows = [row for row in (csv.reader(lines) if comma else (line.split() for line in lines)) if len(row) > 1]
    if not rows:
        return
    header = [cell.strip().lower() for cell in rows[0]]
    column = next((header.index(known) for known in _LABEL_COLUMNS if known in header[1:]), None)
    if column is None:
        if len(rows[0]) != 2 and name != _LABELS_OF_TINY_IMAGENET:
            return
        column = 1
    for row in rows:
        if len(row) > column and row[column].split():
            label = row[column].strip()
            image = row[0].strip()
            stem = PurePosixPath(image).stem if has_image_ending(ending_of(image)) else PurePosixPath(image).name
            yield stem, label.split()[0] if header[column] == "predictionstring" else label


def _class_list(tree: Tree, root: Folder) -> dict[str, str]:
    """Names of numbered classes from `class_list.txt`: a number and a name a line."""
    for folder, leaf in _lists_below(tree, root):
        if leaf.name.lower() in ("class_list.txt", "classes.txt"):
            rows = [line.split(maxsplit=1) for line in tree.read_text(folder, leaf).splitlines()]
            return {row[0]: row[1].strip() for row in rows if len(row) == 2 and row[0].isdigit()}
    return {}


def _lists_below(tree: Tree, root: Folder) -> list[tuple[Folder, Leaf]]:
    depth = len(root)
    near = [(folder, leaf) for folder, leaf in tree.lists if folder[:depth] == root and len(folder) <= depth + _DEEPEST]
    return sorted(near, key=lambda found: natural_key("/".join((*found[0], found[1].name))))


# --- text files of one part each --------------------------------------------------------------------------------------


def _text_lists(tree: Tree, root: Folder) -> Parts | None:
    index = {_key((*folder, leaf.name)): (folder, leaf) for folder, leaf in _images_below(tree, root)}
    listed: dict[str, list[tuple[Folder, Leaf]]] = {}
    said: list[str] = []
    for folder, leaf in _lists_below(tree, root):
        part = part_of(PurePosixPath(leaf.name).stem, with_lists=True)
        if ending_of(leaf.name) == ".json" or part is None or part in listed:
            continue
        lines = [line.strip() for line in tree.read_text(folder, leaf).splitlines() if line.strip()]
        found = [index[key] for key in map(_line_key, lines) if key in index]
        if found and 2 * len(found) >= len(lines):
            listed[part] = found
            said.append(_as_listed(part, "/".join((*folder, leaf.name)), len(lines) - len(found)))
    if not listed:
        return None
    taken = {file for files in listed.values() for file in files}
    rest = [file for file in index.values() if file not in taken]
    if len(taken) < sum(map(len, listed.values())):
        raise DataError(f"Lists of {_place(tree, root)} name the same images for two parts: {'; '.join(said)}. Mend the lists.")
    if "train" not in listed:
        listed["train"], rest = rest, []
        said.append("train is what no list names")
    if rest:
        said.append(f"not used: {len(rest):,} images that no list names")
    return {part: _with_class_folders(tree, root, part, files) for part, files in listed.items()}, said


def _line_key(line: str) -> str:
    """What identifies the image that a line names: its class folder and its name without ending."""
    if not has_image_ending(ending_of(line)):
        line = re.split(r"[,\s]", line, maxsplit=1)[0]
    return _key(PurePosixPath(line).parts)


def _key(parts: Sequence[str]) -> str:
    *above, name = parts or ("",)
    return "/".join((*above[-1:], PurePosixPath(name).stem if has_image_ending(ending_of(name)) else name))


# --- CUB --------------------------------------------------------------------------------------------------------------


def _birds(tree: Tree, root: Folder) -> Parts | None:
    by_name = {leaf.name.lower(): (folder, leaf) for folder, leaf in _lists_below(tree, root)}
    if not {"images.txt", "train_test_split.txt"} <= set(by_name):
        return None
    file_of, is_train = (
        dict(row for line in tree.read_text(*by_name[name]).splitlines() if len(row := line.split(maxsplit=1)) == 2)
        for name in ("images.txt", "train_test_split.txt")
    )
    index = {_key((*folder, leaf.name)): (folder, leaf) for folder, leaf in _images_below(tree, root)}
    parts: dict[str, list[tuple[Folder, Leaf]]] = {"train": [], "test": []}
    for number, file in file_of.items():
        found = index.get(_key(PurePosixPath(file.strip()).parts))
        if found is not None and number in is_train:
            parts["train" if is_train[number].strip() == "1" else "test"].append(found)
    if not all(parts.values()):
        return None
    unnamed = len(index) - sum(map(len, parts.values()))
    said = ["train and test as train_test_split.txt says"] + (
        [f"not used: {unnamed:,} images that it does not name"] if unnamed else []
    )
    return {part: _with_class_folders(tree, root, part, files) for part, files in parts.items()}, said


# --- iNaturalist ------------------------------------------------------------------------------------------------------


def _inaturalist(tree: Tree, root: Folder) -> Parts | None:
    heap = [child for child in {folder[: len(root) + 1] for folder in tree.images} if looks_like_train_and_val(child[-1:])]
    parts: dict[str, PartFiles] = {}
    said: list[str] = []
    images = {"/".join((*folder[len(root) :], leaf.name)): (folder, leaf) for folder, leaf in _images_below(tree, root)}
    for folder, leaf in _lists_below(tree, root):
        part = part_of(PurePosixPath(leaf.name).stem, with_lists=True)
        if ending_of(leaf.name) != ".json" or part is None or part in parts:
            continue
        pairs = _json_labels(tree.read_text(folder, leaf))
        files = [(images[name], label) for name, label in pairs if name in images]
        if not files:
            continue
        where = f"{_place(tree, root)} ({leaf.name})"
        parts[part] = PartFiles(where, tree, [file for file, _ in files], [label for _, label in files])
        said.append(_as_listed(part, leaf.name, len(pairs) - len(files)))
    if "train" in parts:
        unnamed = len(images) - sum(len(part.files) for part in parts.values())
        return parts, said + ([f"not used: {unnamed:,} images that no list names"] if unnamed else [])
    if heap:
        name = "/".join(heap[0])
        raise DataError(
            f"{tree.place} holds the folder {name}: images for training and for validation in one. Which is which say "
            "lists such as train2018.json and val2018.json beside it (with entries images and annotations), and none "
            "that names these images is there. Put the official lists there; or give a folder of class folders inside it as "
            "--data-path, and a share to keep back as --val-share."
        )
    return None


def _json_labels(text: str) -> list[tuple[str, str]]:
    """File name and class name of each image that has an annotation; nothing where the text is of another form."""
    try:
        content: Any = json.loads(text)
        category_of = {entry["image_id"]: entry["category_id"] for entry in content["annotations"]}
        names = {entry["id"]: str(entry.get("name") or entry["id"]) for entry in content.get("categories", [])}
        files = [
            (str(entry["file_name"]), category_of[entry["id"]]) for entry in content["images"] if entry["id"] in category_of
        ]
    except (ValueError, KeyError, TypeError, AttributeError):
        return []
    distinct = len(set(names.values())) == len(names)
    return [(file, names.get(category, str(category)) if distinct else str(category)) for file, category in files]


# --- what they share --------------------------------------------------------------------------------------------------


def _images_below(tree: Tree, root: Folder) -> Iterator[tuple[Folder, Leaf]]:
    for folder, leaves in tree.images.items():
        if folder[: len(root)] == root:
            yield from ((folder, leaf) for leaf in leaves)


def _with_class_folders(tree: Tree, root: Folder, part: str, files: list[tuple[Folder, Leaf]]) -> PartFiles:
    """Listed images, each of the class that its folder names: the one below the innermost folder that holds all of them."""
    folders, level = [folder for folder in tree.images if folder[: len(root)] == root], len(root)
    while all(len(folder) > level + 1 for folder in folders) and len({folder[level] for folder in folders}) == 1:
        level += 1
    labels = [(*folder, "")[min(level, len(folder))] for folder, _ in files]
    return PartFiles(f"{_place(tree, root)} ({part})", tree, files, labels)


def _as_listed(part: str, name: str, absent: int) -> str:
    return f"{part} as {name} lists" + (f" ({absent:,} of it are absent)" if absent else "")


def _place(tree: Tree, root: Folder) -> str:
    return str(tree.place) if not root else f"{tree.place}{':' if tree.is_tar else '/'}{'/'.join(root)}"
