"""One element that is not finite is found anywhere, and huge ones that are finite do not count as such."""

from __future__ import annotations

import pytest
import torch

from p3b.core.finite import all_finite


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_element_is_found_wherever_it_is(dtype: torch.dtype, bad: float) -> None:
    for place in (0, 5, 98):
        tensors = [torch.randn(7, dtype=dtype), torch.randn(9, 11, dtype=dtype), torch.zeros((), dtype=dtype)]
        assert all_finite(tensors)
        tensors[1].view(-1)[place] = bad
        assert not all_finite(tensors)


def test_what_is_huge_is_finite_though_its_sum_is_not() -> None:
    huge = torch.full((1000,), torch.finfo(torch.float32).max)
    assert all_finite([huge, -huge])


def test_nothing_is_finite() -> None:
    assert all_finite([])
    assert all_finite([torch.empty(0)])
