"""How the cost of pruning grows: with depth, width, image size, classes and ranks, measured and on paper.

    python benchmarks/scaling.py run                     # all entries: about a quarter of an hour of one core
    python benchmarks/scaling.py run --only time-classes-   # some; a name that ends in "-" stands for all that begin so
    python benchmarks/scaling.py table                   # the generated part of docs/scaling.md from the JSON lines

Small models in a series for each axis, everything else as in the model they start from. Sides take turns as in bench.py, and
a line that is measured again on the same kind of device replaces the one before. Beside every measured ratio stands what
cost_model.py says from the shapes; its rates are fitted to the plain steps alone, so that what it says about pruning is a
prediction. The last tables are no measurement: what large runs take, from the same model and the assumptions beside it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bench import CYCLES, Entry, Machine, Shape, Training, _certificate, _meant, _resident_bytes, record, take_turns
from cost_model import (
    ESTIMATED,
    Rates,
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
from p3b.train.distributed import all_reduce_mean
from records import RESULTS, ROOT, read_lines, replace_part

SCRIPT = "benchmarks/scaling.py"
LINES = RESULTS / "scaling.jsonl"
PAGE = ROOT / "docs" / "scaling.md"
BEGIN = f"<!-- made from docs/results/scaling.jsonl by `python {SCRIPT} table`; do not edit -->"
END = "<!-- end of what is made from the lines -->"

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
RANKS = (1, 2)


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


def size_of(shape: Shape, batch: int) -> Size:
    """The same for the cost model."""
    given = shape.arguments
    grid = given["img_size"] // given["patch_size"]
    heads = given["num_heads"]
    return Size(given["depth"], given["embed_dim"], heads, grid, given["patch_size"], shape.classes, batch)


# --- measuring


def prune_options(side: str, shape: Shape) -> dict[str, Any] | None:
    """What the pruner of a side is given; None: plain training."""
    if side == "plain":
        return None
    if side == "gated":
        return {"keep_ratios": [0.5] * 2 * shape.arguments["depth"]}
    return {"prune_ratio": 0.5, "blocks_only": True, "estimator": side}  # where a head of many classes is most of the model


def training(side: str, shape: Shape, machine: Machine, precision: str) -> Training:
    """A side, with soft masks in place where it prunes."""
    options = prune_options(side, shape)
    return Training(shape, machine, precision, options, masked=options is not None)


def measure_time(shape: Shape, machine: Machine, precision: str, rounds: int) -> dict[str, Any]:
    """A plain step, a step with gates alone, a step with each estimator, and a mask update, in turns."""
    sides = {side: training(side, shape, machine, precision) for side in ("plain", "gated", *ESTIMATED)}
    pruner = sides["gated"].pruner
    assert pruner is not None
    sides["gated"].step()
    measured = pruner.state_dict()

    def renew() -> None:
        pruner.load_state_dict(measured)  # an update ends the interval: every one begins with the same measurements
        pruner._renew(5)

    acts = {name: side.step for name, side in sides.items()} | {"update": renew}
    repeats = {name: count for name, count in CYCLES.items() if name in acts}
    return {"sides": take_turns(machine, acts, rounds, repeats), "rounds": rounds, "batch": machine.batch_of(shape)}


def measure_memory(shape: Shape, machine: Machine, precision: str, rounds: int) -> dict[str, Any]:
    """The most memory that some steps take, each side in a process of its own that has loaded everything before."""
    with _server().Pool(1, maxtasksperchild=1) as pool:
        asked = [(side, shape, machine, precision, rounds) for side in ("plain", "gated", *ESTIMATED)]
        sides = {each[0]: {"peak_bytes": pool.apply(peak_bytes, each)} for each in asked}
    return {"sides": sides, "rounds": rounds, "batch": machine.batch_of(shape)}


def peak_bytes(side: str, shape: Shape, machine: Machine, precision: str, steps: int) -> int:
    """What this process takes at most in so many steps, beside what it held before the model was built.

    That is resident memory of the process on a CPU, allocated memory on a GPU.
    """
    torch.set_num_threads(1)
    on_gpu = machine.device.type == "cuda"
    before = 0 if on_gpu else _resident_bytes()
    trained = training(side, shape, machine, precision)
    for _ in range(steps):
        trained.step()
    return torch.cuda.max_memory_allocated(machine.device) if on_gpu else _resident_bytes() - before


class CountedMean:
    """The mean over all ranks, and a list of what it was asked for: numbers and dtype of each."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, torch.dtype]] = []

    def __call__(self, tensor: Tensor) -> Tensor:
        self.asked.append((tensor.numel(), tensor.dtype))
        return all_reduce_mean(tensor)

    def taken(self) -> list[tuple[int, torch.dtype]]:
        """What was asked for since the last time."""
        asked, self.asked = self.asked, []
        return asked


