"""What is cut is made up for by what stays: weights and biases of the layers around a cut are fitted anew, in closed form.

Block by block, from the first on, two streams run through the network on a few hundred images: x, that of the dense model, and
x~, that of the cut one as it has become so far. Each block has a first layer (qkv, fc1), which reads the kept input channels z~
of its norm, and a last one (proj, fc2), which reads the kept inner channels h~. One after the other they are fitted:

    first    W z~ + b   to what the dense block's first layer puts out on x, in the kept rows
    last     W h~ + b   to the dense stream after the block less the cut one before it, in the kept output channels

    min over W, b of   E |W f + b - t|^2 + r sum_ij Var(f_j) (W_ij - W'_ij)^2,     W' the weights that were trained

The biases take what is constant in what closed, exactly; the weights take what of it follows linearly from what stays; and
what earlier blocks have missed is made good where a later one can write it. Nothing but kept weights and their biases moves,
so the small network still computes exactly what the masked one does, with the parameters that the budget allows.

Where the residual stream itself is cut, x~ has the channels that stay, norms take their moments over these, and the heads are
fitted as well, to the answers of the dense model.

After CORP (arXiv 2602.05243), VBP (arXiv 2507.12988) and GRAIL (arXiv 2602.23795): the first regresses closed channels on kept
ones, the second moves their means into the next bias, the third fits the next layer by a Gram matrix. Not so here: both layers
of a block are fitted, to what the cut network really gives them, and the last one towards the dense model's stream.

S images, N tokens, D width, F features of a layer, R rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from p3b.errors import ModelError
from p3b.vit.anatomy.attention import RotaryAttention
from p3b.vit.anatomy.half import PreNorm
from p3b.vit.anatomy.norms import norm_of_kept
from p3b.vit.anatomy.weights import STREAM, Weight, dims_of, expand_along
from p3b.vit.families import family_of
from p3b.vit.gates import Gates
from p3b.vit.layout import BlockLayout, ModelLayout
from p3b.vit.observing import evaluating, observed

PENALTY = 0.01
"""r, what holds weights to those that were trained, as a share of each feature's variance."""

Reduce = Callable[[Tensor], Tensor]


@torch.no_grad()
def compensate(
    model: VisionTransformer,
    layout: ModelLayout,
    masks: Mapping[str, Tensor],
    batches: Iterable[Tensor],
    reduce: Reduce,
    penalty: float = PENALTY,
) -> None:
    """Close what the masks cut, by zeros in the weights themselves, and fit what stays; the model is changed in place.

    Afterwards it computes what the hard masks leave of it (but for those of the stream, which norms look at), and `apply_cuts`
    by the same masks makes it small. Frozen layers are closed and not fitted.

    Args:
        model: dense, without gates.
        layout: its map.
        masks: by gate name; an element stays where its mask is >= 0.5.
        batches: images, (S, C, H, W) each, on the model's device; a few hundred are enough. Three tensors of them, (S, N,
            D) each, are held; where the stream is cut, the images as well.
        reduce: mean of a tensor over all ranks, which have images of their own.
        penalty: r, >= 0.

    Raises:
        ModelError: a part of the model is not covered (`require_compensable`), or there are no images.
    """
    branches = _branches(model, layout)
    if layout.stream is not None:
        batches = list(batches)  # gone through again for the heads
    heads = None if layout.stream is None else _Heads(model, layout, masks)
    dense = [_first_stream(model, batch, heads) for batch in batches]
    if not dense:
        raise ModelError("There are no images to compensate the cut on: the batches are empty, or an iterator that is used up.")
    cut = dense
    if heads is not None:
        with heads.narrowed():
            cut = [_first_stream(model, batch) for batch in batches]
    streams = [_Streams(*each) for each in zip(dense, cut, strict=True)]
    with evaluating(model):
        for block in layout.blocks:
            timm_block, half = branches[block.name]
            _Branch(timm_block, half, block, masks).fit(streams, reduce, penalty)
    if heads is not None:
        heads.fit(batches, reduce, penalty)


