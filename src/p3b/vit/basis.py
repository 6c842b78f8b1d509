"""Another basis for the channels of each attention head: the same function, its channels in the order of what they carry.

A head computes softmax(q^T k) v and then proj reads it, so for any invertible A and B of size K x K

    q -> A^T q,   k -> A^-1 k,   v -> B^-1 v,   P_h -> P_h B     (P_h: the columns of proj that read the head)

change nothing; A and B act on weights and biases. A gate cuts channel i of all heads at once, and by itself channel i of
one head has nothing to do with channel i of another. In this basis it has: channel i is the i-th most important of its head.

    Q = E[q q^T],   K = E[(k - k')(k - k')^T],   k' the mean key of an image     Q^1/2 K^1/2 = U S V^T
    O = Cov(o), o what the attention puts out                                    P_h O^1/2   = X T Y^T

With A = Q^-1/2 U S^1/2 and B = O^1/2 Y T^-1/2 channel i of a head carries S_i of the root mean square of its logits over
pairs of tokens, and T_i of that of what it writes, the most first: cutting the last channels is the best cut of that many
for each of the two, if queries and keys are taken for independent. A constant added to all logits of a query changes no
softmax: that is why keys count from their mean. A constant of the output is a bias, which compensation sees to.

K channels of a head, H heads, D width, S images, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from p3b.errors import TrainingError
from p3b.vit.families import family_of
from p3b.vit.observing import observed

Reduce = Callable[[Tensor], Tensor]

LEAST_SHARE = 1e-6
"""Of the largest singular value: smaller ones are taken for this in the change of basis, which stays well conditioned."""


@dataclass(frozen=True)
class HeadMoments:
    """Second moments of what an attention block computes on some images, (H, K, K) float64 each.

    Attributes:
        query: of the queries.
        key: of the keys, each image's from their mean.
        output: of what the attention puts out, from its mean over all images.
    """

    query: Tensor
    key: Tensor
    output: Tensor

    def is_finite(self) -> bool:
        """Whether all of it is."""
        return all(bool(each.isfinite().all()) for each in (self.query, self.key, self.output))


@torch.no_grad()
def head_moments(model: VisionTransformer, batches: Iterable[Tensor], reduce: Reduce) -> list[HeadMoments | None]:
    """Moments of every attention block of a dense model; None where something stands between queries and keys, or values and
    proj, that another basis would change (norms, rotary positions).

    Args:
        model: dense; it is put into evaluation mode while it runs.
        batches: images, (S, C, H, W) each, on the model's device.
        reduce: mean of a tensor over all ranks, which have images of their own.

    Raises:
        TrainingError: there are no images.
    """
    attentions = [attn if _is_plain(attn) else None for attn in _attentions(model)]
    sums: list[dict[str, Tensor]] = [{} for _ in attentions]
    images = 0
    for batch in batches:
        images += len(batch)
        layers = [layer for attn in attentions if attn is not None for layer in (attn.qkv, attn.proj)]
        with observed(model, layers) as seen:
            model(batch)
        for attn, total in zip(attentions, sums, strict=True):
            if attn is not None:
                for name, value in _sums_of(attn, seen[attn.qkv].output, seen[attn.proj].input).items():
                    total[name] = total[name] + value if name in total else value
    if images == 0:
        raise TrainingError("There are no images to calibrate on: the batches are empty, or an iterator that is used up.")
    return [_moments({name: reduce(value) for name, value in total.items()}) if total else None for total in sums]


@torch.no_grad()
def order_heads(model: VisionTransformer, moments: Sequence[HeadMoments | None]) -> None:
    """Change the basis of every head in place; what the model computes stays, to rounding.

    Blocks without moments, or with moments that are not finite, and frozen ones stay as they are.

    Args:
        model: dense.
        moments: of its attention blocks, as `head_moments` measures them.
    """
    for attn, found in zip(_attentions(model), moments, strict=True):
        if found is not None and found.is_finite() and all(parameter.requires_grad for parameter in attn.parameters()):
            _order_block(attn, found)


def _attentions(model: VisionTransformer) -> list[nn.Module]:
    return [
        block.module.get_submodule(half.name)
        for block in family_of(model).blocks(model)
        for half in block.halves
        if half.body.kind == "attn"
    ]


def _is_plain(attn: nn.Module) -> bool:
    norms = ("q_norm", "k_norm", "norm")
    return type(attn) is Attention and all(isinstance(attn.get_submodule(norm), nn.Identity) for norm in norms)


def _sums_of(attn: nn.Module, qkv_SNE: Tensor, output_SNE: Tensor) -> dict[str, Tensor]:
    heads = (attn.num_heads, attn.head_dim)
    q_SNHK, k_SNHK, _ = qkv_SNE.double().unflatten(-1, (3, *heads)).unbind(2)
    o_SNHK = output_SNE.double().unflatten(-1, heads)
    k_SNHK = k_SNHK - k_SNHK.mean(1, keepdim=True)
    product = "snhi,snhj->hij"
    return {
        "tokens": torch.tensor(float(q_SNHK.shape[0] * q_SNHK.shape[1]), dtype=torch.float64, device=q_SNHK.device),
        "query": torch.einsum(product, q_SNHK, q_SNHK),
        "key": torch.einsum(product, k_SNHK, k_SNHK),
        "output": torch.einsum(product, o_SNHK, o_SNHK),
        "mean": o_SNHK.sum((0, 1)),
    }


def _moments(total: dict[str, Tensor]) -> HeadMoments:
    tokens = total["tokens"]
    mean_HK = total["mean"] / tokens
    output = total["output"] / tokens - mean_HK[:, :, None] * mean_HK[:, None, :]
    return HeadMoments(total["query"] / tokens, total["key"] / tokens, output)


def _order_block(attn: nn.Module, moments: HeadMoments) -> None:
    shape = (3, attn.num_heads, attn.head_dim)
    weight_TKD = attn.qkv.weight.double().unflatten(0, shape)  # (3, H, K, D)
    columns_DHK = attn.proj.weight.double().unflatten(1, shape[1:])
    to_query, to_key = _of_logits(moments.query.to(weight_TKD), moments.key.to(weight_TKD))
    to_value, from_value = _of_output(moments.output.to(weight_TKD), columns_DHK.permute(1, 0, 2))
    changes = torch.stack([to_query, to_key, to_value])  # (3, H, K, K), each times the old channels
    attn.qkv.weight.copy_((changes @ weight_TKD).flatten(0, 2))
    if attn.qkv.bias is not None:
        attn.qkv.bias.copy_((changes @ attn.qkv.bias.double().unflatten(0, shape)[..., None]).flatten())
    attn.proj.weight.copy_((columns_DHK.permute(1, 0, 2) @ from_value).permute(1, 0, 2).flatten(1))


def _of_logits(query_HKK: Tensor, key_HKK: Tensor) -> tuple[Tensor, Tensor]:
    """A^T and A^-1."""
    (root_q, inverse_q), (root_k, _) = _roots(query_HKK), _roots(key_HKK)
    u_HKK, s_HK, _ = torch.linalg.svd(root_q @ root_k)
    scale_HK = _scale(s_HK)
    to_query = scale_HK[:, :, None] * (u_HKK.mT @ inverse_q)
    to_key = (u_HKK.mT @ root_q) / scale_HK[:, :, None]
    return to_query, to_key


def _of_output(output_HKK: Tensor, columns_HDK: Tensor) -> tuple[Tensor, Tensor]:
    """B^-1 and B."""
    root, inverse = _roots(output_HKK)
    # P^T P in place of P: K x K, whatever the width, and K right vectors also where the width is less.
    squares, y_HKK = torch.linalg.eigh(root @ columns_HDK.mT @ columns_HDK @ root)
    y_HKK, t_HK = y_HKK.flip(-1), squares.flip(-1).clamp(min=0).sqrt()
    scale_HK = _scale(t_HK)
    return scale_HK[:, :, None] * (y_HKK.mT @ inverse), (root @ y_HKK) / scale_HK[:, None, :]


def _roots(moment_HKK: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric square root of a moment and its inverse; the moment is lifted a little where it is singular."""
    values, vectors = torch.linalg.eigh(moment_HKK)
    values = values.clamp(min=0)
    values = (values + LEAST_SHARE * values.amax(-1, keepdim=True)).clamp(min=torch.finfo(values.dtype).tiny).sqrt()
    return (vectors * values[:, None, :]) @ vectors.mT, (vectors / values[:, None, :]) @ vectors.mT


def _scale(singular_HK: Tensor) -> Tensor:
    """Square roots of singular values, none of them zero: both sides of a product share each evenly."""
    least = (LEAST_SHARE * singular_HK.amax(-1, keepdim=True)).clamp(min=torch.finfo(singular_HK.dtype).tiny)
    return singular_HK.maximum(least).sqrt()
