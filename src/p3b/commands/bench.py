"""`p3b bench`: models side by side in their runtimes, as a table and as JSON."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import p3b
from p3b.deploy.bench import Side, Timing, measure, open_side, size_on_disk
from p3b.deploy.choice import AUTO
from p3b.deploy.hub import local_copy
from p3b.deploy.layouts import check_layout
from p3b.deploy.peak import peak_memory
from p3b.deploy.runners import ONNX, PROGRAM
from p3b.errors import RunFolderError, WeightsError
from p3b.run.deploy_options import BenchConfig, check_bench
from p3b.run.screen import Screen
from p3b.storage import artifact
from p3b.storage.files import write_atomically
from p3b.train.distributed import process_group


def bench(config: BenchConfig) -> dict[str, Any]:
    """Measure, show tables, and write JSON where asked for; returns what that holds.

    Raises:
        UserError: settings or models that cannot be used.
    """
    check_bench(config)
    check_layout(config.layout, [AUTO])
    chosen = sides(config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    screen = Screen(is_main=True)
    with process_group(config.device) as (_, device):
        timings = {size: _timed(config, chosen, size, device) for size in config.batch_sizes}
    memory = _memory(config, chosen) if config.memory else {}
    sizes = {side.name: None if side.dense else size_on_disk(side.path) for side in chosen}
    for number, side in enumerate(chosen, start=1):
        screen.say(f"{number}. {side.name}")
    for batch_size, timed in timings.items():
        show(screen, batch_size, timed, sizes, memory)
    threads = torch.get_num_threads()
    versions = {"p3b": p3b.__version__, "torch": str(torch.__version__), "python": platform.python_version()}
    screen.say(
        f"{threads} thread(s) on {device}; sides in turns; a ratio is the median over the rounds, in brackets their middle "
        "half; memory is what a process of its own grows by with the largest batch"
    )
    result = {
        "threads": threads,
        "device": str(device),
        "machine": platform.machine(),
        "versions": versions,
        "sides": [
            {
                "name": side.name,
                "bytes": sizes[side.name],
                "peak_memory_bytes": memory.get(side.name),
                "timings": [asdict(timed[side.name]) for timed in timings.values()],
            }
            for side in chosen
        ],
    }
    if config.json is not None:
        _write(config.json, json.dumps(result, indent=1) + "\n")
        screen.say(f"figures: {config.json}")
    return result


def sides(config: BenchConfig) -> list[Side]:
    """What is measured, the side that ratios are to first.

    Raises:
        WeightsError: a model is neither here nor on the hub.
    """
    given = [_side(path) for path in config.models]
    saved = [side for side in given if side.path.suffix not in (ONNX, PROGRAM)]
    if len(saved) == 1 and _is_pruned(saved[0].path):
        dense = replace(saved[0], dense=True)
        given, saved = [dense, *given], [dense, *saved]
    also = saved if config.compile else []
    return [each for side in given for each in ([side, replace(side, compiled=True)] if side in also else [side])]


def _side(path: Path) -> Side:
    """A model in eager PyTorch, or an export; one of the hub is fetched."""
    here = local_copy(str(path))
    if not here.exists():
        raise WeightsError(f"There is no {path}. Expected a model that p3b saved (a folder or .pth), an .onnx or a .pt2.")
    return Side(here, called=None if here == path else str(path))


def show(
    screen: Screen,
    batch_size: int,
    timed: Mapping[str, Timing],
    sizes: Mapping[str, int | None],
    memory: Mapping[str, int | None],
) -> None:
    """One table for each batch size; sides are numbered as they were listed."""
    rows = [
        (
            f"{number}. {name.rpartition(', ')[2]}",
            f"{timing.p50_ms:.2f}",
            f"{timing.p90_ms:.2f}",
            f"{timing.images_per_second:,.0f}",
            "" if timing.ratio is None else str(timing.ratio).replace(" to ", "-"),
            _megabytes(sizes[name]),
            _megabytes(memory.get(name)),
        )
        for number, (name, timing) in enumerate(timed.items(), start=1)
    ]
    columns = ("", "p50 ms", "p90 ms", "images/s", "speed-up", "file MB", "RAM MB")
    screen.table(f"batches of {batch_size}", columns, rows)


def _timed(config: BenchConfig, chosen: list[Side], batch_size: int, device: torch.device) -> dict[str, Timing]:
    # Compiled forms are kept with timm's code, which all sides share: past the limit the rest would run eagerly.
    torch._dynamo.config.recompile_limit = 64
    opened = {
        side.name: open_side(
            side,
            layout=config.layout,
            batch_size=batch_size,
            device="cpu" if side.path.suffix == ONNX else device,
            threads=torch.get_num_threads(),
        )
        for side in chosen
    }
    return measure(opened, batch_size, rounds=config.rounds, seconds=config.seconds)


def _memory(config: BenchConfig, chosen: list[Side]) -> dict[str, int | None]:
    """Of all sides but compiled ones, whose compiler takes more than the model."""
    layout, threads = "index" if config.layout == AUTO else config.layout, torch.get_num_threads()
    largest = max(config.batch_sizes)
    return {
        side.name: peak_memory(side, layout=layout, batch_size=largest, threads=threads) for side in chosen if not side.compiled
    }


def _is_pruned(path: Path) -> bool:
    return any(block["form"] != "whole" for block in artifact.read_config(path)["blocks"])


def _megabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e6:.2f}"


def _write(file: Path, text: str) -> None:
    try:
        write_atomically(file, lambda path: path.write_text(text))
    except OSError as error:
        raise RunFolderError(f"Cannot write {file}: {error.strerror}. Choose another --json.") from error
