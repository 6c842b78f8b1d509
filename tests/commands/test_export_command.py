"""`p3b export`: what is said, and what is refused before work starts."""

from __future__ import annotations

from pathlib import Path

import pytest

import p3b
from exported import NAMES, save_photos, save_small, small_vit
from p3b.commands.command_line import main
from p3b.deploy.runners import open_runner

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.usefixtures("onnx_is_listed_once")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one block, since exports are what takes the time here: three a test, each of the model and of the dense one."""
    return save_small(tmp_path_factory.mktemp("saved") / "pruned", depth=1)


def class_folders(root: Path) -> Path:
    """A few photos of each of the model's classes, for training and for validation."""
    for part in ("train", "val"):
        for name in NAMES:
            save_photos(root / part / name, 2)
    return root


def test_int8_with_preprocessing_from_class_folders(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, data = tmp_path / "int8.onnx", class_folders(tmp_path / "data")
    settings = ["--output", str(file), "--with-preprocessing", "--int8", "static", "--layout", "index", "--max-loss", "50"]
    few = ["--check-images", "4", "--calibration-images", "4"]
    assert main(["export", str(saved), *settings, *few, "--data-path", str(data)]) == 0
    said = capsys.readouterr().out
    assert all(row in said for row in ("dense, fp32", "pruned, fp32", "pruned, int8")) and str(file) in said
    metadata = open_runner(file).metadata
    assert (metadata.class_names, metadata.takes, metadata.precision) == (NAMES, "images", "int8 static")


def test_the_layout_is_chosen_by_measurement(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_photos(tmp_path / "photos", 4)
    assert main(["export", str(saved), "--output", str(tmp_path / "a.pt2"), "--images", str(tmp_path / "photos")]) == 0
    said = capsys.readouterr().out
    assert all(f"{layout} " in said for layout in ("index", "folded", "zeros")) and "checked on 4 images" in said


def test_a_model_that_does_not_say_how_images_are_prepared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare, file = p3b.save(small_vit(depth=1).half(), tmp_path / "bare"), tmp_path / "bare.pt2"
    settings = ["export", str(bare), "--output", str(file), "--layout", "index", "--check-images", "2"]
    assert main([*settings, "--with-preprocessing"]) == 2 and not file.exists()
    assert "does not say how its images are prepared" in capsys.readouterr().err
    assert main(settings) == 0
    assert open_runner(file).metadata.preprocessing is None


def test_data_of_other_classes_is_refused(saved: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(saved), "--data-path", str(data)]) == 2
    assert "blue, green, red" in capsys.readouterr().err