def measure_ranks(shape: Shape, machine: Machine, precision: str, rounds: int, ranks: int) -> dict[str, Any]:
    """What so many processes average, counted in real steps, and how long that takes beside a plain step of one of them.

    One thread each. Every act ends when all have come there, so that none is charged for having waited for another's work.
    """
    with tempfile.TemporaryDirectory() as folder, _server().Pool(ranks, maxtasksperchild=1) as pool:
        asked = [(rank, ranks, f"{folder}/store", shape, machine, precision, rounds) for rank in range(ranks)]
        sides = pool.starmap(of_rank, asked, chunksize=1)[0]
    return {"sides": sides, "ranks": ranks, "rounds": rounds, "batch": machine.batch_of(shape)}


def of_rank(
    rank: int, ranks: int, store: str, shape: Shape, machine: Machine, precision: str, rounds: int
) -> dict[str, dict[str, Any]]:
    """What one process of a group finds; see `measure_ranks`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    try:
        trained = training("plain", shape, machine, precision)
        numbers = sum(parameter.numel() for parameter in trained._model.parameters())
        averaged = {"gradients": [(numbers, torch.float32)]}
        for side in ESTIMATED:
            averaged |= {side if what == "step" else "update": asked for what, asked in reduced(side, shape, machine)}
        acts: dict[str, Callable[[], object]] = {"plain": trained.step}
        acts |= {name: _averaging(asked) for name, asked in averaged.items()}
        found = take_turns(machine, {name: _together(act) for name, act in acts.items()}, rounds)
        for name, asked in averaged.items():
            found[name] |= {"bytes": sum(count * dtype.itemsize for count, dtype in asked), "reductions": len(asked)}
        return found
    finally:
        dist.destroy_process_group()


def reduced(estimator: str, shape: Shape, machine: Machine) -> Iterator[tuple[str, list[tuple[int, torch.dtype]]]]:
    """What a real step of pruning averages, and a real mask update: ("step", ...) and ("update", ...)."""
    mean = CountedMean()
    pruned = Training(shape, machine, "fp32", {**(prune_options(estimator, shape) or {}), "reduce": mean})
    pruned.step()  # asks, once, whether it is alone
    mean.taken()
    pruned.step()
    yield "step", mean.taken()
    assert pruned.pruner is not None
    pruned.pruner._renew(5)
    yield "update", mean.taken()


def _averaging(asked: Sequence[tuple[int, torch.dtype]]) -> Callable[[], object]:
    tensors = [torch.zeros(count, dtype=dtype) for count, dtype in asked]
    return lambda: [all_reduce_mean(tensor) for tensor in tensors]


def _together(act: Callable[[], object]) -> Callable[[], object]:
    def acted() -> None:
        act()
        dist.barrier()

    return acted


def _server() -> Any:
    """Processes that fork from one which has loaded everything and done nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["timm", "p3b.pruner"])
    return context


