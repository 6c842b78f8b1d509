"""Does the number of processes change what is pruned, or how many images are counted? The same run in 1, 2 and 4 of them.

Three kinds of cases. `pruning`: a random small model is pruned over the same global batches, with accumulated gradients and
torch's distributed wrapper. `evaluation`: data sets that the processes cannot share out evenly. `command`: `p3b prune` with
one process of 8 images and two of 4. The processes speak gloo and are forked from one that has loaded torch already.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import p3b
from p3b.data import Preprocessing, open_data
from p3b.run.evaluation import evaluate_part
from p3b.run.machine import Machine
from p3b.train.distributed import Processes, process_group
from p3b.train.optim import Precision
from runs import CALM, PHASES, colour_folders, flags, lines, run
from tiny import images, labels, tiny_vit

WORLDS = (1, 2, 4)
GLOBAL_BATCH = 8
SMALL_BUCKET = 0.01
"""In MiB: a model of 10,000 parameters has about eight."""
PATIENCE = 240
"""Seconds that a group of processes may take: collectives that have come out of step wait for ever."""
CLOSE = {"float64": 1e-9, "float32": 1e-5}
"""How near the keep ratios of 1, 2 and 4 processes have to be, or ten times as near as one process comes to itself when the
images of each batch change places: a benefit is the small difference of two losses, and magnifies how these were rounded."""
COMMAND_CLOSE = 5e-3
"""The same for the command, which trains in float32 with AdamW: its steps follow the sign of a gradient however small, and
where one lies at zero, rounding decides. Most runs are 3e-5 apart and one in six 2e-3, as is one process from itself when its
features move by a ten-millionth. With batch norm over each process's own images they are 0.4 apart.
"""
Results = dict[int, list[Any]]
"""By number of processes: what each of them has found, in the order of ranks."""


def cases(count: int, seed: int, work: Path) -> Iterator[dict[str, Any]]:
    """Try `count` cases.

    Args:
        count: of all kinds together; three are one of each.
        seed: of everything that is drawn.
        work: folder for data and runs.

    Yields:
        Per case: part, kind, case, ok, detail, seconds, and the largest difference between keep ratios.
    """
    torch.set_num_threads(1)  # before the first fork: threads do not survive one
    for number in range(count):
        yield one_case(number, seed, work.resolve())


def one_case(number: int, seed: int, work: Path) -> dict[str, Any]:
    """Carry out one case; its kind follows from its number, so that the first three are of three kinds."""
    kind, act = ("evaluation", evaluation) if number % 4 == 1 else ("pruning", pruning)
    if number == 2:
        kind, act = "command", command
    began = time.monotonic()
    work.mkdir(parents=True, exist_ok=True)
    try:
        found = act(number, random.Random(f"{seed}/{number}"), work)
    except GroupError as error:
        found = {"case": kind, "ok": False, "detail": str(error)}
    return {"part": "ranks", "kind": kind, **found, "seconds": round(time.monotonic() - began, 2)}


# --- pruning


@dataclass(frozen=True)
class Setting:
    """A small run. Micro-batches have eight images over all processes; `probes_first`: their loss comes before the task's;
    `narrow`: the residual stream narrows, too, and active elements alone are computed."""

    depth: int
    heads: int
    prune_ratio: float
    accumulate: int
    update_every: int
    layer_scale: bool
    class_token: bool
    probes_first: bool
    dtype: str
    seed: int
    narrow: bool

    @classmethod
    def draw(cls, number: int, draw: random.Random) -> Setting:
        """At random, but for dtype and width: cases take turns."""
        return cls(
            depth=draw.randint(1, 3),
            heads=draw.randint(1, 3),
            prune_ratio=round(draw.uniform(0.1, 0.5), 3),
            accumulate=draw.randint(1, 3),
            update_every=draw.randint(1, 2),
            layer_scale=draw.random() < 0.4,
            class_token=draw.random() < 0.6,
            probes_first=draw.random() < 0.5,
            dtype=list(CLOSE)[number // 3 % 2],
            seed=draw.randrange(1000),
            narrow=number % 2 == 0,
        )

    def model(self) -> nn.Module:
        token = {} if self.class_token else {"class_token": False, "global_pool": "avg"}
        scale = {"init_values": 0.1} if self.layer_scale else {}
        width = 16 * self.heads
        return tiny_vit(
            depth=self.depth, num_heads=self.heads, embed_dim=width, seed=self.seed, dtype=self.torch_dtype, **token, **scale
        )

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


def pruning(number: int, draw: random.Random, work: Path) -> dict[str, Any]:
    """Keep ratios of all decisions agree; in float64 the masks are the same too. Ranks of one run agree to the bit."""
    setting = Setting.draw(number, draw)
    found = in_each_world(partial(prune_by_hand, setting), work)
    (whole,) = found[1]
    rounding = 0.0
    if setting.dtype == "float32":
        reordered = [in_processes(1, partial(prune_by_hand, setting, shift=shift), work)[0] for shift in (1, 3)]
        rounding = max(_ratios_apart(other, whole) for other in reordered)
    ratios_apart, masks_apart, ok = 0.0, 0, True
    for results in found.values():
        ok &= all(result["ratios"] == results[0]["ratios"] for result in results)
        ok &= all(_elements_apart(result, results[0]) == 0 for result in results)
        ok &= all(_same(result["state"], results[0]["state"]) for result in results)
        ratios_apart = max(ratios_apart, _ratios_apart(results[0], whole))
        masks_apart = max(masks_apart, _elements_apart(results[0], whole))
    ok &= ratios_apart <= max(CLOSE[setting.dtype], 10 * rounding) and (setting.dtype != "float64" or masks_apart == 0)
    detail = (
        f"{len(whole['ratios'])} decisions, keep ratios at most {ratios_apart:.1e} apart"
        + (f" (by rounding alone {rounding:.1e})" if rounding else "")
        + f", {masks_apart} mask elements differ"
    )
    return {
        "case": ", ".join(f"{name} {value}" for name, value in asdict(setting).items()),
        "ok": ok,
        "detail": detail,
        f"ratios_apart_{setting.dtype}": ratios_apart,
        f"mask_elements_apart_{setting.dtype}": masks_apart,
    }


def prune_by_hand(setting: Setting, world: Processes, shift: int = 0) -> dict[str, Any]:
    """What a rank decides in a plain loop: (decisions, 2B) keep ratios and goals, the masks of each, the method's state.

    `shift` moves the images of each global batch round by so many places.
    """
    model = setting.model().train()
    # Small buckets: gradients of the model travel in many parts, while those of the probes are on their way.
    wrapped: Any = model if world.world_size == 1 else DistributedDataParallel(model, bucket_cap_mb=SMALL_BUCKET)
    schedule = p3b.Schedule(start=1, sparse=5, final=8, update_every=setting.update_every)
    narrow = {"estimator": "linear", "stream": "auto", "compute": "active"} if setting.narrow else {}
    pruner = p3b.Pruner(wrapped, setting.prune_ratio, schedule=schedule, **narrow)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    decisions, own = [], slice(world.rank, None, world.world_size)
    while not pruner.done:
        for micro_step in range(setting.accumulate):
            draw = 1000 * setting.seed + 10 * pruner.steps_done + micro_step
            batch, targets = images(GLOBAL_BATCH, seed=draw, dtype=setting.torch_dtype), labels(GLOBAL_BATCH, seed=draw)
            batch, targets = batch.roll(shift, 0), targets.roll(shift)
            wrapped.require_backward_grad_sync = micro_step == setting.accumulate - 1  # what no_sync() sets
            logits = wrapped(batch[own])
            probe_loss = pruner.loss(cross_entropy, targets[own]) if setting.probes_first else 0.0
            loss = probe_loss + cross_entropy(logits, targets[own])
            if not setting.probes_first:
                loss = loss + pruner.loss(cross_entropy, targets[own])
            (loss / setting.accumulate).backward()
        decisions.append(pruner.step())
        optimizer.step()
        optimizer.zero_grad()
    decisions.append(pruner.decide_last())
    made = [decision for decision in decisions if decision is not None]
    return {
        "ratios": [[ratio for b in decision.blocks for ratio in (b.keep_ratio, b.keep_ratio_goal)] for decision in made],
        "masks": [dict(decision.masks) for decision in made],
        "state": pruner.state_dict(),
    }


def _ratios_apart(one: dict[str, Any], other: dict[str, Any]) -> float:
    mine, theirs = (torch.tensor(found["ratios"], dtype=torch.float64) for found in (one, other))
    return float((mine - theirs).abs().max())


def _elements_apart(one: dict[str, Any], other: dict[str, Any]) -> int:
    """Elements that one keeps and the other does not, at the decision where there are most of them."""
    return max(
        sum(int(((mine[gate] >= 0.5) != (theirs[gate] >= 0.5)).sum()) for gate in mine)
        for mine, theirs in zip(one["masks"], other["masks"], strict=True)
    )


def _same(one: Any, other: Any) -> bool:
    """Equality to the bit of nested dicts and lists of tensors and plain values."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


