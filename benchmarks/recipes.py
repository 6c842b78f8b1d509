"""What does `--recipe auto` lose against the best of twelve recipes set by hand? Short runs on six small data sets.

    OMP_NUM_THREADS=1 python benchmarks/recipes.py run       # what is not recorded yet; again to continue
    python benchmarks/recipes.py table                       # the part of docs/results/recipes.md made from the lines

Every run is `p3b prune --keep 0.5` in a folder of its own, of a ViT of 0.3 million parameters on 16 x 16 pixels (6 blocks of 64
channels, patches of 4). It starts from weights of another domain: those that `p3b demo` brings, trained on printed letters, or
the same shape trained here on CIFAR-10's vehicles (`start`). Twelve recipes by hand are three learning rates x mild or medium
augmentation x 15 + 15 or 30 + 30 epochs, in batches of 32. The best of them is chosen by the test part, which favours it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Any

from harness.command import Bench, Given, main
from harness.pages import Part, folded, how_it_was_run, table
from harness.records import RESULTS, Line
from p3b.commands.command_line import main as p3b
from p3b.errors import TrainingError
from recipe_data import DATA, LETTERS, DataSet, write_folders

AUTO = "auto"
SHAPE = "--model vit_tiny_patch16_224 --model-kwargs img_size=16 patch_size=4 embed_dim=64 depth=6 num_heads=4"
MACHINE = "--device cpu --precision fp32 --num-workers 0 --layout index --no-report --track none -q"
LEARNING_RATES = ("2e-3", "5e-3", "12e-3")
AUGMENTATIONS = {
    "mild": "--aa None --crop-scale 0.6 1.0 --reprob 0 --mixup 0",
    "medium": "--aa rand-m5-mstd0.5-inc1 --crop-scale 0.35 1.0 --reprob 0.1 --mixup 0.2",
}
EPOCHS = (15, 30)
BY_HAND = {
    f"lr_{lr}-{augmentation}-{epochs}": (
        f"--recipe paper --batch-size 32 --lr {lr} {AUGMENTATIONS[augmentation]} --cutmix 0 --no-repeated-aug --drop-path 0 "
        f"--epochs {epochs} --finetune-epochs {epochs} --prune-start-epoch 20% --prune-update-every 30steps --crop-pct 1"
    )
    for lr, augmentation, epochs in product(LEARNING_RATES, AUGMENTATIONS, EPOCHS)
}
CHANGED = {
    "auto-layers": "--layer-decay 0.75",
    "auto-layers_0.9": "--layer-decay 0.9",
    "auto-sqrt": "--class-balance sqrt",
    "auto-inverse": "--class-balance inverse",
}
"""What auto would give with another choice; these settings are what the rules for them were chosen by."""
OF_IMBALANCE = ("auto-sqrt", "auto-inverse")
SEEDS = (0, 1)
COSTLY = ("animals-200",)
"""Data sets that come last."""


def names() -> list[str]:
    """Every run: auto and the recipes by hand, one seed of all before the other, then what auto could choose instead."""
    data = [name for name in DATA if name not in COSTLY] + list(COSTLY)
    found = [f"{name}-{recipe}-seed{seed}" for seed in SEEDS for recipe in (AUTO, *BY_HAND) for name in data]
    for seed, change, name in product(SEEDS, CHANGED, data):
        if name == "imbalanced" or change not in OF_IMBALANCE:
            found.append(f"{name}-{change}-seed{seed}")
    return found


def split_name(name: str) -> tuple[str, str, int]:
    """Data set, recipe and seed of a run."""
    rest, _, seed = name.rpartition("-seed")
    data = next(known for known in DATA if rest.startswith(f"{known}-"))
    return data, rest.removeprefix(f"{data}-"), int(seed)


def flags_of(recipe: str) -> str:
    return BY_HAND.get(recipe) or f"--recipe auto {CHANGED.get(recipe, '')}"


def measure(name: str, given: Given) -> dict[str, Any]:
    """Carry a run out; what came of it."""
    data_name, recipe, seed = split_name(name)
    data = DATA[data_name]
    folder = write_folders(data, given.shared / "data", given.work / "data" / data_name)
    mirrored = "--hflip 0" if data.symbols and recipe in BY_HAND else ""
    out = given.work / "runs" / name
    words = f"{SHAPE} {start(data, given)} {flags_of(recipe)} {mirrored} {MACHINE} --seed {seed} --overwrite"
    began = time.process_time()
    quietly("prune", str(folder), "--keep", "0.5", "--output-dir", str(out), *words.split())
    summary = json.loads((out / "prune" / "summary.json").read_text())
    config = json.loads((out / "prune" / "config.json").read_text())
    chosen = {key: value for group in ("training", "augment", "prune", "model") for key, value in config[group].items()}
    return {
        "data": data_name,
        "recipe": recipe,
        "seed": seed,
        "classes": summary["classes"],
        "train_images": sum(1 for _ in (folder / "train").rglob("*.png")),
        "images": {part: found["images"] for part, found in summary["accuracy"].items()},
        "top1": summary["pruned"]["top1"],
        "val_top1": summary["accuracy"]["val"]["top1"],
        "chance": summary["chance"]["test"],
        "params": summary["pruned"]["params"],
        "dense_params": summary["dense"]["params"],
        "settings": {key: chosen[key] for key in SHOWN},
        "processor_seconds": round(time.process_time() - began, 1),
    }


SHOWN = ("batch_size", "lr", "epochs", "finetune_epochs", "aa", "mixup", "layer_decay", "class_balance", "prune_update_every")
"""Settings that a line tells."""


def start(data: DataSet, given: Given) -> str:
    """Flags of the weights that a run starts from; those of the vehicles are trained where they are not there."""
    if data.start == LETTERS:
        weights = resources.files("p3b.data") / "glyph_vit.safetensors"
        return f"--model-path {weights} --mean 0.5 0.5 0.5 --std 0.5 0.5 0.5"
    out = given.work / "start"
    if not (out / "train" / "summary.json").exists():
        tars = [str(given.shared / "data" / f"cifar10-vehicles-{part}.tar") for part in ("train", "test")]
        words = (
            f"{SHAPE} {MACHINE} --recipe paper --from-scratch --epochs 8 --batch-size 64 --lr 8e-3 --max-train-images 6000 "
            f"{AUGMENTATIONS['mild']} --cutmix 0 --no-repeated-aug --drop-path 0 --crop-pct 1 --overwrite"
        ).replace("--layout index", "")
        quietly("train", tars[0], "--test-path", tars[1], "--output-dir", str(out), *words.split())
    return f"--model-path {out / 'dense'}"


def quietly(*words: str) -> None:
    """Carry a command out.

    Raises:
        TrainingError: it failed; with what it said.
    """
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = p3b(list(words))
    if status:
        raise TrainingError(f"p3b {words[0]} ended with status {status}: {said.getvalue()[-2000:]}")


# ----------------------------------------------------------------------------------------- the page


def tables(lines: Sequence[Line]) -> list[str]:
    """What auto loses on each data set, and folded all recipes."""
    head = ["data", "images", "test images", f"{AUTO} (%)", "best by hand (%)", f"{AUTO} - best", "median by hand (%)"]
    head += ["worst by hand (%)", "the best one", "seeds"]
    rows, changes, every = [], [], []
    for name, data in DATA.items():
        found = _means([line for line in lines if line["data"] == name])
        by_hand = {recipe: found[recipe] for recipe in BY_HAND if recipe in found}
        if AUTO not in found:
            continue
        one = next(line for line in lines if line["data"] == name)
        auto, count = found[AUTO]
        row = [f"{name}: {data.about}", str(one["train_images"]), str(one["images"]["test"])]
        if len(by_hand) == len(BY_HAND):
            best = max(by_hand, key=lambda recipe: by_hand[recipe][0])
            values = sorted(value for value, _ in by_hand.values())
            row += [f"{auto:.2f}", f"{values[-1]:.2f}", f"{auto - values[-1]:+.2f}", f"{statistics.median(values):.2f}"]
            row += [f"{values[0]:.2f}", best, str(min(count, by_hand[best][1]))]
        else:
            row += [f"{auto:.2f}", "", "", "", "", f"{len(by_hand)} of {len(BY_HAND)} are run", str(count)]
        rows.append(row)
        changes += [[name, CHANGED[change], f"{found[change][0]:.2f}", f"{found[change][0] - auto:+.2f}", str(found[change][1])]
                    for change in CHANGED if change in found]  # fmt: skip
        every += [[name, recipe, f"{value:.2f}", str(seeds)] for recipe, (value, seeds) in found.items()]
    made = table(head, rows)
    if changes:
        made += [
            "What another choice would give:",
            "",
            *table(["data", "auto with", "top-1 (%)", "- auto", "seeds"], changes, text=2),
        ]
    made += folded("All recipes", table(["data", "recipe", "top-1 (%)", "seeds"], every, text=2))
    return [*made, *how_it_was_run(lines)]


def _means(lines: Sequence[Line]) -> Mapping[str, tuple[float, int]]:
    """Mean top-1 over the seeds, and how many there are, by recipe."""
    by_recipe: dict[str, list[float]] = {}
    for line in lines:
        by_recipe.setdefault(line["recipe"], []).append(line["top1"])
    return {recipe: (statistics.fmean(values), len(values)) for recipe, values in by_recipe.items()}


def _flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder that holds data/ with the images")
    parser.add_argument("--work", type=Path, default=Path("runs/recipes"), help="folder for images, start weights and runs")
    parser.add_argument("--threads", type=int, default=1)


PART = Part("recipes.py", RESULTS / "recipes.jsonl", RESULTS / "recipes.md", tables)
BENCH = Bench(__doc__, PART, names(), measure, _flags, keeps=True)

if __name__ == "__main__":
    sys.exit(main(BENCH))
