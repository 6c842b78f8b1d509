"""The final table of a run: size, cost, accuracy and speed of its models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from p3b.deploy.speed import images_per_second
from p3b.report.thresholds import FEWEST_FOR_TOP5
from p3b.run.machine import Machine
from p3b.run.screen import Screen
from p3b.train.evaluate import Accuracy
from p3b.vit.attention import choose_attention
from p3b.vit.cost import count_macs, count_parameters
from p3b.vit.families import images_of


@dataclass(frozen=True)
class Figures:
    """One column of the table.

    Attributes:
        params, macs: of one image.
        bytes: of the weights.
        top1, top5: accuracies in percent; None where nothing was evaluated.
        images_per_second: None where it was not timed.
    """

    params: int
    macs: int
    bytes: int
    top1: float | None = None
    top5: float | None = None
    images_per_second: float | None = None


def figures_of(
    model: VisionTransformer, top1: float | None = None, top5: float | None = None, speed: float | None = None
) -> Figures:
    """The column of a model; accuracies and speed as they were measured."""
    macs = count_macs(model, images_of(model).size)
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    return Figures(count_parameters(model), macs, size, top1, top5, speed)


def measure_speeds(
    models: Sequence[nn.Module], image_shape: tuple[int, int, int], machine: Machine, *, batch_size: int
) -> Sequence[float | None]:
    """Images per second of each model, measured side by side on the main process; None on the others."""
    if not machine.is_main:
        return [None] * len(models)
    return images_per_second(models, image_shape, batch_size=batch_size, device=machine.device)


def as_deployed(model: VisionTransformer, machine: Machine) -> VisionTransformer:
    """The model as it is timed: in float32 and evaluation mode."""
    return choose_attention(model.eval(), machine.device, None)


def reported_part(parts: Mapping[str, Any]) -> str:
    """Name of the part that final figures are of: the test part, else val, else the first."""
    return next((name for name in ("test", "val") if name in parts), next(iter(parts)))


def plain(accuracies: Mapping[str, Accuracy]) -> dict[str, Any]:
    """Accuracies by part, as summary.json holds them."""
    return {name: asdict(accuracy) for name, accuracy in accuracies.items()}


def show_figures(screen: Screen, title: str, columns: Mapping[str, Figures], *, part: str, images: int, classes: int) -> None:
    """Show the table, with the ratio of the second model to the first where there are two.

    Args:
        screen: to show it on.
        title: what the models were trained on.
        columns: figures of each model, by its name.
        part, images: that accuracies were measured on.
        classes: of the data; of a few, top-5 says nothing and is left out.
    """
    figures = list(columns.values())
    rows = [
        ("parameters", *(f"{c.params:,}" for c in figures)),
        ("MACs (M)", *(f"{c.macs / 1e6:,.1f}" for c in figures)),
        ("size on disk (MB)", *(f"{c.bytes / 1e6:.2f}" for c in figures)),
        (f"{part} top-1 (%)", *(_percent(c.top1) for c in figures)),
        *([(f"{part} top-5 (%)", *(_percent(c.top5) for c in figures))] if classes >= FEWEST_FOR_TOP5 else []),
        ("images per second", *(f"{c.images_per_second or 0:,.0f}" for c in figures)),
    ]
    title = f"{title}; accuracy on {images:,} {part} images"
    if len(figures) != 2:
        screen.table(title, ("", *columns), rows)
        return
    dense, small = figures
    ratios = {
        "parameters": small.params / dense.params,
        "MACs (M)": small.macs / dense.macs,
        "size on disk (MB)": small.bytes / dense.bytes,
        "images per second": (small.images_per_second or 0) / (dense.images_per_second or 1),
    }
    with_ratio = [(*row, f"x {ratios[row[0]]:.2f}" if row[0] in ratios else "") for row in rows]
    screen.table(title, ("", *columns, "ratio"), with_ratio)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
