"""Shared by all tests. This folder is on the path while tests run, so that they can import the builders of `tiny`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from processes import SparePython
from refusals import Refusals
from runs import colour_folders

torch.set_num_threads(1)  # the networks here are so small that threads only wait for each other


@pytest.fixture(scope="session")
def shared() -> Path:
    """Worked numbers and images that lie beside the repository; tests that need them are skipped where they are absent."""
    folder = Path(__file__).parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("the shared folder beside the repository is absent")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Coloured images in class folders, for runs of the commands."""
    return colour_folders(tmp_path_factory.mktemp("colours"))


@pytest.fixture(scope="session")
def python() -> Iterator[SparePython]:
    """For tests of what a main process does, by itself and at its end."""
    spare = SparePython()
    yield spare
    spare.close()


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refusals:
    return Refusals(tmp_path / "out", capsys)
