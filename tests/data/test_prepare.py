"""Every image comes out as a person sees it, whatever its format, mode, orientation and transparency, or is refused."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from faults.images import FORMATS, KINDS, cases, turned
from p3b.data import open_data, read_image
from p3b.data.formats import begins_like_an_image, has_image_ending, missing_plugin
from p3b.data.prepare import UnclearPixelsError, holds_several_frames, prepare_image
from p3b.errors import ConfigError, DataError


def test_random_files_give_what_a_person_sees(tmp_path: Path) -> None:
    wrong = [case for case in cases(3 * len(FORMATS), 0, tmp_path) if not case["ok"]]
    assert not wrong


def test_the_generator_s_own_turns_are_the_standard_s() -> None:
    """An image that carries the orientation it was turned against looks as before; Pillow's table says the same."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    for orientation in range(1, 9):
        image, exif = Image.fromarray(pixels), Image.Exif()
        exif[0x0112] = orientation
        buffer = io.BytesIO()
        image.save(buffer, "PNG", exif=exif)
        assert np.array_equal(np.asarray(ImageOps.exif_transpose(Image.open(buffer))), turned(pixels, orientation))
        assert np.array_equal(np.asarray(read_image(buffer)), turned(pixels, orientation))


@pytest.mark.parametrize("kind", KINDS)
def test_preparing_twice_is_preparing_once(kind: str) -> None:
    drawn = KINDS[kind](np.random.default_rng(1), 6, 9, False)
    drawn.image.info.update(drawn.options)
    if drawn.seen is None:
        with pytest.raises(UnclearPixelsError, match="which value is white"):
            prepare_image(drawn.image)
        return
    for channels, mode in ((3, "RGB"), (1, "L")):
        once = prepare_image(drawn.image, channels)
        assert once.mode == mode
        assert prepare_image(once, channels).tobytes() == once.tobytes()
    assert prepare_image(prepare_image(drawn.image), 1).tobytes() == prepare_image(drawn.image, 1).tobytes()


def test_plain_rgb_is_left_as_it_was_decoded(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 8, 3), dtype=np.uint8)
    for ending in ("jpg", "png"):
        Image.fromarray(pixels).save(tmp_path / f"x.{ending}")
        assert read_image(tmp_path / f"x.{ending}").tobytes() == Image.open(tmp_path / f"x.{ending}").convert("RGB").tobytes()


def test_other_numbers_of_channels_are_refused_in_words() -> None:
    with pytest.raises(ConfigError, match="4 channels"):
        prepare_image(Image.new("RGB", (2, 2)), 4)


def test_damaged_exif_data_say_nothing_of_the_orientation() -> None:
    image = Image.new("RGB", (3, 2), (1, 2, 3))
    for damaged in (b"Exif\x00\x00MM\x00", b"Exif\x00\x00II*\x00\xff\xff\xff\xff", b"nonsense"):
        image.info["exif"] = damaged
        assert prepare_image(image).size == (3, 2)


def test_twelve_bits_and_white_as_zero_are_read_off_the_tiff() -> None:
    values = np.array([[0, 2048, 4095]], np.uint16)
    for bits, scale in ((16, 16), (12, 1)):
        image = Image.fromarray(values * scale)
        image.tag_v2 = {258: (bits,), 262: 1}
        assert np.asarray(prepare_image(image))[0, :, 0].tolist() == [0, 128, 255]
        image.tag_v2 = {258: (bits,), 262: 0}
        assert np.asarray(prepare_image(image))[0, :, 0].tolist() == [255, 127, 0]


def test_which_endings_are_images() -> None:
    assert all(map(has_image_ending, (".jpg", ".webp", ".jfif", ".tga", ".mpo", ".qoi")))
    assert not any(map(has_image_ending, ("", ".txt", ".pdf", ".h5", ".mpg", ".json", ".npy")))
    assert begins_like_an_image(b"\xff\xd8\xff\xe0" + bytes(12)) and not begins_like_an_image(b"BMW is a car\n\n\n\n")
    assert missing_plugin(".txt") is None
    assert has_image_ending(".heic") != (missing_plugin(".heic") == "pillow-heif")


def picture(file: Path, seed: int = 0, **options: object) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)).save(file, **options)
    return file


def test_images_of_unknown_names_are_known_by_their_content(tmp_path: Path) -> None:
    for number, name in enumerate(("a/photo", "a/photo.jpg_large", "b/x.png", "b/README", "b/notes.md")):
        if number < 3:
            picture(tmp_path / name, number, format="PNG")
        else:
            (tmp_path / name).write_text("no image")
    splits = open_data("FOLDER", tmp_path, val_share=0.0)
    assert np.bincount(splits.train.targets).tolist() == [2, 1]
    assert "2 files that are no images here" in splits.description and "1 .md" in splits.description


def test_a_film_is_its_first_frame_and_that_is_said(tmp_path: Path) -> None:
    first, second = (Image.new("RGB", (4, 4), colour) for colour in ((10, 20, 30), (200, 100, 0)))
    for name, ending in (("a", "gif"), ("b", "webp")):
        file = picture(tmp_path / name / "still.png", 3).with_name(f"film.{ending}")
        first.save(file, save_all=True, append_images=[second], **({"lossless": True} if ending == "webp" else {}))
        with Image.open(file) as opened:
            assert holds_several_frames(opened)
        assert read_image(file).getpixel((1, 1)) == (10, 20, 30)
    splits = open_data("FOLDER", tmp_path, val_share=0.0)
    assert "2 files of train hold several frames or pages; the first is used" in splits.description


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n"])
def test_a_class_that_cannot_be_read_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    picture(tmp_path / "a" / "x.png")
    picture(tmp_path / "b" / "good.png")
    (tmp_path / "b" / "bad.png").write_bytes(content)  # one of two: told when it is its turn
    open_data("FOLDER", tmp_path, val_share=0.0)
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "bad.png").write_bytes(content)
    with pytest.raises(DataError, match="class folders dog of train"):
        open_data("FOLDER", tmp_path, val_share=0.0)
