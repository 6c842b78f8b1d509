"""The change of basis of attention heads: exact, and in the order of what channels carry."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor

from p3b.errors import TrainingError
from p3b.vit.basis import head_moments, order_heads
from tiny import images, tiny_vit


def _same(tensor: Tensor) -> Tensor:
    return tensor


@pytest.mark.parametrize("changed", [{}, {"qkv_bias": False}, {"embed_dim": 12, "num_heads": 1}], ids=str)
def test_order_of_heads_changes_no_output(changed: dict[str, object]) -> None:
    model, batch = tiny_vit(dtype=torch.float64, **changed), images(6, dtype=torch.float64)
    before, weight = model(batch), model.blocks[0].attn.qkv.weight.clone()
    order_heads(model, head_moments(model, [batch[:4], batch[4:]], _same))
    assert torch.allclose(model(batch), before, rtol=0, atol=1e-10)
    assert not torch.allclose(model.blocks[0].attn.qkv.weight, weight, atol=1e-3)


def test_channels_of_a_head_come_in_the_order_of_what_they_carry() -> None:
    model, batch = tiny_vit(dtype=torch.float64), images(16, dtype=torch.float64)
    order_heads(model, head_moments(model, [batch], _same))
    for block, found in zip(model.blocks, head_moments(model, [batch], _same), strict=True):
        assert found is not None
        query, key, output = (each.diagonal(dim1=-2, dim2=-1) for each in (found.query, found.key, found.output))
        columns = block.attn.proj.weight.unflatten(1, (3, 8)).square().sum(0)
        for carried in (query * key, output * columns):
            assert (carried[:, :-1] >= carried[:, 1:] * (1 - 1e-6)).all()
        # What two channels of a head do has nothing in common any more.
        assert torch.allclose(found.query, torch.diag_embed(query), atol=1e-5 * float(query.max()))


def test_moments_that_are_singular_leave_the_model_as_it_was() -> None:
    model, batch = tiny_vit(dtype=torch.float64), images(2, dtype=torch.float64)
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight[:5].zero_()
        model.blocks[0].attn.qkv.bias[:5].zero_()
        model.blocks[1].attn.proj.weight.zero_()
    before = model(batch)
    order_heads(model, head_moments(model, [batch], _same))
    assert torch.allclose(model(batch), before, rtol=0, atol=1e-9)


def test_what_has_no_basis_to_choose_stays_as_it_is() -> None:
    normed, frozen = tiny_vit(qk_norm=True), tiny_vit()
    frozen.blocks[0].requires_grad_(False)
    assert head_moments(normed, [images()], _same) == [None, None]
    moments = head_moments(frozen, [images()], _same)
    before = deepcopy(frozen.state_dict())
    order_heads(frozen, moments)
    moved = {key for key, value in frozen.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {f"blocks.1.attn.{key}" for key in ("qkv.weight", "qkv.bias", "proj.weight")}
    order_heads(frozen, head_moments(frozen, [images() * torch.nan], _same))
    with pytest.raises(TrainingError, match="no images"):
        head_moments(tiny_vit(), [], _same)
