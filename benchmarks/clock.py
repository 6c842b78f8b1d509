"""Where does the time of a training run go?

    python benchmarks/clock.py run                            # everything: a few minutes on 2 cores that do nothing else
    python benchmarks/clock.py run --only animals-train-fp32  # one measurement
    python benchmarks/clock.py table                          # the tables of docs/clock.md from the JSON lines

Every figure is processor time of one core, so that other work on the machine counts little, the median over rounds. What
changes torch or p3b to be measured runs in a process of its own. Photos are made by the tool itself: JPEGs of 500 x 375 pixels.
Some lines also have a side "before": an earlier revision, measured in turns with the one of the line (`commit_before`).
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from harness.command import Bench, Given, main
from harness.pages import Part, counted, how_it_was_run, table
from harness.records import RESULTS, ROOT, Line
from harness.turns import CPU, take_turns
from step_parts import measure_step
from training import Shape, preloaded

ANIMALS = "data/cifar10-animals-train.tar"
TINY = {"img_size": 32, "patch_size": 4, "embed_dim": 128, "num_heads": 4}
SHAPES: Mapping[str, Shape] = {
    "animals": Shape("32 px, width 128, depth 12", "vit_tiny_patch16_224", 16, 3, TINY),
    "shallow": Shape("32 px, width 128, depth 3", "vit_tiny_patch16_224", 16, 7, {**TINY, "depth": 3}, classes=6),
    "photos": Shape("photos at 224 px, DeiT-Tiny", "deit_tiny_patch16_224", 4, 3, {}),
}
IMAGES = {"animals": 160, "photos": 20}
ATTENTION = ((16, 4, 17, 16), (64, 4, 65, 32), (16, 3, 197, 64), (8, 6, 197, 64), (4, 6, 577, 64), (2, 6, 1370, 64))
"""(images, heads, tokens, channels of a head)"""
START_UP = {
    "import p3b": "import p3b",
    "p3b --help": "from p3b.commands.command_line import main; main(['--help'])",
    "p3b train --help": "from p3b.commands.command_line import main; main(['train', '--help'])",
    "the commands and all that they import": "import p3b.commands.prune",
}


@dataclass(frozen=True)
class Entry:
    """One measurement: its kind, and the model where there is one; `precision` and `prune` are those of a step."""

    kind: str
    shape: str | None = None
    precision: str = "fp32"
    prune: bool = False


ENTRIES: Mapping[str, Entry] = {
    "animals-train-fp32": Entry("step", "animals"),
    "animals-prune-bf16": Entry("step", "animals", "bf16", prune=True),
    "photos-train-fp32": Entry("step", "photos"),
    "attention": Entry("attention"),
    "start-up": Entry("start"),
}
SETTLED = ("compile", "channels-last")
"""Questions that were answered once: their lines stay, and the code that measured them is at the commit of each line."""


def measure(name: str, given: Given) -> dict[str, Any]:
    entry = ENTRIES[name]
    repeated = entry.kind in ("step", "start")  # each round in new processes
    rounds = given.rounds if repeated else 1
    with tempfile.TemporaryDirectory() as folder:
        photos, animals = make_photos(Path(folder) / "photos"), given.shared / ANIMALS
        images = "photos" if entry.shape == "photos" else "animals" if animals.exists() else "digits"
        source = {"photos": str(photos), "animals": str(animals), "digits": "DIGITS"}[images]
        found = [_measured(entry, source, photos) for _ in range(rounds)]
    data = images if entry.kind == "step" else "none"
    return {"kind": entry.kind, "shape": entry.shape, "data": data, "rounds": rounds, "sides": {"now": _medians(found)}}


def _measured(entry: Entry, source: str, photos: Path) -> dict[str, Any]:
    if entry.kind == "start":
        return measure_start(photos)
    if entry.shape is None:
        return measure_attention()
    with preloaded().Pool(1) as pool:
        given = (SHAPES[entry.shape], IMAGES[entry.shape], entry.precision, entry.prune, source)
        return pool.apply(measure_step, given)


def measure_attention() -> dict[str, Any]:
    """Attention of several sizes, fused and plain, forward and backward: milliseconds, in turns."""

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v

    forms = {"fused": torch.nn.functional.scaled_dot_product_attention, "plain": plain}
    found = {}
    for size in ATTENTION:
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
            inputs = [torch.randn(size, dtype=dtype, requires_grad=True) for _ in range(3)]

            def act(form: str, inputs: Any = inputs, autocast: bool = name == "bf16") -> None:
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    forms[form](*inputs).sum().backward()

            images, heads, tokens, width = size
            title = f"{images} images, {heads} heads of {width}, {tokens} tokens | {name}"
            taken = _in_turns({form: partial(act, form) for form in forms}, 7)["ms"]
            found |= {f"{title} | {form}": ms for form, ms in taken.items()}
    return {"ms": found}


def measure_start(photos: Path) -> dict[str, Any]:
    """Processor time of each start-up, each a process of its own."""
    with tempfile.TemporaryDirectory() as work:
        flags = [
            "--data-path", str(photos), "--val-share", "0.1", "--max-train-images", "8", "--batch-size", "8",
            "--epochs", "1", "--model", "vit_tiny_patch16_224", "--model-kwargs", "img_size=32", "patch_size=8", "embed_dim=24",
            "depth=2", "num_heads=3", "--num-workers", "0", "--device", "cpu", "--output-dir", f"{work}/run",
        ]  # fmt: skip
        scripts = {
            **START_UP,
            "a run of one step": f"from p3b.commands.command_line import published_main; published_main({flags!r})",
        }
        found = {}
        for name, script in scripts.items():
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            found[name] = 1000 * (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return {"ms": found}


def make_photos(root: Path, classes: int = 4, images: int = 8) -> Path:
    """JPEGs of 500 x 375 pixels in class folders: smooth noise with grain."""
    noise = np.random.default_rng(0)
    for name in range(classes):
        folder = root / f"class{name}"
        folder.mkdir(parents=True)
        for image in range(images):
            smooth = Image.fromarray(noise.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((500, 375))
            grain = np.asarray(smooth).astype(int) + noise.integers(-12, 13, (375, 500, 3))
            Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(folder / f"{image}.jpg", quality=90)
    return root


def _in_turns(sides: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Any]:
    return {"ms": {name: 1000 * side["seconds"] for name, side in take_turns(CPU, sides, rounds).items()}}


def _medians(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The median over rounds of every figure."""
    found: dict[str, Any] = {}
    for key, value in results[0].items():
        if isinstance(value, dict):
            found[key] = {name: statistics.median(result[key][name] for result in results) for name in value}
        else:
            found[key] = statistics.median(result[key] for result in results)
    return found


