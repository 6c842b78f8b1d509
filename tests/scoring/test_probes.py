"""Section 3 of the method: one probe scores a block's input and output, and no gradient of it reaches the backbone."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from p3b.scoring.probes import BlockProbes
from p3b.vit.layout import read_layout
from p3b.vit.taps import Taps
from tiny import CLASSES, VARIANTS, images, labels, tiny_vit

CE = nn.functional.cross_entropy


def _stream(model: nn.Module, batch: Tensor) -> list[Tensor]:
    taps = Taps()
    taps.attach(model)
    model(batch)
    stream = taps.take()
    taps.detach()
    return stream


@pytest.mark.parametrize("variant", ["plain", "distilled", "registers", "no class token"])
def test_benefit_is_the_loss_before_minus_the_loss_after(variant: str) -> None:
    model = tiny_vit(**VARIANTS[variant])
    layout, batch, targets = read_layout(model), images(4), labels(4)
    stream = _stream(model, batch)
    torch.manual_seed(0)
    probes = BlockProbes(layout)
    benefits, total = deepcopy(probes)(stream, CE, targets)
    assert benefits.shape == (2, 4)
    assert not benefits.requires_grad
    sum_of_losses = 0.0
    for b in range(4):
        losses: dict[str, list[float]] = {"cls": [], "patch": []}
        for x in (stream[b], stream[b + 1]):
            patches = x[:, layout.prefix_tokens :]
            token = patches.mean(1) if variant == "no class token" else x[:, 0]
            maps = torch.empty(4, 24, 4, 4)
            for row in range(4):
                for column in range(4):
                    maps[:, :, row, column] = patches[:, 4 * row + column]
            losses["cls"].append(CE(probes.cls_probes[b](token), targets).item())
            losses["patch"].append(CE(probes.patch_probes[b](maps), targets).item())
        assert benefits[0, b].item() == pytest.approx(losses["cls"][0] - losses["cls"][1], abs=1e-5)
        assert benefits[1, b].item() == pytest.approx(losses["patch"][0] - losses["patch"][1], abs=1e-5)
        sum_of_losses += sum(losses["cls"]) + sum(losses["patch"])
    assert total.item() == pytest.approx(sum_of_losses, rel=1e-5)


def test_the_patch_probe_is_two_convolutions_a_pool_and_a_linear_layer() -> None:
    probes = BlockProbes(read_layout(tiny_vit()))
    kinds = [type(module) for module in probes.patch_probes[0]]
    convolution = [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    assert kinds == [*convolution, *convolution, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear]
    conv = probes.patch_probes[0][0]
    assert (conv.kernel_size, conv.padding, conv.bias, conv.in_channels, conv.out_channels) == ((3, 3), (1, 1), None, 24, 24)
    assert probes.cls_probes[0].out_features == probes.patch_probes[0][-1].out_features == CLASSES
    assert len(probes.cls_probes) == len(probes.patch_probes) == 4


def test_soft_targets_are_taken_like_the_task_loss_takes_them() -> None:
    model = tiny_vit()
    probes, stream = BlockProbes(read_layout(model)), _stream(model, images(4))
    hard = labels(4)
    soft = nn.functional.one_hot(hard, CLASSES).float()
    torch.testing.assert_close(deepcopy(probes)(stream, CE, hard), deepcopy(probes)(stream, CE, soft))


def test_no_gradient_of_a_probe_reaches_the_backbone() -> None:
    model, plain = tiny_vit(), tiny_vit()
    probes, taps = BlockProbes(read_layout(model)), Taps()
    taps.attach(model)
    batch, targets = images(4), labels(4)
    (CE(model(batch), targets) + probes(taps.take(), CE, targets)[1]).backward()
    CE(plain(batch), targets).backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad)
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in probes.parameters())


def test_a_block_that_helps_by_construction_gets_a_positive_benefit_after_training() -> None:
    """Features before the block say nothing, after it they hold the label: the benefit goes to the entropy of the labels."""
    layout = read_layout(tiny_vit(depth=1))
    torch.manual_seed(0)
    probes = BlockProbes(layout)
    targets = torch.arange(20) % CLASSES
    told = torch.zeros(20, 17, 24).index_fill(2, torch.tensor([0]), 0.0)
    told.scatter_(2, targets.view(-1, 1, 1).expand(-1, 17, 1), 1.0)
    stream = [torch.zeros(20, 17, 24), told, told]
    optimizer = torch.optim.AdamW(probes.parameters(), lr=0.02)
    for _ in range(40):
        benefits, total = probes(stream, CE, targets)
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (benefits[:, 0] > 0.5).all()
    assert (benefits[:, 1].abs() < 0.05).all()  # the second block adds nothing
