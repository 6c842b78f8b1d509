"""Printed syllables: which classes there are, that typefaces are told apart, and what an image looks like."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import ImageFont

import glyph_images
from p3b.errors import ConfigError

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def test_classes_are_syllables_each_once() -> None:
    found = glyph_images.syllables()
    assert len(found) == len(set(found)) == glyph_images.CLASSES >= 500
    assert all("가" <= syllable <= "힣" for syllable in found)


def test_test_images_are_drawn_with_other_typefaces() -> None:
    assert not set(glyph_images.TRAIN_FONTS) & set(glyph_images.TEST_FONTS)
    assert all(font.startswith("Un") for font in glyph_images.TEST_FONTS)
    assert not any(font.startswith("Un") for font in glyph_images.TRAIN_FONTS)


def test_typefaces_are_found_by_name_and_missing_ones_named() -> None:
    assert glyph_images.find_fonts(FONTS, ["DejaVuSans"]) == [FONTS / "DejaVuSans.ttf"]
    with pytest.raises(ConfigError, match=r"has no typeface UnBatang\. .*apt-get install .*fonts-unfonts-core"):
        glyph_images.find_fonts(FONTS, ["DejaVuSans", "UnBatang"])


def test_an_image_is_bright_on_dark_and_follows_from_the_generator() -> None:
    font = ImageFont.truetype(FONTS / "DejaVuSans.ttf", 96)

    def drawn(seed: int) -> np.ndarray:
        return np.asarray(glyph_images.draw_character("H", font, np.random.default_rng(seed)))

    image = drawn(0)
    assert image.shape == (32, 32) and image.dtype == np.uint8
    assert np.median(image) < 40 and image.max() > 150
    assert (image == drawn(0)).all() and (image != drawn(1)).any()


def test_the_source_task_has_other_characters_and_other_typefaces() -> None:
    source = glyph_images.source_characters()
    assert len(source) == len(set(source)) == glyph_images.SOURCE_CLASSES
    assert all("\u4e00" <= character <= "\u9fff" for character in source)
    assert not {*glyph_images.SOURCE_FONTS} & {*glyph_images.TRAIN_FONTS, *glyph_images.TEST_FONTS}


def test_the_pretraining_is_known_to_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert glyph_images.pretrain(tmp_path / "data") == 2
    assert "source-train.tar" in capsys.readouterr().err
    assert not (tmp_path / "data" / glyph_images.WEIGHTS).exists()
