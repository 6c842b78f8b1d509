"""Section 3 of the method: one probe scores a block's input and output, and no gradient of it reaches the backbone."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from p3b.scoring.meter import Reduce
from p3b.scoring.probes import BlockProbes, MeanOverPlaces
from p3b.vit.layout import ModelLayout, read_layout
from p3b.vit.taps import Taps
from tiny import CLASSES, VARIANTS, images, in_ranks, labels, tiny_vit

CE = nn.functional.cross_entropy
Measured = tuple[Tensor, dict[str, Tensor]]
"""Benefits, and the gradient of every parameter by its key."""


def _alone(tensor: Tensor) -> Tensor:
    return tensor


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
    probes = BlockProbes(layout, _alone)
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
    probes = BlockProbes(read_layout(tiny_vit()), _alone)
    kinds = [type(module) for module in probes.patch_probes[0]]
    convolution = [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    assert kinds == [*convolution, *convolution, MeanOverPlaces, nn.Linear]
    conv = probes.patch_probes[0][0]
    assert (conv.kernel_size, conv.padding, conv.bias, conv.in_channels, conv.out_channels) == ((3, 3), (1, 1), None, 24, 24)
    assert probes.cls_probes[0].out_features == probes.patch_probes[0][-1].out_features == CLASSES
    assert len(probes.cls_probes) == len(probes.patch_probes) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_pool_is_a_mean_over_places(dtype: torch.dtype) -> None:
    maps = torch.randn(3, 5, 4, 7, dtype=dtype).to(memory_format=torch.channels_last)
    torch.testing.assert_close(MeanOverPlaces()(maps), nn.functional.adaptive_avg_pool2d(maps, 1).flatten(1))


def test_soft_targets_are_taken_like_the_task_loss_takes_them() -> None:
    model = tiny_vit()
    probes, stream = BlockProbes(read_layout(model), _alone), _stream(model, images(4))
    hard = labels(4)
    soft = nn.functional.one_hot(hard, CLASSES).float()
    torch.testing.assert_close(deepcopy(probes)(stream, CE, hard), deepcopy(probes)(stream, CE, soft))


def test_no_gradient_of_a_probe_reaches_the_backbone() -> None:
    model, plain = tiny_vit(), tiny_vit()
    probes, taps = BlockProbes(read_layout(model), _alone), Taps()
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
    probes = BlockProbes(layout, _alone)
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


def _measure(probes: nn.Module, stream: list[Tensor], targets: Tensor) -> Measured:
    benefits, total = probes(stream, CE, targets)
    total.backward()
    return benefits, {key: parameter.grad for key, parameter in probes.named_parameters()}


# --- in a single process


class _PlainProbes(nn.Module):
    """Probes as they would be written down for one process: modules of torch's, one call after the other."""

    def __init__(self, layout: ModelLayout) -> None:
        super().__init__()
        self.layout, width = layout, layout.width
        self.cls_probes = nn.ModuleList(nn.Linear(width, layout.num_classes) for _ in layout.blocks)
        self.patch_probes = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                MeanOverPlaces(),
                nn.Linear(width, layout.num_classes),
            ).to(memory_format=torch.channels_last)
            for _ in layout.blocks
        )

    def forward(self, stream: list[Tensor], criterion: Callable[..., Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
        tokens = [x[:, 0] for x in stream]
        maps = [x[:, 1:].unflatten(1, self.layout.grid).permute(0, 3, 1, 2) for x in stream]
        wide = torch.float64 if stream[0].dtype == torch.float64 else torch.float32
        losses = [
            criterion(probe(features[b + side]).to(wide), targets)
            for probes, features in ((self.cls_probes, tokens), (self.patch_probes, maps))
            for b, probe in enumerate(probes)
            for side in (0, 1)
        ]
        before_after = torch.stack(losses).view(2, -1, 2)
        return (before_after[..., 0] - before_after[..., 1]).detach(), before_after.sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_single_process_computes_what_plain_modules_compute_bit_for_bit(dtype: torch.dtype) -> None:
    """float32 and float64 throughout, and bfloat16 by autocast."""
    base = torch.float64 if dtype == torch.float64 else torch.float32
    model = tiny_vit(dtype=base)
    layout, stream, targets = read_layout(model), _stream(model, images(6, dtype=base)), labels(6)
    found = []
    for build in (_PlainProbes, lambda layout: BlockProbes(layout, _alone)):
        torch.manual_seed(3)
        probes = build(layout).to(base)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            benefits, total = probes(stream, CE, targets)
        total.backward()
        found.append((benefits, total, {key: parameter.grad for key, parameter in probes.named_parameters()}))
    (plain_benefits, plain_total, plain_gradients), (benefits, total, gradients) = found
    assert torch.equal(benefits, plain_benefits)
    assert torch.equal(total, plain_total)
    assert list(gradients) == list(plain_gradients)
    assert all(torch.equal(gradients[key], plain_gradients[key]) for key in gradients)
    assert benefits.dtype == base


def test_a_state_holds_parameters_alone() -> None:
    probes = BlockProbes(read_layout(tiny_vit()), _alone)
    assert list(probes.state_dict()) == [key for key, _ in probes.named_parameters()]


# --- in several processes: threads that meet at a barrier stand for ranks, real processes are in two_ranks.py


def _shared_out(count: int, stream: list[Tensor], targets: Tensor, autocast: torch.dtype | None = None) -> list[Measured]:
    """What each of `count` ranks measures on its share of a batch, and what one process measures on all of it, at the end."""
    layout = read_layout(tiny_vit())
    torch.manual_seed(3)
    initial = BlockProbes(layout, _alone).to(stream[0].dtype).state_dict()

    def measure(rank: int, reduce: Reduce, ranks: int = count) -> Measured:
        probes = BlockProbes(layout, reduce).to(stream[0].dtype)
        probes.load_state_dict(initial)
        share = slice(rank, None, ranks)
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            return _measure(probes, [x[share] for x in stream], targets[share])

    return [*in_ranks(count, measure), measure(0, _alone, 1)]


def _mean(measured: list[Measured]) -> Measured:
    gradients = {key: torch.stack([gradients[key] for _, gradients in measured]).mean(0) for key in measured[0][1]}
    return torch.stack([benefits for benefits, _ in measured]).mean(0), gradients


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-5)])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_together_measure_what_one_process_does(ranks: int, dtype: torch.dtype, tolerance: float) -> None:
    stream = _stream(tiny_vit(dtype=dtype), images(8, dtype=dtype))
    *shares, whole = _shared_out(ranks, stream, labels(8))
    benefits, gradients = _mean(shares)
    torch.testing.assert_close(benefits, whole[0], rtol=tolerance, atol=tolerance)
    for key, gradient in whole[1].items():
        torch.testing.assert_close(gradients[key], gradient, rtol=10 * tolerance, atol=tolerance, msg=key)
    # What a rank measures alone is another thing: the law above does not hold by accident.
    by_themselves = [_shared_out(1, [x[r::ranks] for x in stream], labels(8)[r::ranks])[-1] for r in range(ranks)]
    assert (_mean(by_themselves)[0] - whole[0])[1].abs().max() > 1e-3


