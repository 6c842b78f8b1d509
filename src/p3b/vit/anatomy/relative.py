"""timm's attentions with relative positions: BEiT's, whose queries and values have biases apart, RelPosAttention, and SAM's.

A table of biases has a column for each head, which goes with the head; a small network that gives the biases (`RelPosMlp`)
loses an output. Nothing else of either is cut. Where all blocks share one table it stays whole, and whole heads cannot go.

Neither class takes heads of another width: a small attention is timm's own `Attention`, which is given the biases as a mask.

SAM's attention has vectors as long as a head is wide, for distances along rows and along columns; each query is multiplied with
them as it is with the keys, but without the scale. It takes narrower heads as it stands.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from timm.layers import RelPosBias, RelPosMlp
from timm.models.beit import Attention as BeitAttention
from timm.models.beit import RelativePositionBias
from timm.models.vision_transformer_relpos import RelPosAttention
from timm.models.vision_transformer_sam import Attention as SamAttention
from torch import Tensor, nn

from p3b.errors import ModelError
from p3b.vit.anatomy.attention import SelfAttention
from p3b.vit.anatomy.body import in_place_of, narrow_linear, pruned_or, refuse, require_linear
from p3b.vit.anatomy.norms import is_none_or_norm
from p3b.vit.anatomy.shape import BranchShape
from p3b.vit.anatomy.weights import STREAM, Axis, Moments, Weight, affine
from p3b.vit.parts import BiasedAttention, QueryValueLinear

TABLE = "relative_position_bias_table"
_DISTANCES = ("rel_pos_h", "rel_pos_w")


@dataclass(frozen=True)
class RelativeAttention(SelfAttention):
    """timm's RelPosAttention (`p3b.vit.anatomy.body.Body`)."""

    any_input_width: bool = False  # it takes the number of its inputs for that of its heads' channels
    classes: tuple[type[nn.Module], ...] = (RelPosAttention,)
    kinds: tuple[type[nn.Module], ...] = (RelPosBias, RelPosMlp)
    """Classes of the module that gives the biases."""

    def require_covered(self, name: str, body: nn.Module) -> None:
        if type(body) not in self.classes:
            known = ", ".join(kind.__name__ for kind in self.classes)
            raise ModelError(f"{name}: {pruned_or(type(body).__name__)} is not covered; of timm's attentions {known} is.")
        require_linear(name, body, ("qkv", "proj"))
        norms = {norm: getattr(body, norm) for norm in ("q_norm", "k_norm") if hasattr(body, norm)}
        biases = getattr(body, "rel_pos", None)
        refuse(
            name,
            {
                **{f"{norm}: {type(part).__name__}": not is_none_or_norm(part) for norm, part in norms.items()},
                "q_norm: a norm of queries without weights": getattr(norms.get("q_norm"), "weight", 0) is None,
                f"rel_pos: {type(biases).__name__}": biases is not None and type(biases) not in self.kinds,
            },
        )
        if not body.qkv.out_features == 3 * body.proj.in_features == 3 * body.qkv.in_features:
            raise ModelError(f"{name}: its widths show that it has been pruned already; prune the dense model instead.")

    def sizes(self, body: nn.Module) -> dict[str, int]:
        width = body.qkv.in_features
        return {"in": width, "heads": body.num_heads, "head": width // body.num_heads, "out": body.proj.out_features}

    def weights(self, body: nn.Module) -> list[Weight]:
        head, inner = self.head_axis(body), self.inner(body)
        norms = {norm: getattr(body, norm, nn.Identity()) for norm in ("q_norm", "k_norm")}
        return [
            *self.read_weights(body),
            *(weight for name, norm in norms.items() for weight in affine(name, norm, head)),
            *self.bias_weights(body),
            Weight("proj.weight", (("out",), inner), gated=((0, "out"), (1, "heads"), (0, STREAM))),
            Weight("proj.bias", (("out",),), gated=((0, "out"), (0, STREAM))),
        ]

    def bias_weights(self, body: nn.Module) -> list[Weight]:
        """Weights that the biases come from. They are read once for an image, whatever its tokens are."""
        biases = body.rel_pos
        if isinstance(biases, RelPosMlp):
            fc1, fc2, places = biases.mlp.fc1, biases.mlp.fc2, biases.rel_coords_log.shape[:2].numel()
            return [
                Weight("rel_pos.mlp.fc1.weight", ((fc1.out_features,), (fc1.in_features,)), times=places),
                Weight("rel_pos.mlp.fc1.bias", ((fc1.out_features,),)),
                Weight("rel_pos.mlp.fc2.weight", (("heads",), (fc2.in_features,)), times=places),
                Weight("rel_pos.mlp.fc2.bias", (("heads",),)),
            ]
        return (
            [] if biases is None else [Weight(f"rel_pos.{TABLE}", ((len(biases.get_parameter(TABLE)),), ("heads",)), times=0)]
        )

    def moments(self, body: nn.Module) -> list[Moments]:
        norms = {norm: getattr(body, norm, nn.Identity()) for norm in ("q_norm", "k_norm")}
        return [Moments(name, self.head_axis(body)) for name, norm in norms.items() if not isinstance(norm, nn.Identity)]

    def makes_constant(self, body: nn.Module) -> list[Tensor | None]:
        return [self.value_bias(body), self.last(body).weight, self.last(body).bias]

    def narrow(self, body: nn.Module, shape: BranchShape, inputs: int, outputs: int) -> nn.Module:
        self.narrow_layers(body, shape, inputs, outputs)
        biases = body.rel_pos
        if isinstance(biases, RelPosMlp):
            narrow_linear(biases.mlp.fc2, biases.mlp.fc2.in_features, shape.heads)
            biases.num_heads = shape.heads
        if biases is not None:
            set_heads(biases, shape.heads)
        return in_place_of(body, BiasedAttention(body, shape.heads, shape.inner))

    def narrow_layers(self, body: nn.Module, shape: BranchShape, inputs: int, outputs: int) -> None:
        """Make layers and norms for fewer channels."""
        rows = shape.heads * shape.inner
        narrow_linear(self.first(body), inputs, 3 * rows)
        self.narrow_inside(body, shape.inner, rows, outputs)


@dataclass(frozen=True)
class BeitSelfAttention(RelativeAttention):
    """timm's attention of BEiT."""

    classes: tuple[type[nn.Module], ...] = (BeitAttention,)

    def read_weights(self, body: nn.Module) -> list[Weight]:
        rows: Axis = (3, *self.inner(body))
        # The attention reads the weight of its layer without calling it.
        own = [Weight(name, (self.inner(body),), gated=((0, "head"),)) for name in ("q_bias", "v_bias")]
        return [Weight("qkv.weight", (rows, ("in",)), gated=((0, "head"), (1, "in")), user=self.reader(body)), *own]

    def reader(self, body: nn.Module) -> str | None:
        """The module that reads the weight of `qkv`: without biases the layer itself."""
        return None if body.q_bias is None else ""

    def bias_weights(self, body: nn.Module) -> list[Weight]:
        table = body._parameters.get(TABLE)
        return [] if table is None else [Weight(TABLE, ((len(table),), ("heads",)), times=0)]

    def value_bias(self, body: nn.Module) -> Tensor | None:
        return body.v_bias

    def narrow(self, body: nn.Module, shape: BranchShape, inputs: int, outputs: int) -> nn.Module:
        rows, example = shape.heads * shape.inner, body.proj.weight
        if body.q_bias is None:
            narrow_linear(self.first(body), inputs, 3 * rows)
        else:
            body.qkv = QueryValueLinear(inputs, rows, example).train(body.training)
        narrow_linear(self.last(body), rows, outputs)
        body.rel_pos = None
        if body.window_size is not None:
            body.rel_pos = RelativePositionBias(body.window_size, shape.heads, device="meta")
            body.rel_pos.relative_position_bias_table = nn.Parameter(
                example.new_empty(len(body.get_parameter(TABLE)), shape.heads)
            )
            body.rel_pos.register_buffer("relative_position_index", body.relative_position_index, persistent=False)
        for moved in ("window_size", "num_relative_distance"):  # which the module that gives the biases has now
            body.__dict__.pop(moved, None)
        return in_place_of(body, BiasedAttention(body, shape.heads, shape.inner))

    def small_key(self, key: str) -> str:
        if key == TABLE:
            return f"rel_pos.{TABLE}"
        return f"qkv.{key}" if key in ("q_bias", "v_bias") else key


@dataclass(frozen=True)
class DecomposedAttention(RelativeAttention):
    """timm's attention of SAM: relative positions along rows and along columns, read by the queries."""

    any_input_width: bool = True
    classes: tuple[type[nn.Module], ...] = (SamAttention,)

    def require_covered(self, name: str, body: nn.Module) -> None:
        super().require_covered(name, body)
        refuse(name, {"rope: rotary positions in SAM's attention": body.rope is not None})

    def bias_weights(self, body: nn.Module) -> list[Weight]:
        tables = {name: body._parameters.get(name) for name in _DISTANCES}
        return [Weight(name, ((len(table),), ("head",)), times=0) for name, table in tables.items() if table is not None]

    def narrow(self, body: nn.Module, shape: BranchShape, inputs: int, outputs: int) -> nn.Module:
        self.narrow_layers(body, shape, inputs, outputs)
        for weight in self.bias_weights(body):
            table = body.get_parameter(weight.key)
            setattr(body, weight.key, nn.Parameter(table.new_empty(len(table), shape.inner)))
        body.num_heads, body.head_dim, body.scale = shape.heads, shape.inner, shape.inner**-0.5
        return body

    def rescale(self, weights: MutableMapping[str, nn.Parameter], sizes: Mapping[str, int], kept: Mapping[str, int]) -> None:
        super().rescale(weights, sizes, kept)
        # What the queries are multiplied by goes off here, where nothing is scaled.
        for name in (each for each in _DISTANCES if each in weights):
            weights[name].div_(math.sqrt(kept["head"] / sizes["head"]))


def set_heads(biases: nn.Module, heads: int) -> None:
    """Let the module that gives the biases do so for fewer heads; its table holds no values yet."""
    biases.bias_shape = (*biases.bias_shape[:2], heads)
    table = biases._parameters.get(TABLE)
    if table is not None:
        setattr(biases, TABLE, nn.Parameter(table.new_empty(len(table), heads)))
