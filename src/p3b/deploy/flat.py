"""A model whose blocks see the tokens of all images as the rows of one matrix, for ONNX Runtime.

Nothing else is computed; what changes is how an exported graph looks:

    linear layers   of a linear layer on a 3-D tensor the exporter makes a MatMul and an Add; of one on a matrix a Gemm, which
                    adds the bias as it multiplies
    attention       rows are ordered by token first, then by image. Queries, keys and values come from a product each, whose
                    output (N, S, H, K) is transposed and multiplied. ONNX Runtime multiplies such a transposed tensor where it
                    lies; of one product for all three it copies every element twice before
    shapes          the number of rows is the only one that is not known beforehand, so that nearly no node computes shapes
    last block      a classifier that reads the class token hears nothing of the others: from the last attention on, they are
                    keys and values alone

N tokens, of which the classifier reads R; S samples, D width, H heads, K head width; I channels read, O channels written.
"""

from __future__ import annotations

from copy import deepcopy

from timm.layers import Attention, Mlp
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from p3b.deploy.sides import Addend
from p3b.vit.parts import ConstantBranch, NoBlock, NoBranch


def for_onnx(model: nn.Module) -> nn.Module:
    """A copy of a model, in evaluation mode, in the form that ONNX Runtime is quick with.

    Args:
        model: any; its own blocks or those of a VisionTransformer inside it become matrix products where they are timm's. Of
            blocks of another kind, and outside them, the linear layers alone are made flat.
    """
    copy = deepcopy(model).eval()
    for vit in [module for module in copy.modules() if isinstance(module, VisionTransformer)]:
        if all(_is_plain(block) for block in vit.blocks):
            vit.blocks = _token_rows(vit, vit.patch_embed.num_patches + vit.num_prefix_tokens)
    inside = {id(module) for rows in copy.modules() if isinstance(rows, TokenRows) for module in rows.modules()}
    for name, module in list(copy.named_modules()):
        if type(module) is nn.Linear and id(module) not in inside:
            parent, _, attribute = name.rpartition(".")
            setattr(copy.get_submodule(parent), attribute, FlatLinear(module))
    return copy


class FlatLinear(nn.Module):
    """A linear layer (..., I) -> (..., O) that multiplies (tokens of all images, I)."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features  # timm's and our attentions ask for them
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x.reshape(-1, x.shape[-1]), self.weight, self.bias)
        return y.reshape(-1, *x.shape[1:-1], y.shape[-1])


class TokenRows(nn.Sequential):
    """Blocks that work on (N * S, D), token by token: (S, N, D) -> (S, R, D)."""

    def __init__(self, *blocks: nn.Module, read: int) -> None:
        super().__init__(*blocks)
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[-1]
        rows = super().forward(x.transpose(0, 1).reshape(-1, width))
        return rows.reshape(self.read, -1, width).transpose(0, 1)


class LastBlock(nn.Module):
    """timm's block, of whose tokens the first are read afterwards: (N * S, D) -> (R * S, D)."""

    def __init__(self, block: Block, tokens: int, read: int) -> None:
        super().__init__()
        self.tokens, self.read = tokens, read
        self.norm1, self.attn, self.ls1 = block.norm1, block.attn, block.ls1
        self.norm2, self.mlp, self.ls2 = block.norm2, block.mlp, block.ls2

    def forward(self, x: Tensor) -> Tensor:
        first = _first(x, self.tokens, self.read) + self.ls1(self.attn(self.norm1(x)))
        return first + self.ls2(self.mlp(self.norm2(first)))


class RowAttention(nn.Module):
    """timm's attention on rows: (N * S, I) -> (R * S, O). The root of the head width is in the queries' weights."""

    def __init__(self, attn: Attention, tokens: int, read: int) -> None:
        super().__init__()
        self.tokens, self.read, self.heads, self.head_dim = tokens, read, attn.num_heads, attn.head_dim
        weights = attn.qkv.weight.detach().chunk(3)
        biases = (None, None, None) if attn.qkv.bias is None else attn.qkv.bias.detach().chunk(3)
        self.query, self.key, self.value = (_linear(*pair) for pair in zip(weights, biases, strict=True))
        for parameter in self.query.parameters():
            parameter.data.mul_(attn.scale)
        self.proj = attn.proj

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        query = self.query(_first(x, self.tokens, self.read)).reshape(self.read, -1, self.heads, self.head_dim)
        key, value = (layer(x).reshape(self.tokens, -1, self.heads, self.head_dim) for layer in (self.key, self.value))
        weights = (query.permute(1, 2, 0, 3) @ key.permute(1, 2, 3, 0)).softmax(-1)
        mixed = weights @ value.permute(1, 2, 0, 3)
        return self.proj(mixed.permute(2, 0, 1, 3).reshape(-1, self.heads * self.head_dim))


def _token_rows(vit: VisionTransformer, tokens: int) -> TokenRows:
    """The blocks of a model on rows; from the last attention on, of the tokens that its classifier reads."""
    blocks = list(vit.blocks)
    attentions = [depth for depth, block in enumerate(blocks) if isinstance(block, Block) and type(block.attn) is Attention]
    read = _tokens_read(vit) or tokens
    for depth in attentions:
        block, is_last = blocks[depth], depth == attentions[-1] and read < tokens
        assert isinstance(block, Block) and isinstance(block.attn, Attention)
        block.attn = RowAttention(block.attn, tokens, read if is_last else tokens)
        if is_last:
            blocks[depth] = LastBlock(block, tokens, read)
    return TokenRows(*blocks, read=read if attentions else tokens)


def _tokens_read(vit: VisionTransformer) -> int | None:
    """How many tokens, from the first on, the classifier reads; None for all."""
    if type(vit) is VisionTransformerDistilled:
        return 2
    is_class_token = type(vit) is VisionTransformer and vit.attn_pool is None and vit.global_pool == "token"
    return 1 if is_class_token else None


def _first(x: Tensor, tokens: int, read: int) -> Tensor:
    """The rows of the first tokens: (N * S, D) -> (R * S, D)."""
    return x if read == tokens else x.reshape(tokens, -1, x.shape[-1])[:read].reshape(-1, x.shape[-1])


_BY_TOKEN = (ConstantBranch, NoBranch, Addend)
_MORE = ("q_norm", "k_norm", "norm", "gate")
"""Parts of timm's attention that `RowAttention` goes without."""


def _is_plain(block: nn.Module) -> bool:
    """Whether a block works on rows as well once its attention does."""
    if isinstance(block, NoBlock):
        return True
    if type(block) is not Block or type(block.mlp) not in (Mlp, *_BY_TOKEN):
        return False
    if type(block.attn) in _BY_TOKEN:
        return True
    if type(block.attn) is not Attention or type(block.attn.qkv) is not nn.Linear:
        return False
    return all(isinstance(getattr(block.attn, part), nn.Identity | None) for part in _MORE)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta", dtype=weight.dtype)
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return layer
