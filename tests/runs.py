"""Tiny runs of the commands: coloured images in class folders, a two-block model, and a look at what a run left behind."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

import p3b
from p3b.commands.command_line import main, published_main
from p3b.deploy.speed import images_per_second
from p3b.train.checkpoint import Checkpoints
from p3b.vit.cost import count_macs
from tiny import DISTILLED, VIT

COLOURS = ("blue", "green", "red")
SIZES = {"train": 4, "val": 3, "test": 3}
"""Images of each class in each part."""
SHAPE = ("img_size=16", "patch_size=8", "embed_dim=24", "depth=2", "num_heads=3")
BLOCKS = 4
"""Two a block of the network: attention and MLP."""
MODEL = ("--model", VIT, "--model-kwargs", *SHAPE)
TWO_HEADS = ("--model", DISTILLED, "--model-kwargs", *SHAPE)
MACHINE = (
    "--num-workers",
    "0",
    "--device",
    "cpu",
    "--precision",
    "fp32",
    "--batch-size",
    "4",
    "--track",
    "none",
    "--no-report",
)
CALM = ("--no-augment", "--mixup", "0", "--cutmix", "0", "--smoothing", "0", "--drop-path", "0")
"""Nothing random in training."""
PHASES = ("--epochs", "3", "--prune-start-epoch", "1")


def colour_folders(root: Path, parts: Mapping[str, int] = SIZES, classes: Sequence[str] = COLOURS, seed: int = 0) -> Path:
    """PNGs of 16 pixels in `<part>/<class>/`; noise, and one channel that says the class."""
    noise = np.random.default_rng(seed)
    for part, images in parts.items():
        for number, name in enumerate(classes):
            folder = root / part / name
            folder.mkdir(parents=True)
            for image in range(images):
                pixels = noise.integers(0, 120, (16, 16, 3), dtype=np.uint8)
                pixels[..., 2 - number % 3] += 120
                Image.fromarray(pixels).save(folder / f"{image}.png")
    return root


CIFAR100_NAMES = [f"class{number}" for number in range(100)]


def write_cifar100(root: Path, train: int = 6, test: int = 4, protocol: int = 2) -> dict[str, NDArray[np.uint8]]:
    """A small data set in torchvision's own files; returns the pixels of each part, (n, 3072)."""
    folder, noise = root / "cifar-100-python", np.random.default_rng(0)
    folder.mkdir(parents=True)
    pixels = {}
    for part, count in (("train", train), ("test", test)):
        pixels[part] = noise.integers(0, 256, (count, 3072), dtype=np.uint8)
        content = {
            "data": pixels[part],
            "fine_labels": [7 * number % 100 for number in range(count)],
            "coarse_labels": [number % 20 for number in range(count)],
            "filenames": [f"{number}.png" for number in range(count)],
            "batch_label": part,
        }
        (folder / part).write_bytes(pickle.dumps(content, protocol=protocol))
    meta = {"fine_label_names": CIFAR100_NAMES, "coarse_label_names": CIFAR100_NAMES[:20]}
    (folder / "meta").write_bytes(pickle.dumps(meta, protocol=protocol))
    return pixels


PAPER = ("--recipe", "paper")
"""Nothing is chosen: what is not given is as published."""


def flags(data: Path, out: Path, *more: str, model: Sequence[str] = MODEL, recipe: Sequence[str] = PAPER) -> list[str]:
    """Flags of a tiny run; later ones win."""
    return ["--data-path", str(data), "--output-dir", str(out), *model, *MACHINE, *recipe, *more]


ONE_BATCH: dict[str, Any] = {"rounds": 1, "seconds_per_round": 0.0}
"""Of throughput, in place of seconds."""


_COUNTED: dict[Any, int] = {}


def _count_macs_once(model: nn.Module, img_size: int | tuple[int, int]) -> int:
    """`count_macs`, which takes longer than to train a tiny model; runs have the same few shapes again and again."""
    shapes = tuple((name, tensor.shape) for name, tensor in model.state_dict().items())
    key = type(model), img_size, shapes, str(model)
    if key not in _COUNTED:
        _COUNTED[key] = count_macs(model, img_size)
    return _COUNTED[key]


@contextmanager
def brief(*, figures: bool = False) -> Iterator[None]:
    """Everything is real, but what takes longer than a tiny run itself: throughput is measured more briefly and in two layouts,
    figures are drawn only where a test looks at them, and the MACs of a shape are counted once.
    """
    import p3b.commands.prune
    import p3b.deploy.choice
    import p3b.report.comparison_page
    import p3b.run.final_table
    import p3b.run.records
    import p3b.run.series_speed

    measure = partial(images_per_second, **ONE_BATCH)
    with pytest.MonkeyPatch.context() as patch:
        for module in (p3b.run.final_table, p3b.run.series_speed):
            patch.setattr(module, "images_per_second", measure)
        patch.setattr(p3b.run.final_table, "count_macs", _count_macs_once)
        patch.setattr(p3b.commands.prune, "choose_layout", partial(p3b.commands.prune.choose_layout, seconds=0.0))
        patch.setattr(p3b.deploy.choice, "images_per_second", lambda *given, **more: measure(*given, **{**more, **ONE_BATCH}))
        patch.setattr(p3b.deploy.choice, "CANDIDATES", p3b.deploy.choice.CANDIDATES[:2])
        if not figures:
            patch.setattr(p3b.run.records.Records, "draw", lambda _records, _figure_format: [])
            patch.setattr(p3b.report.comparison_page, "draw_comparison", lambda _comparison, out: out)
            patch.setattr(p3b.report.comparison_page, "_pictures", lambda *_comparison: [])
        yield


def run(command: str, *given: str, figures: bool = False) -> int:
    """Exit status of `p3b <command>`, or of main.py; see `brief`."""
    with brief(figures=figures):
        try:
            return published_main(given) if command == "main.py" else main([command, *given])
        except SystemExit as stop:  # how the parser of the flags ends
            return int(stop.code or 0)


def finished(command: str, data: Path, out: Path, *given: str, figures: bool = False) -> Path:
    """The output folder of a tiny run that went well."""
    assert run(command, *flags(data, out, *given), figures=figures) == 0
    return out


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def without_seconds(file: Path) -> list[dict[str, Any]]:
    """The lines of a file, but for what differs from run to run."""
    return [{key: value for key, value in line.items() if not key.endswith("seconds")} for line in lines(file)]


def read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text())
    return content


def weights(saved: Path) -> dict[str, Tensor]:
    return p3b.load(saved).state_dict()


def last_checkpoint(stage: Path) -> dict[str, Any]:
    """Content of the newest checkpoint of a stage."""
    found = Checkpoints(stage / "checkpoints").newest()
    assert found is not None and not found.passed_over
    return found.content


def same_tensors(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def everything_in(folder: Path) -> dict[str, bytes]:
    """Content of every file, to see that nothing has changed; but for the lock, which says who looked last."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != ".lock"]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}
