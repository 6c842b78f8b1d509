"""A saved model as a file that runs without p3b: ONNX or `.pt2`, run again in its own runtime before it is kept.

    candidates  the model in each layout, exported, compared with the model itself on real images, and timed in turns
    winner      the quickest, or the one that was asked for; in half precision or int8 where that is asked for
    figures     speed, size, agreement and accuracy of the dense model, of the pruned one in float32, and of what is written

Nothing is at the file's place until everything has passed.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from p3b.data.transforms import Preprocessing
from p3b.deploy.agreement import Agreement, Limit, Logits, compare, require
from p3b.deploy.choice import CANDIDATES, with_layout
from p3b.deploy.int8 import Kind, Quantised, Writer, dynamic_writer, quantisable, quantise, static_writer
from p3b.deploy.layouts import plan_layout
from p3b.deploy.metadata import Metadata
from p3b.deploy.onnx_file import OnnxRunner, describe_onnx, write_onnx
from p3b.deploy.photos import Preparation, batches, logits_of
from p3b.deploy.prepared import HalfPrecision, Prepared
from p3b.deploy.program import ProgramRunner, write_program
from p3b.deploy.runners import ONNX, PROGRAM, Runner, TorchRunner
from p3b.deploy.turns import in_turns
from p3b.errors import ConfigError, ExportError
from p3b.storage.files import write_atomically

LIMITS: Mapping[str, Limit] = {
    "fp32": Limit(1e-4, 1.0),
    "fp16": Limit(2e-2, 0.95),
    "images": Limit(5e-2, 0.95),
}
"""What an export may differ by from the model in PyTorch. "images": preprocessing is inside, where a resized pixel may differ
by a level. What int8 may cost is the user's to say, in points of top-1."""
ABOUT = 1.03
"""Times within this factor of the quickest count as the same: then the smaller file is taken."""
DENSE, FP32, WRITTEN = "dense, fp32", "fp32", "written"
Labelled = Sequence[tuple[Image.Image, int]]


@dataclass(frozen=True)
class ExportPlan:
    """What to write.

    Attributes:
        file: its ending, .onnx or .pt2, is the format.
        layouts: to choose from by measurement; a single one is taken.
        half: in float16.
        int8: by ONNX Runtime's quantisation; for .onnx alone.
        with_preprocessing: take uint8 images of any size.
        batch_size: images at a time that speed is measured with.
        max_loss: points of top-1 that half precision or int8 may lose against float32.
    """

    file: Path
    layouts: tuple[str, ...] = CANDIDATES
    half: bool = False
    int8: Kind | None = None
    with_preprocessing: bool = False
    batch_size: int = 1
    max_loss: float = 1.0


@dataclass(frozen=True)
class Evidence:
    """Real images that an export is judged by.

    Attributes:
        preprocessing: that they are prepared with: the model's own, where it says so.
        check: compared with the model itself.
        calibration: that static int8 finds its scales on.
        dense_is_trained: whether the dense model's top-1 means anything, or its weights are random.
        labelled: that top-1 is measured on; where there are none, "loss" is the share of `check` whose first class changes.
    """

    preprocessing: Preprocessing
    check: Sequence[Image.Image]
    calibration: Sequence[Image.Image] = ()
    labelled: Labelled = ()
    dense_is_trained: bool = False


@dataclass(frozen=True)
class Figures:
    """Of one side. `milliseconds`: median of a call at the plan's batch size; `top1` in percent."""

    bytes: int
    milliseconds: float
    agreement: Agreement | None = None
    top1: float | None = None


@dataclass(frozen=True)
class Tried:
    """A layout that was tried.

    Attributes:
        milliseconds: median of a call at the plan's batch size.
        bytes: of its weights in float32.
    """

    milliseconds: float
    bytes: int


@dataclass(frozen=True)
class ExportReport:
    """What was written and what was measured.

    Attributes:
        metadata: that travels inside.
        layouts: what was measured of each layout that was tried; those that come to the same are tried once, a single one not.
        sides: figures by name: `DENSE` (where there is one), `FP32` (where the file is not that), `WRITTEN`.
        checked: images that the logits were compared on.
        quantised: what int8 kept in float.
    """

    metadata: Metadata
    layouts: Mapping[str, Tried]
    sides: Mapping[str, Figures]
    checked: int
    quantised: Quantised | None = None


