"""Processes and devices, and laws that need two processes (the `two_ranks` script carries them out)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from p3b.errors import ConfigError
from p3b.train.distributed import all_reduce_mean, all_reduce_sum, gather, in_group, process_group, wait_for_all


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


def test_laws_of_two_processes(tmp_path: Path) -> None:
    script = Path(__file__).with_name("two_ranks.py")
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    laws = ("collectives", "evaluation", "pruning", "disagreeing", "a_step_that_is_not_finite_on_one_rank", "resuming")
    for law in (*laws, "one_rank_alone_fails"):
        assert f"{law} holds" in done.stdout
    assert "p3b, process 1: Cannot read the image" in done.stderr
