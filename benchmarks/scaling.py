"""How does the cost of pruning grow with depth, width, image size, classes and ranks?

    python benchmarks/scaling.py run                        # everything: about a quarter of an hour of one core
    python benchmarks/scaling.py run --only time-classes-   # all measurements whose name begins so
    python benchmarks/scaling.py table                      # the tables of docs/scaling.md from the JSON lines

Small models in a series for each axis, everything else as in the model they start from. Sides take turns as in bench.py, and
a line that is measured again on the same kind of device replaces the one before. Beside every measured ratio stands what
cost_model.py says from the shapes; its rates are fitted to the plain steps alone, so that what it says about pruning is a
prediction. The last tables are no measurement: what large runs would take, see projection.py.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import large
import projection
from cost_model import (
    ESTIMATED,
    Size,
    Wire,
    Work,
    fit,
    gates,
    memory_gates,
    memory_plain,
    memory_probes,
    plain,
    probes,
    update,
    wire,
    wire_gradients,
)
from harness.command import Bench, Given, machine_flags, main
from harness.pages import Part, how_it_was_run, table
from harness.records import RESULTS, ROOT, Line
from harness.turns import Machine, take_turns
from p3b.train.distributed import all_reduce_mean
from training import CYCLES, Entry, Shape, Training, measure_memory, preloaded, rounds_of

MODEL, BATCH, ROUNDS = "vit_tiny_patch16_224", 8, 3
START: Mapping[str, int] = {"depth": 3, "width": 128, "image": 64, "classes": 100}
"""The model that every series starts from."""
PATCH, HEAD_WIDTH = 8, 64
AXES: Mapping[str, tuple[int, ...]] = {
    "depth": (3, 6, 12, 24),
    "width": (64, 128, 192, 384),
    "image": (32, 64, 96, 160),
    "classes": (10, 100, 1_000, 10_000),
}
TITLES = {
    "depth": "Depth (timm blocks)",
    "width": "Width",
    "image": f"Image size (pixels; patches of {PATCH})",
    "classes": "Classes",
}
LARGE: Mapping[str, int] = {"fp32": 32, "bf16": 64}
"""Images of a batch, by precision, that memory is measured with at the width of ViT-L/16 at 224 pixels."""
LARGE_BLOCKS = 4
"""Of ViT-L's 24 blocks."""
LARGE_SIDES = ("plain", "gated", "linear", "low_rank")
RANKS = (1, 2)
PRUNING = ("gated", *ESTIMATED)
SIDES = ("plain", *PRUNING)


def shape_of(**values: int) -> Shape:
    """The model that the series start from, with some values changed."""
    chosen = {**START, **values}
    arguments = {
        "img_size": chosen["image"],
        "patch_size": PATCH,
        "embed_dim": chosen["width"],
        "depth": chosen["depth"],
        "num_heads": chosen["width"] // HEAD_WIDTH,
    }
    title = ", ".join(f"{name} {value}" for name, value in chosen.items())
    return Shape(title, MODEL, BATCH, ROUNDS, arguments, chosen["classes"])


def size_of(shape: Shape, batch: int, precision: str = "fp32") -> Size:
    """The same for the cost model."""
    given = shape.arguments
    grid = given["img_size"] // given["patch_size"]
    sizes = (given["depth"], given["embed_dim"], given["num_heads"], grid, given["patch_size"], shape.classes, batch)
    return Size(*sizes, feature_bytes=2 if precision == "bf16" else 4)


# --- measuring


def prune_options(side: str, shape: Shape) -> dict[str, Any] | None:
    """What the pruner of a side is given: only blocks are pruned, since a head of many classes is most of a small model."""
    return shape.prune_options(side, blocks_only=True)


def training(side: str, shape: Shape, machine: Machine, precision: str) -> Training:
    """A side, with soft masks in place where it prunes."""
    options = prune_options(side, shape)
    return Training(shape, machine, precision, options, masked=options is not None)


