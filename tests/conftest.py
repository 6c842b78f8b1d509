"""Shared by all tests. This folder is on the path while tests run, so that they can import the builders of `tiny`."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:  # the process that only hands the tests out to workers reads this file too, and needs no torch
    from processes import SparePython
    from refusals import Refusals

os.environ["OMP_NUM_THREADS"] = "1"  # the networks here are so small that threads of torch only wait for each other
gc.disable()  # until everything is imported, which leaves next to no garbage
_MEMORY = Path("/dev/shm")
if _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free > 1 << 30:
    # A file system like any other, but for the wait until a disk has what runs flush to it, thousands of times.
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(_MEMORY))


def pytest_collection_finish() -> None:
    """What has been imported by now stays: collecting garbage never looks at it again, nor do forks copy it for that."""
    gc.collect()
    gc.freeze()
    gc.enable()
    gc.set_threshold(20_000, 20, 20)  # tests are short: what they leave is little, and was looked through many times a second


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
    from runs import colour_folders

    return colour_folders(tmp_path_factory.mktemp("colours"))


@pytest.fixture(scope="session")
def python() -> Iterator[SparePython]:
    """For tests of what a main process does, by itself and at its end."""
    from processes import SparePython

    spare = SparePython()
    yield spare
    spare.close()


@pytest.fixture(scope="session", autouse=True)
def flags_are_described_once() -> Iterator[None]:
    """tyro works out anew what flags a command has each time that words are parsed: longer than a tiny run takes to train."""
    import tyro._parsers

    describe, known = tyro._parsers.ParserSpecification.from_callable_or_type, {}

    def describe_once(settings: Any, **how: Any) -> Any:
        if how["parent_classes"] or how["default_instance"] is not tyro.MISSING_NONPROP:
            return describe(settings, **how)
        if settings not in known:
            known[settings] = describe(settings, **how)
        return known[settings]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tyro._parsers.ParserSpecification, "from_callable_or_type", staticmethod(describe_once))
        yield


@pytest.fixture(scope="session")
def onnx_is_listed_once() -> Iterator[None]:
    """torch lists all operations that ONNX has anew at each export, which takes as long as to export a tiny model."""
    from functools import cache

    from torch.onnx._internal.exporter._registration import ONNXRegistry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(cache(ONNXRegistry.from_torchlib)))
        yield


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refusals:
    from refusals import Refusals

    return Refusals(tmp_path / "out", capsys)
