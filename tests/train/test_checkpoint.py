"""Checkpoints as files: the newest good one is found, whatever has become of the others."""

from __future__ import annotations

import multiprocessing
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from p3b.errors import RunFolderError, WeightsError
from p3b.train.checkpoint import Checkpoints


def content(step: int, numbers: int = 1000) -> dict[str, Any]:
    return {"model": torch.full((numbers,), float(step)), "progress": {"step": step}}


def written(folder: Path, *steps: int) -> tuple[Checkpoints, list[Path]]:
    checkpoints = Checkpoints(folder)
    return checkpoints, [checkpoints.write(content(step)) for step in steps]


def newest_step(checkpoints: Checkpoints) -> int | None:
    found = checkpoints.newest()
    if found is None:
        return None
    assert torch.equal(found.content["model"], content(found.content["progress"]["step"])["model"])
    return int(found.content["progress"]["step"])


def test_the_newest_is_found_and_the_one_before_stays(tmp_path: Path) -> None:
    checkpoints, files = written(tmp_path / "checkpoints", 1, 2, 3, 4)
    assert newest_step(checkpoints) == 4
    assert sorted((tmp_path / "checkpoints").iterdir()) == files[-2:]
    assert [file.name.split("-")[0] for file in files] == ["000001", "000002", "000003", "000004"]


def test_there_may_be_none(tmp_path: Path) -> None:
    assert newest_step(Checkpoints(tmp_path / "absent")) is None


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "longer"])
def test_a_damaged_one_is_passed_over_and_said_so(tmp_path: Path, damage: str) -> None:
    checkpoints, files = written(tmp_path, 1, 2)
    whole = bytearray(files[-1].read_bytes())
    if damage == "flipped":
        whole[len(whole) // 2] ^= 1
    changed = {"cut": whole[:-100], "empty": b"", "flipped": whole, "longer": whole + b"more"}[damage]
    files[-1].write_bytes(bytes(changed))
    assert newest_step_passing_over(checkpoints, files[-1]) == 1
    files[0].write_bytes(b"")
    with pytest.raises(WeightsError, match=r"no checkpoint to resume from.*--overwrite") as refusal:
        checkpoints.newest()
    assert all(file.name in str(refusal.value) for file in files)


def newest_step_passing_over(checkpoints: Checkpoints, damaged: Path) -> int:
    found = checkpoints.newest()
    assert found is not None and [line.split()[0] for line in found.passed_over] == [damaged.name]
    return int(found.content["progress"]["step"])


def test_a_whole_file_that_is_no_checkpoint_is_passed_over(tmp_path: Path) -> None:
    """Its name fits its content, so nothing was damaged; yet there is nothing to go on from in it."""
    checkpoints, files = written(tmp_path, 1)
    checkpoints.write({"model": torch.zeros(1)})
    found = checkpoints.newest()
    assert found is not None and found.file == files[0] and "cannot be read" in found.passed_over[0]


def test_what_a_killed_writer_left_is_no_checkpoint_and_is_tidied_away(tmp_path: Path) -> None:
    checkpoints, files = written(tmp_path, 1)
    (tmp_path / ".000002.unnamed.abc.part").write_bytes(b"half")
    (tmp_path / "000002.unnamed").write_bytes(b"whole, but without its name")
    assert newest_step(checkpoints) == 1
    checkpoints.tidy()
    assert list(tmp_path.iterdir()) == files


def test_a_full_disk_leaves_the_checkpoints_before(tmp_path: Path) -> None:
    """The system refuses to write more than a few kilobytes to a file, in a process of its own."""
    checkpoints, files = written(tmp_path, 1, 2)

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            checkpoints.write(content(3, numbers=100_000))
        except RunFolderError as error:
            os._exit(7 if "cannot be written" in str(error) and "--resume" in str(error) else 8)
        os._exit(9)

    process = multiprocessing.get_context("fork").Process(target=fill)
    process.start()
    process.join(60)
    assert process.exitcode == 7
    assert sorted(tmp_path.iterdir()) == files and newest_step(checkpoints) == 2