def measure_time(shape: Shape, machine: Machine, precision: str, rounds: int) -> dict[str, Any]:
    """A plain step, a step with gates alone, a step with each estimator, and a mask update, in turns."""
    sides = {side: training(side, shape, machine, precision) for side in SIDES}
    acts = {name: side.step for name, side in sides.items()} | {"update": sides["gated"].mask_update()}
    return {"sides": take_turns(machine, acts, rounds, CYCLES)}


def measure_peaks(shape: Shape, machine: Machine, precision: str, rounds: int, names: Sequence[str] = SIDES) -> dict[str, Any]:
    """The most memory that some steps of each side take."""
    return measure_memory({side: prune_options(side, shape) for side in names}, shape, machine, precision, rounds)


def measure_ranks(shape: Shape, machine: Machine, precision: str, rounds: int, ranks: int) -> dict[str, Any]:
    """What so many processes average, counted in real steps, and how long that takes beside a plain step of one of them.

    One thread each. Every act ends when all have come there, so that none is charged for having waited for another's work.
    """
    with tempfile.TemporaryDirectory() as folder, preloaded().Pool(ranks, maxtasksperchild=1) as pool:
        asked = [(rank, ranks, f"{folder}/store", shape, machine, precision, rounds) for rank in range(ranks)]
        sides = pool.starmap(of_rank, asked, chunksize=1)[0]
    return {"sides": sides, "ranks": ranks}


