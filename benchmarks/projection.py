"""What would pruning DeiT-Base on eight GPUs take? On paper: the cost model and the assumptions beside it, nothing measured."""

from __future__ import annotations

from dataclasses import dataclass

import cost_model as cost
from harness.pages import folded, table


@dataclass(frozen=True)
class Accelerator:
    """What is assumed of a GPU. Rates are what its maker states; `share` is what training reaches of them, low and high.

    Source: NVIDIA A100 80GB SXM data sheet (dense bf16 and float64 on tensor cores, memory bandwidth, NVLink in one direction).
    """

    title: str = "NVIDIA A100 80GB SXM"
    bf16: float = 312e12
    float64: float = 19.5e12
    memory: float = 2.039e12
    link: float = 300e9
    share: tuple[float, float] = (0.30, 0.45)
    link_share: float = 0.5


@dataclass(frozen=True)
class DataSet:
    """A data set to train on. Sources: Russakovsky et al. 2015 (ImageNet-1k); the competition pages of iNaturalist."""

    title: str
    images: int
    classes: int


DATA = (
    DataSet("iNaturalist 2019", 265_213, 1_010),
    DataSet("ImageNet-1k", 1_281_167, 1_000),
    DataSet("iNaturalist 2018", 437_513, 8_142),
)
GPU, GPUS, PER_GPU, PRUNING_EPOCHS, FINETUNING_EPOCHS, UPDATES = Accelerator(), 8, 64, 50, 300, 3
KEPT = 0.5
"""Share of multiply-accumulates that fine-tuning the small model is reckoned with."""
ROWS = [(data, estimator) for data in DATA for estimator in (None, *cost.ESTIMATED)]


@dataclass(frozen=True)
class Projection:
    """What pruning DeiT-Base takes on all GPUs, at one share of the peak.

    Attributes:
        plain_step, computing, averaging: seconds of a plain step; what pruning adds by computing, and by averaging.
        epoch: hours of an epoch of plain training.
        pruning: hours of all epochs of pruning.
        finetuning: hours of fine-tuning the small model.
        bytes_step: what each GPU hands over to be averaged in a step beside the model's gradients.
    """

    plain_step: float
    computing: float
    averaging: float
    epoch: float
    pruning: float
    finetuning: float
    bytes_step: int

    @property
    def ratio(self) -> float:
        return 1 + (self.computing + self.averaging) / self.plain_step


def project(estimator: str | None, data: DataSet, share: float) -> Projection:
    """The arithmetic of a large run; every number in it is an assumption or counted from shapes.

    A plain step takes 2 x its multiply-accumulates / (share x peak): its memory traffic and the averaging of its gradients,
    which hides behind the backward pass, are in the share. What pruning adds is reckoned in full and hides behind nothing:
    multiply-accumulates and traffic at the same share of their peaks, what is averaged at `link_share` of a ring's links.
    """
    size = deit_base(data.classes)
    rates = cost.Rates(2 / (share * GPU.bf16), 2 / (share * GPU.float64), 1 / (share * GPU.memory), 0.0)
    plain_step = cost.plain(size).macs * rates.mac
    added = rates.seconds(added_work(estimator, size))
    handed = cost.wire(estimator, size).step
    averaging = cost.Wire.sent(handed, GPUS) / (GPU.link_share * GPU.link)
    steps = data.images // (GPUS * PER_GPU)
    epoch = steps * plain_step
    pruning = PRUNING_EPOCHS * (epoch + steps * (added + averaging) + UPDATES * rates.seconds(cost.update(size)))
    finetuning = FINETUNING_EPOCHS * KEPT * epoch
    return Projection(plain_step, added, averaging, epoch / 3600, pruning / 3600, finetuning / 3600, handed)


def deit_base(classes: int) -> cost.Size:
    """DeiT-Base at 224 pixels under bf16, with the batch of one GPU."""
    return cost.Size(12, 768, 12, 14, 16, classes, PER_GPU, feature_bytes=2)


def added_work(estimator: str | None, size: cost.Size) -> cost.Work:
    """What a pruning step adds on one of the GPUs."""
    return cost.gates(size) + (cost.probes(estimator, size, GPUS) if estimator else cost.Work())