def export(
    model: VisionTransformer, metadata: Metadata, plan: ExportPlan, evidence: Evidence, dense: VisionTransformer | None = None
) -> ExportReport:
    """Write the file that the plan asks for, or leave nothing.

    Args:
        model: small or dense, on the CPU; it is not changed.
        metadata: of the saved model.
        plan: what to write.
        evidence: what it is judged by.
        dense: what the model was pruned from, or one of its shape, whose speed and size are measured beside.

    Raises:
        ExportError: the export computes something else than the model, or loses more than the plan allows.
        ConfigError: a package is missing, or the preprocessing cannot be put into a graph.
    """
    if plan.int8 and (plan.half or plan.file.suffix != ONNX):
        raise ConfigError("int8 is ONNX Runtime's, from float32: it goes with neither half precision nor a .pt2.")
    with TemporaryDirectory() as scratch:
        trials = _Trials(plan, metadata, evidence, Path(scratch), model)
        layout, tried = trials.layout(model)
        written, agreement = trials.final(model, layout)
        sides: dict[str, tuple[Path, Runner, Agreement | None]] = {}
        if dense is not None:
            sides[DENSE] = (*trials.side(dense, "dense"), None)
        quantised = None
        metadata = trials.described(layout)
        if plan.int8 or plan.half:
            base = written if plan.int8 else trials.side(model, "base", layout)[0]
            sides[FP32] = (base, trials.open(base), agreement if plan.int8 else None)
        if plan.int8:
            written, quantised = trials.quantised(written)
            agreement = trials.agreement(trials.open(written))
        if plan.file.suffix == ONNX:
            describe_onnx(written, metadata)
        sides[WRITTEN] = (written, trials.open(written), agreement)
        report = ExportReport(metadata, tried, trials.figures(sides), agreement.images, quantised)
        trials.require_little_loss(report)
        write_atomically(plan.file, partial(shutil.copyfile, written))
        return report


def distinct(model: VisionTransformer, layouts: Sequence[str]) -> list[str]:
    """The layouts that carry the model out in different ways, each by its first name; pure."""
    plans: dict[Any, str] = {}
    for name in layouts:
        plan = plan_layout(model, name)
        plans.setdefault((plan.branches, plan.order), name)
    return list(plans.values())


def choose(tried: Mapping[str, Tried]) -> str:
    """The layout with the fewest bytes of those that are about as quick as the quickest; pure."""
    limit = ABOUT * min(each.milliseconds for each in tried.values())
    return min((name for name in tried if tried[name].milliseconds <= limit), key=lambda name: tried[name].bytes)