@pytest.mark.parametrize("ranks", [2, 4])
def test_features_far_from_zero_keep_their_variance_over_ranks(ranks: int) -> None:
    """The variance is not lost where the mean is a thousand times as large and ranks differ in it."""
    generator = torch.Generator().manual_seed(0)
    stream = [torch.randn(8, 17, 24, generator=generator) + 300 + torch.arange(8).view(-1, 1, 1) for _ in range(5)]
    exact = _shared_out(1, [x.double() for x in stream], labels(8))[-1]
    *shares, fused = _shared_out(ranks, stream, labels(8))
    error = (_mean(shares)[0].double() - exact[0]).abs().max()
    assert error < 4 * (fused[0].double() - exact[0]).abs().max() + 1e-5


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_under_autocast_statistics_are_wide_and_features_narrow(autocast: torch.dtype) -> None:
    stream, seen = _stream(tiny_vit(), images(8)), []
    *shares, whole = _shared_out(2, stream, labels(8), autocast)
    benefits, gradients = _mean(shares)
    torch.testing.assert_close(benefits, whole[0], rtol=0.02, atol=0.01)
    for key, gradient in whole[1].items():
        assert gradients[key].dtype == torch.float32
        assert (gradients[key] - gradient).norm() < 0.05 * gradient.norm() + 1e-3, key

    def look(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append((inputs[0].dtype, output.dtype))

    probes = BlockProbes(read_layout(tiny_vit()), torch.clone)
    for relu in (2, 5):
        probes.patch_probes[0][relu].register_forward_hook(look)
    with torch.autocast("cpu", autocast):
        probes(stream, CE, labels(8))
    assert set(seen) == {(autocast, autocast)}
    assert len(seen) == 4


def test_a_pass_takes_two_reductions_forward_and_two_backward_however_many_blocks() -> None:
    seen: list[Tensor] = []

    def reduce(tensor: Tensor) -> Tensor:
        seen.append(tensor)
        return tensor.clone()

    for depth in (1, 3):
        model = tiny_vit(depth=depth)
        probes, stream, targets = BlockProbes(read_layout(model), reduce), _stream(model, images(4)), labels(4)
        assert not probes.alone
        for _ in range(2):
            seen.clear()
            _, total = probes(stream, CE, targets)
            assert [tuple(tensor.shape) for tensor in seen] == [(4 * depth, 2, 24)] * 2
            total.backward()
            assert len(seen) == 4


def test_several_processes_compute_what_one_does_where_there_is_one() -> None:
    """The two ways through the probes differ by rounding alone, with every kind of prefix tokens."""
    for variant in ("plain", "registers", "no class token"):
        model = tiny_vit(**VARIANTS[variant], dtype=torch.float64)
        layout, stream = read_layout(model), _stream(model, images(4, dtype=torch.float64))
        torch.manual_seed(0)
        whole = BlockProbes(layout, _alone).double()
        lockstep = BlockProbes(layout, torch.clone).double()
        lockstep.load_state_dict(whole.state_dict())
        torch.testing.assert_close(
            _measure(lockstep, stream, labels(4)), _measure(whole, stream, labels(4)), rtol=1e-10, atol=1e-12
        )