def of_rank(
    rank: int, ranks: int, store: str, shape: Shape, machine: Machine, precision: str, rounds: int
) -> dict[str, dict[str, Any]]:
    """What one process of a group finds; see `measure_ranks`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    try:
        trained = training("plain", shape, machine, precision)
        numbers = sum(parameter.numel() for parameter in trained.model.parameters())
        averaged = {"gradients": [(numbers, torch.float32)]}
        for side in ESTIMATED:
            found = reduced(side, shape, machine)
            averaged |= {side: found["step"], "update": found["update"]}
        acts: dict[str, Callable[[], object]] = {"plain": trained.step}
        acts |= {name: _averaging(asked) for name, asked in averaged.items()}
        sides = take_turns(machine, {name: _together(act) for name, act in acts.items()}, rounds)
        for name, asked in averaged.items():
            sides[name] |= {"bytes": sum(count * dtype.itemsize for count, dtype in asked), "reductions": len(asked)}
        return sides
    finally:
        dist.destroy_process_group()


def reduced(estimator: str, shape: Shape, machine: Machine) -> dict[str, list[tuple[int, torch.dtype]]]:
    """Numbers and dtype of every mean over ranks that is asked for: in a real "step" of pruning, and in a mask "update"."""
    asked: list[tuple[int, torch.dtype]] = []

    def mean(tensor: Tensor) -> Tensor:
        asked.append((tensor.numel(), tensor.dtype))
        return all_reduce_mean(tensor)

    pruned = Training(shape, machine, "fp32", {**(prune_options(estimator, shape) or {}), "reduce": mean})
    assert pruned.pruner is not None
    pruned.step()  # asks, once, whether it is alone
    found = {}
    for name, act in (("step", pruned.step), ("update", partial(pruned.pruner._renew, 5))):
        asked.clear()
        act()
        found[name] = list(asked)
    return found


def _averaging(asked: Sequence[tuple[int, torch.dtype]]) -> Callable[[], object]:
    tensors = [torch.zeros(count, dtype=dtype) for count, dtype in asked]
    return lambda: [all_reduce_mean(tensor) for tensor in tensors]


def _together(act: Callable[[], object]) -> Callable[[], object]:
    return lambda: (act(), dist.barrier())


SHAPES: dict[str, Shape] = {f"{axis}-{value}": shape_of(**{axis: value}) for axis, values in AXES.items() for value in values}
LARGE_SHAPES = {
    f"large-{precision}": Shape(
        f"{LARGE_BLOCKS} of 24 blocks of ViT-L/16",
        MODEL,
        images,
        ROUNDS,
        {"img_size": 224, "patch_size": 16, "embed_dim": 1024, "depth": LARGE_BLOCKS, "num_heads": 16},
        1_000,
    )
    for precision, images in LARGE.items()
}
ENTRIES: dict[str, Entry] = {
    **{f"time-{name}": Entry("time", name, "fp32", measure_time) for name in SHAPES},
    **{f"memory-{name}": Entry("memory", name, "fp32", measure_peaks, 2) for name in SHAPES},
    **{
        f"memory-{n}": Entry("large", n, n.partition("-")[2], partial(measure_peaks, names=LARGE_SIDES), 2)
        for n in LARGE_SHAPES
    },
    **{f"ranks-{n}": Entry("ranks", "classes-1000", "fp32", partial(measure_ranks, ranks=n), 7) for n in RANKS},
}


def measure(name: str, given: Given) -> dict[str, Any]:
    return ENTRIES[name].run(SHAPES | LARGE_SHAPES, given)


# --- tables


def predicted(side: str, size: Size) -> Work:
    """Work of a whole act of a side of `measure_time`."""
    if side == "update":
        return update(size)
    pruned = plain(size) if side == "plain" else plain(size) + gates(size)
    return pruned + probes(side, size) if side in ESTIMATED else pruned


def predicted_bytes(side: str, size: Size) -> int:
    """Memory that a side of `measure_peaks` takes."""
    pruned = memory_plain(size) + (0 if side == "plain" else memory_gates(size))
    return pruned + (memory_probes(side, size).total if side in ESTIMATED else 0)


def handed_over(side: str, size: Size) -> int:
    """Bytes that a side of `measure_ranks` hands over to be averaged, on paper."""
    if side == "gradients":
        return wire_gradients(size)
    return wire("linear", size).update if side == "update" else wire(side, size).step


def tables(lines: Sequence[Line]) -> list[str]:
    """All tables, made from the lines, the cost model and the assumptions alone."""
    order = list(ENTRIES)
    lines = sorted(lines, key=lambda line: (line["device"], order.index(line["name"])))
    text: list[str] = []
    for device in dict.fromkeys(line["device"] for line in lines):
        here = [line for line in lines if line["device"] == device]
        for kind, made in KINDS:
            if found := [line for line in here if line["table"] == kind]:
                text += made(found)
    return [*text, *large.tables(), *projection.tables(), *how_it_was_run(lines, *rounds_of(lines))]


def _size(line: Line) -> Size:
    return size_of((SHAPES | LARGE_SHAPES)[line["shape"]], line["result"]["batch"], line["precision"])


def _time_tables(lines: Sequence[Line]) -> list[str]:
    steps = [(plain(_size(line)), line["result"]["sides"]["plain"]["seconds"]) for line in lines]
    rates = fit(steps)
    misses = [abs(rates.seconds(work) / seconds - 1) for work, seconds in steps]

    def row(size: Size, sides: Mapping[str, Any]) -> list[str]:
        base = rates.seconds(plain(size))
        cells = [
            f"{sides[side]['ratio']:.2f} / {rates.seconds(predicted(side, size)) / base:.2f}" if side in sides else ""
            for side in PRUNING
        ]
        return [f"{1000 * sides['plain']['seconds']:,.0f} ms", *cells, f"{1000 * sides['update']['seconds']:.1f} ms"]

    text = ["### Time", "", *_by_axis(lines, ("plain step", *PRUNING, "a mask update"), row)]
    return [
        *text,
        f"Rates fitted to the {len(steps)} plain steps: {_rate(rates.mac, 1e9)} billion multiply-accumulates a second, "
        f"{_rate(rates.byte, 1e9)} GB a second, {rates.operator * 1e6:.1f} microseconds an operator; they miss a plain step by "
        f"{statistics.median(misses):.0%} (median) and {max(misses):.0%} (most).",
        "",
    ]


def _memory_tables(lines: Sequence[Line]) -> list[str]:
    def row(size: Size, sides: Mapping[str, Any]) -> list[str]:
        measured = {side: told["peak_bytes"] for side, told in sides.items()}
        paper = {side: predicted_bytes(side, size) for side in SIDES}
        more = [
            f"{_mib(measured[side] - measured['plain'], '+')} / {_mib(paper[side] - paper['plain'], '+')}"
            if side in measured
            else ""
            for side in PRUNING
        ]
        return [f"{_mib(measured['plain'])} / {_mib(paper['plain'])} MiB", *more]

    return ["### Memory", "", *_by_axis(lines, ("plain step", *PRUNING), row)]


def _by_axis(lines: Sequence[Line], head: Sequence[str], row: Callable[[Size, Mapping[str, Any]], list[str]]) -> Iterator[str]:
    """A table for each axis."""
    for axis, title in TITLES.items():
        rows = [
            [f"{int(line['shape'].partition('-')[2]):,}", *row(_size(line), line["result"]["sides"])]
            for line in lines
            if line["shape"].startswith(f"{axis}-")
        ]
        yield from table([title, *head], rows) if rows else ()


_AVERAGED = {
    "gradients": "gradients of the model, a step",
    "update": "scores, a mask update",
    **{side: f"what pruning by `{side}` adds, a step" for side in ESTIMATED},
}


def _ranks_table(lines: Sequence[Line]) -> list[str]:
    head = ["processes", "what is averaged", "reductions", "bytes, counted", "bytes, on paper", "each sends"]
    head += ["processor time, relative to a plain step", "on the wall"]
    rows = []
    for line in lines:
        size, ranks = _size(line), line["result"]["ranks"]
        for name, told in line["result"]["sides"].items():
            if name != "plain":
                paper = f"{handed_over(name, size):,}" if ranks > 1 else "-"  # a single process keeps to itself what it can
                sent = Wire.sent(told["bytes"], ranks)
                row = [str(ranks), _AVERAGED[name], str(told["reductions"]), f"{told['bytes']:,}", paper, f"{sent:,.0f}"]
                rows.append([*row, f"{told['ratio']:.3f}", f"{told['wall_ratio']:.3f}"])
    return ["### Ranks", "", *table(head, rows, text=2)]


def _large_table(lines: Sequence[Line]) -> list[str]:
    rows = []
    for line in lines:
        size, sides = _size(line), line["result"]["sides"]
        plain_bytes, on_paper = sides["plain"]["peak_bytes"], predicted_bytes("plain", size)
        more = [
            f"{_mib(sides[side]['peak_bytes'] - plain_bytes, '+')} MiB ({sides[side]['peak_bytes'] / plain_bytes - 1:+.1%}) / "
            f"{predicted_bytes(side, size) / on_paper - 1:+.1%}"
            for side in LARGE_SIDES[1:]
        ]
        rows.append([line["precision"], str(size.batch), f"{_mib(plain_bytes)} / {_mib(on_paper)} MiB", *more])
    shape = next(iter(LARGE_SHAPES.values()))
    return [
        f"### Memory at ViT-L's width: {shape.title}, {shape.classes:,} classes",
        "",
        *table(["precision", "images", "plain step", *LARGE_SIDES[1:]], rows),
    ]


def _rate(seconds: float, unit: float) -> str:
    return f"{1 / seconds / unit:,.1f}" if seconds else "any number of"


def _mib(count: float, sign: str = "") -> str:
    return f"{count / 2**20:{sign},.0f}"


KINDS = (("time", _time_tables), ("memory", _memory_tables), ("large", _large_table), ("ranks", _ranks_table))
"""What is made of the lines of each kind."""
PART = Part("scaling.py", RESULTS / "scaling.jsonl", ROOT / "docs" / "scaling.md", tables)
BENCH = Bench(__doc__, PART, tuple(ENTRIES), measure, machine_flags)

if __name__ == "__main__":
    sys.exit(main(BENCH))
