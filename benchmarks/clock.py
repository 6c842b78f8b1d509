"""Where the time of a training run goes, as the code is and as it was.

    python benchmarks/clock.py run --before ../old/src        # all entries; a few minutes on 2 cores that do nothing else
    python benchmarks/clock.py run --only animals-train-fp32  # one entry, as the code is
    python benchmarks/clock.py table                          # the generated part of docs/clock.md from the JSON lines

A step of the real loop is taken apart: what its parts take is measured around them, each without those it calls.
Every measurement is a process of its own; the two sides take turns, and a figure is the median over rounds of processor time,
so that other work on the machine counts little. Photos are made by the tool itself: JPEGs of 500 x 375 pixels.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from p3b.storage.files import write_atomically
from records import RESULTS, ROOT, circumstances, machine_of, packages_of, read_lines, replace_part, revision_of, versions

LINES = RESULTS / "clock.jsonl"
PAGE = ROOT / "docs" / "clock.md"
BEGIN = "<!-- made from docs/results/clock.jsonl by `python benchmarks/clock.py table`; do not edit -->"
END = "<!-- end of what is made from the lines -->"

ANIMALS = "data/cifar10-animals-train.tar"
TINY = {"model": "vit_tiny_patch16_224", "img_size": 32, "patch_size": 4, "embed_dim": 128, "num_heads": 4}
SHAPES: dict[str, dict[str, Any]] = {
    "animals": {"title": "32 px, width 128, depth 12", "batch": 16, "images": 160, **TINY},
    "shallow": {"title": "32 px, width 128, depth 3", "batch": 16, "depth": 3, **TINY},
    "photos": {
        "title": "photos at 224 px, DeiT-Tiny",
        "batch": 4,
        "images": 20,
        "model": "deit_tiny_patch16_224",
        "img_size": 224,
    },
    "attention": {
        "sizes": [(16, 4, 17, 16), (64, 4, 65, 32), (16, 3, 197, 64), (8, 6, 197, 64), (4, 6, 577, 64), (2, 6, 1370, 64)]
    },
}
STEPS = 3
"""Steps that are timed, after one that is not."""
START_UP = {
    "import p3b": "import p3b",
    "p3b --help": "from p3b.commands.command_line import main; main(['--help'])",
    "p3b train --help": "from p3b.commands.command_line import main; main(['train', '--help'])",
    "the commands and all that they import": "import p3b.commands.prune",
}
ENTRIES: dict[str, dict[str, Any]] = {
    "animals-train-fp32": {"kind": "step", "shape": "animals", "precision": "fp32", "prune": False},
    "animals-prune-bf16": {"kind": "step", "shape": "animals", "precision": "bf16", "prune": True},
    "photos-train-fp32": {"kind": "step", "shape": "photos", "precision": "fp32", "prune": False},
    "attention": {"kind": "attention", "shape": "attention"},
    "start-up": {"kind": "start"},
    "compile": {"kind": "compile", "shape": "shallow"},
    "channels-last": {"kind": "layout", "shape": "photos"},
}


class Clock:
    """Processor seconds by part; time in an inner part does not count for the outer one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}
        self._parts = ["the rest"]
        self._since = time.process_time()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what happens within for this part."""
        self._turn()
        self._parts.append(name)
        self.calls[name] = self.calls.get(name, 0) + 1
        try:
            yield
        finally:
            self._turn()
            self._parts.pop()

    def begin(self) -> None:
        """Forget what was measured, and begin."""
        self.seconds, self.calls, self._since = {}, {}, time.process_time()

    def end(self, steps: int) -> dict[str, Any]:
        """Milliseconds and calls a step, by part."""
        self._turn()
        return {
            "ms": {name: 1000 * seconds / steps for name, seconds in self.seconds.items()},
            "calls": {name: calls / steps for name, calls in self.calls.items()},
        }

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, counted."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return counted

    def _turn(self) -> None:
        now = time.process_time()
        self.seconds[self._parts[-1]] = self.seconds.get(self._parts[-1], 0.0) + now - self._since
        self._since = now


def measure_step(shape: Mapping[str, Any], precision: str, prune: bool, data: str) -> dict[str, Any]:
    """A step of `train_epoch`, and the evaluation of as many images, taken apart: milliseconds and calls by part."""
    import timm
    import torch
    from timm.utils import ModelEmaV3

    import p3b.core.finite
    import p3b.data
    import p3b.data.images
    import p3b.data.loaders
    import p3b.pruner
    import p3b.scoring.trained
    import p3b.train.loop
    from p3b.train.evaluate import evaluate
    from p3b.train.losses import TrainingLoss
    from p3b.train.optim import Precision, build_optimizer

    clock, cpu = Clock(), torch.device("cpu")
    torch.manual_seed(0)
    size = shape["img_size"]
    splits = p3b.data.open_data(*_data_set(data), val_share=0.2, max_train_images=shape["images"])
    keep = getattr(p3b.data, "keep_decoded", None)  # a revision before it decodes each time
    if keep is not None:
        keep(splits, "auto")
    preprocessing = p3b.data.Preprocessing((3, size, size), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    options = {"batch_size": shape["batch"], "num_workers": 0, "device": cpu}
    batches = p3b.data.train_batches(splits.train, preprocessing, p3b.data.Augmentation(repeats=1), seed=0, **options)
    samples = batches._loader.loader._loader.dataset
    samples._transform = clock.around("data: augment", samples._transform)
    samples._read = clock.around("data: read and decode", samples._read)
    model = timm.create_model(
        shape["model"], num_classes=len(splits.class_names), drop_path_rate=0.1, **_arguments(shape)
    ).train()
    chosen = Precision.choose(precision, cpu)
    if importlib.util.find_spec("p3b.vit.attention"):  # a revision before it trains the fused form
        importlib.import_module("p3b.vit.attention").choose_attention(model, cpu, chosen.dtype)
    optimizer, ema = build_optimizer(model, "adamw", 1e-4, 0.05), ModelEmaV3(model, decay=0.99)
    pruner: Any = p3b.train.loop.NoPruning("train", 0)
    if prune:
        schedule = p3b.Schedule(start=0, sparse=1, final=10**6, update_every=3)
        pruner = p3b.Pruner(model, 0.5, schedule=schedule, estimator="linear")
    pruner.step, pruner.loss = clock.around("method", pruner.step), clock.around("method", pruner.loss)
    optimizer.step = clock.around("optimizer", optimizer.step)  # type: ignore[method-assign]
    ema.update = clock.around("moving average", ema.update)  # type: ignore[method-assign]
    for module in (p3b.train.loop, p3b.pruner, p3b.scoring.trained):
        module.all_finite = clock.around("finite?", module.all_finite)  # type: ignore[attr-defined]
    torch.Tensor.backward = clock.around("backward", torch.Tensor.backward)  # type: ignore[method-assign]
    loss = TrainingLoss(torch.nn.functional.cross_entropy)
    learner = p3b.train.loop.Learner(model, optimizer, loss, chosen, chosen.scaler(), pruner, ema=ema)
    forward, model.forward = model.forward, clock.around("forward", model.forward)
    endless = _Endless(batches, clock)
    for _ in p3b.data.eval_batches(splits.train, preprocessing, **options):  # an epoch has gone by
        pass
    endless.steps = 4 if prune else 1  # soft masks are in place

    def go() -> None:
        progress = p3b.train.loop.EpochProgress("train", cpu)
        p3b.train.loop.train_epoch(learner, endless, progress, lambda *_: None, lambda: None)

    go()
    endless.steps = STEPS
    clock.begin()
    go()
    found = clock.end(STEPS)
    model.forward, clock.seconds = forward, {}
    began = time.process_time()
    some = splits.val.subset(range(min(len(splits.val), 2 * shape["batch"])))
    accuracy = evaluate(model, p3b.data.eval_batches(some, preprocessing, **options), chosen, lambda sums: sums)
    found["evaluation"] = 1000 * (time.process_time() - began) / accuracy.images * shape["batch"]
    return found


class _Endless:
    """So many batches, epoch after epoch; making one is counted."""

    def __init__(self, batches: Any, clock: Clock) -> None:
        self._batches, self._clock, self.steps = batches, clock, 1
        self._epoch, self._coming = 0, iter(batches)  # goes on from call to call: one batch is always made ahead

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.steps):
            with self._clock.part("data: collate, normalise, erase"):
                batch = next(self._coming, None)
                if batch is None:
                    self._epoch += 1
                    self._batches.set_epoch(self._epoch)
                    self._coming = iter(self._batches)
                    batch = next(self._coming)
            yield batch


def measure_compile(shape: Mapping[str, Any]) -> dict[str, Any]:
    """Forward and backward, compiled and not, plain and with soft gates: milliseconds of each, in turns; seconds to compile."""
    import timm
    import torch

    import p3b

    sides: dict[str, Callable[[], None]] = {}
    seconds: dict[str, float] = {}
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    for gated in (False, True):
        for how in ("eager", "compiled"):
            torch.manual_seed(0)
            model = timm.create_model(shape["model"], num_classes=6, drop_path_rate=0.1, **_arguments(shape)).train()
            if gated:
                pruner = p3b.Pruner(model, keep_ratios=[0.5] * 2 * len(model.blocks), schedule=p3b.Schedule(0, 1, 10**6, 1))
                masks = {name: torch.rand(len(mask)) for name, mask in pruner.gates.masks.items()}
                pruner.gates.set(masks)
            module = torch.compile(model) if how == "compiled" else model
            images = torch.randn(shape["batch"], 3, *model.patch_embed.img_size)

            def step(module: Any = module, images: torch.Tensor = images, model: torch.nn.Module = model) -> None:
                module(images).square().mean().backward()
                model.zero_grad()

            name = f"{'gated' if gated else 'plain'}, {how}"
            began = time.monotonic()
            step()
            seconds[name], sides[name] = time.monotonic() - began, step
            step()
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(7):
        for name, step in sides.items():
            taken[name].append(_processor(step))
    return {
        "ms": {name: 1000 * statistics.median(values) for name, values in taken.items()},
        "first_step_seconds": seconds,
    }


def measure_layout(shape: Mapping[str, Any]) -> dict[str, Any]:
    """The patch embedding, forward and backward, with images and weights in both memory formats: milliseconds, in turns."""
    import torch

    sides = {}
    for name, layout in (("contiguous", torch.contiguous_format), ("channels last", torch.channels_last)):
        embed = torch.nn.Conv2d(3, 192, 16, 16).to(memory_format=layout)
        images = torch.randn(shape["batch"], 3, shape["img_size"], shape["img_size"])

        def step(embed: Any = embed, images: torch.Tensor = images, layout: Any = layout) -> None:
            embed(images.to(memory_format=layout)).flatten(2).transpose(1, 2).square().mean().backward()

        step()
        sides[name] = step
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(25):
        for name, step in sides.items():
            taken[name].append(_processor(step))
    return {"ms": {name: 1000 * statistics.median(values) for name, values in taken.items()}}


def measure_attention(shape: Mapping[str, Any]) -> dict[str, Any]:
    """Attention of several sizes (images, heads, tokens, channels of a head), forward and backward: milliseconds, in turns."""
    import torch

    def fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v

    found = {}
    for size in shape["sizes"]:
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
            inputs = [torch.randn(size, dtype=dtype, requires_grad=True) for _ in range(3)]
            taken: dict[str, list[float]] = {"fused": [], "plain": []}
            for _ in range(8):
                for form, attend in (("fused", fused), ("plain", plain)):
                    with torch.autocast("cpu", torch.bfloat16, enabled=name == "bf16"):
                        taken[form].append(_processor(lambda: attend(*inputs).sum().backward()))  # noqa: B023
            images, heads, tokens, width = size
            for form, values in taken.items():
                title = f"{images} images, {heads} heads of {width}, {tokens} tokens"
                found[f"{title} | {name} | {form}"] = 1000 * statistics.median(values[1:])
    return {"ms": found}


def measure_start(source: Path, photos: Path) -> dict[str, Any]:
    """Processor and wall seconds of each start-up, each a process of its own."""
    with tempfile.TemporaryDirectory() as work:
        flags = [
            "train", "--data-path", str(photos), "--val-share", "0.1", "--max-train-images", "8", "--batch-size", "8",
            "--epochs", "1", "--model", "vit_tiny_patch16_224", "--model-kwargs", "img_size=32", "patch_size=8", "embed_dim=24",
            "depth=2", "num_heads=3", "--num-workers", "0", "--device", "cpu", "--output-dir", f"{work}/run",
        ]  # fmt: skip
        scripts = {**START_UP, "a run of one step": f"from p3b.commands.command_line import main; main({flags!r})"}
        found = {}
        for name, script in scripts.items():
            before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
            environment = {**os.environ, "PYTHONPATH": str(source)}
            subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, env=environment)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            found[name] = [processor, time.monotonic() - began]
    return {"ms": {name: 1000 * processor for name, (processor, _) in found.items()}}


def make_photos(root: Path, classes: int = 4, images: int = 8) -> None:
    """JPEGs of 500 x 375 pixels in class folders: smooth noise with grain."""
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(0)
    for name in range(classes):
        folder = root / f"class{name}"
        folder.mkdir(parents=True)
        for image in range(images):
            smooth = Image.fromarray(noise.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((500, 375))
            grain = np.asarray(smooth).astype(int) + noise.integers(-12, 13, (375, 500, 3))
            Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(folder / f"{image}.jpg", quality=90)


def main(
    arguments: Sequence[str] | None = None,
    *,
    entries: Mapping[str, Mapping[str, Any]] = ENTRIES,
    shapes: Mapping[str, Mapping[str, Any]] = SHAPES,
    lines: Path = LINES,
    page: Path = PAGE,
) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "table", "measure"))
    parser.add_argument("--only", choices=list(entries), help="this entry alone")
    parser.add_argument("--before", type=Path, help="src folder of another checkout: measured in turns with this one")
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder that may hold the animals")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--asked", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.action == "measure":
        import torch

        torch.set_num_threads(1)
        asked = json.loads(given.asked)
        measures = {
            "step": measure_step,
            "compile": measure_compile,
            "layout": measure_layout,
            "attention": measure_attention,
        }
        measure = measures[asked.pop("kind")]
        print(json.dumps(measure(**asked)))
        return 0
    if given.action == "run":
        with tempfile.TemporaryDirectory() as folder:
            photos = Path(folder) / "photos"
            make_photos(photos)
            for name, entry in entries.items():
                if given.only in (None, name):
                    line = record(name, entry, shapes, given, photos, lines)
                    print(f"{name}: {json.dumps(line['sides'])}", flush=True)
    replace_part(page, BEGIN, END, tables(read_lines(lines), shapes))
    return 0


def record(
    name: str, entry: Mapping[str, Any], shapes: Mapping[str, Mapping[str, Any]], given: Any, photos: Path, lines: Path
) -> dict[str, Any]:
    """Measure one entry; its line, which is returned, replaces the one of that name."""
    made_by, began = circumstances(), time.monotonic()
    comparable = given.before is not None and entry["kind"] in ("step", "start")
    sources = {"before": given.before.resolve()} if comparable else {}
    sources["now"] = ROOT / "src"
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sources}
    rounds = given.rounds if entry["kind"] in ("step", "start") else 1
    for number in range(rounds):
        for side in list(sources)[:: -1 if number % 2 else 1]:
            found[side].append(_measured(entry, shapes, sources[side], given.shared, photos))
    data = "none"
    if entry["kind"] == "step":
        data = "photos" if entry["shape"] == "photos" else "animals" if (given.shared / ANIMALS).exists() else "digits"
    line = {
        "name": name,
        "kind": entry["kind"],
        "shape": entry.get("shape"),
        "data": data,
        "sides": {side: _medians(results) for side, results in found.items()},
        "rounds": rounds,
        "commit_before": _commit_of(given.before) if comparable else None,
        "command": f"python benchmarks/clock.py run --only {name}" + (" --before ../before/src" if comparable else ""),
        **made_by,
        "versions": versions("torch", "timm", "torchvision", "pillow"),
        "seconds": round(time.monotonic() - began, 1),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    others = [old for old in read_lines(lines) if old["name"] != name]
    in_order = sorted([*others, line], key=lambda each: [*ENTRIES, each["name"]].index(each["name"]))
    text = "".join(json.dumps(each) + "\n" for each in in_order)
    lines.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(lines, lambda file: file.write_text(text))
    return line


def tables(lines: Sequence[Mapping[str, Any]], shapes: Mapping[str, Mapping[str, Any]] = SHAPES) -> str:
    """All tables, made from the lines alone."""
    text: list[str] = []
    for line in lines:
        sides = line["sides"]
        now, before = sides["now"], sides.get("before")
        if line["kind"] == "step":
            shape = shapes[line["shape"]]
            text += [f"### {line['name']}: {shape['title']} ({line['data']}), batches of {shape['batch']}", ""]
            for side, found in sides.items():
                largest = sorted(found["ms"], key=found["ms"].__getitem__, reverse=True)[:3]
                told = ", ".join(f"{part} {found['ms'][part]:.1f} ms" for part in largest)
                text.append(f"- The three largest costs, {side}: {told}.")
            text += ["", "| part of a step | before (ms) | now (ms) | calls before | calls now |", "|---|---:|---:|---:|---:|"]
            parts = sorted(
                {part for found in sides.values() for part in found["ms"]}, key=lambda part: -now["ms"].get(part, 0.0)
            )
            for part in parts:
                cells = [_number(found and found["ms"].get(part, 0.0)) for found in (before, now)]
                cells += [_number(found and found["calls"].get(part), 0) for found in (before, now)]
                text.append(f"| {part} | {' | '.join(cells)} |")
            totals = [_number(found and sum(found["ms"].values())) for found in (before, now)]
            text.append(f"| **the whole step** | {totals[0]} | {totals[1]} | | |")
            evaluation = [_number(found and found["evaluation"]) for found in (before, now)]
            text += [f"| evaluation of as many images | {evaluation[0]} | {evaluation[1]} | | |", ""]
        elif line["kind"] == "start":
            text += ["### Start-up", "", "| | before (s) | now (s) |", "|---|---:|---:|"]
            for name in now["ms"]:
                cells = [_number(found and found["ms"][name] / 1000, 2) for found in (before, now)]
                text.append(f"| {name} | {' | '.join(cells)} |")
            text.append("")
        elif line["kind"] == "compile":
            text += [f"### `--compile`: {shapes[line['shape']]['title']}, batches of {shapes[line['shape']]['batch']}", ""]
            text += [
                "| forward and backward | eager (ms) | compiled (ms) | eager / compiled | first step (s) |",
                "|---|---:|---:|---:|---:|",
            ]
            for kind in ("plain", "gated"):
                eager, quick = now["ms"][f"{kind}, eager"], now["ms"][f"{kind}, compiled"]
                first = now["first_step_seconds"][f"{kind}, compiled"]
                text.append(f"| {kind} | {eager:.1f} | {quick:.1f} | {eager / quick:.2f} | {first:.0f} |")
            text.append("")
        elif line["kind"] == "attention":
            text += ["### Attention", "", "| forward and backward | | fused (ms) | plain (ms) | fused / plain |"]
            text.append("|---|---|---:|---:|---:|")
            for case in dict.fromkeys(name.rpartition(" | ")[0] for name in now["ms"]):
                fused, plain = (now["ms"][f"{case} | {form}"] for form in ("fused", "plain"))
                text.append(f"| {case} | {fused:.2f} | {plain:.2f} | {fused / plain:.2f} |")
            text.append("")
        else:
            text += ["### Patch embedding, channels last", "", "| forward and backward | ms |", "|---|---:|"]
            text += [f"| {name} | {value:.2f} |" for name, value in now["ms"].items()] + [""]
    if not lines:
        return "No run is recorded.\n"
    text += ["### How it was run", ""]
    for line in lines:
        before = f", before: commit {line['commit_before'][:12]}" if line["commit_before"] else ""
        text.append(
            f"- `{line['command']}`: {line['date'][:10]}, {revision_of(line)}{before}, {line['rounds']} rounds "
            f"in {line['seconds']:.0f} s on {machine_of(line)}; {packages_of(line)}"
        )
    return "\n".join(text) + "\n"


def _measured(
    entry: Mapping[str, Any], shapes: Mapping[str, Mapping[str, Any]], source: Path, shared: Path, photos: Path
) -> dict[str, Any]:
    """One measurement in a process of its own, with the code of `source`."""
    if entry["kind"] == "start":
        return measure_start(source, photos)
    asked = {**entry, "shape": shapes[entry["shape"]]}
    if entry["kind"] == "step":
        animals = shared / ANIMALS
        asked["data"] = str(photos) if entry["shape"] == "photos" else str(animals) if animals.exists() else "DIGITS"
    command = [sys.executable, __file__, "measure", "--asked", json.dumps(asked)]
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    if entry["kind"] == "compile":  # what was compiled for an earlier measurement does not count
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(photos.parent / "compiled")
    result: dict[str, Any] = json.loads(
        subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    )
    return result


def _medians(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The median over rounds of every figure."""
    found: dict[str, Any] = {}
    for key, value in results[0].items():
        if isinstance(value, dict):
            found[key] = {name: statistics.median(result[key][name] for result in results) for name in value}
        else:
            found[key] = statistics.median(result[key] for result in results)
    return found


def _processor(act: Callable[[], object]) -> float:
    began = time.process_time()
    act()
    return time.process_time() - began


def _arguments(shape: Mapping[str, Any]) -> dict[str, Any]:
    return {key: shape[key] for key in ("img_size", "patch_size", "embed_dim", "depth", "num_heads") if key in shape}


def _data_set(data: str) -> tuple[str, str | None]:
    return ("DIGITS", None) if data == "DIGITS" else ("FOLDER", data)


def _commit_of(source: Path) -> str:
    command = ["git", "--no-optional-locks", "rev-parse", "HEAD"]
    return subprocess.run(command, cwd=source, capture_output=True, text=True, check=True).stdout.strip()


def _number(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


if __name__ == "__main__":
    sys.exit(main())
