"""The residual stream of a masked model, computed in its active channels alone (`p3b.vit.active`).

In a forward pass all that reads or writes the stream has the rows or columns of these channels: patch embedding, tokens,
positions, norms, LayerScale, heads; and the first and last layers of blocks, which `p3b.vit.active` sees to. What flows is D'
wide, so that norms and additions get cheaper with the products, and nothing is gathered. Parameters keep their width.

Tokens and positions belong to the model itself, whose hooks act where it is called. Where a part of it is (`forward_features`,
`forward_intermediates`) all channels are computed: a layer that is given D of them takes all, and one that is given D' those.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from timm.layers import LayerScale
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from p3b.vit.anatomy.norms import is_norm
from p3b.vit.anatomy.weights import STREAM
from p3b.vit.layout import ModelLayout

_MODELS = (VisionTransformer, VisionTransformerDistilled)
"""Classes whose forward pass takes the width from its tensors."""
_LAYERS = (nn.Conv2d, nn.Linear, LayerScale)
"""Beside norms: what may hold parameters that lie along the stream."""


class ActiveStream:
    """Lets a gated model compute some channels of its residual stream.

    Args:
        layout: of the model, whose blocks are all timm's plain ones.
        model: dense; on its device.

    Attributes:
        off: whether everything is computed for now.
    """

    def __init__(self, layout: ModelLayout, model: nn.Module) -> None:
        self.off = False
        self._called = False
        """Whether a pass is under way that began with a call of the model, so that its tokens are narrow."""
        self._size = layout.width
        self._device = next(model.parameters()).device
        self._index: Tensor | None = None
        """(D',) sorted channels that are computed, on the device; None where all are."""
        self._norms: tuple[str, ...] = ()
        self._layers: dict[str, dict[str, int]] = {}
        """Axis of the stream by parameter, by the name of the module that holds it."""
        if layout.stream is None or type(model) not in _MODELS:
            return
        seen_to = {f"{block.name.rpartition('.')[0]}.{layer}." for block in layout.blocks for layer in _ENDS}
        layers: dict[str, dict[str, int]] = {name: {} for name in layout.stream.norms}  # they may have no parameters
        for weight in layout.stream.weights:
            holder, _, parameter = weight.key.rpartition(".")
            if f"{holder}." not in seen_to:
                axis = next(axis for axis, factors in enumerate(weight.axes) if STREAM in factors)
                layers.setdefault(holder, {})[parameter] = axis
        modules = [model.get_submodule(name) for name in layers if name]
        users = {weight.user for weight in layout.stream.weights}
        if users == {None} and all(isinstance(module, _LAYERS) or is_norm(module) for module in modules):
            self._layers, self._norms = layers, layout.stream.norms

    @property
    def possible(self) -> bool:
        """Whether this model can compute a part of its stream."""
        return bool(self._layers)

    def choose(self, index: Tensor) -> None:
        """Compute these channels from now on.

        Args:
            index: (D',) sorted.
        """
        self._index = index.to(self._device) if len(index) < self._size else None

    def attach(self, model: nn.Module) -> list[RemovableHandle]:
        """Act on the model's forward pass, after its gates; returns the hooks."""
        handles: list[RemovableHandle] = []
        for name, axes in self._layers.items():
            layer = model.get_submodule(name)
            handles += [
                layer.register_forward_pre_hook(_restore, prepend=True),  # what a pass that was interrupted has left
                layer.register_forward_pre_hook(self._select(axes)),
                # The gates' own hook on a norm computes with its weights, so it comes before.
                layer.register_forward_hook(_restore, prepend=name not in self._norms, always_call=True),
            ]
        if self.possible:
            handles += [
                model.register_forward_pre_hook(lambda *_: self._call(begins=True), prepend=True),
                model.register_forward_hook(lambda *_: self._call(begins=False), always_call=True),
            ]
        return handles

    def of(self, x: Tensor) -> Tensor | None:
        """The channels that x (..., D' or D) has; None where these are all."""
        index = self._index
        return index if index is not None and x.shape[-1] == len(index) else None

    def whole(self, x: Tensor) -> Tensor:
        """(..., D' or D) -> (..., D), zeros where nothing was computed."""
        if self._index is None or x.shape[-1] == self._size:
            return x
        return x.new_zeros(*x.shape[:-1], self._size).index_copy_(-1, self._index, x)

    def of_norm(self, name: str, mask: Tensor, x: Tensor) -> Tensor:
        """The part of a norm's mask (D,) that is for what the norm is given, x."""
        index = self.of(x) if name in self._norms else None
        return mask if index is None else mask.index_select(0, index)

    def _call(self, *, begins: bool) -> None:
        self._called = begins and not self.off

    def _select(self, axes: Mapping[str, int]) -> Callable[[nn.Module, Any], None]:
        def select(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            begins = isinstance(layer, (*_MODELS, nn.Conv2d))  # what it is given are images
            index = (self._index if self._called else None) if begins else self.of(args[0])
            if index is None:
                return
            layer.__dict__["_whole_stream"] = {name: layer._parameters[name] for name in axes}, _shape(layer)
            for name, axis in axes.items():
                parameter = layer._parameters[name]
                assert parameter is not None
                # The registry may hold any tensor while the layer computes; __setattr__ would refuse it.
                layer._parameters[name] = parameter.index_select(axis, index)
            if _shape(layer) is not None:
                layer.__dict__["normalized_shape"] = (len(index),)

        return select


_ENDS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
"""Layers of a plain block that read and write the stream."""


def _shape(layer: nn.Module) -> tuple[int, ...] | None:
    return layer.__dict__.get("normalized_shape")


def _restore(layer: nn.Module, *_args: object) -> None:
    if "_whole_stream" in layer.__dict__:
        parameters, shape = layer.__dict__.pop("_whole_stream")
        layer._parameters.update(parameters)
        if shape is not None:
            layer.__dict__["normalized_shape"] = shape
