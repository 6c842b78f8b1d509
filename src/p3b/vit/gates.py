"""Gates: a vector per prunable dimension that multiplies its channels (section 6 of the method).

A gate on the channels of a linear layer is the same as scaling rows or columns of that layer's weight, which is far less to
multiply than activations. While gates are attached, each gated layer computes with the product in the place of its weight; the
parameters themselves, the classes and the state-dict keys stay as they are. A score that is m * dLoss/dm needs no gradient of
the gates: see `p3b.scoring.criteria`. A method that learns masks does, also of elements that are masked: `collect_gradients`
is for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from p3b.errors import ModelError
from p3b.vit.layout import ModelLayout, dims_of, expand_along


@dataclass(frozen=True)
class _GatedWeight:
    """One parameter of a layer and the gates on its axes: (axis, gate name, factors of the axis)."""

    parameter: str
    gates: tuple[tuple[int, str, tuple[int | str, ...]], ...]


class Gates:
    """All gates of a model. `masks` is what they hold, by gate name ("blocks.0.attn.in"), ones at first.

    Until the first `set` nothing is multiplied at all, so that an ungated step costs nothing. The hooks are plain functions
    that share these masks: a deep copy of the model (as an exponential moving average makes) is gated by the same masks.
    """

    def __init__(self, layout: ModelLayout, model: nn.Module) -> None:
        device = next(model.parameters()).device
        self.masks: dict[str, Tensor] = {
            block.gate(dim): torch.ones(size, device=device) for block in layout.blocks for dim, size in block.dims.items()
        }
        self._closed = False
        self._leaves: dict[str, Tensor] | None = None
        self._scales: dict[tuple[str, str], list[Tensor]] = {}
        self._gated: dict[str, list[_GatedWeight]] = {}
        for block in layout.blocks:
            for weight in block.weights:
                if weight.gated:
                    layer, _, parameter = weight.key.rpartition(".")
                    gates = tuple((axis, block.gate(dims_of(weight.axes[axis])[0]), weight.axes[axis]) for axis in weight.gated)
                    self._gated.setdefault(layer, []).append(_GatedWeight(parameter, gates))
        self._ranks = {weight.key: len(weight.axes) for block in layout.blocks for weight in block.weights}
        self._handles: list[RemovableHandle] = []
        self._layers: list[nn.Module] = []

    def attach(self, model: nn.Module) -> None:
        """Let the gates act on the model's forward pass."""
        for name in self._gated:
            layer = model.get_submodule(name)
            self._layers.append(layer)
            self._handles += [
                layer.register_forward_pre_hook(self._swap_hook(name)),
                layer.register_forward_hook(_restore, always_call=True),
            ]

    def detach(self) -> None:
        """Take the gates off: class, state-dict keys and outputs are as they were before `attach`."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for layer in self._layers:
            _restore(layer)
        self._layers.clear()

    def set(self, masks: Mapping[str, Tensor]) -> None:
        """New values for all gates.

        Raises:
            ModelError: names or sizes are not those of this model's gates.
        """
        if {name: mask.shape for name, mask in masks.items()} != {name: mask.shape for name, mask in self.masks.items()}:
            raise ModelError("The masks do not fit the model: their names or sizes are those of another architecture.")
        sizes = [len(mask) for mask in self.masks.values()]
        together = torch.cat([masks[name] for name in self.masks]).to(next(iter(self.masks.values())))  # one transfer for all
        self.masks = dict(zip(self.masks, together.split(sizes), strict=True))
        self._closed = True
        expanded = {
            (gate, factors): expand_along(self.masks[gate], factors)
            for weights in self._gated.values()
            for gated in weights
            for _, gate, factors in gated.gates
        }
        self._scales = {
            (layer, gated.parameter): [
                _along_axis(expanded[gate, factors], axis, self._ranks[f"{layer}.{gated.parameter}"])
                for axis, gate, factors in gated.gates
            ]
            for layer, weights in self._gated.items()
            for gated in weights
        }
        if self._leaves is not None:
            self._leaves = self._new_leaves()

    def collect_gradients(self) -> None:
        """From now on backward passes leave the gradient with respect to the masks, those of masked elements included."""
        if self._leaves is None:
            self._leaves = {}
            self.set(self.masks)

    def gradients(self) -> dict[str, Tensor]:
        """dLoss/dm of every gate, by name, summed over the backward passes since the last `set`; zeros where there was none.

        It is this rank's own: the sum knows nothing of a distributed wrapper.
        """
        assert self._leaves is not None, "collect_gradients comes first"
        return {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in self._leaves.items()}

    def _new_leaves(self) -> dict[str, Tensor]:
        return {name: mask.detach().requires_grad_() for name, mask in self.masks.items()}

    def _swap_hook(self, layer_name: str) -> Callable[[nn.Module, object], None]:
        gated_weights = self._gated[layer_name]

        def swap(layer: nn.Module, _args: object) -> None:
            _restore(layer)  # a keyboard interrupt in a forward pass skips the hook after it
            if not self._closed:
                return
            kept: dict[str, nn.Parameter] = {}
            for gated in gated_weights:
                weight = kept[gated.parameter] = layer._parameters[gated.parameter]
                if self._leaves is not None and torch.is_grad_enabled():
                    product = self._differentiable_product(weight, gated, self._leaves)
                else:
                    first, *others = self._scales[layer_name, gated.parameter]
                    product = weight * first.to(weight.dtype)
                    for scale in others:
                        product = product.mul_(scale.to(weight.dtype))
                # The registry may hold any tensor while the layer computes; __setattr__ would refuse it.
                layer._parameters[gated.parameter] = product
            layer._ungated_parameters = kept

        return swap

    @staticmethod
    def _differentiable_product(weight: Tensor, gated: _GatedWeight, leaves: Mapping[str, Tensor]) -> Tensor:
        """The weight times its gates, as part of the graph: nothing may be multiplied in place."""
        for axis, gate, factors in gated.gates:
            weight = weight * _along_axis(expand_along(leaves[gate], factors).to(weight.dtype), axis, weight.ndim)
        return weight


def _restore(layer: nn.Module, *_args: object) -> None:
    if "_ungated_parameters" in layer.__dict__:
        layer._parameters.update(layer.__dict__.pop("_ungated_parameters"))


def _along_axis(vector: Tensor, axis: int, rank: int) -> Tensor:
    return vector.view([-1 if position == axis else 1 for position in range(rank)])
