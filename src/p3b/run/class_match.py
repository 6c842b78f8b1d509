"""The classes of a data set matched with a model's by their names: some of them, in whatever order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from p3b.data import DataSplits, LabelledImages
from p3b.errors import DataError


def with_classes_of(splits: DataSplits, class_names: Sequence[str] | None) -> DataSplits:
    """The same images under the class indices of a model.

    Args:
        splits: a data set.
        class_names: of the model, by index; None where it says none: then the data's order is taken for the model's.

    Raises:
        DataError: the data have classes that the model does not know.
    """
    names = splits.class_names
    if class_names is None or tuple(class_names) == names:
        return splits
    unknown = [name for name in names if name not in class_names]
    if unknown:
        raise DataError(
            f"The model was trained for the classes {_some(class_names)}; the data has {_some(names)}, of which the model does "
            f"not know {_some(unknown)}. Evaluate it on images of its own classes; some of them are enough, in any order."
        )
    index_of = {name: index for index, name in enumerate(class_names)}
    indices = np.array([index_of[name] for name in names], dtype=np.int64)
    return replace(
        splits,
        class_names=tuple(class_names),
        train=_relabelled(splits.train, indices),
        val=None if splits.val is None else _relabelled(splits.val, indices),
        test=None if splits.test is None else _relabelled(splits.test, indices),
    )


def _relabelled(images: LabelledImages, indices: NDArray[np.int64]) -> LabelledImages:
    of_store = np.zeros(len(images.store), dtype=np.int64)
    of_store[images.indices] = indices[images.targets]
    again = LabelledImages(images.store, of_store, skip_unreadable=images.skip_unreadable, indices=images.indices)
    again.origin = images.origin
    return again


def _some(names: Sequence[str], most: int = 8) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more:,} more" if more > 0 else "")
