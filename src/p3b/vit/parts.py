"""The modules that a small model has where a dense one has timm's: those that read or write some channels, and those for less.

Everything that torch offers for a dense timm model works on these: TorchScript, `torch.fx`, `torch.export`. That is why this
file does without postponed annotations, which TorchScript cannot read, and why no shape is taken apart with a star, which
`torch.fx` cannot trace.
"""

import math
from collections.abc import Sequence

import torch
from timm.layers import Attention, AttentionRope, drop_path
from timm.models.beit import RelativePositionBias
from timm.models.swin_transformer import WindowAttention
from timm.models.swin_transformer_v2 import WindowAttention as WindowAttentionV2
from torch import Tensor, nn
from torch.nn import functional as F


def flat_select(x: Tensor, index: Tensor) -> Tensor:
    """Channels of the last axis by index: (..., C) -> (..., len(index)); torch reads a matrix several times quicker.

    An exported graph gathers by element instead: ONNX Runtime takes several times as long for its Gather as for GatherElements.
    """
    if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript does not compile what stands behind this condition alone)
        if torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export():
            return x.gather(-1, index.expand(x.shape[:-1] + index.shape))
    return x.reshape(-1, x.shape[-1]).index_select(1, index).reshape(x.shape[:-1] + index.shape)


def spread(x: Tensor, index: Tensor, width: int) -> Tensor:
    """Channels of the last axis put in their places: (..., len(index)) -> (..., width), zeros elsewhere."""
    if torch.jit.is_scripting():
        zeros = x.new_zeros(x.shape[:-1] + [width])  # noqa: RUF005
    else:
        zeros = x.new_zeros(x.shape[:-1] + (width,))  # noqa: RUF005
    return zeros.index_copy_(-1, index, x)


class ReadChannels(nn.Module):
    """Norm over all D channels of which only some are read: (..., D) -> (..., len(inputs)).

    `centred`: whether the mean is taken out, as a layer norm does and RMSNorm does not.
    """

    __constants__ = ["centred", "eps", "normalized_shape"]  # noqa: RUF012 (TorchScript asks for a list on the class)

    def __init__(self, inputs: Sequence[int], width: int, norm: nn.Module, example: Tensor, centred: bool = True) -> None:
        super().__init__()
        self.normalized_shape, self.eps, self.centred = (width,), norm.eps, centred
        self.register_buffer("index", torch.tensor(inputs, device=_index_device(example)), persistent=False)
        for key in ("weight", "bias"):
            dense = getattr(norm, key, None)
            self.register_parameter(key, None if dense is None else nn.Parameter(dense.new_empty(len(inputs))))

    def forward(self, x: Tensor) -> Tensor:
        if self.centred:
            x = F.layer_norm(x, self.normalized_shape, eps=self.eps)
        else:
            x = F.rms_norm(x, self.normalized_shape, eps=self.eps)
        x = flat_select(x, self.index)
        if self.weight is None:
            return x
        return x * self.weight if self.bias is None else torch.addcmul(self.bias, x, self.weight)


class WriteChannels(nn.Module):
    """Spreads a block's output over the D channels of the residual stream: (..., len(outputs)) -> (..., D), zeros elsewhere.

    Stands in the place of timm's LayerScale and carries its gamma where there is one.
    """

    def __init__(self, outputs: Sequence[int], width: int, example: Tensor, scaled: bool) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("index", torch.tensor(outputs, device=_index_device(example)), persistent=False)
        self.gamma = nn.Parameter(example.new_empty(len(outputs))) if scaled else None

    def forward(self, x: Tensor) -> Tensor:
        if self.gamma is not None:
            x = x * self.gamma
        return spread(x, self.index, self.width)


class DropAndWrite(nn.Module):
    """Stochastic depth, then the output spread over the D channels of the stream: (..., len(outputs)) -> (..., D).

    Stands in the place of timm's DropPath in blocks whose layer scale is a parameter of the block itself.
    """

    def __init__(self, outputs: Sequence[int], width: int, example: Tensor, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.width, self.drop_prob = width, drop_prob
        self.register_buffer("index", torch.tensor(outputs, device=_index_device(example)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = drop_path(x, self.drop_prob, self.training)
        return spread(x, self.index, self.width)


class QueryValueLinear(nn.Linear):
    """q, k and v in one layer, of which k has no bias: (..., D) -> (..., 3 * rows)."""

    def __init__(self, inputs: int, rows: int, example: Tensor) -> None:
        super().__init__(inputs, 3 * rows, bias=False, device=example.device, dtype=example.dtype)
        self.q_bias = nn.Parameter(example.new_empty(rows))
        self.v_bias = nn.Parameter(example.new_empty(rows))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias)))


