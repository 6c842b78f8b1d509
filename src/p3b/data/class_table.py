"""What a log says of classes: their names and how many images each part has of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from p3b.data.images import LabelledImages
from p3b.data.scan import some

ALL_SHOWN = 24
"""So many classes are all shown; of more, the smallest and the largest."""
_SHOWN_EACH = 5


def class_lines(class_names: Sequence[str], parts: Mapping[str, LabelledImages]) -> list[str]:
    """A table: a line for each class with its images in each part."""
    counts = _counts(class_names, parts)
    of_first = next(iter(counts.values()))
    chosen = list(range(len(class_names)))
    title = f"classes ({' / '.join(parts)} images)"
    if len(chosen) > ALL_SHOWN:
        by_size = sorted(chosen, key=lambda number: (of_first[number], number))
        chosen = [*by_size[:_SHOWN_EACH], *by_size[-_SHOWN_EACH:]]
        title += f": the {_SHOWN_EACH} smallest and the {_SHOWN_EACH} largest of {len(class_names):,}"
    width = max((len(class_names[number]) for number in chosen), default=0)
    rows = [f"  {class_names[number]:{width}}  {' / '.join(f'{of[number]:,}' for of in counts.values())}" for number in chosen]
    return [f"{title}:", *rows]


def missing_classes(class_names: Sequence[str], parts: Mapping[str, LabelledImages]) -> list[str]:
    """A line for each part that has no image of some class; and names that differ in case alone."""
    said = []
    for part, of in _counts(class_names, parts).items():
        absent = [class_names[number] for number in np.flatnonzero(of == 0).tolist()]
        if absent:
            said.append(f"{part} has no image of {len(absent):,} of {len(class_names):,} classes: {some(absent)}")
    folded: dict[str, list[str]] = {}
    for name in class_names:
        folded.setdefault(name.casefold(), []).append(name)
    return said + [f"classes that differ in case alone: {', '.join(same)}" for same in folded.values() if len(same) > 1]


def _counts(class_names: Sequence[str], parts: Mapping[str, LabelledImages]) -> dict[str, np.ndarray]:
    return {part: np.bincount(images.targets, minlength=len(class_names)) for part, images in parts.items()}