# --- evaluation


def evaluation(number: int, draw: random.Random, work: Path) -> dict[str, Any]:
    """Each image counts once, whether the processes share the images out or each looks at all of them."""
    batch_size, sizes = draw.randint(1, 5), sorted({1, 2, 3, 7, 9, 13, draw.randint(4, 24)})
    model = tiny_vit(img_size=16, num_classes=3, seed=draw.randrange(1000))
    data = work / "images"
    if not data.exists():
        colour_folders(data, {"train": 1, "test": 8})
    test = open_data("FOLDER", data).test
    assert test is not None
    order = draw.sample(range(len(test)), len(test))
    preprocessing, precision = Preprocessing((3, 16, 16), (0.5,) * 3, (0.5,) * 3), Precision(torch.device("cpu"), None)

    def evaluate(world: Processes) -> list[dict[str, float]]:
        machine, size = Machine(world, precision.device, precision), {"batch_size": batch_size, "num_workers": 0}
        return [
            asdict(evaluate_part(model, part, preprocessing, machine, **size, shared=shared))
            for part in (test.subset(torch.tensor(order[:size]).numpy()) for size in sizes)
            for shared in (True, False)
        ]

    found = in_each_world(evaluate, work)
    whole, apart, ok = found[1][0], 0.0, True
    for results in found.values():
        for accuracies in results:
            for accuracy, expected, size in zip(accuracies, whole, [size for size in sizes for _ in (0, 1)], strict=True):
                ok &= accuracy["images"] == size
                ok &= (accuracy["top1"], accuracy["top5"]) == (expected["top1"], expected["top5"])
                apart = max(apart, abs(accuracy["loss"] - expected["loss"]))
    return {
        "case": f"{', '.join(map(str, sizes))} images in batches of {batch_size}",
        "ok": ok and apart < 1e-6,
        "detail": f"each image counted once and equal accuracies: {ok}; losses at most {apart:.1e} apart",
    }