def require_compensable(model: VisionTransformer, layout: ModelLayout) -> None:
    """Refuse a model, or dimensions of it, whose cut `compensate` cannot make up for; arguments as there.

    Raises:
        ModelError: names the part.
    """
    _branches(model, layout)


def _branches(model: VisionTransformer, layout: ModelLayout) -> dict[str, tuple[nn.Module, PreNorm]]:
    """Every residual branch by its name: its block, and which half of it. ModelError for one that is not covered."""
    mend = "cut without compensation (--compensate off)."
    for block in layout.blocks:
        if block.moments:
            raise ModelError(f"{block.moments[0].norm}: a norm over what is cut inside a block cannot be compensated; {mend}")
    found: dict[str, tuple[nn.Module, PreNorm]] = {}
    for part in family_of(model).blocks(model):
        for half in part.halves:
            if type(half) is not PreNorm or isinstance(half.body, RotaryAttention):
                raise ModelError(f"{part.branch(half)}: compensation does not cover a branch of this kind; {mend}")
            found[part.branch(half)] = (part.module, half)
    return found


@dataclass
class _Streams:
    """The stream of a batch in the dense model and in the cut one, (S, N, D) each; what the dense branch at hand puts out."""

    dense: Tensor
    cut: Tensor
    output: Tensor | None = None


class _Stop(Exception):  # noqa: N818 - it is none
    """What is looked for has been seen: the rest of the forward pass is left out."""


