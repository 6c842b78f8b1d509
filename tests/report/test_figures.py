"""Figures come from the run folder's files alone, whatever the depth, the number of updates or the method."""

from __future__ import annotations

import ast
import copy
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from PIL import Image

from p3b.errors import ConfigError, RunFolderError
from p3b.report import figures
from p3b.report.figures import benefit_figure, draw_figures, keep_ratio_figure
from p3b.storage.files import is_unfinished


def _record(update: int, depth: int, phase: str = "sparsify") -> dict[str, Any]:
    blocks = [
        {
            "name": f"blocks.{d}.{kind}",
            "kind": kind,
            "benefit_cls": 0.1 * d - 0.05 * update,
            "benefit_patch": 0.2 - 0.01 * d,
            "importance": 1.0,
            "keep_ratio_goal": 0.5,
            "keep_ratio": 1 - 0.5 * update / (update + 1),
            "kept_params": 100,
            "params": 200,
        }
        for d in range(depth)
        for kind in ("attn", "mlp")
    ]
    return {"epoch": (update + 1) / 3, "step": update, "phase": phase, "progress": 0.5, "tau": 0.1, "blocks": blocks}


def _write(folder: Path, records: list[Any]) -> Path:
    (folder / "blocks.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.mark.parametrize(("num_updates", "depth"), [(1, 4), (2, 1), (20, 24)])
def test_every_shape_of_run_gives_both_figures(tmp_path: Path, num_updates: int, depth: int) -> None:
    phases = ["sparsify"] * 10 + ["sharpen"] * 10
    _write(tmp_path, [_record(update, depth, phases[update]) for update in range(num_updates)])
    assert draw_figures(tmp_path) == [tmp_path / "benefit.png", tmp_path / "keep_ratio.png"]
    for name in ("benefit.png", "keep_ratio.png"):
        with Image.open(tmp_path / name) as image:
            pixels = np.asarray(image.convert("RGB"))
        assert min(pixels.shape[:2]) > 400
        assert (pixels[[0, -1]] == 255).all()  # nothing is cut at the upper and lower edge ...
        assert (pixels[:, [0, -1]] == 255).all()  # ... nor at the sides
        saturation = pixels.max(axis=2).astype(int) - pixels.min(axis=2)
        assert (saturation > 60).sum() > 100  # and something coloured is drawn
    assert sorted(path.name for path in tmp_path.iterdir()) == ["benefit.png", "blocks.jsonl", "keep_ratio.png"]


def test_svg_says_what_the_axes_mean_and_is_the_same_file_every_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(figures.STYLE, "svg.fonttype", "none")  # words stay words, to be read here
    _write(tmp_path, [_record(0, 4), _record(1, 4, "sharpen")])
    benefit, keep_ratio = (path.read_bytes() for path in draw_figures(tmp_path, "svg"))
    for words in (b"class token", b"patches", b"Attention", b"MLP", b"epoch", b"block depth", b"nats", b"sharpen"):
        assert words in benefit
    for words in (b"keep ratio", b"Attention", b"MLP", b"goal", b"block depth", b"Last update, epoch 0.7"):
        assert words in keep_ratio
    assert [path.read_bytes() for path in draw_figures(tmp_path, "svg")] == [benefit, keep_ratio]


def test_without_benefits_the_benefit_figure_is_left_out(tmp_path: Path) -> None:
    records = [_record(update, 2) for update in range(2)]
    for record in records:
        for block in record["blocks"]:
            block.update(benefit_cls=None, benefit_patch=None, importance=None, keep_ratio_goal=None)
    _write(tmp_path, records)
    assert draw_figures(tmp_path) == [tmp_path / "keep_ratio.png"]
    assert not (tmp_path / "benefit.png").exists()


def test_a_single_probe_and_gaps_are_drawn(tmp_path: Path) -> None:
    records = [_record(update, 2) for update in range(3)]
    for record in records:
        for block in record["blocks"]:
            block["benefit_patch"] = None
    records[1]["blocks"][0]["benefit_cls"] = float("nan")
    both, single = tmp_path / "both.png", tmp_path / "single.png"
    assert benefit_figure(_write(tmp_path, [_record(0, 2)]), both) == both
    assert benefit_figure(_write(tmp_path, records), single) == single
    with Image.open(both) as both_image, Image.open(single) as single_image:
        assert single_image.height < both_image.height
        assert single_image.width == both_image.width


def test_no_update_yet_draws_nothing(tmp_path: Path) -> None:
    _write(tmp_path, [])
    assert draw_figures(tmp_path) == []
    assert keep_ratio_figure(tmp_path, tmp_path / "keep_ratio.png") is None
    assert [path.name for path in tmp_path.iterdir()] == ["blocks.jsonl"]


def _without(key: str) -> dict[str, Any]:
    record = _record(1, 2)
    del record["blocks"][1][key]
    return record


def _with(key: str, value: Any) -> dict[str, Any]:
    record = _record(1, 2)
    record["blocks"][1][key] = value
    return record


@pytest.mark.parametrize(
    ("damaged", "reason"),
    [
        ([1, 2], "list"),
        ({"epoch": 1.0}, "'blocks'"),
        ({"epoch": 1.0, "blocks": []}, "at least one block"),
        ({**_record(1, 2), "epoch": "soon"}, "'soon'"),
        ({**_record(1, 2), "epoch": 0.1}, "before"),
        (_without("keep_ratio"), "'keep_ratio'"),
        (_with("kind", "conv"), "'conv'"),
        (_with("benefit_cls", "high"), "'high'"),
        (_with("name", "another"), "those of the first line"),
        (_record(1, 3), "those of the first line"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, damaged: Any, reason: str) -> None:
    _write(tmp_path, [_record(0, 2), copy.deepcopy(damaged)])
    with pytest.raises(RunFolderError, match=r"Line 2 of '.*blocks\.jsonl'") as caught:
        draw_figures(tmp_path)
    assert reason in str(caught.value)


def test_a_line_cut_off_is_named(tmp_path: Path) -> None:
    _write(tmp_path, [_record(0, 2), _record(1, 2)])
    path = tmp_path / "blocks.jsonl"
    path.write_text(path.read_text()[:-40])
    with pytest.raises(RunFolderError, match="Line 2 of"):
        keep_ratio_figure(tmp_path, tmp_path / "keep_ratio.png")


def test_a_folder_without_updates_file_is_a_kind_error(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="pruning stage"):
        draw_figures(tmp_path)


@pytest.mark.parametrize("fmt", ["pdf", "PNG", ""])
def test_other_formats_are_refused_before_anything_is_read(tmp_path: Path, fmt: str) -> None:
    with pytest.raises(ConfigError, match="png"):
        draw_figures(tmp_path, fmt)


def test_a_failed_drawing_leaves_the_old_figure_and_no_rubbish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path, [_record(0, 2)])
    old = tmp_path / "keep_ratio.png"
    old.write_bytes(b"old")
    half_written: list[Path] = []

    def disk_full(*_: Any, **__: Any) -> None:
        half_written.extend(filter(is_unfinished, tmp_path.iterdir()))
        raise OSError("No space left on device")

    monkeypatch.setattr(figures.Figure, "savefig", disk_full)
    with pytest.raises(RunFolderError, match="No space left"):
        keep_ratio_figure(tmp_path, old)
    assert old.read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["blocks.jsonl", "keep_ratio.png"]
    assert len(half_written) == 1, "had it been killed, a resumed run would know this file and remove it"


def test_the_callers_matplotlib_is_left_alone(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    draw_figures(_write(tmp_path, [_record(0, 2)]))
    assert dict(matplotlib.rcParams) == before


def test_imports_stay_in_the_room() -> None:
    tree = ast.parse(Path(figures.__file__).read_text())
    modules = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    foreign = {name for name in modules if name.split(".")[0] not in sys.stdlib_module_names}
    assert {name for name in foreign if not name.startswith("matplotlib")} == {"p3b.errors", "p3b.report.updates"}
    assert not any(name.startswith("matplotlib.pyplot") for name in foreign)
