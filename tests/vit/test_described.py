"""What the weights do not tell is noticed: settings, exchanged layers, hooks, and changes of a model in a layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import p3b
from p3b.errors import ModelError
from p3b.vit.compact import apply_cuts, plan_cuts
from p3b.vit.layout import read_layout
from tiny import images, random_masks, tiny_vit


def _activation(model: VisionTransformer) -> None:
    model.blocks[1].mlp.act = nn.ReLU()


def _slope(model: VisionTransformer) -> None:
    for block in model.blocks:
        block.mlp.act = nn.ELU(alpha=0.5)


def _eps(model: VisionTransformer) -> None:
    model.blocks[1].norm2.eps = 0.1


def _forward(model: VisionTransformer) -> None:
    model.pool = lambda x, pool_type=None: x.mean(1)


def _hook(model: VisionTransformer) -> None:
    model.blocks[0].register_forward_hook(lambda _block, _args, output: 2 * output)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_activation, r"blocks\.1\.mlp\.act is relu, and gelu in blocks\.0"),
        (_slope, r"mlp\.act: ELU\(alpha=0\.5\)"),
        (_eps, r"blocks\.1\.norm2\.eps is 0\.1, expected 1e-06"),
        (_forward, r"the model\.pool was replaced"),
        (_hook, r"blocks\.0 has a forward hook"),
    ],
)
@pytest.mark.parametrize("small", [False, True])
def test_what_would_be_lost_in_a_file_is_not_saved(
    change: Callable[[VisionTransformer], None], told: str, small: bool, tmp_path: Path
) -> None:
    """An activation of its own in a later block was written as that of the first, and loaded as another network."""
    model = tiny_vit()
    if small:
        layout = read_layout(model)
        model = apply_cuts(model, plan_cuts(layout, random_masks(layout, only=".0.mlp.hidden")))
    change(model)
    if small and change is _slope:
        told = "cannot be|mlp.act"
    with pytest.raises(ModelError, match=told):
        p3b.save(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("layout", ["folded", "gathered", "zeros", "reordered"])
def test_a_change_of_a_model_in_a_layout_is_not_lost_unsaid(layout: str, tmp_path: Path) -> None:
    """The compact model is what is saved: what was done to the other since was lost."""
    dense = tiny_vit()
    small = apply_cuts(dense, plan_cuts(read_layout(dense), random_masks(read_layout(dense))))
    p3b.save(small, tmp_path)
    laid = p3b.load(tmp_path, layout=layout)
    p3b.save(laid, tmp_path)
    p3b.save(laid.double().half(), tmp_path / "half")
    for change in (
        lambda model: model.reset_classifier(3),
        lambda model: model.head.weight.zero_(),
        lambda model: model.blocks[0].mlp.fc2.weight.data.mul_(2),
        lambda model: model.deployment.compact[0].head.weight.data.mul_(2),
    ):
        laid = p3b.load(tmp_path, layout=layout)
        with torch.no_grad():
            change(laid)
        for act in (lambda model: p3b.save(model, tmp_path / "no"), lambda model: p3b.with_layout(model, "index")):
            with pytest.raises(ModelError, match=f"the layout '{layout}'.*would be lost"):
                act(laid)
    assert torch.isfinite(p3b.load(tmp_path)(images())).all()
