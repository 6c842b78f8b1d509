"""The change of basis of attention heads: exact, and in the order of what channels carry."""

from __future__ import annotations

import pytest
import torch

from p3b.errors import ModelError
from p3b.vit.basis import head_moments, order_heads
from tiny import images, tiny_vit


@pytest.mark.parametrize("changed", [{}, {"qkv_bias": False}, {"embed_dim": 12, "num_heads": 1}], ids=str)
def test_order_of_heads_changes_no_output(changed: dict[str, object]) -> None:
    model, batch = tiny_vit(dtype=torch.float64, **changed), images(6, dtype=torch.float64)
    before, weight = model(batch), model.blocks[0].attn.qkv.weight.clone()
    order_heads(model, head_moments(model, [batch[:4], batch[4:]]))
    assert torch.allclose(model(batch), before, rtol=0, atol=1e-10)
    assert not torch.allclose(model.blocks[0].attn.qkv.weight, weight, atol=1e-3)


def test_channels_of_a_head_come_in_the_order_of_what_they_carry() -> None:
    model, batch = tiny_vit(dtype=torch.float64), images(16, dtype=torch.float64)
    order_heads(model, head_moments(model, [batch]))
    for block, found in zip(model.blocks, head_moments(model, [batch]), strict=True):
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
    order_heads(model, head_moments(model, [batch]))
    assert torch.allclose(model(batch), before, rtol=0, atol=1e-9)


def test_what_cannot_be_ordered_is_refused() -> None:
    with pytest.raises(ModelError, match="no images"):
        head_moments(tiny_vit(), [])
    with pytest.raises(ModelError, match=r"blocks\.0\.attn: the basis of its heads"):
        head_moments(tiny_vit(qk_norm=True), [images()])