SHAPES: dict[str, Shape] = {f"{axis}-{value}": shape_of(**{axis: value}) for axis, values in AXES.items() for value in values}
ENTRIES: dict[str, Entry] = {f"time-{name}": Entry("time", name, "fp32", measure_time, {}) for name in SHAPES}
ENTRIES |= {f"memory-{name}": Entry("memory", name, "fp32", measure_memory, {}, rounds=2) for name in SHAPES}
ENTRIES |= {
    f"ranks-{ranks}": Entry("ranks", "classes-1000", "fp32", measure_ranks, {"ranks": ranks}, rounds=7) for ranks in RANKS
}


# --- the assumptions of large runs


@dataclass(frozen=True)
class Accelerator:
    """What is assumed of a GPU. Rates are what its maker states; `share` is what training reaches of them, low and high.

    Source: NVIDIA A100 80GB SXM data sheet (dense bf16 and float64 on tensor cores, memory bandwidth, NVLink in one direction).
    """

    title: str = "NVIDIA A100 80GB SXM"
    bf16: float = 312e12
    float64: float = 19.5e12
    memory: float = 2.039e12
    link: float = 300e9
    share: tuple[float, float] = (0.30, 0.45)
    link_share: float = 0.5


@dataclass(frozen=True)
class DataSet:
    """A data set to train on. Sources: Russakovsky et al. 2015 (ImageNet-1k); the competition pages of iNaturalist."""

    title: str
    images: int
    classes: int


DATA = (
    DataSet("iNaturalist 2019", 265_213, 1_010),
    DataSet("ImageNet-1k", 1_281_167, 1_000),
    DataSet("iNaturalist 2018", 437_513, 8_142),
)
GPU, GPUS, PER_GPU, PRUNING_EPOCHS, FINETUNING_EPOCHS, UPDATES = Accelerator(), 8, 64, 50, 300, 3
KEPT = 0.5
"""Share of multiply-accumulates that fine-tuning the small model is reckoned with."""


def deit_base(classes: int) -> Size:
    """DeiT-Base at 224 pixels under bf16, with the batch of one GPU."""
    return Size(12, 768, 12, 14, 16, classes, PER_GPU, feature_bytes=2)


@dataclass(frozen=True)
class Projection:
    """What pruning DeiT-Base takes on all GPUs, at one share of the peak.

    Attributes:
        plain_step, added: seconds of a plain step; seconds that pruning adds by computing, and by averaging.
        epoch: hours of an epoch of plain training.
        pruning: hours of all epochs of pruning.
        finetuning: hours of fine-tuning the small model.
        bytes_step: what each GPU hands over to be averaged in a step beside the model's gradients.
    """

    plain_step: float
    computing: float
    averaging: float
    epoch: float
    pruning: float
    finetuning: float
    bytes_step: int

    @property
    def ratio(self) -> float:
        return 1 + (self.computing + self.averaging) / self.plain_step


def project(estimator: str | None, data: DataSet, share: float) -> Projection:
    """The arithmetic of a large run; every number in it is an assumption or counted from shapes.

    A plain step takes 2 x its multiply-accumulates / (share x peak): its memory traffic and the averaging of its gradients,
    which hides behind the backward pass, are in the share. What pruning adds is reckoned in full and hides behind nothing:
    multiply-accumulates and traffic at the same share of their peaks, what is averaged at `link_share` of a ring's links.
    """
    size = deit_base(data.classes)
    rates = Rates(2 / (share * GPU.bf16), 2 / (share * GPU.float64), 1 / (share * GPU.memory), 0.0)
    plain_step = plain(size).macs * rates.mac
    added = gates(size) + (probes(estimator, size, GPUS) if estimator else Work())
    handed = wire(estimator, size).step
    averaging = Wire.sent(handed, GPUS) / (GPU.link_share * GPU.link)
    steps = data.images // (GPUS * PER_GPU)
    epoch = steps * plain_step
    pruning = PRUNING_EPOCHS * (epoch + steps * (rates.seconds(added) + averaging) + UPDATES * rates.seconds(update(size)))
    finetuning = FINETUNING_EPOCHS * KEPT * epoch
    return Projection(plain_step, rates.seconds(added), averaging, epoch / 3600, pruning / 3600, finetuning / 3600, handed)


