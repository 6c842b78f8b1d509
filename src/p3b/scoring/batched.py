"""Cheap probes of all blocks at once: one product for all blocks' probes of a kind, one call of the task loss.

S samples, N tokens, D width, (H, W) patch grid, C classes, B blocks, R channels between convolutions, P = B + 1 features.

Parameters of a kind are one tensor over all blocks, and so are their gradients and the optimizer's moments. A block's input and
its output go through products of the same shape: where a block adds nothing, both give the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
from p3b.scoring.maps import as_map
from p3b.scoring.meter import Reduce, is_alone
from p3b.scoring.moments import moments_of_all, normalise
from p3b.scoring.task_losses import TaskLosses
from p3b.vit.layout import ModelLayout

CHUNK_BYTES = 2**24
"""What probes may hold at a time, about, until their gradients are there: so many blocks are gone through at once. In a small
model, where calls cost more than arithmetic, these are all; in a large one a few, with a graph small beside the backbone's."""

Weights = Mapping[str, Tensor]


def blocks_at_once(blocks: int, bytes_of_block: int) -> int:
    """How many blocks' probes are evaluated together, in chunks of even size; one block at least."""
    chunks = min(blocks, -(-blocks * bytes_of_block // CHUNK_BYTES))
    return -(-blocks // chunks)


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
        """Logits of neighbouring blocks' probes.

        Args:
            stream_SND: the features around b blocks, b + 1 of them.
            weights: parameters by name, of these blocks alone, (b, ...).

        Returns:
            (2, b, 2, S, C): class token and patches, blocks, input and output of the block.
        """
        raise NotImplementedError

    def bytes_of_graph(self, x_SND: Tensor) -> int:
        """About what autograd holds of a block's probes until their gradients are there."""
        raise NotImplementedError

    def bytes_of_block(self, x_SND: Tensor) -> int:
        """The same with the gradients from inputs and from outputs: with many classes they are most of it."""
        return self.bytes_of_graph(x_SND) + 2 * sum(rows[0].nbytes for rows in self.rows.values())

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
        if not (self._alone and torch.is_grad_enabled()) or computes_in_half(targets.device.type):
            losses = self._losses_of(stream_SND, dict(self.rows.items()), criterion, targets)
            return _benefits(losses), losses.sum()
        found: list[Tensor] = []
        gradients: list[Sequence[Tensor]] = []
        blocks = len(stream_SND) - 1
        size = blocks_at_once(blocks, self.bytes_of_block(stream_SND[0]))
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

    def _losses_of(self, stream_SND: Sequence[Tensor], weights: Weights, criterion: Criterion, targets: Tensor) -> Tensor:
        """(2, b, 2) losses for class token and patches, blocks, input and output."""
        logits = at_least_float32(self.logits(stream_SND, weights))
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

    def bytes_of_graph(self, x_SND: Tensor) -> int:
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
        patch = [_PatchLayers.drawn(width, rank, classes) for _ in range(blocks)]
        rows = _stacked("cls", cls) | _stacked("patch", [layers.answer for layers in patch])
        rows["narrow"] = torch.stack([layers.narrow.weight.detach() for layers in patch])
        for name, convolutions in (("first", [each.first for each in patch]), ("second", [each.second for each in patch])):
            rows[name] = torch.stack([convolution.weight.detach() for convolution in convolutions])
            rows |= {f"{name}_scale": torch.ones(blocks, rank), f"{name}_shift": torch.zeros(blocks, rank)}
        super().__init__(layout, reduce, rows)

    def logits(self, stream_SND: Sequence[Tensor], weights: Weights) -> Tensor:
        tokens_PSD = torch.stack([read_class_token(x_SND, self._layout) for x_SND in stream_SND])
        sides = self._narrowed(stream_SND, weights["narrow"])
        for name in ("first", "second"):
            kernel, scale_K, shift_K = (weights[key].flatten(0, 1) for key in (name, f"{name}_scale", f"{name}_shift"))
            sides = [F.conv2d(x_SKHW, kernel, padding=1, groups=len(stream_SND) - 1) for x_SKHW in sides]
            sides = [x_SKHW.relu_() for x_SKHW in self._normalised(sides, scale_K, shift_K)]
        per_block = weights["first_scale"].shape
        before_BSR, after_BSR = (_mean_over_places(x_SKHW).unflatten(1, per_block).transpose(0, 1) for x_SKHW in sides)
        return torch.stack(
            [
                _linear(tokens_PSD[:-1], tokens_PSD[1:], weights["cls_weight"], weights["cls_bias"]),
                _linear(before_BSR, after_BSR, weights["patch_weight"], weights["patch_bias"]),
            ]
        )

    def bytes_of_graph(self, x_SND: Tensor) -> int:
        samples, tokens, width = x_SND.shape
        rank, classes = self.rows["narrow"].shape[1], self._layout.num_classes
        return samples * x_SND.element_size() * (tokens * (width + 16 * rank) + 12 * classes)

    def _narrowed(self, stream_SND: Sequence[Tensor], narrow_BRD: Tensor) -> list[Tensor]:
        """The 1x1 convolution on all blocks' inputs and on their outputs: (S, K, H, W) each, K = B R, channels-last."""
        patches_PSND = torch.stack([x_SND[:, self._layout.prefix_tokens :] for x_SND in stream_SND])
        kind = patches_PSND.device.type
        if torch.is_autocast_enabled(kind):  # once here, and not by each of the two products that read it
            patches_PSND = patches_PSND.to(torch.get_autocast_dtype(kind))
        sides = [torch.einsum("bsnd,brd->snbr", side_BSND, narrow_BRD) for side_BSND in (patches_PSND[:-1], patches_PSND[1:])]
        return [as_map(x_SNBR.flatten(2), self._layout) for x_SNBR in sides]

    def _normalised(self, sides: Sequence[Tensor], scale_K: Tensor, shift_K: Tensor) -> list[Tensor]:
        """Batch norm of inputs and of outputs, each over the batch of all ranks."""
        if self._alone:
            return [F.batch_norm(x_SKHW, None, None, scale_K, shift_K, training=True) for x_SKHW in sides]
        moments = moments_of_all(self._reduce, sides)
        return [normalise(x_SKHW, scale_K, shift_K, *each) for x_SKHW, each in zip(sides, moments, strict=True)]


@dataclass(frozen=True)
class _PatchLayers:
    """The layers of one block's patch probe that have first weights to draw, in the order in which they are drawn."""

    first: nn.Conv2d
    narrow: nn.Linear
    second: nn.Conv2d
    answer: nn.Linear

    @classmethod
    def drawn(cls, width: int, rank: int, classes: int) -> _PatchLayers:
        return cls(
            first=nn.Conv2d(rank, rank, 3, bias=False),
            narrow=nn.Linear(width, rank, bias=False),
            second=nn.Conv2d(rank, rank, 3, bias=False),
            answer=nn.Linear(rank, classes),
        )


def _stacked(name: str, layers: Sequence[nn.Linear]) -> dict[str, Tensor]:
    return {f"{name}_{part}": torch.stack([getattr(layer, part).detach() for layer in layers]) for part in ("weight", "bias")}


def _linear(before_BSD: Tensor, after_BSD: Tensor, weight_BCD: Tensor, bias_BC: Tensor) -> Tensor:
    """(B, 2, S, C): every block's linear layer on its input and on its output."""
    return torch.stack([torch.baddbmm(bias_BC[:, None], side_BSD, weight_BCD.mT) for side_BSD in (before_BSD, after_BSD)], 1)


def _mean_over_places(x_SKHW: Tensor) -> Tensor:
    """(S, K). torch's pooling gives a gradient in an order that the layer before is slow to read."""
    return x_SKHW.permute(0, 2, 3, 1).flatten(1, 2).mean(1)


def _benefits(losses_2B2: Tensor) -> Tensor:
    losses_2B2 = losses_2B2.detach()
    return losses_2B2[..., 0] - losses_2B2[..., 1]
