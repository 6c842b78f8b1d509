"""Cheap probes of all blocks at once: one product for all blocks' probes of a kind, one call of the task loss.

S samples, N tokens, D width, (H, W) patch grid, C classes, B blocks, R channels between convolutions. Logits are (2, B, 2, S, C):
class token and patches, blocks, input and output of the block.

Parameters of a kind are one tensor over all blocks, and so are their gradients and the optimizer's moments. A block's input and
output go through products of one shape, at one place in them: where a block adds nothing both give the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from p3b.scoring.estimator import (
    Criterion,
    GradientsKnown,
    Probes,
    at_least_float32,
    computes_in_half,
    read_class_token,
    read_tokens,
)
from p3b.scoring.meter import Reduce, is_alone
from p3b.scoring.moments import moments_of_all, normalise
from p3b.scoring.task_losses import TaskLosses
from p3b.vit.layout import ModelLayout

CHUNK_BYTES = 2**23
"""Features and what their probes make of them that are held at a time, about: as many blocks as fit are gone through at once.
Few enough to stay in a processor's cache and far below what the backbone holds; of a small model it is all blocks."""

Weights = Mapping[str, Tensor]


class BatchedProbes(Probes):
    """Benefits by 2B probes that are evaluated together; what the probes are, a subclass says.

    Args:
        layout: of the model whose features are read.
        reduce: mean of a tensor over all ranks, which hold equal shares of the batch; the identity in a single process.
        rows: parameters by name, (B, ...).
    """

    def __init__(self, layout: ModelLayout, reduce: Reduce, rows: Weights) -> None:
        super().__init__()
        self._layout, self._reduce = layout, reduce
        self._alone: bool | None = None
        self._losses = TaskLosses()
        self.rows = nn.ParameterDict(dict(rows))

    def logits(self, stream_SND: Sequence[Tensor], weights: Weights) -> Tensor:
        """(2, b, 2, S, C) for b neighbouring blocks, from the b + 1 features around them and their share of the parameters."""
        raise NotImplementedError

    def bytes_of_block(self, x_SND: Tensor) -> int:
        """About what a block's probes hold until their gradients are there."""
        raise NotImplementedError

    def no_weight_decay(self) -> list[str]:
        return [name for name, parameter in self.named_parameters() if parameter.ndim <= 2]

    def forward(self, stream_SND: Sequence[Tensor], criterion: Criterion, targets: Tensor) -> tuple[Tensor, Tensor]:
        """As `BenefitEstimator.observe`.

        In a single process gradients are taken here, some blocks at a time, so that no more than their graph is held; under
        float16 they are not, since the loss is not scaled yet. With several ranks all blocks go together: each norm costs a
        reduction forward and one backward, however many blocks there are, and all ranks have to come here together.
        """
        if self._alone is None:
            self._alone = is_alone(self._reduce, next(self.parameters()))
        blocks = len(stream_SND) - 1
        if not (self._alone and torch.is_grad_enabled()) or computes_in_half(targets.device.type):
            losses = self._losses_of(stream_SND, self.rows, criterion, targets)
            return _benefits(losses), losses.sum()
        found: list[Tensor] = []
        gradients: list[Sequence[Tensor]] = []
        size = max(1, CHUNK_BYTES // self.bytes_of_block(stream_SND[0]))
        for first in range(0, blocks, size):
            chunk = slice(first, min(first + size, blocks))
            rows = {name: rows[chunk].detach().requires_grad_() for name, rows in self.rows.items()}
            losses = self._losses_of(stream_SND[chunk.start : chunk.stop + 1], rows, criterion, targets)
            gradients.append(torch.autograd.grad(losses.sum(), list(rows.values())))
            found.append(losses.detach())
            del losses  # or its graph would live until the next one is there
        together = torch.cat(found, 1)
        whole = [torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*gradients, strict=True)]
        return _benefits(together), GradientsKnown.apply(together.sum(), whole, *self.rows.values())

    def _losses_of(self, stream_SND: Sequence[Tensor], rows: Weights, criterion: Criterion, targets: Tensor) -> Tensor:
        """(2, b, 2) losses for class token and patches, blocks, input and output."""
        logits = at_least_float32(self.logits(stream_SND, rows))
        return self._losses(logits.flatten(0, 2), criterion, targets).view(logits.shape[:3])


class LinearProbes(BatchedProbes):
    """A linear probe on the class token and one on the mean patch token of every block, on its input and its output.

    Departure from the paper, whose patch probe sees the patches' places: where a block changes the patches without their
    mean, this one is blind to it.
    """

    def __init__(self, layout: ModelLayout, reduce: Reduce) -> None:
        cls, patch = ([nn.Linear(layout.width, layout.num_classes) for _ in layout.blocks] for _ in range(2))
        super().__init__(layout, reduce, _stacked("cls", cls) | _stacked("patch", patch))

    def logits(self, stream_SND: Sequence[Tensor], weights: Weights) -> Tensor:
        read = [read_tokens(x_SND, self._layout) for x_SND in stream_SND]
        cls_PSD, mean_PSD = (torch.stack(tokens) for tokens in zip(*read, strict=True))
        return torch.stack(
            [
                _linear(cls_PSD[:-1], cls_PSD[1:], weights["cls_weight"], weights["cls_bias"]),
                _linear(mean_PSD[:-1], mean_PSD[1:], weights["patch_weight"], weights["patch_bias"]),
            ]
        )

    def bytes_of_block(self, x_SND: Tensor) -> int:
        samples, _, width = x_SND.shape
        return 4 * samples * x_SND.element_size() * (2 * width + 3 * self._layout.num_classes)


