"""The examples are short, and they run as their first lines say."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

import p3b
from p3b.data import open_data
from processes import SparePython

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


Run = Callable[..., str]


@pytest.fixture(scope="module")
def run(python: SparePython) -> Run:
    """What `python <script> <arguments>` in the repository says."""

    def carry_out(script: str, *arguments: object) -> str:
        as_python_does = f"""
import runpy, sys, warnings
warnings.resetwarnings()
sys.argv[0], sys.path[0] = "{script}", "{Path(script).parent}"
runpy.run_path("{script}", run_name="__main__")
"""
        done = python.run(as_python_does, *arguments, folder=ROOT)
        assert done.status == 0, done.errors
        return done.output

    return carry_out


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_an_example_has_at_most_sixty_lines(example: Path) -> None:
    assert len(example.read_text().splitlines()) <= 60


@pytest.fixture(scope="module")
def own_model(run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder of the model that examples/own_loop.py makes, and what it said."""
    folder = tmp_path_factory.mktemp("own") / "model"
    return folder, run("examples/own_loop.py", "--steps", "12", "--out", folder)


def test_the_own_loop_leaves_a_model_that_the_predict_example_reads(
    run: Run, own_model: tuple[Path, str], tmp_path: Path
) -> None:
    made, said = own_model
    small, folder = p3b.load(made), tmp_path / "model"
    assert said.startswith(f"{p3b.count_parameters(small):,} of ")

    # predict.py wants to know how images are prepared; the demo's and the commands' models say so, here the caller does.
    p3b.save(
        small,
        folder,
        class_names=[str(digit) for digit in range(10)],
        preprocessing={
            "input_size": [3, 8, 8],
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
        },
    )
    test = open_data("DIGITS", None).test
    assert test is not None
    image, _ = test[0]
    assert isinstance(image, Image.Image)
    image.save(tmp_path / "digit.png")
    said = run("examples/predict.py", folder, tmp_path / "digit.png", "--top", "2")
    assert said.count("%") == 2 and str(tmp_path / "digit.png") in said


@pytest.mark.parametrize("example", ["backbone_segmentation", "backbone_retrieval"])
def test_a_backbone_is_as_small_as_asked_for_and_equals_the_masked_one(run: Run, example: str) -> None:
    said = run(f"examples/{example}.py", "12").replace(",", "")
    kept, dense = (int(number) for number in re.findall(r"\d+", said)[:2])
    assert abs(kept / dense - 0.5) < 0.01
    assert float(said.split()[-1]) < 1e-4


def test_keep_ratios_by_hand_are_met(run: Run) -> None:
    lines = run("examples/keep_ratios_by_hand.py").splitlines()
    kept = [[int(word.replace(",", "")) for word in line.split() if word.replace(",", "").isdigit()] for line in lines[:6]]
    assert [round(have / of, 1) for have, of in kept] == [1.0, 1.0, 0.5, 0.2, 0.7, 0.0]


@pytest.mark.usefixtures("onnx_is_listed_once")
def test_the_export_runs_with_onnx_runtime_alone(
    own_model: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, where torch's exporter and ONNX Runtime are loaded already: that takes longer than the example."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    file = tmp_path / "small.onnx"
    example = str(ROOT / "examples" / "export_onnx.py")
    monkeypatch.setattr(sys, "argv", [example, str(own_model[0]), str(file), "--rounds", "2", "--layout", "folded"])
    runpy.run_path(example, run_name="__main__")
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith(f"{file}: ") and " ms for 1 image(s)" in said and "class_names" in said
    assert list(tmp_path.iterdir()) == [file], "nothing is left beside it"
