"""Pruned models as backbones: without a head, as features, inside a larger model, by losses that are no classification."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from p3b import Pruner, Schedule, load, save
from p3b.errors import ConfigError, ModelError
from p3b.vit.compact import apply_cuts, plan_cuts
from p3b.vit.cost import count_parameters
from p3b.vit.families import images_of
from p3b.vit.gates import Gates
from p3b.vit.layout import read_layout
from tiny import ANATOMIES, images, random_masks, tiny_vit

VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
SWIN: dict[str, Any] = {
    "img_size": 28,
    "patch_size": 2,
    "embed_dim": 12,
    "depths": (1, 1),
    "num_heads": (2, 3),
    "window_size": 4,
}
FEATURES: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT": ("vit_tiny_patch16_224", VIT),
    "DINOv3": ("vit_small_patch16_dinov3", {**VIT, **{k: v for k, v in ANATOMIES["DINOv3"].items() if k != "name"}}),
    "BEiT": ("beit_base_patch16_224", VIT),
    "relative positions": ("vit_relpos_base_patch16_224", VIT),
    "SAM": ("samvit_base_patch16", {**VIT, "window_size": 3, "global_attn_indexes": (1,), "neck_chans": 8}),
    "Qwen3": ("qwen3_vit_88m", {**VIT, "pos_embed_grid_size": 4}),
    "Swin": (
        "swin_tiny_patch4_window7_224",
        {**SWIN, "feature_cls": "getter"},
    ),
    "Hiera": (
        "hiera_tiny_224",
        {"img_size": 32, "embed_dim": 12, "num_heads": 2, "stages": (1, 1), "q_pool": 1, "mask_unit_size": (4, 4)},
    ),
}
SCHEDULE = Schedule(start=0, sparse=2, final=2, update_every=1)


@pytest.mark.parametrize("kind", FEATURES)
@torch.no_grad()
def test_a_small_model_gives_the_features_of_the_masked_one(kind: str, tmp_path: Path) -> None:
    name, arguments = FEATURES[kind]
    network = timm.create_model(name, features_only=True, out_indices=(0, 1), **arguments).double().eval()
    for parameter in network.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    layout, size = read_layout(network.model), images_of(network.model).size[0]
    batch, masks = images(size=size, dtype=torch.float64), random_masks(layout)
    masked = deepcopy(network)
    gates = Gates(layout, masked.model)
    gates.attach(masked.model)
    gates.set(masks)
    apply_cuts(network.model, plan_cuts(layout, masks))
    found = network(batch)
    assert len(found) == 2 and found[0].ndim == 4
    for small, whole in zip(found, masked(batch), strict=True):
        torch.testing.assert_close(small, whole, rtol=0, atol=1e-10)
    again = load(save(network.model, tmp_path))
    for small, one in zip(found, again.forward_intermediates(batch, indices=[0, 1], intermediates_only=True), strict=True):
        assert torch.equal(small, one)


@torch.no_grad()
def test_intermediate_layers_and_the_embedding_without_a_head_are_exact() -> None:
    model = tiny_vit(num_classes=0, dtype=torch.float64)
    layout, batch = read_layout(model), images(dtype=torch.float64)
    masks = random_masks(layout)
    masked = deepcopy(model)
    gates = Gates(layout, masked)
    gates.attach(masked)
    gates.set(masks)
    small = apply_cuts(model, plan_cuts(layout, masks))
    torch.testing.assert_close(small(batch), masked(batch), rtol=0, atol=1e-10)
    ours, theirs = (each.get_intermediate_layers(batch, n=2, reshape=True, norm=True) for each in (small, masked))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


class _Detector(nn.Module):
    """A head that is no part of the backbone: two numbers at each patch."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = tiny_vit(num_classes=0)
        self.head = nn.Conv2d(24, 2, 1)

    def forward(self, batch: Tensor) -> Tensor:
        answers: Tensor = self.head(self.backbone.forward_intermediates(batch, indices=1, intermediates_only=True)[0])
        return answers


def _pruned(network: nn.Module, pruner: Pruner, loss: Any, of_probes: Any, targets: Tensor) -> list[float]:
    """Prune by two steps; the benefits of the first decision."""
    benefits: list[float] = []
    while not pruner.done:
        batch = images(4, seed=pruner.steps_done)
        (loss(network(batch), targets) + pruner.loss(of_probes, targets)).backward()
        decision = pruner.step()
        benefits = benefits or ([] if decision is None else [block.benefit_patch for block in decision.blocks])
    return benefits


def test_a_backbone_in_a_larger_model_is_pruned_by_that_models_own_criterion() -> None:
    detector, targets = _Detector().train(), torch.rand(4, 2, 4, 4)
    dense = count_parameters(detector.backbone)
    pruner = Pruner(detector.backbone, 0.4, schedule=SCHEDULE, estimator="places", probe_outputs=2)
    benefits = _pruned(detector, pruner, F.mse_loss, F.mse_loss, targets)
    assert len(set(benefits)) == 4, "a benefit of its own for each block"
    pruner.decide_last()
    batch = images()
    with torch.no_grad():
        masked = detector.eval()(batch)
        assert pruner.shrink() is detector.backbone
        torch.testing.assert_close(detector(batch), masked, rtol=1e-4, atol=1e-5)
    assert abs(count_parameters(detector.backbone) - 0.6 * dense) < 0.01 * dense


def test_benefit_is_the_drop_of_the_given_loss_at_the_places() -> None:
    model, targets = tiny_vit(num_classes=0).train(), torch.rand(4, 2, 4, 4)
    seen: list[torch.Size] = []

    def criterion(answers: Tensor, wanted: Tensor) -> Tensor:
        seen.append(answers.shape)
        return F.l1_loss(answers, wanted)

    pruner = Pruner(model, 0.4, schedule=SCHEDULE, estimator="places", probe_outputs=2)
    _pruned(model, pruner, lambda output, _targets: output.square().mean(), criterion, targets)
    pruner.detach()
    assert seen and set(seen) == {torch.Size([4, 2, 4, 4])}


def test_a_backbone_is_pruned_by_its_distance_to_the_features_of_the_dense_one() -> None:
    dense, model = tiny_vit(num_classes=0), tiny_vit(num_classes=0).train()
    with torch.no_grad():
        wanted = dense(images(4))
    pruner = Pruner(model, 0.4, schedule=SCHEDULE, probe_outputs=24)
    benefits = _pruned(model, pruner, F.mse_loss, F.mse_loss, wanted)
    assert len(set(benefits)) == 4
    small = pruner.finalize()
    assert small(images()).shape == (2, 24)


def test_what_cannot_be_measured_is_refused_in_words() -> None:
    with pytest.raises(ModelError, match="probe_outputs"):
        Pruner(tiny_vit(num_classes=0), 0.4, schedule=SCHEDULE)
    with pytest.raises(ConfigError, match="dense prediction"):
        Pruner(tiny_vit(), 0.4, schedule=SCHEDULE, estimator="places")
    with pytest.raises(ConfigError, match="probe_outputs must lie"):
        Pruner(tiny_vit(), 0.4, schedule=SCHEDULE, probe_outputs=0)
    with pytest.raises(ModelError, match=r"hand in model\.backbone"):
        Pruner(_Detector(), 0.4, schedule=SCHEDULE)
