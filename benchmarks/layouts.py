"""What the layout of a small model costs: each layout against the dense model, in one run.

    OMP_NUM_THREADS=2 python benchmarks/layouts.py run                    # all of it: hours, since every network is compiled
    OMP_NUM_THREADS=2 python benchmarks/layouts.py run --model animals --runtime fp32
    python benchmarks/layouts.py table                                    # the tables of docs/layouts.md from the JSON lines

A measurement is one network, prune ratio, runtime and batch size; all its models take turns, round by round. It adds one line
to docs/results/layouts.jsonl and replaces an earlier one of the same measurement. The small networks are made by masks of
random scores, with the keep ratios that water-filling gives to an importance drawn by seed between 0.4 and 1.2 for each block;
weights are random. There are three of each: with widths as they come; aligned, with every head as thin as its block's share
makes it; and aligned with whole heads cut where heads would be thin, which is what `p3b prune --align` makes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from p3b.core.allocation import keep_ratios
from p3b.deploy.choice import CANDIDATES, with_layout
from p3b.deploy.layouts import LAYOUTS
from p3b.deploy.speed import images_per_second
from p3b.methods.base import BlockShares
from p3b.storage.files import write_atomically
from p3b.vit.attention import choose_attention
from p3b.vit.compact import apply_cuts, plan_cuts
from p3b.vit.cost import count_macs, count_parameters, dense_params
from p3b.vit.layout import DEFAULT_DIMS, read_layout
from records import RESULTS, ROOT, circumstances, packages_of, read_lines, revision_of, versions

LINES = RESULTS / "layouts.jsonl"
PAGE = ROOT / "docs" / "layouts.md"
BEGIN, END = "<!-- begin: made by benchmarks/layouts.py table -->", "<!-- end -->"
SEED = 0
DENSE, DENSE_PLAIN = "dense", "dense, plain attention"
"""The dense model as timm makes it; and with the attention that a layout has under bf16, to tell what of the gain is that."""
MODELS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "animals": (
        "vit_tiny_patch16_224",
        {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 12, "num_heads": 4, "num_classes": 6},
    ),
    "DeiT-Tiny": ("deit_tiny_patch16_224", {}),
    "DeiT-Small": ("deit_small_patch16_224", {}),
}
PRUNE_RATIOS, BATCHES = (0.5, 0.75), (1, 32)
RUNTIMES = {
    "fp32": "PyTorch eager, float32",
    "bf16": "PyTorch eager, bf16 autocast",
    "compile": "torch.compile, float32",
    "onnx": "ONNX Runtime, float32",
}
EAGER = ("fp32", "bf16")
ALIGN = 8
ALIGNED = ("index", "gathered", "balanced")
Widths = tuple[int, bool]
"""What kept counts are multiples of, and whether whole heads go where heads would be thin."""
AS_KEPT: Widths = (1, False)
THIN_HEADS: Widths = (ALIGN, False)
WIDTHS: tuple[Widths, ...] = (AS_KEPT, THIN_HEADS, (ALIGN, True))
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
GOAL = 0.9
Key = tuple[str, float, str, int]


def main(arguments: Sequence[str] | None = None, *, lines: Path = LINES, page: Path = PAGE) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "table"))
    parser.add_argument("--model", choices=tuple(MODELS), help="this one alone")
    parser.add_argument("--prune-ratio", type=float, choices=PRUNE_RATIOS, help="this one alone")
    parser.add_argument("--runtime", choices=tuple(RUNTIMES), help="this one alone")
    parser.add_argument("--batch-size", type=int, choices=BATCHES, help="this one alone")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of a measurement at most")
    parser.add_argument(
        "--clock",
        choices=tuple(CLOCKS),
        default="wall",
        help="cpu: the processor's seconds, for OMP_NUM_THREADS=1 on a busy machine",
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="that the rounds of a measurement may take, about")
    given = parser.parse_args(arguments)
    if given.action == "run":
        for name in [given.model] if given.model else MODELS:
            for prune_ratio in [given.prune_ratio] if given.prune_ratio else PRUNE_RATIOS:
                dense = dense_model(name)
                small = {widths: small_model(dense, prune_ratio, *widths) for widths in WIDTHS}
                for runtime in [given.runtime] if given.runtime else RUNTIMES:
                    for batch_size in [given.batch_size] if given.batch_size else BATCHES:
                        key = (name, prune_ratio, runtime, batch_size)
                        replace_line(lines, key, measure(key, dense, small, given.rounds, given.seconds, given.clock))
    write_page(page, read_lines(lines))


def dense_model(name: str) -> VisionTransformer:
    """A network with random weights, in evaluation mode."""
    kind, arguments = MODELS[name]
    torch.manual_seed(SEED)
    return timm.create_model(kind, **arguments).eval()


def small_model(dense: VisionTransformer, prune_ratio: float, align: int, whole_heads: bool) -> VisionTransformer:
    """A copy cut by masks of random scores and uneven keep ratios, the same ones for every alignment, with heads or without."""
    layout = read_layout(dense, ("heads", *DEFAULT_DIMS) if whole_heads else DEFAULT_DIMS)
    generator = torch.Generator().manual_seed(SEED)
    importance = 0.4 + 0.8 * torch.rand(len(layout.blocks), generator=generator, dtype=torch.float64)
    params = torch.tensor([dense_params(block) for block in layout.blocks], dtype=torch.float64)
    goals = keep_ratios(importance, params, layout.other_params, prune_ratio).tolist()
    sizes = {block.gate(dim): size for block in layout.blocks for dim, size in block.dims.items()}
    # Heads come last, so that the scores of all other gates are the same with them and without.
    drawn = sorted(sizes, key=lambda gate: gate.endswith(".heads"))
    scores = {gate: torch.rand(sizes[gate], generator=generator) for gate in drawn}
    masks = BlockShares(layout.blocks, align).decide(goals, scores, progress=1.0, tau=0.0, last=True).masks
    return apply_cuts(deepcopy(dense), plan_cuts(layout, masks)).eval()


def layouts_of(runtime: str, widths: Widths) -> Sequence[str]:
    """What is measured: all that a choice is made from, for the widths that a run makes; the rest in eager PyTorch alone."""
    eager = runtime in EAGER
    if widths == THIN_HEADS:
        return ALIGNED if eager else ()
    return tuple(LAYOUTS) if eager and widths == AS_KEPT else CANDIDATES


def measure(
    key: Key, dense: VisionTransformer, small: Mapping[Widths, VisionTransformer], rounds: int, seconds: float, clock: str
) -> dict[str, Any]:
    """One measurement: all models of a network, prune ratio, runtime and batch size side by side."""
    name, prune_ratio, runtime, batch_size = key
    made_by = circumstances()
    size = tuple(dense.patch_embed.img_size)
    eager: dict[tuple[str, Widths], nn.Module] = {(DENSE, AS_KEPT): dense}
    if runtime == "bf16":
        eager[DENSE_PLAIN, AS_KEPT] = choose_attention(deepcopy(dense), torch.device("cpu"), torch.bfloat16)
    with _number_format(runtime):
        for widths, model in small.items():
            for layout in layouts_of(runtime, widths):
                eager[layout, widths] = with_layout(model, layout)
    images = torch.rand(batch_size, 3, *size)
    with tempfile.TemporaryDirectory() as folder:
        if runtime == "compile":
            models = [_compiled(model) for model in eager.values()]
        elif runtime == "onnx":
            models = [OnnxModel(model, images, Path(folder) / f"{place}.onnx") for place, model in enumerate(eager.values())]
        else:
            models = list(eager.values())
        with _number_format(runtime):
            speeds = images_per_second(
                models, (3, *size), batch_size=batch_size, device=torch.device("cpu"), rounds=rounds,
                seconds_per_round=0.05, seconds=seconds, clock=CLOCKS[clock],
            )  # fmt: skip
    rows = []
    for (layout, widths), speed in zip(eager, speeds, strict=True):
        compact = dense if layout in (DENSE, DENSE_PLAIN) else small[widths]
        align, whole_heads = widths
        rows.append(
            {
                "layout": layout,
                "align": align,
                "heads": whole_heads,
                "images_per_second": speed,
                "params": count_parameters(compact),
                "macs": count_macs(compact, size),
            }
        )
    print(f"{name}, {prune_ratio:.0%}, {runtime}, batch {batch_size}: {_best(rows)}", flush=True)
    return {
        "network": name,
        "prune_ratio": prune_ratio,
        "runtime": runtime,
        "batch_size": batch_size,
        "command": "python benchmarks/layouts.py run" + (" --clock cpu" if clock == "cpu" else ""),
        "clock": clock,
        **made_by,
        "seed": SEED,
        "threads": torch.get_num_threads(),
        "versions": versions("torch", "timm", "onnx", "onnxruntime"),
        "rows": rows,
    }


def _number_format(runtime: str) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16) if runtime == "bf16" else contextlib.nullcontext()


class OnnxModel(nn.Module):
    """An exported model in ONNX Runtime, called like the module that it was exported from."""

    def __init__(self, model: nn.Module, images: Tensor, file: Path) -> None:
        import onnxruntime

        super().__init__()
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        shape = {0: torch.export.Dim("batch", min=1, max=1024)}
        batch = images if len(images) > 1 else torch.cat([images, images])
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            torch.onnx.export(model, (batch,), file, dynamo=True, dynamic_shapes=(shape,), verbose=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self.input = self.session.get_inputs()[0].name

    def forward(self, images: Tensor) -> Any:
        return self.session.run(None, {self.input: images.numpy()})


def _compiled(model: nn.Module) -> nn.Module:
    # All models share timm's code, which is what compiled forms are kept with: past the limit the rest would run eagerly.
    torch._dynamo.config.recompile_limit = 64
    compiled: nn.Module = torch.compile(model, dynamic=False)
    return compiled


def replace_line(file: Path, key: Key, line: dict[str, Any]) -> None:
    """Write a measurement in the place of an earlier one of the same key."""
    kept = [*(other for other in read_lines(file) if _key(other) != key), line]
    order = [(m, p, r, b) for r in RUNTIMES for m in MODELS for p in PRUNE_RATIOS for b in BATCHES]
    kept.sort(key=lambda other: order.index(_key(other)))
    text = "".join(json.dumps(other) + "\n" for other in kept)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, lambda path: path.write_text(text))


def write_page(page: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Put the tables between the markers of the page; what is written around them stays."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    text = f"{before}{BEGIN}\n\n{tables(lines)}\n{END}{after}"
    write_atomically(page, lambda path: path.write_text(text))


def tables(lines: Sequence[dict[str, Any]]) -> str:
    """A table for each runtime, made from the lines alone: speed-up over dense, and in brackets its share of the MACs ratio."""
    text: list[str] = []
    for runtime, title in RUNTIMES.items():
        group = [line for line in lines if line["runtime"] == runtime]
        if not group:
            text += [f"### {title}", "", "No run is recorded.", ""]
            continue
        columns = list(dict.fromkeys(_column(row) for line in group for row in line["rows"][1:]))
        text += [f"### {title}", "", f"| network | pruned | batch | MACs ratio | {' | '.join(columns)} |"]
        text.append("|---|---:|---:|" + "---:|" * (1 + len(columns)))
        for line in group:
            dense, *rows = line["rows"]
            of = {_column(row): row for row in rows}
            ratio = dense["macs"] / of["index"]["macs"]
            cells = [_cell(dense, of[column]) if column in of else "" for column in columns]
            text.append(
                f"| {line['network']} | {line['prune_ratio']:.0%} | {line['batch_size']} | {ratio:.2f} | {' | '.join(cells)} |"
            )
        measured = [ratio for ratio in PRUNE_RATIOS if any(line["prune_ratio"] == ratio for line in group)]
        text += ["", f"With the best layout: {'; '.join(_met(group, ratio) for ratio in measured)}.", ""]
    if lines:
        text += ["### How it was run", ""]
        text += [f"- {told}" for told in dict.fromkeys(map(_certificate, lines))]
    return "\n".join(text) + "\n"


def _met(group: Sequence[Mapping[str, Any]], prune_ratio: float) -> str:
    """How many of the measurements at a prune ratio are as they should be."""
    many, single = (
        [line for line in group if line["prune_ratio"] == prune_ratio and line["batch_size"] == size]
        for size in (max(BATCHES), min(BATCHES))
    )
    met = sum(_share(line["rows"]) >= GOAL for line in many)
    slower = sum(_speedup(line["rows"]) < 1 for line in single)
    return (
        f"at {prune_ratio:.0%}, {met} of {len(many)} measurements at batch {max(BATCHES)} reach {GOAL} of the MACs ratio, and "
        f"{slower} of {len(single)} at batch {min(BATCHES)} are slower than dense"
    )


def _key(line: Mapping[str, Any]) -> Key:
    return line["network"], line["prune_ratio"], line["runtime"], line["batch_size"]


def _column(row: Mapping[str, Any]) -> str:
    """Layout and widths of a row; lines from before whole heads went under alignment say nothing of them: all were kept."""
    aligned = "" if row["align"] == 1 else f", align {row['align']}"
    return f"{row['layout']}{aligned}{', whole heads' if row.get('heads', False) else ''}"


def _cell(dense: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    speedup = row["images_per_second"] / dense["images_per_second"]
    return f"{speedup:.2f} ({speedup * row['macs'] / dense['macs']:.2f})"


def _small(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [row for row in rows[1:] if row["layout"] != DENSE_PLAIN]


def _speedup(rows: Sequence[Mapping[str, Any]]) -> float:
    return float(max(row["images_per_second"] for row in _small(rows)) / rows[0]["images_per_second"])


def _share(rows: Sequence[Mapping[str, Any]]) -> float:
    """The best speed-up as a share of its MACs ratio."""
    dense = rows[0]
    best = max(row["images_per_second"] * row["macs"] for row in _small(rows))
    return float(best / (dense["images_per_second"] * dense["macs"]))


def _best(rows: Sequence[Mapping[str, Any]]) -> str:
    best = max(_small(rows), key=lambda row: row["images_per_second"])
    return f"{_column(best)}: {_cell(rows[0], best)}"


def _certificate(line: Mapping[str, Any]) -> str:
    hardware = line["hardware"]
    return (
        f"`{line['command']}`: {revision_of(line)}, seed {line['seed']}, {line['threads']} threads on "
        f"{hardware['cores']} cores {hardware['machine']} that may have done other work too, "
        f"{'wall clock' if line['clock'] == 'wall' else 'seconds of the processor'}; {packages_of(line)}"
    )


if __name__ == "__main__":
    main()
