"""Processes and devices, and laws that need two processes (they stand in `two_ranks`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from two_ranks import LAWS, in_two_processes, one_rank_alone_fails

from p3b.errors import ConfigError
from p3b.train.distributed import all_reduce_mean, all_reduce_sum, gather, in_group, process_group, wait_for_all
from runs import colour_folders


def test_one_process_needs_no_group() -> None:
    with process_group("cpu") as (processes, device):
        assert processes.is_main and processes.world_size == 1 and device == torch.device("cpu")
        assert not in_group()
        tensor = torch.ones(2)
        assert all_reduce_mean(tensor) is tensor and all_reduce_sum(tensor) is tensor and gather("mine") == ["mine"]
        wait_for_all()


@pytest.mark.parametrize(("device", "said"), [("gpu", "Unknown device"), ("meta", "not covered")])
def test_devices_that_are_none(device: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said), process_group(device):
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ranks")
    colour_folders(out / "data")
    return out


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_it_holds_in_two_processes(law: Callable[[Path], None], folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    in_two_processes(law, folder)
    if law is one_rank_alone_fails:
        assert "p3b, process 1: Cannot read the image" in capfd.readouterr().err
