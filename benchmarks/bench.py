"""What pruning costs beside plain training, measured side by side.

    python benchmarks/bench.py run                         # all entries: about half an hour on 2 cores that do nothing else
    python benchmarks/bench.py run --only gates-tiny-fp32  # one entry; a name that ends in "-" stands for all that begin so
    python benchmarks/bench.py run --device cuda           # on a GPU, with batches of 128
    python benchmarks/bench.py table                       # the tables of docs/performance.md from the JSON lines

Every figure is a ratio of two sides that took turns in one run: in each round every side does one step, and the ratio is the
median over rounds of one side's time by the other's. The clock is the processor time of this process on a CPU, so that other
work on the machine counts little, and the wall clock, with synchronisation, on a GPU. An entry that is measured again on the
same kind of device replaces its line in docs/results/performance.jsonl.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import p3b
from p3b.scoring.estimators import ESTIMATORS
from p3b.scoring.ridge import SOLVE_EVERY
from p3b.storage.files import write_atomically
from p3b.vit.attention import choose_attention
from records import RESULTS, ROOT, circumstances, machine_of, packages_of, read_lines, replace_part, revision_of, versions

LINES = RESULTS / "performance.jsonl"
PAGE = ROOT / "docs" / "performance.md"
BEGIN = "<!-- made from docs/results/performance.jsonl by `python benchmarks/bench.py table`; do not edit -->"
END = "<!-- end of what is made from the lines -->"

CLASSES = 100
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16}
CYCLES = {"ridge": SOLVE_EVERY, "subsampled": 4}
"""Steps after which the work of an estimator repeats, where they differ."""
EPOCH_STEPS = 100
"""Steps of the epoch that a share of training time is told for: a short one, since longer ones make the share smaller."""


@dataclass(frozen=True)
class Shape:
    """A model to measure with: what timm builds it from, and the images of a batch on a CPU."""

    title: str
    model: str
    cpu_batch: int
    rounds: int
    arguments: Mapping[str, int]
    classes: int = CLASSES

    def build(self) -> VisionTransformer:
        torch.manual_seed(0)
        return timm.create_model(self.model, num_classes=self.classes, drop_path_rate=0.1, **self.arguments).train()


SHAPES: Mapping[str, Shape] = {
    "tiny": Shape("DeiT-Tiny", "deit_tiny_patch16_224", 16, 11, {}),
    "small": Shape("DeiT-Small", "deit_small_patch16_224", 8, 9, {}),
}


@dataclass(frozen=True)
class Machine:
    """Where a measurement runs."""

    device: torch.device

    def batch_of(self, shape: Shape) -> int:
        return shape.cpu_batch if self.device.type == "cpu" else 128

    def now(self) -> tuple[float, float]:
        """(seconds that count, seconds on the wall); everything that was asked for is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return time.perf_counter(), time.perf_counter()
        return time.process_time(), time.perf_counter()

    def seconds(self, act: Callable[[], object]) -> tuple[float, float]:
        counted, wall = self.now()
        act()
        counted_after, wall_after = self.now()
        return counted_after - counted, wall_after - wall


class Training:
    """One side: a model, its optimizer and perhaps a pruner, doing steps of the published loop on one batch.

    Args:
        shape: of the model.
        machine: where it trains.
        precision: "fp32" or "bf16" (autocast).
        prune: arguments of the pruner beside its schedule, which is in the phase of pruning throughout; None: plain training.
        masked: decide on masks from a step of its own first, so that soft ones are in place.
    """

    def __init__(
        self, shape: Shape, machine: Machine, precision: str, prune: Mapping[str, Any] | None = None, masked: bool = False
    ) -> None:
        self._machine, self._precision, batch = machine, precision, machine.batch_of(shape)
        self._model = choose_attention(shape.build(), machine.device, AUTOCAST[precision]).to(machine.device)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-4)
        size = self._model.patch_embed.img_size
        self._images = torch.randn(batch, 3, *size, device=machine.device)
        self._targets = torch.randint(shape.classes, (batch,), device=machine.device)
        self.pruner: p3b.Pruner | None = None
        if prune is not None:
            first_update = 1 if masked else 10**6
            # Past `sparse` by then: the keep ratios have reached their goals, and the masks are soft.
            schedule = p3b.Schedule(start=0, sparse=1, final=10**6, update_every=first_update)
            self.pruner = p3b.Pruner(self._model, schedule=schedule, **prune)
            if masked:
                self.step()
                self.pruner.schedule = p3b.Schedule(start=0, sparse=1, final=10**6, update_every=10**6 - 1)

    def step(self) -> None:
        with torch.autocast(self._machine.device.type, torch.bfloat16, enabled=self._precision == "bf16"):
            loss = nn.functional.cross_entropy(self._model(self._images).float(), self._targets)
            if self.pruner is not None:
                loss = loss + self.pruner.loss(nn.functional.cross_entropy, self._targets)
        loss.backward()
        if self.pruner is not None:
            self.pruner.step()
        self._optimizer.step()
        self._optimizer.zero_grad()