# --- the command


def command(number: int, draw: random.Random, work: Path) -> dict[str, Any]:
    """`p3b prune` over the same global batches writes the same keep ratios into blocks.jsonl."""
    data = work / "colours"
    if not data.exists():
        colour_folders(data, {"train": 8, "val": 3, "test": 3})

    def prune(world: Processes) -> int:
        share = str(GLOBAL_BATCH // world.world_size)
        given = (*PHASES, *CALM, "--batch-size", share, "--seed", seed, "--overwrite")
        return run("prune", *flags(data, work / f"in{world.world_size}", *given))

    seed = str(draw.randrange(1000))
    statuses = {size: in_processes(size, prune, work, grouped=False) for size in (1, 2)}
    found = {
        world: torch.tensor(
            [
                [block[key] for block in line["blocks"] for key in ("keep_ratio", "keep_ratio_goal")]
                for line in lines(work / f"in{world}" / "prune" / "blocks.jsonl")
            ],
            dtype=torch.float64,
        )
        for world, ranks in statuses.items()
        if ranks == [0] * world
    }
    shapes = {tuple(ratios.shape) for ratios in found.values()}
    apart = [float((ratios - found[1]).abs().max()) for ratios in found.values()] if len(shapes) == 1 and 1 in found else []
    return {
        "case": "p3b prune with 1 x 8 and 2 x 4 images",
        "ok": len(apart) == 2 and max(apart) < COMMAND_CLOSE,
        "detail": f"exit statuses {statuses}, decisions x ratios {sorted(shapes)}, {max(apart, default=-1.0):.1e} apart",
        "ratios_apart_command": max(apart, default=None),
    }


# --- processes


class GroupError(Exception):
    """A process of a group ended with an error, or the group did not come to an end."""


def in_each_world(act: Callable[[Processes], Any], work: Path) -> Results:
    """What `act` returns in groups of 1, 2 and 4 processes."""
    return {size: in_processes(size, act, work) for size in WORLDS}


def in_processes(size: int, act: Callable[[Processes], Any], work: Path, *, grouped: bool = True) -> list[Any]:
    """Fork processes, let each act, and collect what they return, in the order of ranks.

    They have joined their process group when they act, unless `grouped` is false: the commands do so themselves.

    Raises:
        GroupError: one of them did not end well, or not in time; the message holds their errors.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    files = [work / f"rank{rank}.pt" for rank in range(size)]

    def rank_of(rank: int) -> None:
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        os.environ.update({name: str(value) for name, value in environment.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        with files[rank].with_suffix(".txt").open("w", buffering=1) as said:
            os.dup2(said.fileno(), 1)  # the lines of the parent are its own
            os.dup2(said.fileno(), 2)
            try:
                if grouped:
                    with process_group("cpu") as (world, _):
                        result = act(world)
                else:
                    result = act(Processes(rank, size, rank, size))
                torch.save(result, files[rank])
            except BaseException:
                traceback.print_exc(file=said)
                os._exit(1)

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=rank_of, args=(rank,)) for rank in range(size)]
    for process in processes:
        process.start()
    until = time.monotonic() + PATIENCE
    while any(process.is_alive() for process in processes) and time.monotonic() < until:
        if any(process.exitcode for process in processes):
            until = min(until, time.monotonic() + 15)  # the others wait for one that is gone
        processes[0].join(0.02)
    codes = [process.exitcode for process in processes]
    for process in processes:
        if process.is_alive():
            process.kill()
        process.join()
    if codes != [0] * size:
        said = " / ".join(file.with_suffix(".txt").read_text()[-400:] for file in files)
        raise GroupError(f"{size} processes ended with {codes} (None: had to be stopped): {said}")
    return [torch.load(file, weights_only=True) for file in files]
