"""A user's own folders and tars as parts with class indices: classes matched by name, every class readable."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from timm.utils.misc import natural_key

from p3b.data.first_look import frames_line, require_readable
from p3b.data.folders import FoundImages, FoundParts, find_images, find_parts
from p3b.data.libraries import Parts
from p3b.data.scan import some
from p3b.errors import DataError


def own_parts(
    name: str,
    data_path: str | Path | None,
    val_path: str | Path | None,
    test_path: str | Path | None,
    *,
    skip_unreadable: bool,
    for_evaluation: bool,
    class_names: Sequence[str] | None,
    needs_val: bool,
) -> Parts:
    """Parts of a folder set.

    Args:
        name: of the data set, for messages.
        data_path, val_path, test_path, skip_unreadable, for_evaluation, class_names: as `open_data` takes them.
        needs_val: a validation part must be there.

    Raises:
        DataError: see `open_data`.
    """
    explicit = {part: path for part, path in (("val", val_path), ("test", test_path)) if path is not None}
    found = _all_found(name, data_path, explicit, for_evaluation)
    if "train" not in found.parts and not for_evaluation:
        raise DataError(
            f"{data_path} has {' and '.join(sorted(found.parts))} but no train part. Expected a folder "
            f"{Path(str(data_path)) / 'train'} of class folders."
        )
    if needs_val and "val" not in found.parts:
        why = f": {found.unlabelled['val']}" if "val" in found.unlabelled else ""
        raise DataError(
            f"{name} at {data_path} has no val part{why}. Expected train and val there, each a folder of class folders; or "
            "give one with --val-path, or a share of train to keep back with --val-share."
        )
    names = _class_names(found.parts, class_names)
    labelled = {part: images.labelled(names, skip_unreadable) for part, images in found.parts.items()}
    for part, images in labelled.items():
        require_readable(part, found.parts[part].where, images, names)
    frames = [line for part, images in labelled.items() if (line := frames_line(part, images)) is not None]
    if "train" not in labelled:
        some_part = next(iter(labelled.values()))
        labelled["train"] = some_part.subset(np.empty(0, np.int64))
    where = ", ".join(dict.fromkeys(str(path) for path in (data_path, val_path, test_path) if path is not None))
    unlabelled = tuple(why for part, why in found.unlabelled.items() if part == "val" and "val" not in labelled)
    names = names if class_names is None else tuple(class_names)  # as the model spells them
    return Parts(where, names, **labelled, said=(*found.said, *frames), unlabelled=unlabelled)


def _all_found(name: str, data_path: str | Path | None, explicit: Mapping[str, str | Path], for_evaluation: bool) -> FoundParts:
    """What lies at the data path, and the parts that are given each by a path of its own."""
    if data_path is not None:
        path = Path(data_path).expanduser()
        if name != "FOLDER" and not path.exists():
            raise DataError(
                f"There is no {path}. {name} must be fetched by hand (its owners' terms) and unpacked into {path / 'train'} "
                f"and {path / 'val'}, each a folder of class folders."
            )
        found = find_parts(path)
    elif for_evaluation and explicit:
        found = FoundParts({}, (), {})
    else:
        raise DataError(f"{name} needs a data path: say where it lies with --data-path.")
    known = found.parts["train"].class_names if "train" in found.parts else ()
    for part, given in explicit.items():
        found.parts[part] = find_images(Path(given).expanduser(), known)
    return found


def _class_names(parts: dict[str, FoundImages], given: Sequence[str] | None) -> tuple[str, ...]:
    """The classes by index: the model's, else those of train, else all that the other parts have.

    Raises:
        DataError: a part has classes beyond these.
    """
    if given is not None:
        known, whose = tuple(given), f"the model, which knows {len(given)} classes"
    elif "train" in parts:
        known = parts["train"].class_names
        whose = f"train ({parts['train'].where}, {len(known)} classes)"
    else:
        return tuple(sorted(sorted({name for part in parts.values() for name in part.class_names}), key=natural_key))
    composed = {unicodedata.normalize("NFC", name) for name in known}
    for part, images in parts.items():
        extra = [name for name in images.class_names if name not in composed]
        if extra:
            missing = [name for name in known if unicodedata.normalize("NFC", name) not in images.class_names]
            also = f" and {len(missing)} missing ({some(missing)})" if missing else ""
            raise DataError(
                f"The classes of the {part} part ({images.where}) differ from those of {whose}: {len(extra)} extra "
                f"({some(extra)}){also}. The folder below the part names the class; each must be one of {some(known, 8)}."
            )
    return tuple(unicodedata.normalize("NFC", name) for name in known)