def take_turns(
    machine: Machine,
    sides: Mapping[str, Callable[[], object]],
    rounds: int,
    repeats: Mapping[str, int] | None = None,
) -> dict[str, dict[str, Any]]:
    """Let every side act once a round, in an order that turns around every round.

    Args:
        machine: whose clock counts.
        sides: what is timed, by name; the first is what the others are compared with.
        rounds: at least 1.
        repeats: how often a side acts a round, where that is not once: all of a cycle whose acts differ. Its time is the mean.

    Returns:
        By side: median `seconds` (of the clock that counts) and `wall_seconds` of an act, and `ratio` and `wall_ratio`, the
        median over rounds of its time by that of the first side.
    """
    for act in sides.values():  # warms up
        act()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            count = (repeats or {}).get(name, 1)
            taken = [machine.seconds(sides[name]) for _ in range(count)]
            times[name].append((sum(counted for counted, _ in taken) / count, sum(wall for _, wall in taken) / count))
    first = times[next(iter(sides))]
    return {
        name: {
            "seconds": statistics.median(counted for counted, _ in taken),
            "wall_seconds": statistics.median(wall for _, wall in taken),
            "ratio": statistics.median(mine[0] / base[0] for mine, base in zip(taken, first, strict=True)),
            "wall_ratio": statistics.median(mine[1] / base[1] for mine, base in zip(taken, first, strict=True)),
        }
        for name, taken in times.items()
    }


def measure_gates(shape: Shape, machine: Machine, precision: str, rounds: int) -> dict[str, Any]:
    """A step of pruning by given keep ratios, soft masks in place and nothing probed, against a plain step."""
    plain = Training(shape, machine, precision)
    blocks = 2 * shape.arguments.get("depth", 12)
    gated = Training(shape, machine, precision, {"keep_ratios": [0.5] * blocks}, masked=True)
    found = take_turns(machine, {"plain": plain.step, "pruning": gated.step}, rounds)
    return {"sides": found, "rounds": rounds, "batch": machine.batch_of(shape)}


def measure_masks(shape: Shape, machine: Machine, precision: str, rounds: int) -> dict[str, Any]:
    """A whole mask update (benefits -> masks -> gates -> parameters counted -> digest) against a plain step."""
    plain = Training(shape, machine, precision)
    pruned = Training(shape, machine, precision, {"prune_ratio": 0.5, "estimator": "linear"})
    pruner = pruned.pruner
    assert pruner is not None
    pruned.step()
    measured = pruner.state_dict()
    plain.step()
    steps, updates = [], []
    for _ in range(rounds):
        steps.append(machine.seconds(plain.step)[0])
        pruner.load_state_dict(measured)  # an update ends the interval: every one begins with the same measurements
        updates.append(machine.seconds(lambda: pruner._renew(5))[0])
    shares = [3 * update / (EPOCH_STEPS * step) for update, step in zip(updates, steps, strict=True)]
    return {
        "sides": {"plain": {"seconds": statistics.median(steps)}, "update": {"seconds": statistics.median(updates)}},
        "share_of_training": statistics.median(shares),
        "epoch_steps": EPOCH_STEPS,
        "rounds": rounds,
        "batch": machine.batch_of(shape),
    }


def measure_benefit(shape: Shape, machine: Machine, precision: str, rounds: int) -> dict[str, Any]:
    """A step of pruning with each estimator of benefit against a plain step."""
    sides = {"plain": Training(shape, machine, precision)}
    sides |= {name: Training(shape, machine, precision, {"prune_ratio": 0.5, "estimator": name}) for name in ESTIMATORS}
    found = take_turns(machine, {name: side.step for name, side in sides.items()}, rounds, CYCLES)
    return {"sides": found, "rounds": rounds, "batch": machine.batch_of(shape)}


