"""How much faster than the dense model is a small one, in each layout?

    OMP_NUM_THREADS=2 python benchmarks/layouts.py run                    # all of it: hours, since every network is compiled
    OMP_NUM_THREADS=2 python benchmarks/layouts.py run --only animals-fp32-
    python benchmarks/layouts.py table                                    # the tables of docs/layouts.md from the JSON lines

A measurement is one network, runtime, prune ratio and batch size (NETWORK-RUNTIME-PERCENT-BATCH); all its models take turns,
round by round. Its line in docs/results/layouts.jsonl replaces an earlier one. The small networks are made by masks of
random scores, with the keep ratios that water-filling gives to an importance drawn by seed between 0.4 and 1.2 for each block;
weights are random. There are three of each: with widths as they come; aligned, with every head as thin as its block's share
makes it; and aligned with whole heads cut where heads would be thin, which is what `p3b prune --align` makes.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from harness.command import Bench, Given, main
from harness.pages import Part, folded, how_it_was_run, table
from harness.records import RESULTS, ROOT, Line
from p3b.core.allocation import keep_ratios
from p3b.deploy.choice import CANDIDATES, with_layout
from p3b.deploy.layouts import LAYOUTS
from p3b.deploy.metadata import Metadata
from p3b.deploy.onnx_file import OnnxRunner, write_onnx
from p3b.deploy.speed import images_per_second
from p3b.methods.base import BlockShares
from p3b.vit.attention import choose_attention
from p3b.vit.compact import apply_cuts, plan_cuts
from p3b.vit.cost import count_macs, count_parameters, dense_params
from p3b.vit.layout import DEFAULT_DIMS, read_layout

SEED = 0
DENSE, DENSE_PLAIN, DENSE_AS_EXPORTED = "dense", "dense, plain attention", "dense, as torch exports it"
"""The dense model, in ONNX with all that `p3b export` does to a graph. To tell what of a gain that is: with the attention that
a layout has under bf16; as torch alone exports it."""
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
"""Share of the MACs ratio that a speed-up should reach."""
NAMES = {
    f"{network}-{runtime}-{100 * ratio:.0f}-{batch}": (network, ratio, runtime, batch)
    for runtime, network, ratio, batch in product(RUNTIMES, MODELS, PRUNE_RATIOS, BATCHES)
}


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


def measure(name: str, given: Given) -> dict[str, Any]:
    """All models of a network, prune ratio, runtime and batch size side by side."""
    network, prune_ratio, runtime, batch_size = NAMES[name]
    dense = dense_model(network)
    small = {widths: small_model(dense, prune_ratio, *widths) for widths in WIDTHS}
    size = tuple(dense.patch_embed.img_size)
    eager: dict[tuple[str, Widths], nn.Module] = {(DENSE, AS_KEPT): dense}
    if runtime == "bf16":
        eager[DENSE_PLAIN, AS_KEPT] = choose_attention(deepcopy(dense), torch.device("cpu"), torch.bfloat16)
    if runtime == "onnx":
        eager[DENSE_AS_EXPORTED, AS_KEPT] = dense
    with _number_format(runtime):
        for widths, model in small.items():
            for layout in layouts_of(runtime, widths):
                eager[layout, widths] = with_layout(model, layout)
    with tempfile.TemporaryDirectory() as folder:
        images = torch.rand(2, 3, *size)
        models = [
            OnnxModel(model, images, Path(tempfile.mkdtemp(dir=folder)) / "model.onnx", flat=layout != DENSE_AS_EXPORTED)
            if runtime == "onnx"
            else _carried_out(model, runtime)
            for (layout, _), model in eager.items()
        ]
        with _number_format(runtime):
            speeds = images_per_second(
                models, (3, *size), batch_size=batch_size, device=torch.device("cpu"), rounds=given.rounds,
                seconds_per_round=0.05, seconds=given.seconds, clock=CLOCKS[given.clock],
            )  # fmt: skip
    rows = []
    for (layout, (align, whole_heads)), speed in zip(eager, speeds, strict=True):
        compact = small[align, whole_heads] if layout in LAYOUTS else dense
        costs = {"params": count_parameters(compact), "macs": count_macs(compact, size)}
        rows.append({"layout": layout, "align": align, "heads": whole_heads, "images_per_second": speed, **costs})
    return {
        "network": network,
        "prune_ratio": prune_ratio,
        "runtime": runtime,
        "batch_size": batch_size,
        "clock": given.clock,
        "seed": SEED,
        "threads": torch.get_num_threads(),
        "rows": rows,
    }


def _carried_out(model: nn.Module, runtime: str) -> nn.Module:
    if runtime == "compile":
        # All models share timm's code, which is what compiled forms are kept with: past the limit the rest would run eagerly.
        torch._dynamo.config.recompile_limit = 64
        return torch.compile(model, dynamic=False)  # type: ignore[return-value]
    return model


def _number_format(runtime: str) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16) if runtime == "bf16" else contextlib.nullcontext()


class OnnxModel(nn.Module):
    """A model in ONNX Runtime as `p3b export` writes it, or (`flat=False`) as torch alone does; called like a module."""

    def __init__(self, model: nn.Module, images: Tensor, file: Path, *, flat: bool = True) -> None:
        super().__init__()
        write_onnx(model, images, file, optimize=False, flat=flat)
        self.run = OnnxRunner(file, Metadata(None, None))

    def forward(self, images: Tensor) -> Any:
        return self.run(images.numpy())


# --- tables


def tables(lines: Sequence[Line]) -> list[str]:
    """For each runtime what layouts bring, and folded every layout; made from the lines alone."""
    lines = sorted(lines, key=lambda line: list(NAMES.values()).index(_key(line)))
    text = [
        "Speed-up over the dense model, and in brackets as a share of the MACs ratio. `index` is the model as saved; the best",
        f"layout is the quickest of all, with widths as kept and with `--align {ALIGN}`.",
        "",
    ]
    for runtime, title in RUNTIMES.items():
        if group := [line for line in lines if line["runtime"] == runtime]:
            ratios = [ratio for ratio in PRUNE_RATIOS if any(line["prune_ratio"] == ratio for line in group)]
            text += [f"### {title}", "", *_best_layouts(group), f"{' '.join(_met(group, ratio) for ratio in ratios)}", ""]
            text += folded(f"Every layout, {title}", _all_layouts(group))
    return text + how_it_was_run(lines, *(f"seed {line['seed']}, {_CLOCKS[line['clock']]}" for line in lines))


_CLOCKS = {"wall": "wall clock", "cpu": "processor time"}


def _best_layouts(group: Sequence[Line]) -> list[str]:
    rows = []
    for line in group:
        dense, *_ = line["rows"]
        kinds = {aligned: [row for row in _small(line["rows"]) if (row["align"] > 1) == aligned] for aligned in (False, True)}
        index = next(row for row in kinds[False] if row["layout"] == "index")
        best = [max(found, key=lambda row: row["images_per_second"]) if found else None for found in kinds.values()]
        told = ["" if row is None else f"{row['layout']}: {_cell(dense, row)}" for row in best]
        rows.append([*_place(line), _cell(dense, index), *told])
    return table([*PLACE, "index", "best layout", f"best layout, align {ALIGN}"], rows)


def _all_layouts(group: Sequence[Line]) -> list[str]:
    columns = list(dict.fromkeys(_column(row) for line in group for row in line["rows"][1:]))
    rows = []
    for line in group:
        dense, *others = line["rows"]
        of = {_column(row): row for row in others}
        rows.append([*_place(line), *(_cell(dense, of[column]) if column in of else "" for column in columns)])
    return table([*PLACE, *columns], rows)


PLACE = ("network", "pruned", "batch", "MACs ratio")


def _place(line: Line) -> list[str]:
    dense, index = line["rows"][0], next(row for row in line["rows"] if row["layout"] == "index")
    return [line["network"], f"{line['prune_ratio']:.0%}", str(line["batch_size"]), f"{dense['macs'] / index['macs']:.2f}"]


def _met(group: Sequence[Line], prune_ratio: float) -> str:
    """How many of the measurements at a prune ratio are as they should be."""
    many, single = (
        [line for line in group if line["prune_ratio"] == prune_ratio and line["batch_size"] == size]
        for size in (max(BATCHES), min(BATCHES))
    )
    met = sum(_share(line["rows"]) >= GOAL for line in many)
    slower = sum(_speedup(line["rows"]) < 1 for line in single)
    return (
        f"At {prune_ratio:.0%}, {met} of {len(many)} measurements at batch {max(BATCHES)} reach {GOAL} of the MACs ratio, and "
        f"{slower} of {len(single)} at batch {min(BATCHES)} are slower than dense."
    )


def _key(line: Line) -> tuple[str, float, str, int]:
    return line["network"], line["prune_ratio"], line["runtime"], line["batch_size"]


def _column(row: Mapping[str, Any]) -> str:
    """Layout and widths of a row; the oldest lines say nothing of whole heads: all were kept."""
    aligned = "" if row["align"] == 1 else f", align {row['align']}"
    return f"{row['layout']}{aligned}{', whole heads' if row.get('heads', False) else ''}"


def _cell(dense: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    speedup = row["images_per_second"] / dense["images_per_second"]
    return f"{speedup:.2f} ({speedup * row['macs'] / dense['macs']:.2f})"


def _small(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [row for row in rows[1:] if row["layout"] not in (DENSE_PLAIN, DENSE_AS_EXPORTED)]


def _speedup(rows: Sequence[Mapping[str, Any]]) -> float:
    return float(max(row["images_per_second"] for row in _small(rows)) / rows[0]["images_per_second"])


def _share(rows: Sequence[Mapping[str, Any]]) -> float:
    """The best speed-up as a share of its MACs ratio."""
    dense = rows[0]
    best = max(row["images_per_second"] * row["macs"] for row in _small(rows))
    return float(best / (dense["images_per_second"] * dense["macs"]))


def _flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=15, help="rounds of a measurement at most")
    parser.add_argument("--seconds", type=float, default=60.0, help="that the rounds of a measurement may take, about")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="cpu: processor time, for OMP_NUM_THREADS=1")


PART = Part("layouts.py", RESULTS / "layouts.jsonl", ROOT / "docs" / "layouts.md", tables)
BENCH = Bench(__doc__, PART, tuple(NAMES), measure, _flags, ("torch", "timm", "onnx", "onnxruntime"), key=_key)

if __name__ == "__main__":
    sys.exit(main(BENCH))
