"""The examples are short, and they run as their first lines say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import p3b
from p3b.data import open_data

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_an_example_has_at_most_sixty_lines(example: Path) -> None:
    assert len(example.read_text().splitlines()) <= 60


def test_the_own_loop_leaves_a_model_that_the_predict_example_reads(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    said = run("examples/own_loop.py", "--steps", "60", "--out", str(folder))
    small = p3b.load(folder)
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
    said = run("examples/predict.py", str(folder), str(tmp_path / "digit.png"), "--top", "2")
    assert said.count("%") == 2 and str(tmp_path / "digit.png") in said


def test_keep_ratios_by_hand_are_met() -> None:
    lines = run("examples/keep_ratios_by_hand.py").splitlines()
    kept = [[int(word.replace(",", "")) for word in line.split() if word.replace(",", "").isdigit()] for line in lines[:6]]
    assert [round(have / of, 1) for have, of in kept] == [1.0, 1.0, 0.5, 0.2, 0.7, 0.0]
