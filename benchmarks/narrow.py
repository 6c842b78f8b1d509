"""What do steps cost while a model is pruned, and those of the small model after it?

    python benchmarks/narrow.py run                    # everything: about 15 minutes of one core
    python benchmarks/narrow.py run --only stage-90-fp32    # one measurement
    python benchmarks/narrow.py table                  # the tables of docs/narrow.md from the JSON lines

Model: the animals' ViT (32 px, width 128, depth 12, 65 tokens), batches of 32 (16 in `returns-`), a step of AdamW. Every
figure is processor time of one thread, all sides in turns. `stage-` and `small-` take masks of random scores and uneven keep
ratios, as `benchmarks/layouts.py` does: a stage is sampled at points that lie evenly between the start of pruning and its end,
with masks and softness of that moment. `returns-` prunes on real images, everything computed, and looks at each mask update at
what would not have been.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import p3b
import p3b.data
from harness.command import Bench, Given, main
from harness.pages import Part, how_it_was_run, table
from harness.records import RESULTS, ROOT, Line
from harness.turns import CPU, take_turns
from layouts import MODELS, SEED, dense_model, small_model
from p3b.core.allocation import keep_ratios
from p3b.methods import method_dims
from p3b.methods.base import BlockShares
from p3b.storage.models import build_model
from p3b.train.optim import Precision, build_optimizer
from p3b.vit.active import ActiveWidths
from p3b.vit.attention import choose_attention
from p3b.vit.cost import count_parameters
from p3b.vit.layout import read_layout
from p3b.vit.narrow_stream import narrow_stream
from p3b.vit.trainable import trainable_form

BATCH, FEW, CLASSES = 32, 16, 6
"""Images of a step, those of a step of `returns-`, and classes."""
RATIOS = {"75": 0.75, "90": 0.9}
POINTS = 8
"""Moments of the stage that are measured."""
NARROW: Mapping[str, Any] = {"align": 8, "stream": "auto"}
"""Options of a narrower stream."""
SPARSE = 0.375
"""Share of the stage after which keep ratios have reached their goals, as `p3b prune` has it."""
EPSILONS = (0.01, 0.03, 0.1)
"""Least masks of what is computed that `returns-` looks at."""
UPDATES, EVERY = 10, 4
"""Mask updates of `returns-`, and steps between two of them: few, so that scores are noisy and more comes back than usual."""
NAMES = [f"{kind}-{ratio}-{form}" for form in ("fp32", "bf16") for kind in ("stage", "small", "returns") for ratio in RATIOS]


def measure(name: str, given: Given) -> dict[str, Any]:
    kind, ratio, form = name.split("-")
    precision = Precision.choose(form, torch.device("cpu"))
    measures = {"stage": measure_stage, "small": measure_small, "returns": measure_returns}
    found = measures[kind](RATIOS[ratio], precision, given)
    number_format = str(precision.dtype or torch.float32).removeprefix("torch.")
    return {"kind": kind, "prune_ratio": RATIOS[ratio], "precision": number_format, "rounds": given.rounds, **found}


class Step:
    """Steps of a model on one batch, with its optimizer and perhaps a pruner that measures."""

    def __init__(self, model: VisionTransformer, precision: Precision, pruner: p3b.Pruner | None = None) -> None:
        self._model, self._precision, self.pruner = model.train(), precision, pruner
        choose_attention(model, torch.device("cpu"), precision.dtype)
        self._optimizer = build_optimizer(model, "adamw", 1e-4, 0.05)
        generator = torch.Generator().manual_seed(SEED)
        self._images = torch.randn(BATCH, 3, *model.patch_embed.img_size, generator=generator)
        self._targets = torch.randint(CLASSES, (BATCH,), generator=generator)

    def __call__(self) -> None:
        with self._precision.autocast():
            loss = nn.functional.cross_entropy(self._model(self._images).float(), self._targets)
            if self.pruner is not None:
                loss = loss + self.pruner.loss(nn.functional.cross_entropy, self._targets)
        loss.backward()
        if self.pruner is not None:
            self.pruner.step()
        self._optimizer.step()
        self._optimizer.zero_grad()


def measure_small(prune_ratio: float, precision: Precision, given: Given) -> dict[str, Any]:
    """The dense model and small ones in both forms, with widths as they come and with whole heads gone."""
    dense = dense_model("animals")
    steps = {"dense": Step(dense, precision)}
    params = {}
    for title, align in (("as kept", 1), ("align 8", 8)):
        small = small_model(dense, prune_ratio, align, align > 1)
        params[title] = count_parameters(small)
        steps[f"saved, {title}"] = Step(small, precision)
        steps[f"quick, {title}"] = Step(trainable_form(small), precision)
    return {"sides": take_turns(CPU, steps, given.rounds), "params": {"dense": count_parameters(dense), **params}}


def measure_stage(prune_ratio: float, precision: Precision, given: Given) -> dict[str, Any]:
    """Steps at points of the stage: dense, all computed, active elements, with `linear` probes; all with a narrower stream."""
    never = p3b.Schedule(start=0, sparse=1, final=10**6, update_every=10**6)
    probed = {"prune_ratio": prune_ratio, "estimator": "linear"}
    uniform = {"prune_ratio": prune_ratio, "method": "uniform", **NARROW}
    sides: Mapping[str, Mapping[str, Any] | None] = {
        "dense": None,
        "full": {"keep_ratios": [0.5] * 24},
        "active": {"keep_ratios": [0.5] * 24, "compute": "active"},
        "active, linear probes": {**probed, "compute": "active"},
        "narrow stream, full": uniform,
        "narrow stream, active": {**uniform, "compute": "active"},
        "narrow stream, active, linear probes": {**probed, **NARROW, "compute": "active"},
    }
    steps = {}
    for side, options in sides.items():
        model = dense_model("animals")
        steps[side] = Step(model, precision, None if options is None else p3b.Pruner(model, schedule=never, **options))
    dense = dense_model("animals")
    kinds = {"narrow": _masks_of_stage(dense, prune_ratio, NARROW), "wide": _masks_of_stage(dense, prune_ratio, {})}
    points = []
    for point in range(POINTS):
        progress, tau = _moment((point + 0.5) / POINTS)
        masks = {kind: masks_at(progress, tau) for kind, masks_at in kinds.items()}
        computed = 1.0
        for side, step in steps.items():
            if step.pruner is not None:
                step.pruner._set_masks(masks["narrow" if side.startswith("narrow") else "wide"])
                if side == "active" and (active := step.pruner.gates.active) is not None:
                    computed = float(active.computed_N.double().mean())
        found = take_turns(CPU, steps, given.rounds)
        points.append({"progress": progress, "tau": tau, "computed": computed, "sides": found})
        print(point, {side: round(taken["ratio"], 3) for side, taken in found.items()}, file=sys.stderr, flush=True)
    means = {side: statistics.mean(point["sides"][side]["ratio"] for point in points) for side in steps}
    return {"points": points, "means": means}


def measure_returns(prune_ratio: float, precision: Precision, given: Given) -> dict[str, Any]:
    """Pruning on real images, everything computed: what would not have been, and how much of it came back."""
    _, arguments = MODELS["animals"]
    kwargs = {key: value for key, value in arguments.items() if key != "num_classes"}
    torch.manual_seed(SEED)
    model, _ = build_model(
        MODELS["animals"][0],
        num_classes=CLASSES,
        model_kwargs=kwargs,
        weights=given.shared / "data/source_vit.safetensors",
        seed=SEED,
    )
    steps_in_all = UPDATES * EVERY
    schedule = p3b.Schedule(start=0, sparse=round(SPARSE * steps_in_all), final=steps_in_all + 1, update_every=EVERY)
    pruner = p3b.Pruner(model, prune_ratio, schedule=schedule, estimator="linear")
    shadows = [ActiveWidths(pruner.layout, model, epsilon) for epsilon in EPSILONS]
    optimizer = build_optimizer(model.train(), "adamw", 5e-4, 0.05)
    choose_attention(model, torch.device("cpu"), precision.dtype)
    updates: list[list[dict[str, float]]] = []
    before: list[Tensor] = []
    for images, targets in _batches(given.shared, steps_in_all):
        with precision.autocast():
            loss = nn.functional.cross_entropy(model(images).float(), targets)
            loss = loss + pruner.loss(nn.functional.cross_entropy, targets)
        loss.backward()
        decision = pruner.step()
        optimizer.step()
        optimizer.zero_grad()
        if decision is None:
            continue
        kept_N = torch.cat(list(decision.masks.values())) >= 0.5
        updates.append([])
        for number, shadow in enumerate(shadows):
            shadow.set(decision.masks)
            computed_N = shadow.computed_N
            found = {"progress": decision.progress, "tau": decision.tau, "computed": float(computed_N.double().mean())}
            found["left_out"] = _left_out(model.eval(), shadow, images)
            if before:
                closed_N = ~before[number]
                found["not_computed"] = int(closed_N.sum())
                found["computed_again"], found["kept_again"] = (int((closed_N & now).sum()) for now in (computed_N, kept_N))
            updates[-1].append(found)
        model.train()
        before = [shadow.computed_N for shadow in shadows]
        print([{key: round(value, 4) for key, value in found.items()} for found in updates[-1]], file=sys.stderr, flush=True)
    return {"epsilons": EPSILONS, "updates": updates, "every": EVERY, "elements": sum(pruner.layout.gates.values())}


def _left_out(model: nn.Module, active: ActiveWidths, images: Tensor) -> float:
    """Largest relative difference of an image's logits to those at full width."""
    with torch.no_grad():
        full = model(images)
        active.attach(model)
        narrow = model(images)
        active.detach()
    return float(((narrow - full).norm(dim=-1) / full.norm(dim=-1)).max())


