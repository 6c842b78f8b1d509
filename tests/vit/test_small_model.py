"""A small model is a model: what torch and timm offer for the dense one works on it. The table of docs/model.md is made here.

python tests/vit/test_small_model.py        # writes the table anew
"""

from __future__ import annotations

import copy
import pickle
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

import p3b
from p3b.vit.compact import apply_cuts, plan_cuts
from p3b.vit.layout import read_layout
from tiny import images, random_masks, tiny_vit

PAGE = Path(__file__).resolve().parents[2] / "docs" / "model.md"
BEGIN, END = "<!-- made by tests/vit/test_small_model.py; do not edit -->", "<!-- end of what the tests make -->"
Model = VisionTransformer


def _model(small: bool, **changed: object) -> Model:
    """Dense, or cut to blocks of every kind: small ones, constants, halves and whole blocks that are gone."""
    model = tiny_vit(depth=4, drop_path_rate=0.1, **changed)
    if not small:
        return model
    layout = read_layout(model)
    masks = random_masks(layout)
    for gate in ("blocks.1.attn.out", "blocks.1.mlp.out", "blocks.2.attn.in", "blocks.2.mlp.out", "blocks.3.mlp.hidden"):
        masks[gate] = torch.zeros_like(masks[gate])
    return apply_cuts(model, plan_cuts(layout, masks)).eval()


def _same(a: Tensor, b: Tensor, within: float = 1e-5) -> None:
    torch.testing.assert_close(a.float(), b.float(), rtol=within, atol=within)


def _saved(model: Model, batch: Tensor) -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert torch.equal(p3b.load(p3b.save(model.eval(), folder))(batch), model(batch))


def _script(model: Model, batch: Tensor) -> None:
    _same(torch.jit.script(model)(batch), model(batch))


def _trace(model: Model, batch: Tensor) -> None:
    _same(torch.jit.trace(model, batch[:1])(batch), model(batch))


def _features(model: Model, batch: Tensor) -> None:
    found = create_feature_extractor(model, {"blocks.0": "features"})(batch)["features"]
    _same(found[:, 1:], model.forward_intermediates(batch, indices=[0], output_fmt="NLC", intermediates_only=True)[0])


def _export(model: Model, batch: Tensor) -> None:
    exported = torch.export.export(model, (batch,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    _same(exported.module()(images(3)), model(images(3)))


def _compile(model: Model, batch: Tensor) -> None:
    _same(torch.compile(model, backend="eager")(batch), model(batch))


def _int8(model: Model, batch: Tensor) -> None:
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert (quantised(batch) - model(batch)).abs().max() < 0.2 * model(batch).abs().max()


def _copies(model: Model, batch: Tensor) -> None:
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), ModelEmaV3(model).module):
        assert torch.equal(other(batch), model(batch))


def _weights(model: Model, batch: Tensor) -> None:
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(batch), model(batch))


def _formats(model: Model, batch: Tensor) -> None:
    want = model(batch)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        other = copy.deepcopy(model).to(dtype)
        _same(other(batch.to(dtype)), want, 0.2)
        _saved(other, batch.to(dtype))


def _classifier(model: Model, batch: Tensor) -> None:
    model.reset_classifier(3)
    assert model(batch).shape == (2, 3)
    _saved(model, batch)
    model.head = nn.Linear(24, 6)
    _saved(model, batch)


def _cut_off(model: Model, batch: Tensor) -> None:
    model.prune_intermediate_layers(1, prune_norm=False)
    assert model(batch).shape == (2, 17, 24)
    _saved(model, batch)


def _without_a_block(model: Model, batch: Tensor) -> None:
    del model.blocks[1]
    _saved(model, batch)


def _intermediates(model: Model, batch: Tensor) -> None:
    _, maps = model.forward_intermediates(batch, indices=2, output_fmt="NCHW")
    assert [found.shape for found in maps] == [(2, 24, 4, 4)] * 2
    assert len(model.get_intermediate_layers(batch, n=2, reshape=True, return_prefix_tokens=True, norm=True)) == 2


def _other_size(model: Model, _batch: Tensor) -> None:
    model.set_input_size(img_size=(48, 40))
    batch = torch.randn(2, 3, 48, 40)
    assert model(batch).shape == (2, 5)
    _saved(model, batch)


def _attention_mask(model: Model, batch: Tensor) -> None:
    _same(model(batch, attn_mask=torch.zeros(1, 1, 17, 17)), model(batch))


def _training(model: Model, batch: Tensor) -> None:
    model.set_grad_checkpointing(True)
    model.train()(batch).sum().backward()
    assert all(parameter.grad is not None for key, parameter in model.named_parameters() if key.startswith("blocks.3.attn"))


USES: dict[str, Callable[[Model, Tensor], None]] = {
    "`torch.jit.script`": _script,
    "`torch.jit.trace`, run with another batch size": _trace,
    "torchvision's `create_feature_extractor` (`torch.fx`)": _features,
    "`torch.export` with a dynamic batch": _export,
    "`torch.compile`": _compile,
    "`torch.ao.quantization.quantize_dynamic`, int8": _int8,
    "`copy.deepcopy`, `pickle`, timm's moving average": _copies,
    "`state_dict` and `load_state_dict`": _weights,
    "`half()`, `bfloat16()`, `double()`, saved as such": _formats,
    "`reset_classifier`, or another `nn.Linear` as head, then saved": _classifier,
    "`prune_intermediate_layers`, then saved": _cut_off,
    "a block taken out (`del model.blocks[1]`), then saved": _without_a_block,
    "`forward_intermediates`, `get_intermediate_layers`": _intermediates,
    "`set_input_size`, images of another size, then saved": _other_size,
    "`model(images, attn_mask=...)`": _attention_mask,
    "training with gradient checkpointing": _training,
}


def works(use: str, small: bool) -> None:
    """Raises where it does not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces the end of scripting and of its quantisation
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            USES[use](_model(small), images())


def table() -> str:
    """Which use works on which model, tried."""
    lines = ["| | dense timm model | small model |", "|---|---|---|"]
    for use in USES:
        told = []
        for small in (False, True):
            try:
                works(use, small)
                told.append("works")
            except Exception as error:
                told.append(f"{type(error).__name__}")
        lines.append(f"| {use} | {told[0]} | {told[1]} |")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("small", [False, True], ids=["dense", "small"])
def test_it_works(use: str, small: bool) -> None:
    works(use, small)


def test_the_page_has_a_line_for_each_use_and_none_more() -> None:
    made = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].strip().splitlines()
    assert made[2:] == [f"| {use} | works | works |" for use in USES]


if __name__ == "__main__":
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table()}{END}{rest.partition(END)[2]}", encoding="utf-8")