class LowRankProbes(BatchedProbes):
    """The paper's probes (`p3b.scoring.probes`), whose 3x3 convolutions work with few channels.

    The first follows a 1x1 convolution from D channels to R: together they are a 3x3 convolution of that rank. Convolutions of
    all blocks are one grouped convolution over the channels (input or output, block, R), and so are the batch norms.

    Args:
        layout, reduce: as in `BatchedProbes`.
        rank: R.
    """

    def __init__(self, layout: ModelLayout, reduce: Reduce, rank: int) -> None:
        blocks, width, classes = len(layout.blocks), layout.width, layout.num_classes
        cls = [nn.Linear(width, classes) for _ in range(blocks)]
        patch = [_patch_layers(width, rank, classes) for _ in range(blocks)]
        ones, zeros = torch.ones(blocks, rank), torch.zeros(blocks, rank)
        super().__init__(
            layout,
            reduce,
            _stacked("cls", cls)
            | {name: torch.stack([layers[name].weight.detach() for layers in patch]) for name in ("narrow", "first", "second")}
            | {"first_scale": ones, "first_shift": zeros, "second_scale": ones.clone(), "second_shift": zeros.clone()}
            | _stacked("patch", [layers["answer"] for layers in patch]),
        )

    def logits(self, stream_SND: Sequence[Tensor], weights: Weights) -> Tensor:
        tokens_PSD = torch.stack([read_class_token(x_SND, self._layout) for x_SND in stream_SND])
        maps_SKHW = self._narrowed(stream_SND, weights["narrow"])
        for name in ("first", "second"):
            maps_SKHW = F.conv2d(maps_SKHW, _for_both(weights[name]), padding=1, groups=2 * len(stream_SND) - 2)
            scale, shift = (_for_both(weights[f"{name}_{part}"]) for part in ("scale", "shift"))
            maps_SKHW = self._normalised(maps_SKHW, scale, shift).relu_()
        # torch's pooling gives a gradient in an order that the layer before is slow to read.
        pooled_SK = maps_SKHW.permute(0, 2, 3, 1).flatten(1, 2).mean(1)
        pooled_2BSR = pooled_SK.unflatten(1, (2, len(stream_SND) - 1, -1)).permute(1, 2, 0, 3)
        return torch.stack(
            [
                _linear(tokens_PSD[:-1], tokens_PSD[1:], weights["cls_weight"], weights["cls_bias"]),
                _linear(*pooled_2BSR, weights["patch_weight"], weights["patch_bias"]),
            ]
        )

    def bytes_of_block(self, x_SND: Tensor) -> int:
        samples, tokens, width = x_SND.shape
        rank, classes = self.rows["narrow"].shape[1], self._layout.num_classes
        return samples * x_SND.element_size() * (tokens * (width + 16 * rank) + 12 * classes)

    def _narrowed(self, stream_SND: Sequence[Tensor], narrow_BRD: Tensor) -> Tensor:
        """The 1x1 convolution: (S, 2 B R, H, W), channels-last, first all blocks' inputs, then their outputs."""
        patches_PSND = torch.stack([x_SND[:, self._layout.prefix_tokens :] for x_SND in stream_SND])
        kind = patches_PSND.device.type
        if torch.is_autocast_enabled(kind):  # once here, and not by each of the two products that read it
            patches_PSND = patches_PSND.to(torch.get_autocast_dtype(kind))
        sides = [torch.einsum("bsnd,brd->snbr", side_BSND, narrow_BRD) for side_BSND in (patches_PSND[:-1], patches_PSND[1:])]
        return torch.stack(sides, 2).flatten(2).unflatten(1, self._layout.grid).permute(0, 3, 1, 2)

    def _normalised(self, x_SKHW: Tensor, scale_K: Tensor, shift_K: Tensor) -> Tensor:
        """Batch norm over the batch of all ranks."""
        if self._alone:
            return F.batch_norm(x_SKHW, None, None, scale_K, shift_K, training=True)
        return normalise(x_SKHW, scale_K, shift_K, *moments_of_all(self._reduce, [x_SKHW])[0])


def _patch_layers(width: int, rank: int, classes: int) -> dict[str, nn.Module]:
    """One block's layers with their first weights, drawn in this order."""
    first = nn.Conv2d(rank, rank, 3, bias=False)
    narrow = nn.Linear(width, rank, bias=False)
    return {
        "first": first,
        "narrow": narrow,
        "second": nn.Conv2d(rank, rank, 3, bias=False),
        "answer": nn.Linear(rank, classes),
    }


def _stacked(name: str, layers: Sequence[nn.Linear]) -> dict[str, Tensor]:
    return {f"{name}_{part}": torch.stack([getattr(layer, part).detach() for layer in layers]) for part in ("weight", "bias")}


def _linear(before_BSD: Tensor, after_BSD: Tensor, weight_BCD: Tensor, bias_BC: Tensor) -> Tensor:
    """(B, 2, S, C): every block's linear layer on its input and on its output."""
    return torch.stack([torch.baddbmm(bias_BC[:, None], side_BSD, weight_BCD.mT) for side_BSD in (before_BSD, after_BSD)], 1)


def _for_both(rows: Tensor) -> Tensor:
    """(B, R, ...) -> (2 B R, ...): the same parameters for inputs and outputs."""
    return torch.cat([rows, rows]).flatten(0, 1)


def _benefits(losses_2B2: Tensor) -> Tensor:
    losses_2B2 = losses_2B2.detach()
    return losses_2B2[..., 0] - losses_2B2[..., 1]