def _first_stream(model: VisionTransformer, batch: Tensor, heads: _Heads | None = None) -> Tensor:
    """x_0: what the first block is given; the heads, where there are some, take note of their answers."""
    first = model.blocks[0]
    if heads is not None:
        with observed(model, [first, *heads.layers]) as seen:
            model(batch)
        heads.answers.append([seen[head].output for head in heads.layers])
        return seen[first].input
    found: list[Tensor] = []

    def keep(_block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append(inputs[0])
        raise _Stop

    handle = first.register_forward_pre_hook(keep)
    try:
        with evaluating(model), suppress(_Stop):
            model(batch)
    finally:
        handle.remove()
    return found[0]


class _Heads:
    """The linear layers that read what the blocks have made of a stream that is cut.

    Args:
        model, layout, masks: as in `compensate`; nothing is fitted yet.

    Attributes:
        layers: the heads.
        answers: of the dense model, by batch and head.
    """

    def __init__(self, model: VisionTransformer, layout: ModelLayout, masks: Mapping[str, Tensor]) -> None:
        assert layout.stream is not None
        self._model, self._layout = model, layout
        self._stays = masks[STREAM] >= 0.5
        keys = [weight.key for weight in layout.stream.outside if len(weight.axes) == 2 and STREAM in weight.axes[1]]
        self.layers: list[Any] = [model.get_submodule(key.rpartition(".")[0]) for key in keys]
        self.answers: list[list[Tensor]] = []

    @contextmanager
    def narrowed(self) -> Iterator[None]:
        """The model computes with the channels of the stream that stay."""
        gates = Gates(self._layout, self._model)
        ones = {gate: torch.ones_like(mask) for gate, mask in gates.masks.items()}
        gates.attach(self._model)
        gates.set({**ones, STREAM: self._stays.to(ones[STREAM])})
        try:
            yield
        finally:
            gates.detach()

    def fit(self, batches: Iterable[Tensor], reduce: Reduce, penalty: float) -> None:
        """Close and fit all heads, once the blocks are."""
        features: list[list[Tensor]] = []
        with self.narrowed():
            for batch in batches:
                with observed(self._model, self.layers) as seen:
                    self._model(batch)
                features.append([seen[head].input for head in self.layers])
        for number, head in enumerate(self.layers):
            layer = _CutLayer(head, torch.ones(head.out_features, dtype=torch.bool), self._stays.cpu())
            layer.close()
            if not layer.frozen:
                pairs = zip(features, self.answers, strict=True)
                layer.fit(((given[number], answers[number]) for given, answers in pairs), reduce, penalty)


class _Branch:
    """One residual branch, dense and cut.

    Args:
        timm_block, half: where it lies.
        block: its map.
        masks: by gate name.
    """

    def __init__(self, timm_block: nn.Module, half: PreNorm, block: BlockLayout, masks: Mapping[str, Tensor]) -> None:
        self._norm, self._scale = half.entry(timm_block), half.scale(timm_block)
        self._cut = timm_block.get_submodule(half.name)
        self._dense = deepcopy(self._cut)
        inside = f"{block.name}."
        matrices = [weight for weight in block.weights if len(weight.axes) == 2]
        self._layers = {weight.key.removeprefix(inside).removesuffix(".weight"): weight for weight in matrices}
        """Its linear layers by name, in their order; the last one writes to the stream."""
        self._last = next(name for name, layer in self._cut.named_modules() if layer is half.body.last(self._cut))
        self._block, self._masks = block, masks
        device = half.body.last(self._cut).weight.device
        self._stream = (masks[STREAM] >= 0.5).to(device) if STREAM in masks else None

    def fit(self, streams: Sequence[_Streams], reduce: Reduce, penalty: float) -> None:
        """Close and fit all layers, and let the streams run on."""
        for name, weight in self._layers.items():
            layer = _CutLayer(self._cut.get_submodule(name), self._kept(weight, 0), self._kept(weight, 1))
            layer.close()
            if not layer.frozen:
                layer.fit((self._features_and_target(name, each) for each in streams), reduce, penalty)
        for each in streams:
            each.dense = each.dense + self._scaled(self._output_of(each))
            each.output = None
            each.cut = each.cut + self._scaled(self._cut(self._norm_of_cut(each.cut)))

    def _output_of(self, streams: _Streams) -> Tensor:
        """What the dense branch puts out, which the last layer's target and the stream both need."""
        if streams.output is None:
            streams.output = self._dense(self._norm(streams.dense))
        return streams.output

    def _norm_of_cut(self, x_SND: Tensor) -> Tensor:
        return self._norm(x_SND) if self._stream is None else norm_of_kept(self._norm, x_SND, self._stream).to(x_SND.dtype)

    def _scaled(self, outputs_SND: Tensor) -> Tensor:
        return outputs_SND if self._scale is None else outputs_SND * self._scale

    def _features_and_target(self, name: str, streams: _Streams) -> tuple[Tensor, Tensor]:
        """What a layer of the cut branch is given, and what it should put out."""
        cut_SND = self._norm_of_cut(streams.cut)
        if name != self._last:
            return cut_SND, self._dense.get_submodule(name)(self._norm(streams.dense))
        missed_SND = streams.dense - streams.cut
        if self._scale is not None:
            missed_SND = torch.where(self._scale == 0, 0, missed_SND / self._scale)
        layer = self._cut.get_submodule(name)
        with observed(self._cut, [layer]) as seen:
            self._cut(cut_SND)
        return seen[layer].input, self._output_of(streams) + missed_SND

    def _kept(self, weight: Weight, axis: int) -> Tensor:
        """Which rows (axis 0) or columns (1) of a matrix stay, bool."""
        factors, sizes = weight.axes[axis], self._block.sizes
        kept = torch.ones(math.prod(sizes[each] if isinstance(each, str) else each for each in factors), dtype=torch.bool)
        for dim in dims_of(factors):
            mask = (self._masks[self._block.gate(dim)] >= 0.5).cpu()
            kept = kept & expand_along(mask, factors, dim, sizes)
        return kept


class _CutLayer:
    """A linear layer some rows and columns of which are closed.

    Args:
        layer: whose parameters are changed.
        rows, columns: (R,) and (F,) bool, those that stay.
    """

    def __init__(self, layer: nn.Linear, rows: Tensor, columns: Tensor) -> None:
        self._layer = layer
        self._rows, self._columns = (kept.nonzero().flatten().to(layer.weight.device) for kept in (rows, columns))
        self.frozen = not layer.weight.requires_grad

    def close(self) -> None:
        """Put zeros where nothing stays."""
        weight, bias = self._layer.weight, self._layer.bias
        kept = weight[self._rows][:, self._columns]
        weight.zero_()[self._rows[:, None], self._columns] = kept
        if bias is not None:
            kept = bias[self._rows]
            bias.zero_()[self._rows] = kept

    def fit(self, seen: Iterable[tuple[Tensor, Tensor]], reduce: Reduce, penalty: float) -> None:
        """Move what stays to where the layer puts out what it should, as nearly as it can.

        Args:
            seen: for each batch the layer's input and what it should put out, of all columns and rows.
            reduce, penalty: as in `compensate`.
        """
        layer = self._layer
        sums = _Moments(reduce, constant=layer.bias is not None)
        for features, target in seen:
            sums.add(features[..., self._columns], (target - layer(features))[..., self._rows])
        weight_RF, bias_R = sums.solve(penalty)
        if not (weight_RF.isfinite().all() and bias_R.isfinite().all()):
            return  # a batch that is not finite: the layer stays as it was trained
        layer.weight[self._rows[:, None], self._columns] += weight_RF.to(layer.weight.dtype)
        if layer.bias is not None:
            layer.bias[self._rows] += bias_R.to(layer.bias.dtype)


class _Moments:
    """Sums over tokens of the products of features, and of features with what is missing.

    Products are taken in the model's number format, float32 at least, and summed in float64 over batches. Features count from
    about their mean, that of the first batch: nothing is lost in that format where a mean is large and what varies is small.

    Args:
        reduce: mean of a tensor over all ranks.
        constant: whether the layer has a bias; without one features count from zero.
    """

    def __init__(self, reduce: Reduce, *, constant: bool) -> None:
        self._reduce, self._constant = reduce, constant
        self._from_F: Tensor | None = None
        self._sums: list[Tensor] = []

    def add(self, features_SNF: Tensor, missing_SNR: Tensor) -> None:
        wide = torch.promote_types(features_SNF.dtype, torch.float32)
        f_TF, t_TR = features_SNF.flatten(0, -2).to(wide), missing_SNR.flatten(0, -2).to(wide)
        if self._from_F is None:
            self._from_F = self._reduce(f_TF.mean(0)) if self._constant else f_TF.new_zeros(f_TF.shape[1])
        f_TF = torch.cat([f_TF - self._from_F, f_TF.new_ones(len(f_TF), 1)], dim=1)
        found = [(f_TF.T @ f_TF).double(), (f_TF.T @ t_TR).double()]
        self._sums = [total + each for total, each in zip(self._sums, found, strict=True)] if self._sums else found

    def solve(self, penalty: float) -> tuple[Tensor, Tensor]:
        """(R, F) and (R,) float64, by which weights and bias have to grow; zeros for a bias that is not there."""
        assert self._from_F is not None
        square, cross = (self._reduce(total) for total in self._sums)
        tokens, from_F = square[-1, -1].clone(), self._from_F.double()
        square, cross = square / tokens, cross / tokens
        mean_F, offset_R = square[-1, :-1], cross[-1]
        square_FF, cross_FR = square[:-1, :-1], cross[:-1]
        if self._constant:
            square_FF = square_FF - torch.outer(mean_F, mean_F)
            cross_FR = cross_FR - torch.outer(mean_F, offset_R)
        # Features in units of their own deviation; one that moves by no more than rounding is left out.
        variance_F = square_FF.diagonal()
        size_F = variance_F + (mean_F + from_F).square()
        unit_F = torch.where(variance_F > 1e-10 * size_F, variance_F, torch.inf).rsqrt()
        system_FF = square_FF * unit_F * unit_F[:, None]
        system_FF.diagonal().add_(penalty + 1e-8)
        weight_FR = unit_F[:, None] * torch.linalg.solve_ex(system_FF, unit_F[:, None] * cross_FR).result
        constant_R = offset_R - (mean_F + from_F) @ weight_FR if self._constant else torch.zeros_like(offset_R)
        return weight_FR.T, constant_R