class PairsAttention(AttentionRope):
    """timm's attention with rotary positions whose heads have lost pairs of channels: it reads of the angles those that stay.

    Args:
        like: timm's EvaAttention or AttentionRope, whose narrowed layers it takes over.
        heads: heads of keys and values; `like` tells how many heads of queries each has.
        width: channels of a head.
        angles: which of the 2 * K columns of the table, K sines and K cosines, it reads; None for all of them.
        example: a weight on its device.
    """

    def __init__(self, like: nn.Module, heads: int, width: int, angles: Sequence[int] | None, example: Tensor) -> None:
        groups = getattr(like, "num_kv_groups", 1)
        fused, nowhere = like.qkv is not None, torch.device("meta")
        super().__init__(1, heads * groups, attn_head_dim=width, num_kv_heads=heads, qkv_fused=fused, device=nowhere)
        for name in ("qkv", "q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "attn_drop", "norm", "proj", "proj_drop"):
            setattr(self, name, getattr(like, name))
        self.num_prefix_tokens, self.rotate_half = like.num_prefix_tokens, like.rotate_half
        self.fused_attn = like.fused_attn
        index = None if angles is None else torch.tensor(angles, device=_index_device(example))
        self.register_buffer("angles", index, persistent=False)

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        if rope is not None and self.angles is not None:
            rope = flat_select(rope, self.angles)
        return super().forward(x, rope, attn_mask, is_causal)


class BiasedAttention(Attention):
    """timm's Attention with relative positions, for those of timm's attentions that know no heads of another width.

    Args:
        like: timm's RelPosAttention or BEiT's attention, whose narrowed layers it takes over; its `rel_pos` gives the biases,
            (heads, N, N) or one more axis, or is None where the model gives the same ones to all blocks, or none.
        heads: attention heads.
        width: channels of a head.
    """

    def __init__(self, like: nn.Module, heads: int, width: int) -> None:
        super().__init__(1, heads, attn_head_dim=width, device=torch.device("meta"))
        for name in ("qkv", "q_norm", "k_norm", "attn_drop", "proj", "proj_drop"):
            setattr(self, name, getattr(like, name, nn.Identity()))
        self.rel_pos = like.rel_pos
        self.fused_attn = like.fused_attn

    def forward(  # type: ignore[override]
        self, x: Tensor, shared_rel_pos: Tensor | None = None, shared_rel_pos_bias: Tensor | None = None
    ) -> Tensor:
        shared = shared_rel_pos if shared_rel_pos_bias is None else shared_rel_pos_bias
        if self.rel_pos is None:
            return super().forward(x, shared)
        own = self.rel_pos() if isinstance(self.rel_pos, RelativePositionBias) else self.rel_pos.get_bias()
        return super().forward(x, own if shared is None else own + shared)

    def set_window_size(self, window_size: tuple[int, int]) -> None:
        """As timm's attention of BEiT: the biases are resized."""
        if self.rel_pos is not None:
            self.rel_pos.set_window_size(window_size)


class PaddedReadChannels(ReadChannels):
    """A norm that gives the channels that are read, and zeros after them: (..., D) -> (..., between)."""

    def __init__(
        self, inputs: Sequence[int], width: int, norm: nn.Module, example: Tensor, centred: bool, between: int
    ) -> None:
        super().__init__(inputs, width, norm, example, centred)
        self.more = between - len(inputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(super().forward(x), (0, self.more))


class PaddedWindowAttention(WindowAttention):
    """timm's attention in windows that reads the first channels of what it is given, and gives as many, zeros at the end.

    `like` is timm's own, whose narrowed layers it takes over.
    """

    def __init__(self, like: WindowAttention) -> None:
        super().__init__(1, like.num_heads, window_size=like.window_size, head_dim=1, device=torch.device("meta"))
        for name in ("qkv", "proj", "attn_drop", "proj_drop", "relative_position_bias_table", "relative_position_index"):
            setattr(self, name, getattr(like, name))
        self.dim, self.scale, self.fused_attn = like.dim, like.scale, like.fused_attn
        self.reads, self.writes = like.qkv.in_features, like.proj.out_features

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        given = x.shape[-1]
        return F.pad(super().forward(x[..., : self.reads], mask), (0, given - self.writes))


class PaddedDropAndWrite(DropAndWrite):
    """`DropAndWrite` of the first channels of what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[..., : len(self.index)])


class ReadingLinear(nn.Linear):
    """A linear layer of some channels of what it is given: (..., D) -> (..., rows)."""

    def __init__(self, inputs: Sequence[int], like: nn.Linear) -> None:
        rows, bias, weight = like.out_features, like.bias is not None, like.weight
        super().__init__(len(inputs), rows, bias=bias, device=weight.device, dtype=weight.dtype)
        self.weight, self.bias = like.weight, like.bias
        self.register_buffer("index", torch.tensor(inputs, device=_index_device(weight)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(flat_select(x, self.index))


class NormOfFirst(nn.LayerNorm):
    """A layer norm of the first channels of what it is given: (..., D) -> (..., len(weight))."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[..., : self.normalized_shape[0]])


class UnitLength(nn.Module):
    """Keys of cosine attention: vectors of length one."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1)


class ScaledUnitLength(nn.Module):
    """Queries of cosine attention: vectors as long as each head's learned scale, and as attention will divide them by.

    Args:
        logit_scale: (heads, 1, 1), its logarithm; timm lets it grow to log(100).
        width: channels of a head.
    """

    def __init__(self, logit_scale: nn.Parameter, width: int) -> None:
        super().__init__()
        self.logit_scale, self.root = logit_scale, math.sqrt(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * (self.root * torch.clamp(self.logit_scale, max=math.log(100.0)).exp())


class CosineWindowAttention(Attention):
    """timm's Attention as the cosine attention in windows of Swin v2: (..., N, D) -> (..., N, D), of which some are read.

    What it gives are the channels that it writes, and zeros after them.

    Args:
        like: timm's own, whose narrowed layers it takes over.
        heads, width: attention heads and the channels of each.
        inputs: channels that it reads.
        stream: D.
    """

    def __init__(self, like: WindowAttentionV2, heads: int, width: int, inputs: Sequence[int], stream: int) -> None:
        super().__init__(1, heads, attn_head_dim=width, device=torch.device("meta"))
        for name in ("qkv", "attn_drop", "proj", "proj_drop", "cpb_mlp"):
            setattr(self, name, getattr(like, name))
        self.q_norm, self.k_norm = ScaledUnitLength(like.logit_scale, width), UnitLength()
        self.window_size, self.pretrained_window_size = like.window_size, like.pretrained_window_size
        self.more = stream - like.proj.out_features
        for name in ("relative_coords_table", "relative_position_index"):
            self.register_buffer(name, like.get_buffer(name), persistent=False)
        index = torch.tensor(inputs, device=_index_device(like.proj.weight))
        self.register_buffer("index", index, persistent=False)

    _make_pair_wise_relative_positions = WindowAttentionV2._make_pair_wise_relative_positions
    set_window_size = WindowAttentionV2.set_window_size

    def init_non_persistent_buffers(self) -> None:
        """What follows from the windows' size; timm's own has the same."""
        weight = self.proj.weight
        table, index = self._make_pair_wise_relative_positions(device=weight.device, dtype=weight.dtype)
        self.relative_coords_table.copy_(table)
        self.relative_position_index.copy_(index)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        places = self.relative_position_index.shape[0]
        table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
        bias = table[self.relative_position_index.view(-1)].view(places, places, self.num_heads).permute(2, 0, 1)
        bias = 16 * torch.sigmoid(bias).unsqueeze(0)
        if mask is not None:
            bias = (bias + mask.unsqueeze(1)).repeat(x.shape[0] // mask.shape[0], 1, 1, 1)
        return F.pad(super().forward(flat_select(x, self.index), bias), (0, self.more))


class TakesWhatBlocksTake(nn.Module):
    """A module that is called as timm calls its blocks and what is in them, and listens to the first argument alone."""

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        rope: Tensor | None = None,
        shared_rel_pos: Tensor | None = None,
        shared_rel_pos_bias: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        return self.given(x)

    def given(self, x: Tensor) -> Tensor:
        """What it gives for what it is given."""
        return x


class InPlaceOfBranch(TakesWhatBlocksTake):
    """What is left of a branch that reads nothing, or whose inside is gone; timm's blocks treat it as the body it was."""

    def __init__(self) -> None:
        super().__init__()
        self.fills = False
        """Whether it gives a value for each channel of each token, as the branch did, and not the same one for all."""
        self.rel_pos = None
        """What timm resizes of its attentions with relative positions: nothing."""
        self.q_stride = 1
        """What Hiera's blocks ask of an attention: how many tokens it makes one of."""

    def set_window_size(self, window_size: tuple[int, int]) -> None:
        """What timm tells its attentions at another image size: here are no windows."""


class ConstantBranch(InPlaceOfBranch):
    """A block that can only add a constant: `value` (len(outputs),) on some channels, whatever it is given."""

    def __init__(self, outputs: Sequence[int], width: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.width = width
        self.value = nn.Parameter(torch.empty(len(outputs), device=device, dtype=dtype))
        self.register_buffer("index", torch.tensor(outputs, device=_index_device(self.value)), persistent=False)

    def given(self, x: Tensor) -> Tensor:
        value = self.value.new_zeros([self.width]).index_copy(0, self.index, self.value).to(x.dtype)
        return value.expand(x.shape) if self.fills else value


class NoBranch(InPlaceOfBranch):
    """A block that adds nothing."""

    def given(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x) if self.fills else x.new_zeros([])


class NoBlock(TakesWhatBlocksTake, nn.Identity):
    """A timm block both halves of which add nothing; it takes what a block takes."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = NoBranch()
        """For timm, which tells it of another image size."""

    def set_input_size(
        self, feat_size: tuple[int, int], window_size: tuple[int, int], always_partition: bool | None = None
    ) -> None:
        """What timm tells Swin's blocks at another image size: here nothing depends on it."""


def _index_device(example: Tensor) -> torch.device | str:
    """Indices are data even in a skeleton on the meta device: loading fills in weights, not indices."""
    return "cpu" if example.is_meta else example.device
