"""All estimators of block benefit by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from p3b.errors import ConfigError, unknown_name
from p3b.scoring.batched import LinearProbes, LowRankProbes
from p3b.scoring.estimator import BenefitEstimator, Probes
from p3b.scoring.meter import Reduce
from p3b.scoring.places import PlaceProbes
from p3b.scoring.probes import BlockProbes
from p3b.scoring.removal import REMOVAL
from p3b.scoring.ridge import RidgeProbes
from p3b.scoring.staged import Staged
from p3b.scoring.subsampled import Subsampled
from p3b.scoring.trained import TrainedProbes
from p3b.vit.layout import ModelLayout

LOW_RANK = 32
"""Channels between the low-rank probe's convolutions, at most; at most a quarter of the width. At DeiT-Tiny a quarter, 48, took
more than the 1.25 of a plain step that pruning may (docs/performance.md); both transfers that estimators are judged on lie
below this bound."""


@dataclass(frozen=True)
class ProbeSettings:
    """What every estimator is built with.

    Attributes:
        layout: of the model whose features are read.
        reduce: mean of a tensor over all ranks, which hold equal shares of the batch; the identity in a single process.
        device, dtype: of the model.
        lr, weight_decay, seed: of probes that learn by gradient.
    """

    layout: ModelLayout
    reduce: Reduce
    device: torch.device
    dtype: torch.dtype
    lr: float = 5e-4
    weight_decay: float = 0.05
    seed: int = 0


def _paper(settings: ProbeSettings) -> TrainedProbes:
    return _trained(settings, lambda: BlockProbes(settings.layout, settings.reduce))


def _low_rank(settings: ProbeSettings) -> TrainedProbes:
    rank = max(1, min(LOW_RANK, settings.layout.width // 4))
    return _trained(settings, lambda: LowRankProbes(settings.layout, settings.reduce, rank))


def _linear(settings: ProbeSettings) -> TrainedProbes:
    return _trained(settings, lambda: LinearProbes(settings.layout, settings.reduce))


def _ridge(settings: ProbeSettings) -> RidgeProbes:
    return RidgeProbes(settings.layout, settings.reduce, settings.device)


def _subsampled(settings: ProbeSettings) -> Subsampled:
    return Subsampled(_paper(settings))


ESTIMATORS: dict[str, Callable[[ProbeSettings], BenefitEstimator]] = {
    "paper": _paper,
    "linear": _linear,
    "ridge": _ridge,
    "low_rank": _low_rank,
    "subsampled": _subsampled,
}


def _places(settings: ProbeSettings) -> TrainedProbes:
    return _trained(settings, lambda: PlaceProbes(settings.layout))


OF_MAPS: dict[str, Callable[[ProbeSettings], BenefitEstimator]] = {"places": _places}
"""Estimators whose criterion is given a map of answers, not one answer for each image."""


def create_estimator(name: str, settings: ProbeSettings) -> BenefitEstimator:
    """An estimator by name; of a hierarchy one for each stage.

    Raises:
        ConfigError: unknown name.
    """
    known = ESTIMATORS | OF_MAPS
    if name not in known:
        raise ConfigError(unknown_name("estimator of block benefit", name, [*known, REMOVAL]))
    stages = settings.layout.stages
    if len(stages) == 1:
        return known[name](settings)
    return Staged([known[name](replace(settings, layout=stage)) for stage in stages], [len(stage.blocks) for stage in stages])


def _trained(settings: ProbeSettings, build: Callable[[], Probes]) -> TrainedProbes:
    """Probes whose first weights are the same on all ranks and take nothing from the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        probes = build().to(settings.device, settings.dtype)
    return TrainedProbes(probes, settings.reduce, settings.lr, settings.weight_decay)