# --- tables


def predicted(side: str, size: Size) -> Work:
    """Work of a whole act of a side of `measure_time`."""
    if side == "update":
        return update(size)
    pruned = plain(size) if side == "plain" else plain(size) + gates(size)
    return pruned + probes(side, size) if side in ESTIMATED else pruned


def predicted_bytes(side: str, size: Size) -> int:
    """Memory that a side of `measure_memory` takes."""
    pruned = memory_plain(size) + (0 if side == "plain" else memory_gates(size))
    return pruned + (memory_probes(side, size).total if side in ESTIMATED else 0)


def tables(lines: Sequence[dict[str, Any]], shapes: Mapping[str, Shape] = SHAPES) -> str:
    """The generated part of the page, made from the lines, the cost model and the assumptions alone."""
    order = {name: number for number, name in enumerate(ENTRIES)}
    lines = sorted(lines, key=lambda line: (line["device"], order.get(line["name"], len(order))))
    text: list[str] = []
    for device in dict.fromkeys(line["device"] for line in lines):
        here = [line for line in lines if line["device"] == device]
        text += _time_tables([line for line in here if line["table"] == "time"], shapes)
        text += _memory_tables([line for line in here if line["table"] == "memory"], shapes)
        text += _ranks_table([line for line in here if line["table"] == "ranks"], shapes)
    text += _projection_tables()
    text += ["### How it was run", ""] + [f"- {_certificate(line)}" for line in lines]
    return "\n".join(text if lines else [*text, "No run is recorded."]) + "\n"


def _time_tables(lines: Sequence[dict[str, Any]], shapes: Mapping[str, Shape]) -> list[str]:
    if not lines:
        return []
    sizes = [size_of(shapes[line["shape"]], line["result"]["batch"]) for line in lines]
    steps = [(plain(size), line["result"]["sides"]["plain"]["seconds"]) for size, line in zip(sizes, lines, strict=True)]
    rates = fit(steps)
    misses = [abs(rates.seconds(work) / seconds - 1) for work, seconds in steps]
    text = [
        "### Time",
        "",
        f"Rates fitted to the {len(steps)} plain steps: {_rate(rates.mac, 1e9)} billion multiply-accumulates a second, "
        f"{_rate(rates.byte, 1e9)} GB a second, {rates.operator * 1e6:.1f} microseconds an operator; they miss a plain step by "
        f"{statistics.median(misses):.0%} (median) and {max(misses):.0%} (most).",
        "",
    ]
    sides = ("gated", *ESTIMATED)
    for axis, found in _by_axis(lines):
        text += [
            f"| {TITLES[axis]} | plain step | {' | '.join(sides)} | a mask update |",
            "|---|---:" + "|---:" * (len(sides) + 1) + "|",
        ]
        for value, line in found:
            size, told = size_of(shapes[line["shape"]], line["result"]["batch"]), line["result"]["sides"]
            base = rates.seconds(plain(size))
            expected = {side: rates.seconds(predicted(side, size)) / base for side in sides}
            cells = [f"{told[side]['ratio']:.2f} / {expected[side]:.2f}" if side in told else "" for side in sides]
            cells += [f"{1000 * told['update']['seconds']:.1f} ms"]
            text.append(f"| {value:,} | {1000 * told['plain']['seconds']:,.0f} ms | {' | '.join(cells)} |")
        text.append("")
    return text


def _memory_tables(lines: Sequence[dict[str, Any]], shapes: Mapping[str, Shape]) -> list[str]:
    if not lines:
        return []
    text = ["### Memory", ""]
    sides = ("gated", *ESTIMATED)
    for axis, found in _by_axis(lines):
        text += [f"| {TITLES[axis]} | plain step | {' | '.join(sides)} |", "|---|---:" + "|---:" * len(sides) + "|"]
        for value, line in found:
            size = size_of(shapes[line["shape"]], line["result"]["batch"])
            peaks = {side: told["peak_bytes"] for side, told in line["result"]["sides"].items()}
            cells = [f"{_mib(peaks['plain'])} / {_mib(predicted_bytes('plain', size))} MiB"]
            for side in sides:
                paper = predicted_bytes(side, size) - predicted_bytes("plain", size)
                more = None if side not in peaks else peaks[side] - peaks["plain"]
                cells.append("" if more is None else f"{_mib(more, sign='+')} / {_mib(paper, sign='+')}")
            text.append(f"| {value:,} | {' | '.join(cells)} |")
        text.append("")
    return text


