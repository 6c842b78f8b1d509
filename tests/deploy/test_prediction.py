"""Predictions come in order, whatever is among the files, and memory stays bounded."""

from __future__ import annotations

import io
import struct
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from exported import NAMES, PREPROCESSING, photos, save_photos, small_vit
from p3b.deploy import prediction
from p3b.deploy.metadata import Metadata
from p3b.deploy.photos import Preparation, find_files
from p3b.deploy.prediction import Source, predict, softmax, sources
from p3b.deploy.runners import TorchRunner
from p3b.errors import DataError

METADATA = Metadata(NAMES, PREPROCESSING)
NO_INPUT = io.BytesIO()


@pytest.fixture(scope="module")
def runner() -> TorchRunner:
    return TorchRunner(small_vit(), METADATA)


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG that claims a size and brings what it likes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def hostile(folder: Path) -> dict[str, bytes]:
    """Files that are no images, or claim to be more than they are."""
    whole = io.BytesIO()
    photos(1)[0].save(whole, "JPEG")
    return {
        "bomb.png": png(20_000, 20_000, zlib.compress(bytes(60_000))),
        "huge.png": png(2**31 - 1, 2**31 - 1),
        "truncated.jpg": whole.getvalue()[:-200],
        "text.png": b"no image at all",
        "empty.png": b"",
    }


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 1), (3, 2), (32, 8)])
def test_probabilities_are_those_of_the_model_in_the_order_of_the_files(
    runner: TorchRunner, tmp_path: Path, batch_size: int, workers: int
) -> None:
    files = save_photos(tmp_path, 7)
    found = list(predict(runner, sources(files, NO_INPUT), batch_size=batch_size, workers=workers, top=5))
    assert [each.file for each in found] == [str(file) for file in files]
    for answer, image in zip(found, photos(7), strict=True):
        expected = softmax(runner(Preparation(METADATA)(image)[None]))[0]
        assert {label.name: label.probability for label in answer.labels} == pytest.approx(
            dict(zip(NAMES, expected, strict=True)), abs=1e-6
        )
        said = [label.probability for label in answer.labels]
        assert said == sorted(said, reverse=True) and sum(said) == pytest.approx(1)


def test_hostile_files_get_an_answer_in_words_and_disturb_no_other(runner: TorchRunner, tmp_path: Path) -> None:
    files = save_photos(tmp_path, 3)
    for name, content in hostile(tmp_path).items():
        (tmp_path / name).write_bytes(content)
    found = {Path(each.file).name: each for each in predict(runner, sources([tmp_path], NO_INPUT), batch_size=2, workers=2)}
    assert {name for name, each in found.items() if each.error} == set(hostile(tmp_path))
    assert "400000000" not in str(found["bomb.png"].error) and "pixels" in str(found["bomb.png"].error)
    assert "pixels" in str(found["huge.png"].error) and all("\n" not in str(each.error) for each in found.values())
    assert all(len(found[file.name].labels) == 3 for file in files)


def test_a_limit_on_pixels_is_kept_and_pillows_own_is_put_back(runner: TorchRunner, tmp_path: Path) -> None:
    before = Image.MAX_IMAGE_PIXELS
    files = save_photos(tmp_path, 2)  # 1600 and 2368 pixels
    small, large = predict(runner, sources(files, NO_INPUT), max_pixels=2000)
    assert small.error is None and "64 x 37 pixels, more than the 2,000" in str(large.error)
    assert before == Image.MAX_IMAGE_PIXELS


class Watched(TorchRunner):
    """A model that prepares images itself, and remembers how large its batches were."""

    def __init__(self) -> None:
        super().__init__(small_vit(), Metadata(NAMES, PREPROCESSING, takes="images"))
        self.batches: list[tuple[int, ...]] = []

    def __call__(self, images: NDArray[Any]) -> NDArray[np.float32]:
        self.batches.append(images.shape)
        return np.zeros((len(images), len(NAMES)), np.float32)


def test_batches_hold_one_shape_and_no_more_bytes_than_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = save_photos(tmp_path, 4)
    given = [files[0]] * 5 + [files[1]] * 2
    monkeypatch.setattr(prediction, "MOST_BATCH_BYTES", 3 * 40 * 40 * 2)
    runner = Watched()
    assert len(list(predict(runner, sources(given, NO_INPUT), batch_size=4, workers=2))) == 7
    assert runner.batches == [(2, 3, 40, 40), (2, 3, 40, 40), (1, 3, 40, 40), (1, 3, 37, 64), (1, 3, 37, 64)]


def test_no_more_images_are_read_ahead_than_are_waited_for(runner: TorchRunner) -> None:
    opened, lock = [0], threading.Lock()

    def open_one() -> io.BytesIO:
        with lock:
            opened[0] += 1
        content = io.BytesIO()
        photos(1)[0].save(content, "PNG")
        content.seek(0)
        return content

    def endless() -> Iterator[Source]:
        while True:
            yield Source("one", open_one)

    answers = predict(runner, endless(), batch_size=2, workers=3)
    assert [next(answers).file for _ in range(4)] == ["one"] * 4
    assert opened[0] <= 4 + 2 * (2 + 3)
    answers.close()  # type: ignore[attr-defined]


def test_folders_are_searched_at_any_depth_and_hidden_files_left_out(tmp_path: Path) -> None:
    for name in ("b/2.png", "b/10.png", "a.jpg", ".hidden.png", "b/.cache/x.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [str(file.relative_to(tmp_path)) for file in find_files(tmp_path)] == ["a.jpg", "b/2.png", "b/10.png"]


def test_standard_input_is_one_image(runner: TorchRunner) -> None:
    content = io.BytesIO()
    photos(1)[0].save(content, "PNG")
    content.seek(0)
    (answer,) = predict(runner, sources(["-"], content))
    assert answer.file == "standard input" and answer.error is None


def test_what_is_not_there_is_refused_at_once(tmp_path: Path) -> None:
    for given, word in (([tmp_path / "none.png"], "There is no"), ([tmp_path], "has no image"), ([], "No image is given")):
        with pytest.raises(DataError, match=word):
            sources(given, NO_INPUT)


def test_logits_that_are_not_finite_are_no_probabilities() -> None:
    with pytest.raises(DataError, match="NaN"):
        softmax(np.array([[0.0, np.nan]], np.float32))
    assert softmax(np.array([[1000.0, 1000.0]], np.float32)).tolist() == [[0.5, 0.5]]


def test_a_model_without_preprocessing_says_how_to_add_it() -> None:
    with pytest.raises(DataError, match=r"p3b\.save"):
        list(predict(TorchRunner(small_vit(), Metadata()), []))