def measure_memory(shape: Shape, machine: Machine, precision: str, rounds: int) -> dict[str, Any]:
    """The most memory that some steps take, plain and with each estimator of benefit, each in a process of its own."""
    peaks = {name or "plain": _peak_bytes(shape, machine, precision, name, rounds) for name in (None, *ESTIMATORS)}
    sides = {name: {"peak_bytes": peak} for name, peak in peaks.items()}
    return {"sides": sides, "rounds": rounds, "batch": machine.batch_of(shape)}


def _peak_bytes(shape: Shape, machine: Machine, precision: str, estimator: str | None, steps: int) -> int:
    """What `_print_peak` prints in a process of its own."""
    asked = {
        "shape": asdict(shape),
        "device": str(machine.device),
        "precision": precision,
        "estimator": estimator,
        "steps": steps,
    }
    command = [sys.executable, __file__, "peak", "--asked", json.dumps(asked), "--threads", str(torch.get_num_threads())]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _print_peak(shape: Mapping[str, Any], device: str, precision: str, estimator: str | None, steps: int) -> None:
    """Print the bytes that some steps take at most, beside what the process held before the model was built.

    That is resident memory of the process on a CPU, allocated memory on a GPU.
    """
    machine = Machine(torch.device(device))
    on_gpu = machine.device.type == "cuda"
    before = 0 if on_gpu else _resident_bytes()
    side = Training(Shape(**shape), machine, precision, estimator and {"prune_ratio": 0.5, "estimator": estimator})
    for _ in range(steps):
        side.step()
    print(torch.cuda.max_memory_allocated(machine.device) if on_gpu else _resident_bytes() - before)