def _moment(share: float) -> tuple[float, float]:
    """Progress and softness when a share of the stage is over."""
    schedule = p3b.Schedule(start=0, sparse=round(SPARSE * 10_000), final=10_000, update_every=1)
    step = round(share * 10_000)
    return schedule.progress(step), schedule.tau(step)


def _masks_of_stage(
    dense: VisionTransformer, prune_ratio: float, options: Mapping[str, Any]
) -> Callable[[float, float], Mapping[str, Tensor]]:
    """Masks at a moment of the stage, the same scores all the time; of a method with these options."""
    layout = read_layout(dense, method_dims("block_benefit", options))
    generator = torch.Generator().manual_seed(SEED)
    importance = 0.4 + 0.8 * torch.rand(len(layout.blocks), generator=generator, dtype=torch.float64)
    scores = {gate: torch.rand(size, generator=generator) for gate, size in layout.gates.items()}
    align = options.get("align", 1)
    narrow = narrow_stream(layout, options.get("stream", 0), align, prune_ratio, blocks_only=False)
    shares = BlockShares(layout.blocks, align, stream=narrow)
    others, ratio = (layout.other_params, prune_ratio) if narrow is None else (narrow.others, narrow.ratio)
    goals = keep_ratios(importance, shares.params_at_goal, others, ratio).tolist()
    return lambda progress, tau: shares.decide(goals, scores, progress=progress, tau=tau).masks


