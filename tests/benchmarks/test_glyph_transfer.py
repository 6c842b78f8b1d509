"""Printed syllables: which classes there are, that typefaces are told apart, and what an image looks like."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import ImageFont

import glyph_transfer
from measured import settings
from p3b.errors import ConfigError
from p3b.run.option_checks import check
from p3b.run.series_plan import config_of

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def test_classes_are_syllables_each_once() -> None:
    found = glyph_transfer.syllables()
    assert len(found) == len(set(found)) == glyph_transfer.CLASSES >= 500
    assert all("가" <= syllable <= "힣" for syllable in found)


def test_test_images_are_drawn_with_other_typefaces() -> None:
    assert not set(glyph_transfer.TRAIN_FONTS) & set(glyph_transfer.TEST_FONTS)
    assert all(font.startswith("Un") for font in glyph_transfer.TEST_FONTS)
    assert not any(font.startswith("Un") for font in glyph_transfer.TRAIN_FONTS)


def test_typefaces_are_found_by_name_and_missing_ones_named() -> None:
    assert glyph_transfer.find_fonts(FONTS, ["DejaVuSans"]) == [FONTS / "DejaVuSans.ttf"]
    with pytest.raises(ConfigError, match=r"has no typeface UnBatang\. .*apt-get install .*fonts-unfonts-core"):
        glyph_transfer.find_fonts(FONTS, ["DejaVuSans", "UnBatang"])


def test_an_image_is_bright_on_dark_and_follows_from_the_generator() -> None:
    font = ImageFont.truetype(FONTS / "DejaVuSans.ttf", 96)

    def drawn(seed: int) -> np.ndarray:
        return np.asarray(glyph_transfer.draw_syllable("H", font, np.random.default_rng(seed)))

    image = drawn(0)
    assert image.shape == (32, 32) and image.dtype == np.uint8
    assert np.median(image) < 40 and image.max() > 150
    assert (image == drawn(0)).all() and (image != drawn(1)).any()


def test_the_runs_are_known_to_the_command() -> None:
    config = settings(Path("SHARED"), Path("WORK"), flags=glyph_transfer.SETTINGS)
    planned = glyph_transfer.runs(config)
    assert {run.row for run in planned} == {"dense", "smaller", *glyph_transfer.METHODS}
    for run in planned[:4]:
        check(config_of(config, run))
