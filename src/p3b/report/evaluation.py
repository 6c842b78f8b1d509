"""What the predictions of a stage say of its classes: accuracy by class, mistakes, calibration. Pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from p3b.report.record import Predictions, StageRecord

BINS = 10


@dataclass(frozen=True)
class ClassAccuracy:
    """Accuracy of one class in percent, of this model and of the dense one (None without a dense run)."""

    name: str
    images: int
    accuracy: float
    dense: float | None


@dataclass(frozen=True)
class ConfusedPair:
    """A mistake that is made between two classes.

    Attributes:
        target: class of the images.
        predicted: what they were taken for.
        images: how many they are.
    """

    target: str
    predicted: str
    images: int


@dataclass(frozen=True)
class Bin:
    """Images whose stated probability lies in one tenth.

    Attributes:
        confidence: mean probability, in percent.
        accuracy: share that is right, in percent.
        images: how many they are.
    """

    confidence: float
    accuracy: float
    images: int


@dataclass(frozen=True)
class Calibration:
    """Bins with images, and the expected calibration error in points (Guo et al., ICML 2017)."""

    bins: tuple[Bin, ...]
    error: float


def class_accuracies(stage: StageRecord) -> list[ClassAccuracy]:
    """Every class that has images: those that lost most against the dense model first, else the lowest first."""
    found = stage.predictions
    if found is None:
        return []
    images = Counter(found.target)
    right = _right(found, found.predicted)
    right_dense = _right(found, found.dense_predicted) if found.dense_predicted else None
    entries = [
        ClassAccuracy(
            _name(stage, target),
            count,
            100 * right[target] / count,
            None if right_dense is None else 100 * right_dense[target] / count,
        )
        for target, count in sorted(images.items())
    ]
    return sorted(entries, key=lambda entry: entry.accuracy - (entry.dense or 0.0))


def confused_pairs(stage: StageRecord) -> list[ConfusedPair]:
    """Pairs of target and predicted class that differ, the most frequent first."""
    found = stage.predictions
    if found is None:
        return []
    pairs = Counter((t, p) for t, p in zip(found.target, found.predicted, strict=True) if t != p)
    return [ConfusedPair(_name(stage, t), _name(stage, p), count) for (t, p), count in pairs.most_common()]


def calibration(stage: StageRecord) -> Calibration | None:
    """Stated probabilities against shares that are right, in tenths; None without predictions."""
    found = stage.predictions
    if found is None:
        return None
    members: dict[int, list[tuple[float, bool]]] = {}
    for probability, target, predicted in zip(found.probability, found.target, found.predicted, strict=True):
        members.setdefault(min(int(probability * BINS), BINS - 1), []).append((probability, target == predicted))
    bins = [
        Bin(100 * sum(p for p, _ in each) / len(each), 100 * sum(ok for _, ok in each) / len(each), len(each))
        for _, each in sorted(members.items())
    ]
    error = sum(each.images * abs(each.confidence - each.accuracy) for each in bins) / len(found.target)
    return Calibration(tuple(bins), error)


def _right(found: Predictions, predicted: tuple[int, ...]) -> Counter[int]:
    return Counter(target for target, answer in zip(found.target, predicted, strict=True) if target == answer)


def _name(stage: StageRecord, index: int) -> str:
    names = stage.class_names
    return names[index] if index < len(names) else str(index)
