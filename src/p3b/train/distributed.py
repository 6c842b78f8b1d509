"""Processes: one or many, started by torchrun or torch.distributed.launch, with NCCL on GPUs and gloo on CPUs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from p3b.errors import ConfigError, TrainingError

_LOST_PEER = re.compile(r"[Cc]onnection (closed|reset|refused)|[Tt]imed out|timeout|Socket|gloo|NCCL|Broken pipe")
"""How gloo's and NCCL's plain RuntimeErrors read when a peer is lost."""


@dataclass(frozen=True)
class Processes:
    """This process among all: its rank, how many there are, and its place on this machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@contextmanager
def process_group(device: str, timeout_minutes: float = 10.0) -> Iterator[tuple[Processes, torch.device]]:
    """Join the group that the launcher describes in the environment, and leave it at the end.

    Within another `process_group`, whose group it is, nothing is joined or left.

    Args:
        device: "auto", "cpu", "cuda" or "cuda:1".
        timeout_minutes: how long a collective waits for a rank that does not come.

    Raises:
        ConfigError: the device is not there.
    """
    processes = Processes(
        rank=int(os.environ.get("RANK", 0)),
        world_size=int(os.environ.get("WORLD_SIZE", 1)),
        local_rank=int(os.environ.get("LOCAL_RANK", 0)),
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
    )
    chosen = _choose_device(device, processes)
    if "RANK" not in os.environ or processes.world_size == 1 or dist.is_initialized():
        yield processes, chosen
        return
    on_gpu = chosen.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(chosen)
    timeout = timedelta(minutes=timeout_minutes)
    store, rank, world_size = next(iter(rendezvous("env://", timeout=timeout)))
    # torchrun keeps one store over its restarts (as of torch 2.14), and in it the addresses of the processes that died.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=dist.PrefixStore(f"attempt {attempt}", store),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=chosen if on_gpu else None,
    )
    try:
        yield processes, chosen
    finally:
        dist.destroy_process_group()


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """Mean over all ranks, as a new tensor; the tensor itself in a single process."""
    if not in_group():
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total.div_(dist.get_world_size())


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over all ranks, as a new tensor; the tensor itself in a single process."""
    if not in_group():
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def gather(value: Any) -> list[Any]:
    """A plain value of every rank, in the order of ranks, on every rank."""
    if not in_group():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def require_agreement(what: str, digest: str) -> None:
    """Compare a digest of something that every rank has worked out for itself.

    Raises:
        TrainingError: the ranks differ; on every rank, so that none goes on with what the others have not.
    """
    digests = gather(digest)
    if len(set(digests)) > 1:
        found = ", ".join(f"rank {rank}: {value[:12]}" for rank, value in enumerate(digests))
        raise TrainingError(
            f"The processes disagree on {what} ({found}); the run stops and keeps its last checkpoint. They must run the same "
            "code on the same kind of device; --resume continues from the checkpoint."
        )


def wait_for_all() -> None:
    """Return when every rank has come here."""
    if in_group():
        dist.barrier()


def lost_process(error: BaseException) -> TrainingError | None:
    """What to tell the user where an error means that another process is gone or does not answer; None where it does not."""
    told = str(error)
    if not isinstance(error, dist.DistError) and not (isinstance(error, RuntimeError) and _LOST_PEER.search(told)):
        return None
    cause = told.splitlines()[0][:200] if told else type(error).__name__
    return TrainingError(
        f"Another process of this run is gone or did not answer in time ({cause}). Its own message says why. The run stops and "
        "keeps its last checkpoint: continue with --resume, or start it with torchrun --max-restarts, which does so by itself."
    )


def in_group() -> bool:
    """Whether there is more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _choose_device(device: str, processes: Processes) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"Unknown device '{device}'. Known: auto, cpu, cuda, cuda:N.") from error
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"Device '{device}' was asked for, but torch finds no GPU. Use --device auto or --device cpu.")
        if chosen.index is None:
            chosen = torch.device("cuda", processes.local_rank)
        if chosen.index >= torch.cuda.device_count():
            raise ConfigError(
                f"Process {processes.local_rank} would use GPU {chosen.index}, but this machine has "
                f"{torch.cuda.device_count()}. Start at most one process per GPU (--nproc_per_node)."
            )
    elif chosen.type != "cpu":
        raise ConfigError(f"Device '{device}' is not covered. Known: auto, cpu, cuda, cuda:N.")
    return chosen