def _batches(shared: Path, count: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of the animals, or of printed digits where they are not there."""
    archive = shared / "data/cifar10-animals-train.tar"
    splits = p3b.data.open_data("FOLDER", str(archive), val_share=0.2, max_train_images=2 * FEW * count)
    preprocessing = p3b.data.Preprocessing((3, 32, 32), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    batches = p3b.data.train_batches(
        splits.train, preprocessing, p3b.data.Augmentation(repeats=1), seed=SEED, batch_size=FEW, num_workers=0,
        device=torch.device("cpu"),
    )  # fmt: skip
    found: list[tuple[Tensor, Tensor]] = []
    epoch = 0
    while len(found) < count:
        batches.set_epoch(epoch)
        found += list(batches)
        epoch += 1
    return found[:count]


# --- tables


def tables(lines: Sequence[Line]) -> list[str]:
    """All tables, made from the lines alone."""
    lines = sorted(lines, key=lambda line: NAMES.index(line["name"]))
    makers = {"stage": _stage_table, "small": _small_table, "returns": _returns_table}
    text = [each for line in lines for each in makers[line["kind"]](line)]
    return text + how_it_was_run(lines, *(line["precision"] for line in lines))


def _title(line: Line) -> str:
    return f"{100 * line['prune_ratio']:.0f} % pruned, {line['precision']}"


def _stage_table(line: Line) -> list[str]:
    sides = list(line["means"])
    rows = [
        [
            f"{point['progress']:.2f}",
            f"{point['tau']:.3f}",
            f"{point['computed']:.0%}",
            *(f"{point['sides'][side]['ratio']:.2f}" for side in sides),
        ]
        for point in line["points"]
    ]
    rows.append(["**mean**", "", "", *(f"**{line['means'][side]:.2f}**" for side in sides)])
    return [f"### A step of pruning: {_title(line)}", "", *table(["progress", "softness", "computed", *sides], rows)]


def _small_table(line: Line) -> list[str]:
    rows = [
        [side, f"{1000 * taken['seconds']:.0f}", f"{taken['ratio']:.3f}", " to ".join(f"{r:.3f}" for r in taken["ratio_range"])]
        for side, taken in line["sides"].items()
    ]
    return [f"### A step of the small model: {_title(line)}", "", *table(["form", "ms", "of dense", "range"], rows)]


def _returns_table(line: Line) -> list[str]:
    text = [f"### What is left out: {_title(line)}, {line['elements']:,} elements", ""]
    for number, epsilon in enumerate(line["epsilons"]):
        updates = [update[number] for update in line["updates"]]
        rows = [
            [
                f"{update['progress']:.2f}",
                f"{update['tau']:.3f}",
                f"{update['computed']:.0%}",
                f"{update['left_out']:.4f}",
                *(f"{update[key]:,}" if key in update else "" for key in ("not_computed", "computed_again", "kept_again")),
            ]
            for update in updates
        ]
        head = [f"progress (masks from {epsilon:g})", "softness", "computed", "logits differ by"]
        text += table([*head, "not computed before", "of these computed now", "of these kept now"], rows)
    return text


def _flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder with the animals and the source model")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side")
    parser.add_argument("--threads", type=int, default=1)


PART = Part("narrow.py", RESULTS / "narrow.jsonl", ROOT / "docs" / "narrow.md", tables)
BENCH = Bench(__doc__, PART, NAMES, measure, _flags)

if __name__ == "__main__":
    sys.exit(main(BENCH))
