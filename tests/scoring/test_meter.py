"""Means over one and two intervals; a step that does not count leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from p3b.scoring.meter import IntervalMeter, average
from tiny import in_ranks

YES, NO = torch.tensor(True), torch.tensor(False)


def _list(value: Tensor | None) -> list[float]:
    assert value is not None
    return value.tolist()


def test_means_are_over_finished_intervals() -> None:
    meter = IntervalMeter()
    meter.add("x", torch.tensor([1.0, 2.0]), YES)
    assert meter.mean("x") is None
    meter.add("x", torch.tensor([3.0, 6.0]), YES)
    meter.close()
    assert _list(meter.mean("x")) == [2.0, 4.0]
    meter.add("x", torch.tensor([8.0, 1.0]), YES)
    meter.close()
    assert _list(meter.mean("x")) == [8.0, 1.0]
    assert _list(meter.mean_of_last_two("x")) == [4.0, 3.0]  # over all three steps, not over two means
    meter.add("x", torch.tensor([0.0, 0.0]), YES)
    meter.close()
    assert _list(meter.mean_of_last_two("x")) == [4.0, 0.5]
    assert meter.mean("y") is None


def test_a_step_that_does_not_count_leaves_no_trace() -> None:
    meter = IntervalMeter()
    meter.add("x", torch.tensor([float("nan"), float("inf")]), NO)
    meter.add("x", torch.tensor([2.0, 4.0]), YES)
    meter.add("x", torch.tensor([100.0, 100.0]), NO)
    meter.close()
    assert _list(meter.mean("x")) == [2.0, 4.0]


def test_an_interval_in_which_nothing_counted_is_finite() -> None:
    meter = IntervalMeter()
    meter.add("x", torch.tensor([float("nan")]), NO)
    meter.close()
    assert _list(meter.mean("x")) == [0.0]


def test_closing_twice_is_closing_once() -> None:
    meter = IntervalMeter()
    meter.add("x", torch.tensor([4.0]), YES)
    meter.close()
    meter.close()
    assert _list(meter.mean("x")) == [4.0]


def test_what_was_added_is_not_changed_by_adding_more() -> None:
    meter, value = IntervalMeter(), torch.tensor([1.0])
    meter.add("x", value, YES)
    meter.add("x", value, YES)
    meter.close()
    assert value.item() == 1.0


def test_going_on_from_a_state_in_the_middle_of_an_interval() -> None:
    meter, other = IntervalMeter(), IntervalMeter()
    for value in (1.0, 5.0, 9.0):
        meter.add("x", torch.tensor([value]), YES)
        if value != 9.0:
            meter.close()
    other.load_state_dict(meter.state_dict(), torch.device("cpu"))
    for m in (meter, other):
        m.add("x", torch.tensor([2.0]), YES)
        m.close()
        assert _list(m.mean("x")) == [5.5]
        assert _list(m.mean_of_last_two("x")) == pytest.approx([16 / 3])


def test_a_state_that_was_read_onto_the_cpu_goes_on_where_the_model_is() -> None:
    """A checkpoint is read onto the CPU: on a GPU the first step after resuming once met sums on another device."""
    meter = IntervalMeter()
    meter.add("x", torch.tensor([1.0]), YES)
    other = IntervalMeter()
    other.load_state_dict(meter.state_dict(), torch.device("meta"))
    other.add("x", torch.ones(1, device="meta"), torch.ones((), dtype=torch.bool, device="meta"))
    other.close()
    mean = other.mean("x")
    assert mean is not None
    assert mean.device.type == "meta"


def test_a_mean_in_buckets_is_the_mean() -> None:
    def rank(number: int, mean: Any) -> tuple[list[Tensor], list[int]]:
        generator = torch.Generator().manual_seed(number)
        conv = torch.randn(4, 3, 3, 3, generator=generator).to(memory_format=torch.channels_last)
        tensors = [torch.randn(70, generator=generator), torch.randn((), generator=generator), conv]
        tensors += [torch.randn(5, 2, generator=generator), torch.randn(0)]
        sizes = []

        def told(tensor: Tensor) -> Tensor:
            sizes.append(tensor.nbytes)
            return mean(tensor)

        average(told, tensors, bucket_bytes=128)
        return tensors, sizes

    (first, sizes), (second, _) = in_ranks(2, rank)
    alone = [rank(number, lambda tensor: tensor)[0] for number in (0, 1)]
    for one, other, *both in zip(first, second, *alone, strict=True):
        assert torch.equal(one, other) and torch.equal(one, torch.stack(both).mean(0))
    assert sizes == [128, 128, 28, 432, 40]  # bytes; what is not contiguous is not taken apart
