"""What of a masked model is computed while it is pruned: elements whose mask is below `EPSILON` are not.

All parameters keep their width, and with them gradients, optimizer moments, moving average, checkpoints and probes. In a
forward pass the layers of a block compute with the rows and columns of the active elements alone, selected from the (gated)
weights; going back, autograd gives the others a gradient of zero.

    active      mask >= EPSILON, and of those below it the highest, up to a multiple of 8 (of heads: those alone)
    "hidden"    rows of fc1, columns of fc2                "head"    rows of q, k and v, columns of proj, in every head
    "heads"     the same rows and columns, of whole heads  "stream"  everything that reads or writes it, in the whole model
    "in"        columns of qkv or fc1; the norm's output is gathered     "out"    rows of proj or fc2; what they give is spread

"in" and "out" move activations, so they are narrowed only where the products that are saved take longer (`GATHER_COST`). A
narrower stream moves none (`p3b.vit.active_stream`).
Elements between EPSILON and 0.5 count as pruned and are computed: these are the ones that can come back next. As masks sharpen
fewer lie between, just as fewer come back where everything is computed. Only timm's plain attention and MLP are narrowed; of
other kinds, and of those with norms inside, everything is computed.

What an element that is not computed lacks, against the model at full width: its share of the output, at most EPSILON of what it
would add without a mask; and its gradient. AdamW then lets its moments fade and goes on with weight decay; at full width, where
gradients are scaled by the mask and Adam divides by their size, it would go on moving at nearly the full rate. Its score is
taken to be what it was when it was last computed, times the square of how far its mask has fallen since:

    score_e = m_e^2 * (mean over that interval of (m_e * dLoss/dm_e)^2) / (m_e of that interval)^2

which is what would be measured if the loss were as sensitive to it as then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from p3b.vit.active_stream import ActiveStream
from p3b.vit.anatomy.weights import STREAM
from p3b.vit.layout import BlockLayout, ModelLayout
from p3b.vit.parts import flat_select
from p3b.vit.trainable import gather_both_ways, is_plain, round_up

EPSILON = 0.03
"""Least mask of an element that is computed, whatever its rank; docs/narrow.md has what 0.01, 0.03 and 0.1 leave out."""
MULTIPLE = 8
"""Of active elements: products of float32 are tiled by it."""
GATHER_COST = 28
"""Multiply-accumulates that take as long as gathering one element, as for layouts (`p3b.deploy.layouts`)."""


@dataclass(frozen=True)
class _Branch:
    """One block's modules by name, and what of it is active: None where all is.

    Attributes:
        rows, columns: selected from the first layer.
        read: columns that are gathered from the norm's output; None where this has no others.
        last_rows, last_columns: selected from the last layer.
        queries: factor for each selected row of the first layer, where heads are narrower than they were.
        heads: heads and channels of a head; None for an MLP or where all are active.
        spread: D indices into the last layer's output and a zero behind it.
        back: for each of these outputs the channel whose gradient it gets.
    """

    rows: Tensor | None = None
    columns: Tensor | None = None
    read: Tensor | None = None
    last_rows: Tensor | None = None
    last_columns: Tensor | None = None
    queries: Tensor | None = None
    heads: tuple[int, int] | None = None
    spread: Tensor | None = None
    back: Tensor | None = None


class ActiveWidths:
    """Lets a gated model compute its active elements alone.

    Args:
        layout: of the model.
        model: dense; on its device.
        epsilon: least mask of what is computed, in (0, 0.5].

    Attributes:
        computed_N: (N,) bool, over all gates, on the CPU: which elements are computed.
    """

    def __init__(self, layout: ModelLayout, model: nn.Module, epsilon: float = EPSILON) -> None:
        self._layout, self._epsilon = layout, epsilon
        self._device = next(model.parameters()).device
        self._active = {block.name: _Branch() for block in layout.blocks}
        self._narrowed = [
            block for block in layout.blocks if is_plain(model.get_submodule(block.name.rpartition(".")[0]), block.kind)
        ]
        """Blocks that are narrowed: timm's plain attention and MLP; of others everything is computed."""
        self._stream = ActiveStream(layout, model) if len(self._narrowed) == len(layout.blocks) else None
        self._streams: dict[str, Tensor | None] = {}
        """By block, which channels of the stream its first layer has just read, so that its last one writes these."""
        self._off = False
        self._handles: list[RemovableHandle] = []
        elements = sum(layout.gates.values())
        self.computed_N = torch.ones(elements, dtype=torch.bool)
        self._computed = self.computed_N.to(self._device)
        self._masks_N = torch.ones(elements, device=self._device)
        self._sensitivity_N = torch.zeros(elements, device=self._device)
        """Mean of (dLoss/dm_e)^2 over the last interval in which the element was computed."""
        self._sum_N, self._count = torch.zeros_like(self._masks_N), torch.zeros((), device=self._device)
        """Scores of the interval that runs, and its steps that count."""

    def attach(self, model: nn.Module) -> None:
        """Act on the model's forward pass, after its gates."""
        for block in self._narrowed:
            owner = model.get_submodule(block.name.rpartition(".")[0])
            attends = block.kind == "attn"
            norm, first, last = (
                owner.get_submodule(name)
                for name in (("norm1", "attn.qkv", "attn.proj") if attends else ("norm2", "mlp.fc1", "mlp.fc2"))
            )
            if attends:
                self._around(owner.get_submodule("attn"), self._narrow_heads(block.name), _restore_heads)
            self._around(first, self._select_first(block.name), _restore)
            self._around(last, self._select_last(block.name), _restore)
            self._handles.append(norm.register_forward_hook(self._read(block.name)))
            self._handles.append(last.register_forward_hook(self._write(block.name)))
        if self._stream is not None:
            self._handles += self._stream.attach(model)

    def detach(self) -> None:
        """Take everything off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def set(self, masks: Mapping[str, Tensor]) -> None:
        """Choose what is active by the masks, which the gates have taken, too.

        Args:
            masks: by gate name, the same on every rank.
        """
        counted = self._count > 0
        measured_N = self._sum_N / self._count.clamp(min=1) / self._masks_N.square().clamp(min=1e-30)
        known_N = self._computed & (self._masks_N > 0) & counted
        self._sensitivity_N = torch.where(known_N, measured_N, self._sensitivity_N)
        self._sum_N, self._count = torch.zeros_like(self._sum_N), torch.zeros_like(self._count)
        self._choose(masks)

    def complete(self, scores_N: Tensor, counts: Tensor) -> Tensor:
        """Scores of a step with those of elements that were not computed filled in.

        Args:
            scores_N: as measured, zero where nothing was computed.
            counts: 0-dim bool: whether the step counts.
        """
        self._sum_N = self._sum_N + torch.where(counts, scores_N, 0.0)
        self._count = self._count + counts
        return torch.where(self._computed, scores_N, self._sensitivity_N * self._masks_N.square())

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Within it everything is computed."""
        self._turn(off=True)
        try:
            yield
        finally:
            self._turn(off=False)

    def whole_stream(self, x: Tensor) -> Tensor:
        """What flows in the residual stream, (..., D' or D) -> (..., D): zeros where nothing was computed."""
        return x if self._stream is None else self._stream.whole(x)

    def of_norm(self, name: str, mask: Tensor, x: Tensor) -> Tensor:
        """The part of a norm's mask, (D,) or of another width, that is for what this norm is given, x."""
        return mask if self._stream is None else self._stream.of_norm(name, mask, x)

    def _turn(self, *, off: bool) -> None:
        self._off = off
        if self._stream is not None:
            self._stream.off = off

    def state_dict(self) -> dict[str, Any]:
        """All that later scores depend on, besides the masks."""
        return {"sensitivity": self._sensitivity_N, "sum": self._sum_N, "count": self._count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`, once `set` has taken the masks of then."""
        if state["sensitivity"].shape != self._sensitivity_N.shape:
            raise ValueError(f"scores of {len(state['sensitivity'])} elements for {len(self._sensitivity_N)}")
        self._sensitivity_N, self._sum_N, self._count = (state[key].to(self._device) for key in ("sensitivity", "sum", "count"))

    def _choose(self, masks: Mapping[str, Tensor]) -> None:
        computed: dict[str, Tensor] = {gate: torch.ones(size, dtype=torch.bool) for gate, size in self._layout.gates.items()}
        stream = self._choose_stream(masks)
        if stream is not None:
            computed[STREAM].zero_()[stream] = True
        for block in self._narrowed:
            kept = {dim: _active(masks[block.gate(dim)].cpu(), self._epsilon, dim) for dim in block.dims}
            kept = {dim: index for dim, index in kept.items() if len(index) < block.dims[dim]}
            kept = {dim: index for dim, index in kept.items() if _pays(block, dim, kept)}
            for dim, index in kept.items():
                computed[block.gate(dim)].zero_()[index] = True
            self._active[block.name] = _branch(block, kept, self._device)
        self.computed_N = torch.cat(list(computed.values()))
        self._computed = self.computed_N.to(self._device)
        self._masks_N = torch.cat([masks[gate] for gate in self._layout.gates]).to(self._device, torch.float32)

    def _choose_stream(self, masks: Mapping[str, Tensor]) -> Tensor | None:
        """Sorted indices of the channels of the residual stream that are computed, on the CPU; None where all are."""
        if self._stream is None or not self._stream.possible:
            return None
        index = _active(masks[STREAM].cpu(), self._epsilon, STREAM)
        self._stream.choose(index)
        return index if len(index) < len(masks[STREAM]) else None

    def _now(self, name: str) -> _Branch:
        return _ALL if self._off else self._active[name]

    def _around(self, module: nn.Module, before: Callable[[nn.Module, Any], None], after: Callable[..., None]) -> None:
        """Hooks in this order: what a pass that was interrupted has left is put right, gates swap, this selects; and back."""
        self._handles += [
            module.register_forward_pre_hook(after, prepend=True),
            module.register_forward_pre_hook(before),
            module.register_forward_hook(after, prepend=True, always_call=True),
        ]

    def _select_first(self, name: str) -> Callable[[nn.Module, Any], None]:
        def select(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            now = self._now(name)
            stream = self._streams[name] = None if self._stream is None else self._stream.of(args[0])
            _swap(layer, now.rows, now.columns if stream is None else stream, factors=now.queries)

        return select

    def _select_last(self, name: str) -> Callable[[nn.Module, Any], None]:
        def select(layer: nn.Module, _args: object) -> None:
            now, stream = self._now(name), self._streams.get(name)
            _swap(layer, now.last_rows if stream is None else stream, now.last_columns, zero_row=now.spread is not None)

        return select

    def _narrow_heads(self, name: str) -> Callable[[nn.Module, Any], None]:
        def narrow(attention: Any, _args: object) -> None:
            heads = self._now(name).heads
            if heads is not None:
                attention._whole_heads = {key: getattr(attention, key) for key in _OF_HEADS}
                count, width = heads
                attention.__dict__.update(zip(_OF_HEADS, (count, width, count * width, width**-0.5), strict=True))

        return narrow

    def _read(self, name: str) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
        def gather(_norm: nn.Module, _args: object, output: Tensor) -> Tensor | None:
            read = self._now(name).read
            return None if read is None else flat_select(output, read)

        return gather

    def _write(self, name: str) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
        def spread(_layer: nn.Module, _args: object, output: Tensor) -> Tensor | None:
            now = self._now(name)
            if now.spread is None:
                return None
            assert now.back is not None
            if output.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
                output = output.float()  # as the stream is there
            found = gather_both_ways(output.reshape(-1, output.shape[-1]), now.spread, now.back)
            return found.reshape(*output.shape[:-1], len(now.spread))

        return spread


class LeftOut:
    """Measures what is missing in the logits of a model that computes its active elements alone.

    Args:
        active: attached to the model.
        model: whose last images of a pass with gradients are looked at.
        images: how many of them, at most.
    """

    def __init__(self, active: ActiveWidths, model: nn.Module, images: int = 8) -> None:
        self._active, self._model, self._most = active, model, images
        self._images: Tensor | None = None

        def remember(_model: nn.Module, args: tuple[Tensor, ...]) -> None:
            if torch.is_grad_enabled() and args:
                self._images = args[0][: self._most].detach().clone()  # the rest of the batch may go

        # A function, which a deep copy of the model shares; a method would be copied with all that it belongs to.
        self._handle = model.register_forward_pre_hook(remember)

    def measure(self) -> float | None:
        """Largest relative difference (2-norm) of an image's logits to those at full width; None where there was no pass.

        The model is in evaluation mode meanwhile, so that no random number is drawn.
        """
        images, self._images = self._images, None
        if images is None:
            return None
        modes = {module: module.training for module in self._model.modules()}
        self._model.eval()
        try:
            with torch.no_grad():
                narrow = self._logits(images)
                with self._active.suspended():
                    full = self._logits(images)
        finally:
            for module, training in modes.items():
                module.training = training
        return float(((narrow - full).norm(dim=-1) / full.norm(dim=-1).clamp(min=1e-30)).max())

    def detach(self) -> None:
        """Take the hook off the model."""
        self._handle.remove()

    def _logits(self, images: Tensor) -> Tensor:
        found = self._model(images)
        return torch.cat(list(found), dim=-1) if isinstance(found, tuple) else found


_ALL = _Branch()
_OF_HEADS = ("num_heads", "head_dim", "attn_dim", "scale")
"""What timm's attention knows of its heads."""


def _active(mask: Tensor, epsilon: float, dim: str) -> Tensor:
    """Sorted indices of the active elements of a gate; of outputs one fewer than a multiple, for a row of zeros comes after."""
    count, spare, multiple = max(1, int((mask >= epsilon).sum())), int(dim == "out"), 1 if dim == "heads" else MULTIPLE
    count = min(round_up(count + spare, multiple) - spare, len(mask))
    return mask.argsort(descending=True, stable=True)[:count].sort().values


def _pays(block: BlockLayout, dim: str, kept: Mapping[str, Tensor]) -> bool:
    """Whether narrowing a dimension saves more than it costs, once the inner ones are narrow; these cost nothing."""
    if dim not in ("in", "out"):
        return True
    width = block.sizes[dim]
    inner = ("heads", "head") if block.kind == "attn" else ("hidden",)
    channels = math.prod(len(kept[each]) if each in kept else block.sizes[each] for each in inner)
    products = (3 if (block.kind, dim) == ("attn", "in") else 1) * channels
    moved = len(kept[dim]) if dim == "in" else width
    return products * (width - len(kept[dim])) > GATHER_COST * moved


def _branch(block: BlockLayout, kept: Mapping[str, Tensor], device: torch.device) -> _Branch:
    """The indices that carry out what is active of a block."""
    index = {dim: channels.to(device) for dim, channels in kept.items()}
    spread = back = queries = rows = last_columns = None
    if "out" in index:
        channels, width = index["out"], block.sizes["out"]
        spread = torch.full((width,), len(channels), device=device)
        spread[channels] = torch.arange(len(channels), device=device)
        back = torch.cat([channels, channels[-1:]])  # the gradient of the zero is dropped: that of any channel will do
    heads = None
    if index.keys() & {"heads", "head"}:
        width = block.sizes["head"]
        which, inside = (index.get(dim, torch.arange(block.sizes[dim], device=device)) for dim in ("heads", "head"))
        places = (which[:, None] * width + inside).flatten()
        heads, last_columns = (len(which), len(inside)), places
        rows = (torch.arange(3, device=device)[:, None] * (block.heads * width) + places).flatten()
        if len(inside) < width:
            queries = torch.ones(len(rows), 1, device=device, dtype=torch.float64)
            queries[: len(places)] = math.sqrt(len(inside) / width)
    if "hidden" in index:
        rows = last_columns = index["hidden"]
    return _Branch(
        rows=rows,
        columns=index.get("in"),
        read=index.get("in"),
        last_rows=index.get("out"),
        last_columns=last_columns,
        queries=queries,
        heads=heads,
        spread=spread,
        back=back,
    )


def _swap(
    layer: nn.Module, rows: Tensor | None, columns: Tensor | None, *, factors: Tensor | None = None, zero_row: bool = False
) -> None:
    """Let a linear layer compute with some rows and columns, the rows times their factors, and perhaps one of zeros behind."""
    if rows is None and columns is None:
        return
    whole = dict(layer._parameters)
    for name, parameter in whole.items():
        if parameter is None:
            continue
        value: Tensor = parameter
        if rows is not None:
            value = value.index_select(0, rows)
        if columns is not None and value.ndim == 2:
            value = value.index_select(1, columns)
        if factors is not None:
            value = value * (factors if value.ndim == 2 else factors[:, 0]).to(value.dtype)
        if zero_row:
            value = F.pad(value, (*(0, 0) * (value.ndim - 1), 0, 1))
        # The registry may hold any tensor while the layer computes; __setattr__ would refuse it.
        layer._parameters[name] = value
    layer.__dict__["_whole_parameters"] = whole


def _restore(layer: nn.Module, *_args: object) -> None:
    if "_whole_parameters" in layer.__dict__:
        layer._parameters.update(layer.__dict__.pop("_whole_parameters"))


def _restore_heads(attention: Any, *_args: object) -> None:
    attention.__dict__.update(attention.__dict__.pop("_whole_heads", {}))