def tables() -> list[str]:
    """The end of docs/scaling.md."""
    low, high = GPU.share
    size = deit_base(DATA[0].classes)
    text = [
        "### DeiT-Base on 8 GPUs, on paper",
        "",
        f"Times and ratios are given for training that reaches {high:.0%} and {low:.0%} of the GPU's peak. Memory is per GPU, "
        f"beside a plain step, which holds {cost.memory_plain(size) / 1e9:.1f} GB and averages "
        f"{cost.wire_gradients(size) / 1e6:.0f} MB of gradients.",
        "",
    ]
    head = ["data", "estimator", "epoch, plain", "step, relative to a plain one", f"{PRUNING_EPOCHS} epochs of pruning"]
    head += [f"{FINETUNING_EPOCHS} of fine-tuning", "more memory", "more to average a step"]
    text += table(head, [_row(data, estimator) for data, estimator in ROWS], text=2)
    text += folded("Assumptions", table(["assumption", "value"], _assumptions(), text=2))
    head = ["data", "estimator", "products", "products in float64", "solving in float64", "memory traffic", "averaging"]
    costs = table(head, [_shares(data, estimator, high) for data, estimator in ROWS], text=2)
    return text + folded(f"Where the added time comes from, at {high:.0%} of the peak, as shares of a plain step", costs)


def _assumptions() -> list[list[str]]:
    low, high = GPU.share
    macs = cost.plain(deit_base(1000)).macs
    slow, fast = (share * GPU.bf16 * PER_GPU / (2 * macs) for share in GPU.share)
    return [
        [
            "GPUs",
            f"{GPUS} x {GPU.title}: {GPU.bf16 / 1e12:.0f} TFLOP/s bf16, {GPU.float64 / 1e12:.1f} TFLOP/s float64, "
            f"{GPU.memory / 1e12:.3f} TB/s memory, {GPU.link / 1e9:.0f} GB/s links (data sheet)",
        ],
        [
            "share of peak that training reaches",
            f"{low:.0%} to {high:.0%} of arithmetic and of memory bandwidth; {GPU.link_share:.0%} of the links",
        ],
        ["batch", f"{PER_GPU} a GPU, {GPUS * PER_GPU} together; data loading keeps up"],
        ["a step's products", f"{macs / 1e12:.2f}e12 multiply-accumulates a GPU at 1,000 classes, 2 operations each"],
        [
            "so plain training",
            f"2 x {macs / 1e12:.2f}e12 / (share x {GPU.bf16 / 1e12:.0f}e12) seconds a step: {slow:,.0f} to {fast:,.0f} images "
            "a second and GPU",
        ],
        [
            "epochs",
            f"{PRUNING_EPOCHS} of pruning, {FINETUNING_EPOCHS} of fine-tuning at {KEPT:.0%} of the arithmetic; "
            f"{UPDATES} mask updates an epoch; evaluation left out",
        ],
    ]


def _row(data: DataSet, estimator: str | None) -> list[str]:
    size = deit_base(data.classes)
    slow, fast = (project(estimator, data, share) for share in GPU.share)
    extra = cost.memory_gates(size) + (cost.memory_probes(estimator, size, GPUS).total if estimator else 0)
    return [
        f"{data.title} ({data.images:,} images, {data.classes:,} classes)",
        estimator or "none (gates alone)",
        f"{_range(60 * fast.epoch, 60 * slow.epoch)} min",
        _range(*sorted((fast.ratio, slow.ratio)), digits=2),
        f"{_range(fast.pruning, slow.pruning)} h",
        f"{_range(fast.finetuning, slow.finetuning)} h",
        f"{extra / 1e9:.2f} GB",
        f"{fast.bytes_step / 1e6:,.1f} MB",
    ]


def _shares(data: DataSet, estimator: str | None, share: float) -> list[str]:
    added, told = added_work(estimator, deit_base(data.classes)), project(estimator, data, share)
    parts = (
        2 * added.macs / GPU.bf16,
        2 * added.macs64 / GPU.float64,
        2 * added.solve64 / GPU.float64,
        added.traffic / GPU.memory,
    )
    seconds = [*(part / share for part in parts), told.averaging]
    return [data.title, estimator or "none (gates alone)", *(f"{each / told.plain_step:.1%}" for each in seconds)]


def _range(low: float, high: float, digits: int = 1) -> str:
    first, last = f"{low:,.{digits}f}", f"{high:,.{digits}f}"
    return first if first == last else f"{first} to {last}"
