"""What ONNX Runtime is given computes what the model computes, on the rows of one matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from exported import small_vit
from p3b.deploy.choice import with_layout
from p3b.deploy.flat import FlatLinear, RowAttention, TokenRows, for_onnx
from p3b.deploy.onnx_file import narrow_indices
from p3b.vit.compact import apply_cuts, plan_cuts
from p3b.vit.layout import read_layout
from tiny import VARIANTS, images, random_masks, tiny_vit

KINDS = {**VARIANTS, "attention pool": {"class_token": False, "global_pool": "map"}, "qk norm": {"qk_norm": True}}


def assert_same(model: VisionTransformer) -> torch.nn.Module:
    flat = for_onnx(model)
    for count in (1, 3):
        batch = images(count, dtype=torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(flat(batch), model(batch), rtol=1e-12, atol=1e-12)
    return flat


@pytest.mark.parametrize("kind", KINDS)
def test_a_dense_model_computes_the_same(kind: str) -> None:
    flat = assert_same(tiny_vit(dtype=torch.float64, **KINDS[kind]))
    rows = sum(isinstance(module, RowAttention) for module in flat.modules())
    assert rows == (0 if kind == "qk norm" else 2), "attention of another kind stays as it is, its linear layers flat"
    assert any(isinstance(module, FlatLinear) for module in flat.modules())


@pytest.mark.parametrize("layout", ["index", "folded", "gathered", "zeros"])
def test_a_small_model_computes_the_same_in_every_layout(layout: str) -> None:
    small = with_layout(small_vit().double(), layout)
    flat = assert_same(small)
    assert isinstance(flat.get_submodule("blocks"), TokenRows) and not isinstance(small.blocks, TokenRows)


@pytest.mark.parametrize("gone", ["blocks.0.attn.out", "blocks.0.attn.in", "blocks.0"])
def test_a_vanished_or_constant_block_computes_the_same(gone: str) -> None:
    dense = tiny_vit(dtype=torch.float64)
    layout = read_layout(dense)
    masks = {name: mask.zero_() if name.startswith(gone) else mask for name, mask in random_masks(layout, keep=0.6).items()}
    assert_same(apply_cuts(dense, plan_cuts(layout, masks)))


@pytest.mark.parametrize("kind", ["plain", "distilled", "no class token", "registers", "attention pool"])
def test_after_the_last_attention_only_the_tokens_that_the_classifier_reads_go_on(kind: str) -> None:
    """Whichever block that is: the one behind it has a constant in the place of its attention."""
    dense = tiny_vit(dtype=torch.float64, depth=3, **KINDS[kind])
    layout = read_layout(dense)
    masks = {
        name: mask.zero_() if name == "blocks.2.attn.in" else mask for name, mask in random_masks(layout, keep=0.6).items()
    }
    flat = assert_same(apply_cuts(dense, plan_cuts(layout, masks)))
    widths = []
    for block in flat.get_submodule("blocks"):
        block.mlp.fc1.register_forward_hook(lambda _module, _inputs, output: widths.append(len(output) // 2))
    flat(images(2, dtype=torch.float64))
    tokens = {"plain": 17, "distilled": 18, "no class token": 16, "registers": 19, "attention pool": 16}[kind]
    read = {"plain": 1, "distilled": 2, "registers": 1}.get(kind, tokens)
    assert widths == [tokens, read, read]


def test_the_root_of_the_head_width_is_counted_once() -> None:
    model = tiny_vit()
    before = model.blocks[0].attn.qkv.weight.clone()
    attention = next(module for module in for_onnx(model).modules() if isinstance(module, RowAttention))
    assert torch.equal(model.blocks[0].attn.qkv.weight, before), "the model itself stays as it was"
    torch.testing.assert_close(attention.query.weight, before[:24] * 8**-0.5)


def test_constant_indices_of_gathers_become_narrow_and_others_stay(tmp_path: Path) -> None:
    ir = pytest.importorskip("onnx_ir")
    onnx, ort = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    text = """<ir_version: 10, opset_import: ["" : 20]>
    g (float[N, 4] x, int64[N, 2] given) => (float[N, 2] y, float[N, 2] z, float[N, 2] w)
    <int64[2] index = {3, 1}, int64[1] two = {2}>
    {
        shape = Shape<start = 0, end = 1> (x)
        both = Concat<axis = 0> (shape, two)
        spread = Expand (index, both)
        again = Cast<to = 7> (spread)
        y = GatherElements<axis = -1> (x, spread)
        z = GatherElements<axis = -1> (x, again)
        w = GatherElements<axis = -1> (x, given)
    }"""
    model: Any = ir.from_proto(onnx.parser.parse_model(text))
    narrow_indices(model)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    kinds = {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    assert kinds == {"index_int32": onnx.TensorProto.INT32, "two": onnx.TensorProto.INT64}
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    x = torch.rand(3, 4)
    given = torch.tensor([[0, 2]] * 3)
    y, z, w = session.run(None, {"x": x.numpy(), "given": given.numpy()})
    assert (y == x[:, [3, 1]].numpy()).all() and (z == y).all() and (w == x[:, [0, 2]].numpy()).all()
