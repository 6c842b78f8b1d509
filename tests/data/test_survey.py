"""What images are like: sizes, unreadable ones, equal ones within a part, and those that look alike between parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

from p3b.data import open_data
from p3b.data.survey import alike_between, difference_hashes, equal_within, survey, survey_lines


def picture(seed: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """Something smooth with contrast, as photos are."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def photos(root: Path) -> Path:
    """Two classes in train and val: a picture twice in train under two classes, one in val that is a darker JPEG of train's."""
    for part, count in (("train", 6), ("val", 3)):
        for number, name in enumerate(("cat", "dog")):
            (root / part / name).mkdir(parents=True)
            for image in range(count):
                seed = 100 * number + image + (1000 if part == "val" else 0)
                picture(seed).save(root / part / name / f"{image}.png")
    picture(0).save(root / "train" / "dog" / "again.bmp")
    ImageEnhance.Brightness(picture(3).resize((96, 80))).enhance(0.97).save(root / "val" / "cat" / "copy.jpg", quality=80)
    Image.new("RGB", (30, 30), "white").save(root / "train" / "cat" / "plain.png")
    Image.new("RGB", (60, 20), "white").save(root / "val" / "dog" / "plain.png")
    (root / "train" / "dog" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    return root


def test_a_survey_finds_what_a_person_should_know(tmp_path: Path) -> None:
    splits = open_data("FOLDER", photos(tmp_path))
    assert splits.val is not None
    train, val = survey(splits.train), survey(splits.val)
    assert train.images == 15 and len(train.names) == 14
    assert [Path(name).name for name in train.unreadable] == ["broken.jpg"]
    assert train.formats == {"png": 13, "bmp": 1, "jpg": 1}
    assert train.sizes.max() == 48 and sorted(set(val.sizes[:, 0].tolist())) == [48, 60, 96]
    ((one, other, same_class),) = equal_within(train)
    assert {Path(one).name, Path(other).name} == {"0.png", "again.bmp"} and not same_class
    ((found, original),) = alike_between(val, train)
    assert Path(found).name == "copy.jpg" and original.endswith("train/cat/3.png")
    said = "\n".join(survey_lines({"train": train, "val": val}))
    for part in (
        "1 cannot be read, such as",
        "1 are there twice",
        "1 of these are in two classes",
        "1 of 8 images of val look like one of train",
        "shorter side 30 to 40 pixels, median 40",
    ):
        assert part in said


def test_a_large_part_is_sampled(tmp_path: Path) -> None:
    splits = open_data("FOLDER", photos(tmp_path))
    sampled = survey(splits.train, most=4)
    assert len(sampled.names) + len(sampled.unreadable) == 4 and sampled.images == 15
    assert "(4 of them looked at)" in survey_lines({"train": sampled})[0] or sampled.unreadable


def test_a_hash_tells_rising_from_falling_and_not_how_bright() -> None:
    rising = np.tile(np.arange(9, dtype=np.uint8) * 20, 8)[None]
    hashes = difference_hashes(np.concatenate([rising, rising + 40, 255 - rising]))
    assert hashes[0] == hashes[1] == np.uint64(2**64 - 1) and hashes[2] == 0
