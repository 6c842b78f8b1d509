"""An accuracy is told from guessing by the images that it is over."""

from __future__ import annotations

import numpy as np
import pytest

from p3b.run.guessing import chance, is_guessing, said_of_guessing
from p3b.run.series_lines import dense_guesses


def test_chance_is_the_share_of_the_most_frequent_class() -> None:
    assert chance(np.array([0, 0, 0, 1])) == 75.0
    assert chance(np.array([0, 1, 2])) == pytest.approx(100 / 3)
    assert chance(np.array([], dtype=np.int64)) == 0.0


def test_the_more_images_the_less_is_taken_for_guessing() -> None:
    assert is_guessing(40.0, 100 / 3, 120)
    assert not is_guessing(40.0, 100 / 3, 12_000)
    assert is_guessing(20.0, 100 / 3, 12_000), "worse than guessing is guessing, too"
    assert not is_guessing(100.0, 100.0, 50), "with one class alone nothing can be told"


def test_what_is_not_known_is_not_said() -> None:
    assert said_of_guessing("the model", "val", 10.0, None, 100) is None
    said = said_of_guessing("the model", "val", 33.33, 100 / 3, 120)
    assert said is not None and "no better than guessing" in said and "120 val images" in said


def test_only_the_dense_row_of_a_series_is_judged() -> None:
    line = {"kind": "run", "status": "done", "part": "val", "images": 120, "top1": 33.3, "chance": {"val": 33.3, "test": 1.0}}
    lines = [{**line, "name": "dense", "row": "dense"}, {**line, "name": "uniform", "row": "uniform"}]
    (said,) = dense_guesses(lines)
    assert said.startswith("The dense model is no better than guessing")
    assert dense_guesses([{**lines[0], "top1": 60.0}]) == []
    assert dense_guesses([{key: value for key, value in lines[0].items() if key != "chance"}]) == []