# --- tables


def tables(lines: Sequence[Line]) -> list[str]:
    """All tables, made from the lines alone."""
    order = [*ENTRIES, *SETTLED]
    lines = sorted(lines, key=lambda line: order.index(line["name"]))
    makers = {
        "step": _step_table,
        "attention": _attention_table,
        "start": _start_table,
        "compile": _compile_table,
        "layout": _layout_table,
    }
    text = [each for line in lines for each in makers[line["kind"]](line)]
    return text + how_it_was_run(lines, *(counted(line["rounds"], "round") + _before(line) for line in lines))


def _before(line: Line) -> str:
    return f", before: commit {line['commit_before'][:12]}" if line.get("commit_before") else ""


def _step_table(line: Line) -> list[str]:
    shape, sides = SHAPES[line["shape"]], line["sides"]
    now = sides["now"]["ms"]
    parts = sorted({part for found in sides.values() for part in found["ms"]}, key=lambda part: -now.get(part, 0.0))
    text = [f"### {line['name']}: {shape.title} ({line['data']}), batches of {shape.cpu_batch}", ""]
    for side, found in sides.items():
        largest = sorted(found["ms"], key=found["ms"].__getitem__, reverse=True)[:3]
        told = ", ".join(f"{part} {found['ms'][part]:.1f} ms" for part in largest)
        text.append(f"- The three largest costs, {side}: {told}.")
    rows = [
        [
            part,
            *(_number(found["ms"].get(part, 0.0)) for found in sides.values()),
            *(_number(found["calls"].get(part), 0) for found in sides.values()),
        ]
        for part in parts
    ]
    blank = [""] * len(sides)
    rows.append(["**the whole step**", *(_number(sum(found["ms"].values())) for found in sides.values()), *blank])
    rows.append(["evaluation of as many images", *(_number(found["evaluation"]) for found in sides.values()), *blank])
    head = ["part of a step", *(f"{side} (ms)" for side in sides), *(f"calls {side}" for side in sides)]
    return [*text, "", *table(head, rows)]


def _start_table(line: Line) -> list[str]:
    sides = line["sides"]
    rows = [[name, *(_number(found["ms"][name] / 1000, 2) for found in sides.values())] for name in sides["now"]["ms"]]
    return ["### Start-up", "", *table(["", *(f"{side} (s)" for side in sides)], rows)]


def _compile_table(line: Line) -> list[str]:
    shape, now, rows = SHAPES[line["shape"]], line["sides"]["now"], []
    for kind in ("plain", "gated"):
        eager, quick = now["ms"][f"{kind}, eager"], now["ms"][f"{kind}, compiled"]
        first = now["first_step_seconds"][f"{kind}, compiled"]
        rows.append([kind, f"{eager:.1f}", f"{quick:.1f}", f"{eager / quick:.2f}", f"{first:.0f}"])
    head = ["forward and backward", "eager (ms)", "compiled (ms)", "eager / compiled", "first step (s)"]
    return [f"### `--compile`: {shape.title}, batches of {shape.cpu_batch}", "", *table(head, rows)]


def _attention_table(line: Line) -> list[str]:
    now, rows = line["sides"]["now"]["ms"], []
    for case in dict.fromkeys(name.rpartition(" | ")[0] for name in now):
        fused, plain = (now[f"{case} | {form}"] for form in ("fused", "plain"))
        rows.append([*case.split(" | "), f"{fused:.2f}", f"{plain:.2f}", f"{fused / plain:.2f}"])
    head = ["forward and backward", "precision", "fused (ms)", "plain (ms)", "fused / plain"]
    return ["### Attention", "", *table(head, rows, text=2)]


def _layout_table(line: Line) -> list[str]:
    rows = [[name, f"{value:.2f}"] for name, value in line["sides"]["now"]["ms"].items()]
    return ["### Patch embedding, channels last", "", *table(["forward and backward", "ms"], rows)]


def _number(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder that may hold the animals")
    parser.add_argument("--rounds", type=int, default=3, help="of what is measured in processes of its own")


PART = Part("clock.py", RESULTS / "clock.jsonl", ROOT / "docs" / "clock.md", tables)
BENCH = Bench(__doc__, PART, tuple(ENTRIES), measure, _flags, ("torch", "timm", "torchvision", "pillow"))

if __name__ == "__main__":
    sys.exit(main(BENCH))
