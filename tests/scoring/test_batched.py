"""Probes of all blocks at once measure and learn what each block's own modules would, one after the other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from p3b.scoring import batched
from p3b.scoring.batched import BatchedProbes, LinearProbes, LowRankProbes
from p3b.vit.layout import ModelLayout, read_layout
from tiny import CLASSES, VARIANTS, labels, tiny_vit

CE = nn.functional.cross_entropy
RANK = 6
KINDS = pytest.mark.parametrize("kind", [LinearProbes, LowRankProbes])


def _alone(tensor: Tensor) -> Tensor:
    return tensor


def _build(kind: type[BatchedProbes], layout: ModelLayout, dtype: torch.dtype = torch.float32, reduce=_alone) -> BatchedProbes:
    torch.manual_seed(3)
    return (LinearProbes(layout, reduce) if kind is LinearProbes else LowRankProbes(layout, reduce, RANK)).to(dtype)


def _stream(layout: ModelLayout, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, layout.tokens, layout.width, generator=generator).to(dtype) for _ in range(5)]


class _OneByOne(nn.Module):
    """The same probes as modules of torch's, block by block, drawn in the same order."""

    def __init__(self, kind: type[BatchedProbes], layout: ModelLayout) -> None:
        super().__init__()
        self.layout, width = layout, layout.width
        self.cls = nn.ModuleList(nn.Linear(width, CLASSES) for _ in layout.blocks)
        self.patch = nn.ModuleList(_MeanThenLinear(width) if kind is LinearProbes else _narrow(width) for _ in layout.blocks)

    def forward(self, stream: list[Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
        prefix = self.layout.prefix_tokens
        maps = [x[:, prefix:].unflatten(1, self.layout.grid).permute(0, 3, 1, 2) for x in stream]
        tokens = [x[:, 0] if self.layout.has_class_token else x[:, prefix:].mean(1) for x in stream]
        losses = [
            CE(probe(features[b + side]), targets)
            for probes, features in ((self.cls, tokens), (self.patch, maps))
            for b, probe in enumerate(probes)
            for side in (0, 1)
        ]
        before_after = torch.stack(losses).view(2, -1, 2)
        return (before_after[..., 0] - before_after[..., 1]).detach(), before_after.sum()


class _MeanThenLinear(nn.Linear):
    def __init__(self, width: int) -> None:
        super().__init__(width, CLASSES)

    def forward(self, maps: Tensor) -> Tensor:
        return super().forward(maps.mean((2, 3)))


def _narrow(width: int) -> nn.Sequential:
    first, narrow = nn.Conv2d(RANK, RANK, 3, padding=1, bias=False), nn.Conv2d(width, RANK, 1, bias=False)
    second, answer = nn.Conv2d(RANK, RANK, 3, padding=1, bias=False), nn.Linear(RANK, CLASSES)
    norms = [nn.BatchNorm2d(RANK) for _ in range(2)]
    pool = nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(narrow, first, norms[0], nn.ReLU(), second, norms[1], nn.ReLU(), pool, nn.Flatten(), answer)


def _gradients(probes: nn.Module) -> list[Tensor]:
    """Of all parameters, those of each kind stacked over blocks, in an order that both ways share."""
    if isinstance(probes, BatchedProbes):
        rows = probes.rows
        order = ("cls_weight", "cls_bias", "narrow", "first", "first_scale", "first_shift")
        order += ("second", "second_scale", "second_shift", "patch_weight", "patch_bias")
        return [rows[name].grad for name in order if name in rows]
    return [
        torch.stack([parameter.grad for parameter in of_kind])
        for blocks in (probes.cls, probes.patch)
        for of_kind in zip(*(block.parameters() for block in blocks), strict=True)
    ]


@KINDS
@pytest.mark.parametrize("variant", ["plain", "registers", "no class token"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_they_are_the_modules_of_each_block(
    kind: type[BatchedProbes], variant: str, dtype: torch.dtype, tolerance: float
) -> None:
    layout = read_layout(tiny_vit(**VARIANTS[variant]))
    torch.manual_seed(3)
    apart, together = _OneByOne(kind, layout).to(dtype), _build(kind, layout, dtype)
    expected, found = apart(_stream(layout, dtype), labels(8)), together(_stream(layout, dtype), CE, labels(8))
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    for _, total in (expected, found):
        total.backward()
    for ours, theirs in zip(_gradients(together), _gradients(apart), strict=True):
        torch.testing.assert_close(ours.reshape(theirs.shape), theirs, rtol=tolerance, atol=tolerance)


@KINDS
def test_blocks_may_go_together_or_one_by_one(kind: type[BatchedProbes], monkeypatch: pytest.MonkeyPatch) -> None:
    layout = read_layout(tiny_vit())
    stream, found = _stream(layout), []
    for limit in (1, 2 * _build(kind, layout).bytes_of_block(stream[0]), 2**30):
        monkeypatch.setattr(batched, "CHUNK_BYTES", limit)
        probes = _build(kind, layout)
        benefits, total = probes(stream, CE, labels(8))
        total.backward()
        found.append([benefits, total.detach(), *_gradients(probes)])
    for each in found[1:]:
        torch.testing.assert_close(each, found[0], rtol=1e-5, atol=1e-6)


@KINDS
def test_the_same_features_give_the_same_bits_every_time(kind: type[BatchedProbes]) -> None:
    layout = read_layout(tiny_vit())
    (first, total), (second, other) = (_build(kind, layout)(_stream(layout), CE, labels(8)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(total, other)


@pytest.mark.parametrize("depth", [1, 3])
def test_norms_take_two_reductions_forward_and_two_backward_however_many_blocks(depth: int) -> None:
    seen: list[tuple[int, ...]] = []

    def reduce(tensor: Tensor) -> Tensor:
        seen.append(tuple(tensor.shape))
        return tensor.clone()

    layout = read_layout(tiny_vit(depth=depth))
    probes = _build(LowRankProbes, layout, reduce=reduce)
    stream = [torch.randn(4, layout.tokens, layout.width) for _ in range(2 * depth + 1)]
    probes(stream, CE, labels(4))
    seen.clear()
    _, total = probes(stream, CE, labels(4))
    assert seen == [(2, 2, 2 * depth * RANK)] * 2
    total.backward()
    assert len(seen) == 4


@KINDS
def test_under_float16_gradients_wait_for_the_scaled_loss(kind: type[BatchedProbes]) -> None:
    layout = read_layout(tiny_vit())
    probes = _build(kind, layout)
    with torch.autocast("cpu", torch.float16):
        _, total = probes(_stream(layout), CE, labels(8))
    (1024 * total).backward()
    scaled = _gradients(probes)
    plain = _build(kind, layout)
    plain(_stream(layout), CE, labels(8))[1].backward()
    for ours, theirs in zip(scaled, _gradients(plain), strict=True):
        assert (ours / 1024 - theirs).norm() < 0.05 * theirs.norm() + 1e-3
