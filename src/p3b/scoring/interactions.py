"""How much the loss minds two kinds of elements going together: SAViT's interaction matrix.

Gates of value 1 stand on all heads, hidden channels and channels of the residual stream. H_ij is the sum of the second
derivatives of the loss between the gates of kind i in one layer and those of kind j in a layer not above it, both drawn at
random, over the product of what the two kinds weigh in parameters. The vector 1 in 1^T (d2 loss / dm_i dm_j) 1 are the gates
themselves, so one Hessian-vector product for each kind gives a row: never is a Hessian held.

The stream's gate acts where the stream is written and where it is read (`p3b.vit.gates`). The writing alone would say nothing:
a layer norm takes out a factor on all channels, so that derivatives along it are zero. The moments of the norms, which the gate
weighs too, do not change along the vector 1.

Source: Zheng et al., "SAViT: Structure-Aware Vision Transformer Pruning via Collaborative Optimization", NeurIPS 2022.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from p3b.vit.anatomy.weights import STREAM, Weight, expand_along
from p3b.vit.layout import ModelLayout

KINDS = ("heads", "hidden", STREAM)


def kind_weights(layout: ModelLayout) -> Tensor:
    """(3,) what an element of each kind is taken to weigh: D for a head, 4 D for a hidden channel, 6 L D for a channel of the
    stream, with D channels and L layers."""
    layers = len(layout.blocks) // 2
    return torch.tensor([1.0, 4.0, 6.0 * layers], dtype=torch.float64) * layout.width


def draw_layers(layout: ModelLayout, generator: torch.Generator) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """For each kind i the layer that its gates are taken from, and for each kind j a layer not above that one.

    The stream has one gate, whatever the layer; seen from it, no layer is above.
    """
    depth = len(layout.blocks) // 2

    def draw(layers: int) -> int:
        return int(torch.randint(layers, (), generator=generator))

    rows = []
    for kind in KINDS:
        layer = draw(depth)
        below = depth if kind == STREAM else layer + 1
        rows.append((layer, tuple(draw(below) for _ in KINDS)))
    return tuple(rows)


def interaction_matrix(
    model: VisionTransformer,
    layout: ModelLayout,
    images: Tensor,
    loss: Callable[[Tensor], Tensor],
    layers: Sequence[tuple[int, Sequence[int]]],
) -> Tensor:
    """H of one batch, with one pair of layers drawn for each pair of kinds.

    The model computes as in evaluation (no dropout), in the precision of its weights; neither it nor its gradients change.

    Args:
        model: whose layout has the dimensions heads, hidden and stream.
        layout: its map.
        images: (S, channels, height, width).
        loss: from the model's outputs to a scalar.
        layers: as `draw_layers` gives them.

    Returns:
        (3, 3) float64, rows and columns in the order of `KINDS`; not symmetric, as layers are drawn.
    """
    sizes = layout.gates
    gates = {name: torch.ones(size, device=images.device, requires_grad=True) for name, size in sizes.items()}
    chosen = [[_gate(layout, kind, layer) for kind, layer in zip(KINDS, below, strict=True)] for _, below in layers]
    was_training = model.training
    checkpointing = [module for module in model.modules() if getattr(module, "grad_checkpointing", False)]
    model.eval()
    for module in checkpointing:  # what is computed again in backward would not find these parameters
        setattr(module, "grad_checkpointing", False)  # noqa: B010 (mypy takes it for a parameter)
    assert layout.stream is not None
    reads = [model.get_submodule(name).register_forward_hook(_times(gates[STREAM])) for name in layout.stream.norms]
    try:
        # Only the plain form of attention has a second derivative; a compiled model has none at all.
        with (
            torch.enable_grad(),
            torch.autocast(images.device.type, enabled=False),
            sdpa_kernel(SDPBackend.MATH),
            torch.compiler.set_stance("force_eager"),
        ):
            value = loss(functional_call(model, _gated(model, layout, gates), (images,)))
            firsts = torch.autograd.grad(
                value,
                [gates[_gate(layout, kind, layer)] for kind, (layer, _) in zip(KINDS, layers, strict=True)],
                create_graph=True,
            )
            rows = [
                torch.autograd.grad(first.sum(), [gates[name] for name in names], retain_graph=True)
                for first, names in zip(firsts, chosen, strict=True)
            ]
    finally:
        for read in reads:
            read.remove()
        model.train(was_training)
        for module in checkpointing:
            setattr(module, "grad_checkpointing", True)  # noqa: B010
    weights = kind_weights(layout).to(images.device)
    return torch.stack([torch.stack([second.double().sum() for second in row]) for row in rows]) / weights.outer(weights)


def _gate(layout: ModelLayout, kind: str, layer: int) -> str:
    """Full name of the gate of a kind in a layer."""
    attention, mlp = layout.blocks[2 * layer], layout.blocks[2 * layer + 1]
    return {"heads": attention.gate("heads"), "hidden": mlp.gate("hidden"), STREAM: STREAM}[kind]


def _times(gate: Tensor) -> Callable[[torch.nn.Module, object, Tensor], Tensor]:
    def multiply(_norm: torch.nn.Module, _args: object, output: Tensor) -> Tensor:
        return output * gate

    return multiply


def _gated(model: VisionTransformer, layout: ModelLayout, gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's parameters, each times the gates that lie along it: what depends on the gates by autograd."""
    assert layout.stream is not None
    parameters = {key: parameter.detach() for key, parameter in model.named_parameters()}
    for block in layout.blocks:
        for weight in block.weights:
            gated = {dim: gates[block.gate(dim)] for _, dim in weight.gated}
            parameters[weight.key] = _product(parameters[weight.key], weight, block.sizes, gated)
    for weight in layout.stream.outside:
        gated = {dim: gates[dim] for _, dim in weight.gated}
        parameters[weight.key] = _product(parameters[weight.key], weight, {STREAM: layout.stream.size}, gated)
    return parameters


def _product(value: Tensor, weight: Weight, sizes: Mapping[str, int], gates: Mapping[str, Tensor]) -> Tensor:
    for axis, dim in weight.gated:
        along = expand_along(gates[dim], weight.factors(axis, dim), dim, sizes)
        value = value * along.view([-1 if position == axis else 1 for position in range(value.ndim)])
    return value