def _ranks_table(lines: Sequence[dict[str, Any]], shapes: Mapping[str, Shape]) -> list[str]:
    if not lines:
        return []
    text = [
        "### Ranks",
        "",
        "| processes | what is averaged | reductions | bytes, counted | bytes, on paper | each sends | "
        "processor time, of a plain step | on the wall |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for line in lines:
        size, ranks = size_of(shapes[line["shape"]], line["result"]["batch"]), line["result"]["ranks"]
        for name, told in line["result"]["sides"].items():
            if name == "plain":
                continue
            paper = f"{handed_over(name, size):,}" if ranks > 1 else "-"  # a single process keeps to itself what it can
            sent = Wire.sent(told["bytes"], ranks)
            text.append(
                f"| {ranks} | {_AVERAGED[name]} | {told['reductions']} | {told['bytes']:,} | {paper} | {sent:,.0f} | "
                f"{told['ratio']:.3f} | {told['wall_ratio']:.3f} |"
            )
    return [*text, ""]


_AVERAGED = {
    "gradients": "gradients of the model, a step",
    "update": "scores, a mask update",
    **{side: f"what pruning by `{side}` adds, a step" for side in ESTIMATED},
}


def handed_over(side: str, size: Size) -> int:
    """Bytes that a side of `measure_ranks` hands over to be averaged, on paper."""
    if side == "gradients":
        return wire_gradients(size)
    return wire("linear", size).update if side == "update" else wire(side, size).step


def _projection_tables() -> list[str]:
    low, high = GPU.share
    size = deit_base(1000)
    images = [share * GPU.bf16 * size.batch / (2 * plain(size).macs) for share in GPU.share]
    text = [
        "### DeiT-Base on 8 GPUs, on paper",
        "",
        "| assumption | value |",
        "|---|---|",
        f"| GPUs | {GPUS} x {GPU.title}: {GPU.bf16 / 1e12:.0f} TFLOP/s bf16, {GPU.float64 / 1e12:.1f} TFLOP/s float64, "
        f"{GPU.memory / 1e12:.3f} TB/s memory, {GPU.link / 1e9:.0f} GB/s links (data sheet) |",
        f"| share of peak that training reaches | {low:.0%} to {high:.0%} of arithmetic and of memory bandwidth; "
        f"{GPU.link_share:.0%} of the links |",
        f"| batch | {PER_GPU} a GPU, {GPUS * PER_GPU} together; data loading keeps up |",
        f"| a step's products | {plain(size).macs / 1e12:.2f}e12 multiply-accumulates a GPU at 1,000 classes, "
        "2 operations each |",
        f"| so plain training | 2 x {plain(size).macs / 1e12:.2f}e12 / (share x {GPU.bf16 / 1e12:.0f}e12) seconds a step: "
        f"{images[0]:,.0f} to {images[1]:,.0f} images a second and GPU |",
        f"| epochs | {PRUNING_EPOCHS} of pruning, {FINETUNING_EPOCHS} of fine-tuning at {KEPT:.0%} of the arithmetic; "
        f"{UPDATES} mask updates an epoch; evaluation left out |",
        "",
        "Hours and ratios from the high to the low share of the peak. Memory beside a plain step is per GPU.",
        "",
        f"| data | estimator | epoch, plain | step, of a plain one | {PRUNING_EPOCHS} epochs of pruning | "
        f"{FINETUNING_EPOCHS} of fine-tuning | more memory | more to average a step |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for data in DATA:
        for estimator in (None, *ESTIMATED):
            size = deit_base(data.classes)
            slow, fast = (project(estimator, data, share) for share in GPU.share)
            extra = memory_gates(size) + (memory_probes(estimator, size, GPUS).total if estimator else 0)
            text.append(
                f"| {data.title} ({data.images:,} images, {data.classes:,} classes) | {estimator or 'none (gates alone)'} | "
                f"{_range(60 * fast.epoch, 60 * slow.epoch)} min | {_range(*sorted((fast.ratio, slow.ratio)), digits=2)} | "
                f"{_range(fast.pruning, slow.pruning)} h | {_range(fast.finetuning, slow.finetuning)} h | "
                f"{extra / 1e9:.2f} GB | {fast.bytes_step / 1e6:,.1f} MB |"
            )
    size = deit_base(DATA[0].classes)
    text += [
        "",
        f"A plain step holds {memory_plain(size) / 1e9:.1f} GB on this reckoning and averages "
        f"{wire_gradients(size) / 1e6:.0f} MB of gradients. Where the added seconds come from, at the high share of the peak, "
        "as shares of a plain step:",
        "",
        "| data | estimator | products | products in float64 | solving in float64 | memory traffic | averaging |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for data in DATA:
        for estimator in (None, *ESTIMATED):
            added = gates(deit_base(data.classes)) + (probes(estimator, deit_base(data.classes), GPUS) if estimator else Work())
            told = project(estimator, data, high)
            parts = (
                2 * added.macs / GPU.bf16,
                2 * added.macs64 / GPU.float64,
                2 * added.solve64 / GPU.float64,
                added.traffic / GPU.memory,
            )
            shares = [f"{part / high / told.plain_step:.1%}" for part in parts] + [f"{told.averaging / told.plain_step:.1%}"]
            text.append(f"| {data.title} | {estimator or 'none (gates alone)'} | {' | '.join(shares)} |")
    return [*text, ""]


def _by_axis(lines: Sequence[dict[str, Any]]) -> Iterator[tuple[str, list[tuple[int, dict[str, Any]]]]]:
    for axis in AXES:
        found = [(int(line["shape"].partition("-")[2]), line) for line in lines if line["shape"].startswith(f"{axis}-")]
        if found:
            yield axis, found


def _rate(seconds: float, unit: float) -> str:
    return f"{1 / seconds / unit:,.1f}" if seconds else "any number of"


def _mib(count: float, sign: str = "") -> str:
    return f"{count / 2**20:{sign},.0f}"


def _range(low: float, high: float, digits: int = 1) -> str:
    first, last = f"{low:,.{digits}f}", f"{high:,.{digits}f}"
    return first if first == last else f"{first} to {last}"


def write_page(page: Path, lines: Sequence[dict[str, Any]], shapes: Mapping[str, Shape] = SHAPES) -> None:
    """Put the tables between the markers of the page; what is written around them stays."""
    replace_part(page, BEGIN, END, tables(lines, shapes))


def main(
    arguments: Sequence[str] | None = None,
    *,
    entries: Mapping[str, Entry] = ENTRIES,
    shapes: Mapping[str, Shape] = SHAPES,
    lines: Path = LINES,
    page: Path = PAGE,
) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "table"))
    parser.add_argument("--only", metavar="NAME", help=f"this entry alone, or all that begin so: {', '.join(entries)}")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU; threads that wait for each other burn its time")
    parser.add_argument("--rounds", type=int, help="rounds of every entry, in place of its own number")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    if given.action == "run":
        chosen = [name for name in entries if _meant(name, given.only)]
        if not chosen:
            parser.error(f"unknown entry '{given.only}'; known: {', '.join(entries)}")
        for name in chosen:
            line = record(name, entries[name], Machine(torch.device(given.device)), shapes, given.rounds, lines, SCRIPT)
            print(f"{name}: {json.dumps(line['result'])}", flush=True)
    write_page(page, read_lines(lines), shapes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
