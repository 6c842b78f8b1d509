"""What does one shot cost: a trained ViT cut by scores, shares and compensation, 0, 50 and 200 training steps after the cut?

    python benchmarks/one_shot.py run [--only 0.5-] [--steps 0 50 200]     # adds to docs/results/one_shot.jsonl
    python benchmarks/one_shot.py table                                    # the part of docs/one_shot.md made from the lines

The model is `source_vit`, 2.4 million parameters, on what it was trained for: the vehicles of CIFAR-10 (4 classes). It
is measured and compensated on 128 training images. Accuracy, and the KL divergence of the cut model's answers from the dense
model's, are over the same test images for every line. Training afterwards: AdamW at 2.5e-4 on 3,000 training images in batches
of 32, not augmented.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

import p3b
from harness.command import Bench, main
from harness.pages import Part, how_it_was_run, table
from harness.records import RESULTS, ROOT
from p3b.data import Preprocessing, eval_batches
from p3b.run.inputs import open_splits
from p3b.run.options import DataOptions
from p3b.train.distributed import Processes

CALIBRATION, TRAINING, BATCH, RATE = 128, 3_000, 32, 2.5e-4
RATIOS = (0.5, 0.75, 0.9)
NARROW: Mapping[str, Any] = {"estimator": "removal", "stream": "auto", "align": 8}
"""Options of a narrower residual stream, whose small model has no indices."""


@dataclass(frozen=True)
class Way:
    """How a model is cut.

    Attributes:
        said: in the table.
        method: of p3b.Pruner.
        score_batch: images of a batch that scores are squared over.
        compensate: what goes is made up for by what stays.
        order: the basis of the heads is changed first.
        criterion: of logits (S, C) and labels (S,), whose gradients scores are made of.
        options: of the method.
    """

    said: str
    method: str = "uniform"
    score_batch: int = BATCH
    compensate: bool = True
    order: bool = False
    criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    options: Mapping[str, Any] = field(default_factory=dict)


def entropy(logits_SC: Tensor, _labels: Tensor) -> Tensor:
    """Of the model's answers, which needs no labels (AMP, arXiv 2603.08100)."""
    return -(logits_SC.softmax(1) * logits_SC.log_softmax(1)).sum(1).mean()


def surprise(logits_SC: Tensor, _labels: Tensor) -> Tensor:
    """Cross-entropy of labels that are drawn from the model's own answers, as the Fisher information takes them."""
    drawn = torch.multinomial(logits_SC.detach().softmax(1), 1, generator=torch.Generator().manual_seed(len(logits_SC)))
    return F.cross_entropy(logits_SC, drawn[:, 0])


WAYS = {
    "plain": Way("equal shares, nothing compensated", compensate=False),
    "compensated": Way("equal shares, compensated"),
    "ridge": Way("shares by block benefit (ridge probes), compensated", "block_benefit", options={"estimator": "ridge"}),
    "removal": Way("shares by block benefit (removal), compensated", "block_benefit", options={"estimator": "removal"}),
    "removal-ordered": Way("the same, heads in ordered basis", "block_benefit", order=True, options={"estimator": "removal"}),
    "narrow-plain": Way(
        "the same, a narrower stream, nothing compensated", "block_benefit", compensate=False, order=True, options=NARROW
    ),
    "narrow": Way("the same, a narrower stream, compensated", "block_benefit", order=True, options=NARROW),
    "taylor-plain": Way("one ranking of the network, nothing compensated", "taylor", compensate=False),
    "taylor": Way("one ranking of the network, compensated", "taylor"),
    "taylor-single": Way("the same, scores of single images", "taylor", score_batch=1),
    "taylor-ordered": Way("one ranking, compensated, heads in ordered basis", "taylor", order=True),
    "entropy": Way("the same, scored without labels, by the entropy of the answers", "taylor", order=True, criterion=entropy),
    "surprise": Way(
        "the same, scored without labels, by labels drawn from the answers", "taylor", order=True, criterion=surprise
    ),
    "magnitude": Way("one ranking by magnitude, compensated", "magnitude"),
    "random": Way("equal shares, random elements, compensated", "random"),
}


@dataclass(frozen=True)
class Images:
    """(S, 3, 32, 32) images and (S,) labels of a part."""

    images: Tensor
    labels: Tensor

    def batches(self, size: int) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.images.split(size), self.labels.split(size), strict=True))