def size_of(model: nn.Module) -> int:
    """Bytes of what a model holds."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


class _Trials:
    """What an export is made and judged with: the plan, the images in the forms that are needed, and a folder for trials."""

    def __init__(
        self, plan: ExportPlan, metadata: Metadata, evidence: Evidence, scratch: Path, model: VisionTransformer
    ) -> None:
        self._plan, self._metadata, self._evidence, self._scratch = plan, metadata, evidence, scratch
        outside = Preparation(replace(metadata, preprocessing=evidence.preprocessing))
        inside = Preparation(replace(self.described(""), preprocessing=evidence.preprocessing))
        check = [outside(image) for image in evidence.check]
        self._expected = logits_of(TorchRunner(model, metadata), check)
        self._inside = inside
        self._check = [inside(image) for image in evidence.check]
        self._example = self._example_images(check)

    def _example_images(self, prepared: Sequence[NDArray[Any]]) -> NDArray[Any]:
        """A batch to time with and to export by. Images of any size are square ones here, as large as the resize makes them."""
        if not self._plan.with_preprocessing:
            repeated = [prepared[index % len(prepared)] for index in range(self._plan.batch_size)]
            return np.stack(repeated)
        channels, side, _ = self._evidence.preprocessing.input_size
        extent = int(side / self._evidence.preprocessing.crop_pct)
        return np.random.default_rng(0).integers(0, 256, (self._plan.batch_size, channels, extent, extent), dtype=np.uint8)

    def described(self, layout: str, *, half: bool | None = None) -> Metadata:
        """The description of what is written."""
        plan = self._plan
        half = plan.half if half is None else half
        return replace(
            self._metadata,
            takes="images" if plan.with_preprocessing else "tensors",
            precision=f"int8 {plan.int8}" if plan.int8 else "fp16" if half else "fp32",  # type: ignore[arg-type]
            layout=layout,
        )

    def layout(self, model: VisionTransformer) -> tuple[str, dict[str, Tried]]:
        """The layout to write, and what was measured of those there are to choose from."""
        names = distinct(model, self._plan.layouts)
        if len(names) == 1:
            return names[0], {}
        files = {name: self._write(model, name, f"candidate-{name}", half=self._plan.half, tidy=False) for name in names}
        runners = {name: self.open(file) for name, file in files.items()}
        for name, runner in runners.items():
            self._require(self.agreement(runner), name)
        taken = self.time(runners)
        tried = {name: Tried(taken[name], size_of(with_layout(model, name))) for name in names}
        return choose(tried), tried

    def final(self, model: VisionTransformer, layout: str) -> tuple[Path, Agreement]:
        """The model as it is kept, and how far it is from itself in PyTorch."""
        file = self._scratch / f"candidate-{layout}{PROGRAM}"
        if not file.exists():  # of a .pt2 the candidate is the same
            file = self._write(model, layout, "final", half=self._plan.half, tidy=True)
        agreement = self.agreement(self.open(file))
        self._require(agreement, layout)
        return file, agreement

    def side(self, model: VisionTransformer, name: str, layout: str = "index") -> tuple[Path, Runner]:
        """Another model in float32, to measure beside."""
        file = self._write(model, layout, name, half=False, tidy=True)
        return file, self.open(file)

    def open(self, file: Path) -> Runner:
        """A file of ours in its runtime."""
        return OnnxRunner(file, self.described("")) if file.suffix == ONNX else ProgramRunner(file)

    def agreement(self, runner: Runner) -> Agreement:
        """How far a runner is from the model in PyTorch, on the images to check."""
        return compare(self._expected, logits_of(runner, self._check))

    def quantised(self, file: Path) -> tuple[Path, Quantised]:
        """A float32 file in int8."""
        assert self._plan.int8 is not None
        target = self._scratch / f"int8{ONNX}"
        writer: Writer
        if self._plan.int8 == "static":
            writer = static_writer(file, list(batches((self._inside(image) for image in self._evidence.calibration), 8)))
        else:
            writer = dynamic_writer(file)
        truth = self._answers(self.open(file))
        found = quantise(
            quantisable(file, self._plan.int8),
            writer,
            target,
            loss=lambda trial: self._loss(truth, self._answers(self.open(trial))),
            error=lambda trial: self.agreement(self.open(trial)).difference,
            max_loss=self._plan.max_loss,
        )
        return target, found

    def time(self, runners: Mapping[str, Runner]) -> dict[str, float]:
        """Milliseconds of a call of each, the median over rounds in which they take turns."""
        calls: dict[str, Callable[[], object]] = {name: partial(runner, self._example) for name, runner in runners.items()}
        return {name: 1e3 * statistics.median(taken) for name, taken in in_turns(calls, rounds=100, seconds=6.0).items()}

    def figures(self, sides: Mapping[str, tuple[Path, Runner, Agreement | None]]) -> dict[str, Figures]:
        """Size, speed, agreement and accuracy of each side; a dense model of random weights has no accuracy."""
        taken = self.time({name: runner for name, (_, runner, _) in sides.items()})
        untrained = () if self._evidence.dense_is_trained else (DENSE,)
        return {
            name: Figures(file.stat().st_size, taken[name], agreement, None if name in untrained else self._top1(runner))
            for name, (file, runner, agreement) in sides.items()
        }

    def require_little_loss(self, report: ExportReport) -> None:
        """ExportError where half precision loses more than the plan allows (int8 has been held to it already)."""
        base, written = report.sides.get(FP32), report.sides[WRITTEN]
        if base is None or base.top1 is None or written.top1 is None:
            return
        if base.top1 - written.top1 > self._plan.max_loss:
            raise ExportError(
                f"The export has {written.top1:.2f} % top-1, in float32 {base.top1:.2f} %; --max-loss allows "
                f"{self._plan.max_loss:g} points. Nothing was written."
            )

    def _answers(self, runner: Runner) -> Logits:
        """Logits of the labelled images, or of those to check where none are labelled."""
        if not self._evidence.labelled:
            return logits_of(runner, self._check)
        return logits_of(runner, (self._inside(image) for image, _ in self._evidence.labelled))

    def _loss(self, truth: Logits, answers: Logits) -> float:
        """Points of top-1 that answers lose; without labels, the share of them that changes."""
        if not np.isfinite(answers).all():
            return 100.0
        if not self._evidence.labelled:
            return 100 * (1 - compare(truth, answers).top1)
        labels = np.array([label for _, label in self._evidence.labelled])
        before, after = (float((logits.argmax(1) == labels).mean()) for logits in (truth, answers))
        return 100 * (before - after)

    def _top1(self, runner: Runner) -> float | None:
        if not self._evidence.labelled:
            return None
        labels = np.array([label for _, label in self._evidence.labelled])
        return 100 * float((self._answers(runner).argmax(1) == labels).mean())

    def _require(self, agreement: Agreement, layout: str) -> None:
        kind = "images" if self._plan.with_preprocessing else "fp16" if self._plan.half else "fp32"
        require(agreement, LIMITS[kind], f"The export in the layout '{layout}'")

    def _write(self, model: VisionTransformer, layout: str, name: str, *, half: bool, tidy: bool) -> Path:
        file = self._scratch / f"{name}{self._plan.file.suffix}"
        laid_out: nn.Module = with_layout(model, layout)
        if half:
            laid_out = HalfPrecision(deepcopy(laid_out).half())
        if self._plan.with_preprocessing:
            laid_out = Prepared(laid_out, self._evidence.preprocessing)
        example = _two(torch.from_numpy(self._example))
        if file.suffix == PROGRAM:
            write_program(laid_out.eval(), example, file, self.described(layout, half=half))
        else:
            write_onnx(laid_out.eval(), example, file, optimize=tidy, flat=self._plan.int8 != "dynamic")
        return file


def _two(images: Tensor) -> Tensor:
    """At least two of them: an export by a single image would fix their number."""
    return images if len(images) > 1 else torch.cat([images, images])
