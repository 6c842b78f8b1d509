"""`p3b predict`: three forms of the same answers, and what cannot be read at the end."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from exported import NAMES, PREPROCESSING, save_photos, save_small, small_vit
from p3b.commands.command_line import main
from p3b.deploy.export import Evidence, ExportPlan, export
from p3b.deploy.metadata import Metadata
from p3b.deploy.photos import photo_crops


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small(tmp_path_factory.mktemp("saved") / "pruned")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_photos(tmp_path / "photos", 4)
    (tmp_path / "photos" / "5.png").write_bytes(b"no image")
    return tmp_path / "photos"


def test_table_json_lines_and_csv_say_the_same(saved: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(saved), str(folder), "--format", "jsonl", "--top", "2"]) == 0
    said = capsys.readouterr()
    lines = [json.loads(line) for line in said.out.splitlines()]
    assert "1 of 5 image(s) cannot be read" in said.err and "5.png" in said.err
    assert [Path(line["file"]).name for line in lines] == [f"{number}.png" for number in (0, 1, 2, 3, 5)]
    assert "error" in lines[-1] and all(len(line["labels"]) == 2 for line in lines[:-1])

    assert main(["predict", str(saved), str(folder), "--format", "csv", "--top", "2"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["label_1"] for row in rows[:-1]] == [line["labels"][0]["label"] for line in lines[:-1]]
    assert rows[-1]["label_1"] == "" and rows[-1]["error"]

    assert main(["predict", str(saved), str(folder), "--output", str(folder / "table.txt")]) == 0
    table = (folder / "table.txt").read_text()
    assert all(line["labels"][0]["label"] in table for line in lines[:-1])


def test_an_exported_model_answers_as_the_saved_one(saved: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder.parent / "small.pt2"
    export(small_vit(), Metadata(NAMES, PREPROCESSING), ExportPlan(file, ("index",)), Evidence(PREPROCESSING, photo_crops(2)))
    answers = []
    for model in (saved, file):
        assert main(["predict", str(model), str(folder), "--format", "jsonl"]) == 0
        answers.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    for first, second in zip(*answers, strict=True):
        assert [each["label"] for each in first.get("labels", [])] == [each["label"] for each in second.get("labels", [])]
        for one, other in zip(first.get("labels", []), second.get("labels", []), strict=True):
            assert one["probability"] == pytest.approx(other["probability"], abs=1e-5)


def test_names_on_standard_input(
    saved: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = b"\n".join(os.fsencode(folder / f"{number}.png") for number in (2, 0)) + b"\n"
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(names)))
    assert main(["predict", str(saved), "--files-from", "-", "--format", "jsonl"]) == 0
    assert [json.loads(line)["file"][-5:] for line in capsys.readouterr().out.splitlines()] == ["2.png", "0.png"]


def test_where_nothing_can_be_read_the_status_says_so(saved: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(saved), str(folder / "5.png")]) == 2
    assert "1 of 1 image(s) cannot be read" in capsys.readouterr().err
