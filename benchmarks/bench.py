"""How much longer does a training step take when it prunes, and how much more memory?

    python benchmarks/bench.py run                         # everything: about half an hour on 2 cores that do nothing else
    python benchmarks/bench.py run --only gates-tiny-fp32  # one measurement; "gates-" stands for all that begin so
    python benchmarks/bench.py run --device cuda           # on a GPU, with batches of 128
    python benchmarks/bench.py table                       # the tables of docs/performance.md from the JSON lines

Every figure is a ratio to a plain step that was timed in turns with it (`harness/turns.py`). What is measured again on the
same kind of device replaces its line in docs/results/performance.jsonl.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from harness.command import Bench, Given, machine_flags, main
from harness.pages import Part, how_it_was_run, table
from harness.records import RESULTS, ROOT, Line
from harness.turns import Machine, ratio, take_turns
from p3b.scoring.estimators import ESTIMATORS
from p3b.scoring.removal import REMOVAL
from training import CYCLES, Entry, Shape, Training, measure_memory, rounds_of

EPOCH_STEPS, UPDATES = 100, 3
"""Steps and mask updates of the epoch that updates are a share of: a short one, since longer ones make the share smaller."""
SHAPES: Mapping[str, Shape] = {
    "tiny": Shape("DeiT-Tiny", "deit_tiny_patch16_224", 16, 11, {}),
    "small": Shape("DeiT-Small", "deit_small_patch16_224", 8, 9, {}),
}

MEASURED = (*ESTIMATORS, REMOVAL)
"""All ways to a benefit."""
FORMS = ("fp32", "bf16")


def measure_gates(shape: Shape, machine: Machine, precision: str, rounds: int) -> dict[str, Any]:
    """A step of pruning by given keep ratios, soft masks in place and nothing probed, against a plain step."""
    plain = Training(shape, machine, precision)
    gated = Training(shape, machine, precision, shape.prune_options("gated"), masked=True)
    return {"sides": take_turns(machine, {"plain": plain.step, "pruning": gated.step}, rounds)}


def measure_masks(shape: Shape, machine: Machine, precision: str, rounds: int) -> dict[str, Any]:
    """A whole mask update against a plain step."""
    plain = Training(shape, machine, precision)
    pruned = Training(shape, machine, precision, shape.prune_options("linear"))
    sides = take_turns(machine, {"plain": plain.step, "update": pruned.mask_update()}, rounds)
    return {
        "sides": sides,
        "share_of_training": UPDATES * sides["update"]["ratio"] / EPOCH_STEPS,
        "epoch_steps": EPOCH_STEPS,
    }


def measure_benefit(shape: Shape, machine: Machine, precision: str, rounds: int) -> dict[str, Any]:
    """A step of pruning with each estimator of benefit against a plain step."""
    sides = {name: Training(shape, machine, precision, shape.prune_options(name)) for name in ("plain", *MEASURED)}
    return {"sides": take_turns(machine, {name: side.step for name, side in sides.items()}, rounds, CYCLES)}


def measure_peaks(shape: Shape, machine: Machine, precision: str, rounds: int) -> dict[str, Any]:
    """The most memory that a plain step takes, and one with each estimator of benefit."""
    sides = {name: shape.prune_options(name) for name in ("plain", *MEASURED)}
    return measure_memory(sides, shape, machine, precision, rounds)


ENTRIES: Mapping[str, Entry] = {
    **{f"gates-{s}-{p}": Entry("gates", s, p, measure_gates) for s in SHAPES for p in FORMS},
    **{f"masks-{s}": Entry("masks", s, "fp32", measure_masks, 11) for s in SHAPES},
    **{f"benefit-{s}-{p}": Entry("benefit", s, p, measure_benefit, {"small": 3}.get(s, 5)) for s in SHAPES for p in FORMS},
    **{f"memory-{s}-{p}": Entry("memory", s, p, measure_peaks, 2) for s in SHAPES for p in FORMS},
}


def measure(name: str, given: Given) -> dict[str, Any]:
    return ENTRIES[name].run(SHAPES, given)


def tables(lines: Sequence[Line]) -> list[str]:
    """All tables, made from the lines alone."""
    order = list(ENTRIES)
    lines = sorted(lines, key=lambda line: (line["device"], order.index(line["name"])))
    return [
        *_summary(lines),
        "### Gates",
        "",
        *table([*PLACE, "plain step", "pruning step", "ratio", "on the wall"], _gates(lines), text=3),
        "### Mask updates",
        "",
        *table([*PLACE, "plain step", "update", f"three an epoch of {EPOCH_STEPS} steps"], _masks(lines), text=3),
        "### Benefit: time",
        "",
        *table([*PLACE, "estimator", "step", "ratio to a plain step", "on the wall"], _benefit(lines), text=4),
        "### Benefit: memory",
        "",
        *table([*PLACE, "estimator", "peak", "more than a plain step"], _memory(lines), text=4),
        *how_it_was_run(lines, *rounds_of(lines)),
    ]


PLACE = ("model", "precision", "device")


def _of(lines: Sequence[Line], kind: str) -> Iterator[tuple[list[str], Mapping[str, Any]]]:
    """(Cells of the place, result) of every line of a table."""
    for line in lines:
        if line["table"] == kind:
            cores = f"{line['threads']} core{'s' * (line['threads'] > 1)}" if line["device"] == "cpu" else line["device"]
            place = [SHAPES[line["shape"]].title, line["precision"], f"{cores}, batch {line['result']['batch']}"]
            yield place, line["result"]


def _summary(lines: Sequence[Line]) -> list[str]:
    """The answer: the time of a step with each estimator and its memory, by model."""
    time, memory = ({(*place,): result["sides"] for place, result in _of(lines, kind)} for kind in ("benefit", "memory"))
    rows = []
    for name in MEASURED:
        cells = []
        for place, sides in time.items():
            cells.append(f"{sides[name]['ratio']:.2f} x" if name in sides else "")
            peaks = {side: told["peak_bytes"] / 2**20 for side, told in memory.get(place, {}).items()}
            cells.append(f"{peaks[name] - peaks['plain']:+,.0f} MiB" if name in peaks else "")
        rows.append([name, *cells])
    head = [f"{what} ({', '.join(place)})" for place in time for what in ("step", "memory")]
    return ["A pruning step with each estimator, relative to a plain step:", "", *table(["estimator", *head], rows)]


def _gates(lines: Sequence[Line]) -> Iterator[list[str]]:
    for place, result in _of(lines, "gates"):
        plain, pruning = result["sides"]["plain"], result["sides"]["pruning"]
        yield [*place, _ms(plain), _ms(pruning), ratio(pruning), f"{pruning['wall_ratio']:.3f}"]


def _masks(lines: Sequence[Line]) -> Iterator[list[str]]:
    for place, result in _of(lines, "masks"):
        update = f"{1000 * result['sides']['update']['seconds']:.1f} ms"
        yield [*place, _ms(result["sides"]["plain"]), update, f"{result['share_of_training']:.3%} of training"]


def _benefit(lines: Sequence[Line]) -> Iterator[list[str]]:
    for place, result in _of(lines, "benefit"):
        for name, side in result["sides"].items():
            yield [*place, name, _ms(side), ratio(side), f"{side['wall_ratio']:.3f}"]


def _memory(lines: Sequence[Line]) -> Iterator[list[str]]:
    for place, result in _of(lines, "memory"):
        peaks = {name: side["peak_bytes"] / 2**20 for name, side in result["sides"].items()}
        for name, peak in peaks.items():
            yield [*place, name, f"{peak:,.0f} MiB", f"{peak - peaks['plain']:+,.0f} MiB"]


def _ms(side: Mapping[str, float]) -> str:
    return f"{1000 * side['seconds']:,.0f} ms"


PART = Part("bench.py", RESULTS / "performance.jsonl", ROOT / "docs" / "performance.md", tables)
BENCH = Bench(__doc__, PART, tuple(ENTRIES), measure, machine_flags)

if __name__ == "__main__":
    sys.exit(main(BENCH))
