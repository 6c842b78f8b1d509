"""What a saved model was trained on is left out of its evaluation, or counted; classes are matched by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import p3b
from p3b.data import DataSplits, open_data
from p3b.errors import DataError
from p3b.run.class_match import with_classes_of
from p3b.run.trained_images import ALL, UNSEEN, parts_to_evaluate, remember, said_of_part, trained_on
from p3b.storage.model_config import TRAINING_IMAGES
from runs import COLOURS, colour_folders
from tiny import tiny_vit

EACH = 20
"""Images of a class."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return colour_folders(tmp_path_factory.mktemp("whole"), {"photos": EACH}) / "photos"


def saved(splits: DataSplits, path: Path) -> Path:
    model = tiny_vit(img_size=16, num_classes=len(splits.class_names))
    return p3b.save(model, path, class_names=splits.class_names, provenance=remember(splits))


def opened(folder: Path, **how: Any) -> DataSplits:
    return open_data("FOLDER", folder, for_evaluation=True, **how)


def cut_again(folder: Path) -> Any:
    def cut(rule: Mapping[str, Any]) -> DataSplits:
        return opened(folder, val_share=rule["val_share"], seed=rule["seed"], max_train_images=rule["max_train_images"])

    return cut


def names(images: Any) -> set[str]:
    return {images.name(position) for position in range(len(images))}


def test_of_the_folder_that_was_trained_on_the_part_kept_back_is_evaluated(folder: Path, tmp_path: Path) -> None:
    trained = open_data("FOLDER", folder, seed=3)
    known = trained_on(saved(trained, tmp_path / "model"))
    parts = parts_to_evaluate(opened(folder), known, cut_again(folder))
    assert list(parts.images) == ["val"] and names(parts.images["val"]) == names(trained.val)
    assert "54 of these 60 images were trained on" in parts.said[0] and "seed 3" in parts.said[0]


def test_where_the_cut_cannot_be_made_again_the_images_are_told_by_their_bytes(folder: Path, tmp_path: Path) -> None:
    trained = open_data("FOLDER", folder, seed=3)
    known = trained_on(saved(trained, tmp_path / "model"))
    moved = tmp_path / "other"
    for place, file in enumerate(sorted(folder.rglob("*.png"))):  # other names, other order, some images more
        target = moved / file.parent.name / f"{997 * place % 1000:03}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    colour_folders(tmp_path, {"other/new": 2}, seed=9)
    (moved / "new" / "red").rename(moved / "red" / "below")
    for name in ("blue", "green"):
        (moved / "new" / name).rename(moved / name / "below")
    (moved / "new").rmdir()
    parts = parts_to_evaluate(opened(moved), known, cut_again(moved))
    assert list(parts.images) == [UNSEEN] and len(parts.images[UNSEEN]) == 6 + 3 * 2
    assert "evaluated are the other 12" in parts.said[0]


def test_where_everything_was_trained_on_all_is_evaluated_and_said(folder: Path, tmp_path: Path) -> None:
    known = trained_on(saved(open_data("FOLDER", folder, val_share=0.0), tmp_path / "model"))
    parts = parts_to_evaluate(opened(folder), known, cut_again(folder))
    assert list(parts.images) == [ALL] and "60 of the 60 images were trained on" in parts.said[0]


def test_other_images_and_models_that_say_nothing_are_evaluated_whole(folder: Path, tmp_path: Path) -> None:
    other = colour_folders(tmp_path / "other", {"photos": 3}, seed=7) / "photos"
    known = trained_on(saved(open_data("FOLDER", folder), tmp_path / "model"))
    for images, record in ((other, known), (folder, None)):
        parts = parts_to_evaluate(opened(images), record, cut_again(images))
        assert list(parts.images) == [ALL] and parts.said == ()
    assert trained_on(p3b.save(tiny_vit(), tmp_path / "silent")) is None and trained_on(None) is None


def test_training_images_in_a_named_part_are_counted(folder: Path, tmp_path: Path) -> None:
    trained = open_data("FOLDER", folder, seed=3)
    known = trained_on(saved(trained, tmp_path / "model"))
    assert trained.val is not None and said_of_part("val", trained.val, known) is None
    other_seed = open_data("FOLDER", folder, seed=4).val
    assert other_seed is not None
    seen = len(names(other_seed) & names(trained.train))
    assert f"{seen} of the 6 images of val were trained on" in (said_of_part("val", other_seed, known) or "")


def test_a_rule_that_is_none_is_refused(tmp_path: Path) -> None:
    entry = {"images": 1, "size_limit": "f" * 16, "digest_limit": "f" * 16, "digests": [], "rule": {"seed": "zero"}}
    with pytest.raises(DataError, match="no rule of p3b"):
        trained_on(p3b.save(tiny_vit(), tmp_path / "model", provenance={TRAINING_IMAGES: entry}))


def test_some_classes_in_another_order_get_the_indices_of_the_model(folder: Path) -> None:
    splits = opened(folder)
    model_names = ("red", "violet", *COLOURS[1::-1])
    again = with_classes_of(splits, model_names)
    assert again.class_names == model_names
    assert [model_names[target] for target in again.train.targets] == [COLOURS[target] for target in splits.train.targets]
    assert again.train[0][1] == again.train.targets[0]
    assert np.array_equal(with_classes_of(splits, None).train.targets, splits.train.targets)


def test_classes_that_the_model_does_not_know_are_refused_by_name(folder: Path) -> None:
    with pytest.raises(DataError, match="does not know green"):
        with_classes_of(opened(folder), ("blue", "red"))