@cache
def parts(shared: Path, test_images: int) -> tuple[Images, Images]:
    """Training and test images, decoded, in a random order."""
    tars = (shared / "data" / f"cifar10-vehicles-{part}.tar" for part in ("train", "test"))
    options = DataOptions(data_path=next(tars), test_path=next(tars), val_share=0.0, max_train_images=TRAINING)
    splits = open_splits(options, 0, Processes())
    assert splits.test is not None
    preparation = Preprocessing((3, 32, 32), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

    def some(part: Any, count: int) -> Images:
        chosen = torch.randperm(len(part), generator=torch.Generator().manual_seed(0))[:count].numpy()
        found = list(eval_batches(part.subset(chosen), preparation, batch_size=250, num_workers=0, device=torch.device("cpu")))
        return Images(torch.cat([images for images, _ in found]), torch.cat([labels for _, labels in found]))

    return some(splits.train, TRAINING), some(splits.test, test_images)


@cache
def dense_model(shared: Path) -> VisionTransformer:
    shape = {"img_size": 32, "patch_size": 4, "embed_dim": 128, "num_heads": 4, "num_classes": 4}
    model = timm.create_model("vit_tiny_patch16_224", **shape).eval()
    model.load_state_dict(load_file(shared / "data" / "source_vit.safetensors"))
    return model


@cache
def dense_answers(shared: Path, test_images: int) -> Tensor:
    return logits(dense_model(shared), parts(shared, test_images)[1])


@torch.no_grad()
def logits(model: nn.Module, part: Images) -> Tensor:
    return torch.cat([model.eval()(images) for images, _ in part.batches(250)])


def accuracy(found: Tensor, part: Images, dense: Tensor) -> dict[str, float]:
    """Of (S, C) answers: top-1 in percent, and the mean KL divergence from the dense model's, in nats."""
    divergence = (dense.softmax(1) * (dense.log_softmax(1) - found.log_softmax(1))).sum(1).mean()
    return {"top1": 100 * float((found.argmax(1) == part.labels).float().mean()), "kl": float(divergence)}


def cut(way: Way, ratio: float, dense: VisionTransformer, calibration: Images) -> tuple[nn.Module, dict[str, float]]:
    """The small model, and the processor seconds of each part of the work."""
    model, seconds = copy.deepcopy(dense), {}

    def timed(name: str, act: Callable[[], Any]) -> Any:
        began = time.process_time()
        found = act()
        seconds[name] = round(time.process_time() - began, 2)
        return found

    photos = [images for images, _ in calibration.batches(BATCH)]
    pruner = p3b.Pruner(model, ratio, way.method, **way.options)
    timed("calibrate", lambda: pruner.calibrate(calibration.batches(way.score_batch), way.criterion, order=way.order))
    return timed("cut", lambda: pruner.finalize(photos if way.compensate else None)), seconds


def training_batches(train: Images) -> Iterator[tuple[Tensor, Tensor]]:
    """Without end, in an order that is the same for every line."""
    generator = torch.Generator().manual_seed(0)
    while True:
        for chosen in torch.randperm(len(train.labels), generator=generator).split(BATCH):
            yield train.images[chosen], train.labels[chosen]


def measure(name: str, given: argparse.Namespace) -> Mapping[str, Any]:
    ratio, way = name.split("-", 1)
    train, test = parts(given.shared, given.test_images)
    dense, answers = dense_model(given.shared), dense_answers(given.shared, given.test_images)
    calibration = Images(train.images[:CALIBRATION], train.labels[:CALIBRATION])
    model, seconds = cut(WAYS[way], float(ratio), dense, calibration)
    found, batches = {}, training_batches(train)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    for step in range(max(given.steps) + 1):
        if step in given.steps:
            found[str(step)] = accuracy(logits(model, test), test, answers)
        if step < max(given.steps):
            images, labels = next(batches)
            F.cross_entropy(model.train()(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    sizes = {"dense_params": p3b.count_parameters(dense), "params": p3b.count_parameters(model)}
    return {
        "ratio": float(ratio),
        "way": way,
        "after": found,
        "dense": accuracy(answers, test, answers),
        "test_images": len(test.labels),
        "processor_seconds": seconds,
        **sizes,
    }


def tables(lines: Any) -> list[str]:
    """A table for each prune ratio."""
    dense = lines[0]
    top1, images = dense["dense"]["top1"], dense["test_images"]
    error = 100 * math.sqrt(top1 / 100 * (1 - top1 / 100) / images)
    text = [
        f"The dense model has {top1:.2f} % top-1 on the {images:,} test images (standard error {error:.2f} points); KL is in "
        "thousandths of a nat. A dash: not measured.",
        "",
    ]
    steps = sorted({int(step) for line in lines for step in line["after"]})
    for ratio in sorted({line["ratio"] for line in lines}):
        head = [f"{ratio:.0%} of the parameters gone", *(f"top-1, {step} steps" for step in steps)]
        head += [*(f"KL, {step} steps" for step in steps), "processor seconds of the cut"]
        rows = []
        for way, how in WAYS.items():
            for line in (line for line in lines if (line["ratio"], line["way"]) == (ratio, way)):
                after = [line["after"].get(str(step)) for step in steps]
                cells = ["-" if each is None else f"{each['top1']:.2f}" for each in after]
                cells += ["-" if each is None else f"{1000 * each['kl']:.0f}" for each in after]
                rows.append([how.said, *cells, f"{sum(line['processor_seconds'].values()):.1f}"])
        text += table(head, rows)
    return [*text, *how_it_was_run(lines)]


def flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder that holds data/ with the images")
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 50, 200], help="training steps after which is measured")
    parser.add_argument("--test-images", type=int, default=1_000, help="of the 4,000")


PART = Part("one_shot.py", RESULTS / "one_shot.jsonl", ROOT / "docs" / "one_shot.md", tables)
NAMES = [f"{ratio}-{way}" for ratio in RATIOS for way in WAYS]

if __name__ == "__main__":
    sys.exit(main(Bench(__doc__ or "", PART, NAMES, measure, flags, packages=("torch", "timm"))))