def _resident_bytes() -> int:
    """The most that this process has held so far."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


@dataclass(frozen=True)
class Entry:
    """One measurement: which table it stands in, and what it is made with."""

    table: str
    shape: str
    precision: str
    measure: Callable[..., dict[str, Any]]
    options: Mapping[str, Any]
    rounds: int | None = None

    def run(self, machine: Machine, shapes: Mapping[str, Shape], rounds: int | None) -> dict[str, Any]:
        shape = shapes[self.shape]
        rounds = rounds or self.rounds or shape.rounds
        return self.measure(shape, machine, self.precision, rounds, **self.options)


ENTRIES: dict[str, Entry] = {
    f"gates-{shape}-{precision}": Entry("gates", shape, precision, measure_gates, {})
    for shape in SHAPES
    for precision in ("fp32", "bf16")
} | {f"masks-{shape}": Entry("masks", shape, "fp32", measure_masks, {}, rounds=11) for shape in SHAPES}
ENTRIES |= {
    f"benefit-{shape}-bf16": Entry("benefit", shape, "bf16", measure_benefit, {}, rounds=3 if shape == "small" else 5)
    for shape in SHAPES
} | {f"memory-{shape}-bf16": Entry("memory", shape, "bf16", measure_memory, {}, rounds=2) for shape in SHAPES}


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
    parser.add_argument("action", choices=("run", "table", "peak"))
    parser.add_argument("--asked", help=argparse.SUPPRESS)
    parser.add_argument("--only", metavar="NAME", help=f"this entry alone, or all that begin so: {', '.join(entries)}")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU; threads that wait for each other burn its time")
    parser.add_argument("--rounds", type=int, help="rounds of every entry, in place of its own number")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    if given.action == "peak":
        _print_peak(**json.loads(given.asked))
        return 0
    if given.action == "run":
        chosen = [name for name in entries if _meant(name, given.only)]
        if not chosen:
            parser.error(f"unknown entry '{given.only}'; known: {', '.join(entries)}")
        for name in chosen:
            line = record(name, entries[name], Machine(torch.device(given.device)), shapes, given.rounds, lines)
            print(f"{name}: {json.dumps(line['result'])}", flush=True)
    write_page(page, read_lines(lines), shapes)
    return 0


def record(
    name: str,
    entry: Entry,
    machine: Machine,
    shapes: Mapping[str, Shape],
    rounds: int | None,
    lines: Path,
    script: str = "benchmarks/bench.py",
) -> dict[str, Any]:
    """Measure one entry of a script; its line, which is returned, replaces the one that the same kind of device gave before."""
    made_by = circumstances()
    began, threads = time.monotonic(), torch.get_num_threads()
    device = torch.cuda.get_device_name(machine.device) if machine.device.type == "cuda" else "cpu"
    line = {
        "name": name,
        "table": entry.table,
        "shape": entry.shape,
        "precision": entry.precision,
        "options": dict(entry.options),
        "device": device,
        "threads": threads,
        "result": entry.run(machine, shapes, rounds),
        "command": f"python {script} run --only {name} --device {machine.device.type} --threads {threads}",
        **made_by,
        "versions": versions("torch", "timm"),
        "seconds": round(time.monotonic() - began, 1),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    kept = [old for old in read_lines(lines) if (old["name"], old["device"]) != (name, device)]
    text = "".join(json.dumps(each) + "\n" for each in [*kept, line])
    lines.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(lines, lambda file: file.write_text(text))
    return line


def write_page(page: Path, lines: Sequence[dict[str, Any]], shapes: Mapping[str, Shape] = SHAPES) -> None:
    """Put the tables between the markers of the page; what is written around them stays."""
    replace_part(page, BEGIN, END, tables(lines, shapes))


def tables(lines: Sequence[dict[str, Any]], shapes: Mapping[str, Shape] = SHAPES) -> str:
    """All tables, made from the lines alone."""
    by_table: dict[str, list[dict[str, Any]]] = {}
    for line in sorted(
        lines, key=lambda line: (line["device"], list(ENTRIES).index(line["name"]) if line["name"] in ENTRIES else 0)
    ):
        by_table.setdefault(line["table"], []).append(line)
    text: list[str] = []
    if "gates" in by_table:
        text += ["### Gates", "", "| model | precision | device, batch | plain step | pruning step | ratio | on the wall |"]
        text += ["|---|---|---|---:|---:|---:|---:|"]
        for line in by_table["gates"]:
            plain, pruning = line["result"]["sides"]["plain"], line["result"]["sides"]["pruning"]
            ratios = f"{pruning['ratio']:.3f} | {pruning['wall_ratio']:.3f}"
            text.append(f"| {_place(line, shapes)} | {_ms(plain)} | {_ms(pruning)} | {ratios} |")
        text.append("")
    if "masks" in by_table:
        text += ["### Mask updates", ""]
        text += [f"| model | precision | device, batch | plain step | update | three an epoch of {EPOCH_STEPS} steps |"]
        text += ["|---|---|---|---:|---:|---:|"]
        for line in by_table["masks"]:
            sides, share = line["result"]["sides"], line["result"]["share_of_training"]
            update = f"{1000 * sides['update']['seconds']:.1f} ms"
            text.append(f"| {_place(line, shapes)} | {_ms(sides['plain'])} | {update} | {share:.3%} of training |")
        text.append("")
    if "benefit" in by_table:
        text += ["### Benefit: time", ""]
        text += ["| model | precision | device, batch | estimator | step | of a plain step | on the wall |"]
        text += ["|---|---|---|---|---:|---:|---:|"]
        for line in by_table["benefit"]:
            for name, side in line["result"]["sides"].items():
                ratios = f"{side['ratio']:.3f} | {side['wall_ratio']:.3f}"
                text.append(f"| {_place(line, shapes)} | {name} | {_ms(side)} | {ratios} |")
        text.append("")
    if "memory" in by_table:
        text += ["### Benefit: memory", ""]
        text += ["| model | precision | device, batch | estimator | at most | beside a plain step |"]
        text += ["|---|---|---|---|---:|---:|"]
        for line in by_table["memory"]:
            peaks = {name: side["peak_bytes"] / 2**20 for name, side in line["result"]["sides"].items()}
            for name, peak in peaks.items():
                text.append(f"| {_place(line, shapes)} | {name} | {peak:,.0f} MiB | {peak - peaks['plain']:+,.0f} MiB |")
        text.append("")
    if lines:
        text += ["### How it was run", ""]
        text += [f"- {_certificate(line)}" for table in by_table.values() for line in table]
    else:
        text.append("No run is recorded.")
    return "\n".join(text) + "\n"


def _meant(name: str, only: str | None) -> bool:
    return only is None or name == only or (only.endswith("-") and name.startswith(only))


def _place(line: Mapping[str, Any], shapes: Mapping[str, Shape]) -> str:
    device = f"{line['threads']} core{'s' * (line['threads'] > 1)}" if line["device"] == "cpu" else line["device"]
    return f"{shapes[line['shape']].title} | {line['precision']} | {device}, {line['result']['batch']}"


def _ms(side: Mapping[str, float]) -> str:
    return f"{1000 * side['seconds']:,.0f} ms"


def _certificate(made_by: Mapping[str, Any]) -> str:
    return (
        f"`{made_by['command']}`: {made_by['date'][:10]}, {revision_of(made_by)}, {made_by['result']['rounds']} rounds in "
        f"{made_by['seconds']:.0f} s on {machine_of(made_by)}; {packages_of(made_by)}"
    )


if __name__ == "__main__":
    sys.exit(main())
