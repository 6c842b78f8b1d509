"""Gates: a vector per prunable dimension that multiplies its channels (section 6 of the method).

A gate on the channels of a linear layer is the same as scaling rows or columns of that layer's weight, which is far less to
multiply than activations. While gates are attached, each gated layer computes with the product in the place of its weight; the
parameters themselves, the classes and the state-dict keys stay as they are. Where they are large, products are not kept for the
backward pass (`p3b.vit.products`). A score m * dLoss/dm needs no graph
of its own (see `p3b.scoring.criteria`); a method that learns masks asks for dLoss/dm itself, by `Gates.collect_gradients`.

The gate of the residual stream multiplies all that is written to it (patch embedding, tokens, positions, last layers of the
blocks) and all that is read of it. What is read are layer norms, and these take their moments over the channels weighted by
their mask:

    norm(x) = m * (w * (x - mu) / sqrt(var + eps) + b),   mu = sum(m * x) / sum(m),   var = sum(m * (x - mu)^2) / sum(m)

With a mask of zeros and ones this is the ordinary layer norm over the channels that stay. So it is with norms inside a block,
over a head's width or over hidden channels: their moments are those of the channels that stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from p3b.errors import ModelError, TrainingError
from p3b.vit.active import ActiveWidths
from p3b.vit.anatomy.norms import norm_of_kept
from p3b.vit.anatomy.weights import STREAM, Axis, Weight, dims_of, expand_along
from p3b.vit.layout import ModelLayout
from p3b.vit.products import free_until_gradient, product_of


@dataclass(frozen=True)
class _Gate:
    """A gate along one axis of a parameter: its name, the axis, and the dimension's place among the axis's factors."""

    name: str
    dim: str
    axis: int
    factors: Axis
    sizes: Mapping[str, int]

    @property
    def along(self) -> tuple[object, ...]:
        """What a mask that is repeated along the axis depends on."""
        shape = tuple(self.sizes[factor] if isinstance(factor, str) else factor for factor in self.factors)
        return self.name, shape, self.factors.index(self.dim)


@dataclass(frozen=True)
class _GatedWeight:
    """One parameter of a layer, its number of axes, and the gates on them.

    `holder` is where the layer that is called has the module that holds the parameter: mostly it is that layer itself, "".
    """

    holder: str
    parameter: str
    rank: int
    gates: tuple[_Gate, ...]


class Gates:
    """All gates of a model. `masks` is what they hold, by gate name ("blocks.0.attn.in", "stream"), ones at first.

    Until the first `set` nothing is multiplied at all, so that an ungated step costs nothing. The hooks are plain functions
    that share these masks: a deep copy of the model (as an exponential moving average makes) is gated by the same masks.
    """

    def __init__(self, layout: ModelLayout, model: nn.Module) -> None:
        device = next(model.parameters()).device
        self.active: ActiveWidths | None = None
        """What is computed, where that is not everything: set before `attach`."""
        self.masks: dict[str, Tensor] = {gate: torch.ones(size, device=device) for gate, size in layout.gates.items()}
        self._closed = False
        self._collects = self._writers_only = False
        self._leaf: Tensor | None = None
        """All masks in one vector, where gradients are collected: it gets them."""
        self._scales: dict[tuple[str, str, str], list[Tensor]] = {}
        self._gated: dict[str, list[_GatedWeight]] = {}
        self._norms: dict[str, tuple[_Gate, ...]] = {}
        """Norms whose moments are taken over the channels that stay, and the gates along these channels."""
        self._norm_masks: dict[str, Tensor] = {}
        """Their masks, where norms have to look at them: they are not all ones."""
        for block in layout.blocks:
            for weight in block.weights:
                self._add(weight, {dim: block.gate(dim) for _, dim in weight.gated}, block.sizes)
            for moments in block.moments:
                self._norms[moments.norm] = tuple(
                    _Gate(block.gate(dim), dim, 0, moments.axis, block.sizes) for dim in dims_of(moments.axis)
                )
        if layout.stream is not None:
            sizes = {STREAM: layout.stream.size}
            self._norms |= dict.fromkeys(layout.stream.norms, (_Gate(STREAM, STREAM, 0, (STREAM,), sizes),))
            for weight in layout.stream.outside:
                self._add(weight, {STREAM: STREAM}, sizes)
        self._handles: list[RemovableHandle] = []
        self._layers: list[nn.Module] = []

    def attach(self, model: nn.Module) -> None:
        """Let the gates act on the model's forward pass."""
        for name in self._gated:
            layer = model.get_submodule(name)
            self._layers.append(layer)
            self._handles += [
                layer.register_forward_pre_hook(self._swap_hook(name)),
                layer.register_forward_hook(self._restore_hook(name), always_call=True),
            ]
        for name in self._norms:
            self._handles.append(model.get_submodule(name).register_forward_hook(self._norm_hook(name)))
        if self.active is not None:
            self.active.attach(model)

    def detach(self) -> None:
        """Take the gates off: class, state-dict keys and outputs are as they were before `attach`."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self.active is not None:
            self.active.detach()
        for layer in self._layers:
            _restore(layer)
        self._layers.clear()

    @torch.enable_grad()
    def set(self, masks: Mapping[str, Tensor]) -> None:
        """New values for all gates.

        A mask that wants a gradient gets it from each backward pass through the model, exact also for the stream, whose norms
        depend on it beside what its weights tell; `masks` holds the values alone.

        Raises:
            ModelError: names or sizes are not those of this model's gates, or nothing is left of the residual stream.
        """
        if {name: mask.shape for name, mask in masks.items()} != {name: mask.shape for name, mask in self.masks.items()}:
            raise ModelError("The masks do not fit the model: their names or sizes are those of another architecture.")
        stream = masks.get(STREAM)
        if stream is not None and not (stream > 0).any():
            raise ModelError("The masks leave no channel of the residual stream: keep one at least.")
        sizes = [len(mask) for mask in self.masks.values()]
        together = torch.cat([masks[name] for name in self.masks]).to(next(iter(self.masks.values())))  # one transfer for all
        if self._collects:
            together = self._leaf = together.detach().requires_grad_()
        values = dict(zip(self.masks, together.split(sizes), strict=True))
        self.masks = {name: mask.detach() for name, mask in values.items()}
        self._closed = True
        through_norms = together.requires_grad and not self._writers_only
        self._norm_masks = self._masks_of_norms(values if through_norms else self.masks, all_of_them=through_norms)
        expanded = {
            gate.along: expand_along(values[gate.name], gate.factors, gate.dim, gate.sizes)
            for weights in self._gated.values()
            for gated in weights
            for gate in gated.gates
        }
        self._scales = {
            (layer, gated.holder, gated.parameter): [
                _along_axis(expanded[gate.along], gate.axis, gated.rank) for gate in gated.gates
            ]
            for layer, weights in self._gated.items()
            for gated in weights
        }

    def _masks_of_norms(self, values: Mapping[str, Tensor], *, all_of_them: bool) -> dict[str, Tensor]:
        """Masks along the channels of the norms, by name; of those alone that have a channel masked, unless all are wanted."""
        names = list(dict.fromkeys(gate.name for gates in self._norms.values() for gate in gates))
        if not names:
            return {}
        untouched = torch.stack([(values[name] == 1).all() for name in names]).tolist()  # one transfer for all
        touched = set(names) if all_of_them else {name for name, whole in zip(names, untouched, strict=True) if not whole}
        masks: dict[str, Tensor] = {}
        along: dict[tuple[tuple[object, ...], ...], Tensor] = {}
        for norm, gates in self._norms.items():
            if any(gate.name in touched for gate in gates):
                key = tuple(gate.along for gate in gates)
                if key not in along:
                    vectors = [expand_along(values[gate.name], gate.factors, gate.dim, gate.sizes) for gate in gates]
                    along[key] = math.prod(vectors[1:], start=vectors[0])
                masks[norm] = along[key]
        return masks

    def collect_gradients(self, *, writers_only: bool = False) -> None:
        """From now on each backward pass leaves the gradient with respect to all masks, those of masked elements included.

        Args:
            writers_only: leave out what the stream's mask does to the norms: the gradient that its writers' weights tell.
        """
        if not self._collects:
            self._collects, self._writers_only = True, writers_only
            self.set(self.masks)

    @property
    def collects(self) -> bool:
        """Whether backward passes leave gradients with respect to the masks."""
        return self._collects

    def clear_gradients(self) -> None:
        """Forget the gradients of the backward passes so far."""
        if self._leaf is not None:
            self._leaf.grad = None

    def gated_parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters that a gate multiplies, by key."""
        keys = [
            ".".join(name for name in (layer, gated.holder, gated.parameter) if name)
            for layer, weights in self._gated.items()
            for gated in weights
        ]
        return {key: model.get_parameter(key) for key in keys}

    def gradients(self) -> dict[str, Tensor]:
        """dLoss/dm of every gate, by name, summed over the backward passes since the last `set`; zeros where there was none.

        It is this rank's own: a distributed wrapper does not know of masks.
        """
        assert self._leaf is not None, "collect_gradients comes first"
        gradient = torch.zeros_like(self._leaf) if self._leaf.grad is None else self._leaf.grad
        return dict(zip(self.masks, gradient.split([len(mask) for mask in self.masks.values()]), strict=True))

    def _add(self, weight: Weight, names: Mapping[str, str], sizes: Mapping[str, int]) -> None:
        """Take in one parameter, if any gate multiplies it; `names` says each dimension's gate."""
        if weight.gated:
            holder, _, parameter = weight.key.rpartition(".")
            layer = holder if weight.user is None else weight.user
            gates = tuple(_Gate(names[dim], dim, axis, weight.factors(axis, dim), sizes) for axis, dim in weight.gated)
            inside = holder.removeprefix(layer).removeprefix(".")
            self._gated.setdefault(layer, []).append(_GatedWeight(inside, parameter, len(weight.axes), gates))

    def _swap_hook(self, layer_name: str) -> Callable[[nn.Module, object], None]:
        gated_weights = self._gated[layer_name]

        def swap(layer: nn.Module, _args: object) -> None:
            _restore(layer)  # a keyboard interrupt in a forward pass skips the hook after it
            if not self._closed:
                return
            if not layer.get_submodule(gated_weights[0].holder)._parameters:
                raise TrainingError(
                    "The layers are copies that DataParallel has made for another GPU, and gates do not go along. Train on one "
                    "GPU, or with DistributedDataParallel."
                )
            kept: dict[tuple[str, str], nn.Parameter] = {}
            for gated in gated_weights:
                holder = layer.get_submodule(gated.holder)
                weight = kept[gated.holder, gated.parameter] = holder._parameters[gated.parameter]
                product = product_of(weight, self._scales[layer_name, gated.holder, gated.parameter])
                # The registry may hold any tensor while the layer computes; __setattr__ would refuse it.
                holder._parameters[gated.parameter] = product
            layer._ungated_parameters = kept

        return swap

    def _restore_hook(self, layer_name: str) -> Callable[[nn.Module, object, object], None]:
        gated_weights = self._gated[layer_name]

        def restore(layer: nn.Module, _args: object, output: object) -> None:
            holders = layer.__dict__.get("_ungated_parameters", {})
            # torch.compile sees to it by itself, and with active widths no layer computes with a whole product.
            if holders and self.active is None and torch.is_grad_enabled() and not torch.compiler.is_compiling():
                for gated in gated_weights:
                    product = layer.get_submodule(gated.holder)._parameters[gated.parameter]
                    scales = self._scales[layer_name, gated.holder, gated.parameter]
                    assert product is not None
                    free_until_gradient(product, holders[gated.holder, gated.parameter], scales, output)
            _restore(layer)

        return restore

    def _norm_hook(self, name: str) -> Callable[[nn.LayerNorm, tuple[Tensor, ...], Tensor], Tensor | None]:
        def normalise(norm: nn.LayerNorm, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            mask = self._norm_masks.get(name)
            if mask is None:
                return None
            if self.active is not None:
                mask = self.active.of_norm(name, mask, args[0])
            return norm_of_kept(norm, args[0], mask).to(output.dtype)

        return normalise


def _restore(layer: nn.Module, *_args: object) -> None:
    if "_ungated_parameters" in layer.__dict__:
        for (holder, name), parameter in layer.__dict__.pop("_ungated_parameters").items():
            layer.get_submodule(holder)._parameters[name] = parameter


def _along_axis(vector: Tensor, axis: int, rank: int) -> Tensor:
    return vector.view([-1 if position == axis else 1 for position in range(rank)])
