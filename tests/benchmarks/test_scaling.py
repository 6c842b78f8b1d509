"""What the cost model says on paper is what torch counts, keeps and averages; the page says what the lines say."""

from __future__ import annotations

import math
import multiprocessing
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import cost_model as cost
import large
import projection
import scaling
import training
from harness.records import read_lines
from harness.turns import CPU
from p3b.scoring import batched
from p3b.scoring.ridge import SOLVE_EVERY
from p3b.vit import products
from tiny import VIT, in_ranks
from training import Entry, Shape, Training, measure_memory

ATEN = torch.ops.aten


def _convolution_backward(by_out: Any, x: Any, weight: Any, *rest: Any, out_shape: Any, **_: Any) -> int:
    """Gradients of input and weight each take the products of the forward pass.

    torch's counter multiplies those of a grouped convolution's weight by the number of groups.
    """
    asked_for = rest[-1]
    return sum(asked_for[:2]) * 2 * by_out[0] * math.prod(by_out[2:]) * math.prod(weight)


COUNTED = {
    **{op: lambda _into, a, b, **_: 2 * math.prod(a) * b[-1] for op in (ATEN.addmm_, ATEN.baddbmm_)},
    ATEN.convolution_backward: _convolution_backward,
}
"""What torch's counter does not know of itself, or not rightly."""
SIDES = scaling.SIDES
AT_ONCE = ("linear", "low_rank")
"""Estimators whose probes are evaluated many blocks at once."""


def _shape(depth: int = 2, classes: int = 7) -> Shape:
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": depth, "num_heads": 2}
    return Shape(f"depth {depth}", VIT, 4, 2, arguments, classes)


def _settled(side: str, shape: Shape, **more: Any) -> Training:
    """A side past its first steps, at which optimizers make their states, at a step at which ridge solves nothing."""
    options = scaling.prune_options(side, shape)
    trained = Training(shape, CPU, "fp32", options and options | more, masked=options is not None)
    trained.step()
    return trained


def _in_chunks(estimator: str, size: cost.Size, blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many blocks' probes are evaluated at once."""
    monkeypatch.setattr(batched, "CHUNK_BYTES", blocks * cost.bytes_of_block(estimator, size))
    assert cost.blocks_at_once(estimator, size) == blocks < size.blocks


class _Operators(TorchDispatchMode):
    """Counts the calls of torch's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return operator(*args, **(kwargs or {}))


class _Kept:
    """Storages that autograd keeps: bytes now, and at most so far, but for those of some tensors."""

    def __init__(self, without: list[Tensor]) -> None:
        self._known = {tensor.untyped_storage().data_ptr() for tensor in without}
        self._users: dict[int, int] = {}
        self.bytes = self.most = 0

    def take(self, storage: torch.UntypedStorage) -> None:
        place = storage.data_ptr()
        self._users[place] = self._users.get(place, 0) + 1
        if self._users[place] == 1 and place not in self._known:
            self.bytes += storage.nbytes()
            self.most = max(self.most, self.bytes)

    def let_go(self, storage: torch.UntypedStorage) -> None:
        place = storage.data_ptr()
        self._users[place] -= 1
        if self._users[place] == 0 and place not in self._known:
            self.bytes -= storage.nbytes()


class _Saved:
    """Stands in autograd's graph for a tensor, and lives as long as the graph does."""

    def __init__(self, tensor: Tensor, kept: _Kept) -> None:
        self.tensor, self._storage, self._kept = tensor, tensor.untyped_storage(), kept
        kept.take(self._storage)

    def __del__(self) -> None:
        self._kept.let_go(self._storage)


@contextmanager
def _kept_for_backward(without: list[Tensor]) -> Iterator[_Kept]:
    kept = _Kept(without)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: _Saved(tensor, kept), lambda saved: saved.tensor):
        yield kept


def _estimator(trained: Training) -> Any:
    assert trained.pruner is not None
    return trained.pruner._method._estimator


def _kept(trained: Training) -> int:
    """Bytes that autograd keeps at most in a step, parameters left out."""
    held = list(trained.model.parameters())
    if trained.pruner is not None and _estimator(trained) is not None:
        held += _estimator(trained).probes.parameters()
    with _kept_for_backward(held) as kept:
        trained.step()
    return kept.most


def _expected(side: str, size: cost.Size, ranks: int = 1) -> int:
    """The same on paper."""
    kept = scaling.predicted_bytes(side, size) - size.parameters * cost.TRAINED
    if side not in cost.ESTIMATED:
        return kept
    return kept - cost.memory_probes(side, size).total + cost.memory_probes(side, size, ranks).passing


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", [_shape(1, 7), _shape(2, 40)], ids=lambda shape: shape.title)
def test_products_are_what_torch_counts(side: str, shape: Shape) -> None:
    trained = _settled(side, shape)
    for block in trained.model.blocks:
        block.attn.fused_attn = False  # the counter does not know the fused kernel of a CPU
    size = replace(scaling.size_of(shape, 4), fused=False)
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        trained.step()
    work = scaling.predicted(side, size)
    assert counter.get_total_flops() == 2 * (work.macs + work.macs64)
    assert cost.plain(replace(size, fused=True)).macs > cost.plain(size).macs


@pytest.mark.parametrize("side", SIDES)
def test_operators_are_as_many_as_counted(side: str) -> None:
    shape = _shape(3)
    trained = _settled(side, shape)
    cycle = SOLVE_EVERY if side == "ridge" else 1
    with _Operators() as operators:
        for _ in range(cycle):
            trained.step()
    assert operators.count / cycle == pytest.approx(scaling.predicted(side, scaling.size_of(shape, 4)).operators, rel=0.05)


def test_products_that_are_computed_again_take_as_many_operators_as_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = _shape(3)
    size = scaling.size_of(shape, 4)
    kept, work = cost.memory_gates(size), cost.gates(size)
    trained = _settled("gated", shape)
    monkeypatch.setattr(products, "FREED_FROM", 24**2)
    with _Operators() as operators:
        trained.step()
    assert operators.count == pytest.approx(scaling.predicted("gated", size).operators, rel=0.02)
    assert operators.count > (cost.plain(size) + work).operators
    assert kept - cost.memory_gates(size) == (3 * 12 - 4) * 24**2 * cost.FLOAT and cost.gates(size).traffic > work.traffic
    half = replace(size, feature_bytes=2)
    assert cost.memory_gates(half) == cost.memory_gates(size)


@pytest.mark.parametrize("estimator", AT_ONCE)
def test_chunks_of_probes_take_as_many_operators_and_keep_as_much_as_the_model_says(
    estimator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = _shape(3)
    size = scaling.size_of(shape, 4)
    _in_chunks(estimator, size, 2, monkeypatch)
    trained = _settled(estimator, shape)
    features = torch.empty(size.batch, size.tokens, size.width)
    assert _estimator(trained).probes.bytes_of_block(features) == cost.bytes_of_block(estimator, size)
    with _Operators() as operators:
        trained.step()
    assert operators.count == pytest.approx(scaling.predicted(estimator, size).operators, rel=0.05)
    assert _kept(trained) == pytest.approx(_expected(estimator, size), rel=2e-3)


@pytest.mark.parametrize("estimator", [*AT_ONCE, "paper"])
def test_what_autograd_keeps_with_several_ranks_is_what_the_model_says(estimator: str) -> None:
    shape = _shape()
    trained = _settled(estimator, shape, reduce=Tensor.clone)  # no process, but none that is alone
    assert _kept(trained) == pytest.approx(_expected(estimator, scaling.size_of(shape, 4), ranks=2), rel=5e-3)


@pytest.mark.parametrize("side", [side for side in SIDES if side != "ridge"])  # ridge lets go of its graphs one by one
def test_what_autograd_keeps_is_what_the_model_says(side: str) -> None:
    shape = _shape()
    size = scaling.size_of(shape, 4)
    trained = _settled(side, shape)
    assert sum(p.numel() for p in trained.model.parameters()) == size.parameters
    assert _kept(trained) == pytest.approx(_expected(side, size), rel=2e-3)  # targets and drop path are left out
    assert cost.memory_gates(size) > 0 and cost.memory_plain(size) > size.parameters * cost.TRAINED


@pytest.mark.parametrize("estimator", cost.ESTIMATED)
def test_what_an_estimator_holds_is_what_the_model_says(estimator: str) -> None:
    shape = _shape()
    trained = _settled(estimator, shape)
    size = scaling.size_of(shape, 4)
    memory = cost.memory_probes(estimator, size)
    if estimator == "ridge":
        assert memory.held == sum(tensor.nbytes for tensor in _estimator(trained)._state.values())
        assert memory.passing < memory.held
        return
    numbers = sum(parameter.numel() for parameter in _estimator(trained).probes.parameters())
    states = _estimator(trained)._optimizer.state_dict()["state"].values()
    moments = sum(tensor.nbytes for state in states for name, tensor in state.items() if name != "step")
    assert memory.held == numbers * cost.TRAINED == 2 * moments


@pytest.mark.parametrize("estimator", cost.ESTIMATED)
def test_what_ranks_average_is_what_the_model_says(estimator: str) -> None:
    shape = _shape()
    size = scaling.size_of(shape, 4)

    def rank(_rank: int, mean: Any) -> dict[str, int]:
        asked: list[Tensor] = []

        def counted(tensor: Tensor) -> Tensor:
            asked.append(tensor)
            return mean(tensor)

        options = {**(scaling.prune_options(estimator, shape) or {}), "reduce": counted}
        trained = Training(shape, CPU, "fp32", options)
        trained.step()
        found = {}
        for name, act in {"step": trained.step, "update": lambda: trained.pruner._renew(5)}.items():  # type: ignore[union-attr]
            asked.clear()
            act()
            found[name] = sum(tensor.nbytes for tensor in asked)
        return found

    expected = cost.wire(estimator, size)
    assert in_ranks(2, rank) == 2 * [{"step": expected.step, "update": expected.update}]
    assert cost.wire(None, size).step == 4
    assert cost.wire_gradients(size) == 4 * size.parameters
    assert cost.Wire.sent(100, 2) == 100 and cost.Wire.sent(100, 1) == 0


def test_rates_that_made_the_times_are_found_again() -> None:
    sizes = [scaling.size_of(shape, 8) for shape in scaling.SHAPES.values()]
    true = cost.Rates(2e-11, 4e-11, 1e-10, 2e-5)
    found = cost.fit([(cost.plain(size), true.seconds(cost.plain(size))) for size in sizes])
    assert (found.mac, found.mac64, found.byte, found.operator) == pytest.approx((2e-11, 4e-11, 1e-10, 2e-5), rel=1e-6)
    without_traffic = [(cost.plain(size), 3e-11 * cost.plain(size).macs) for size in sizes]
    assert cost.fit(without_traffic).mac == pytest.approx(3e-11) and cost.fit(without_traffic).operator < 1e-9
    falling = [(cost.Work(macs=1, traffic=1), 1.0), (cost.Work(macs=2, traffic=1), 0.5), (cost.Work(macs=3, traffic=2), 0.9)]
    assert min(cost.fit(falling).mac, cost.fit(falling).byte, cost.fit(falling).operator) >= 0


@pytest.mark.parametrize("estimator", cost.ESTIMATED)
def test_what_grows_with_classes_grows_linearly(estimator: str) -> None:
    few, many, more = (cost.Size(3, 128, 2, 8, 8, classes, 8) for classes in (1_000, 2_000, 3_000))
    for part in (lambda size: cost.probes(estimator, size).traffic, lambda size: cost.memory_probes(estimator, size).held):
        assert part(more) - part(many) == pytest.approx(part(many) - part(few)) and part(many) > part(few)
    assert cost.gates(many).traffic - cost.gates(few).traffic == 4 * (many.parameters - few.parameters)
    assert cost.update(many) == cost.update(few)


def test_a_projection_is_the_arithmetic_of_its_assumptions() -> None:
    low, high = (projection.project(None, projection.DATA[1], share) for share in projection.GPU.share)
    size = projection.deit_base(1_000)
    assert low.plain_step == pytest.approx(2 * cost.plain(size).macs / (0.30 * 312e12))
    assert low.epoch == pytest.approx(1_281_167 // 512 * low.plain_step / 3600)
    assert low.epoch / high.epoch == pytest.approx(0.45 / 0.30)
    assert low.finetuning == pytest.approx(300 * 0.5 * low.epoch)
    assert high.pruning > 50 * high.epoch and high.ratio > 1
    assert size.parameters == 86_567_656  # DeiT-Base, as timm counts it


def test_a_measurement_becomes_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {"depth-1": _shape(1), "classes-40": _shape(1, 40)}
    entries = {f"time-{name}": Entry("time", name, "fp32", scaling.measure_time) for name in shapes}
    monkeypatch.setattr(scaling, "SHAPES", shapes)
    monkeypatch.setattr(scaling, "ENTRIES", entries)
    made_by = {"command": "c", "commit": "0" * 40, "hardware": {"machine": "m", "cores": 2, "accelerator": None}}
    given = Namespace(device="cpu", threads=1, rounds=1)
    lines = [{"name": name, **scaling.measure(name, given), **made_by} for name in entries]
    sides = lines[0]["result"]["sides"]
    assert set(sides) == {*SIDES, "update"} and all(side["ratio"] > 0 for side in sides.values())
    text = "\n".join(scaling.tables(lines))
    assert "\n| 40 |" in text and "\n| 1 |" in text and "### Memory" not in text


def test_processes_of_their_own_tell_what_they_average(monkeypatch: pytest.MonkeyPatch) -> None:
    # Forked from this process, which has loaded everything already.
    monkeypatch.setattr(scaling, "preloaded", lambda: multiprocessing.get_context("fork"))
    shape = _shape(1)
    size = scaling.size_of(shape, 4)
    sides = scaling.measure_ranks(shape, CPU, "fp32", rounds=1, ranks=2)["sides"]
    for name in ("gradients", "update", *cost.ESTIMATED):
        assert sides[name]["bytes"] == scaling.handed_over(name, size) and sides[name]["seconds"] > 0


def test_processes_of_their_own_tell_their_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    # Forked, too: so what this process has held before is inherited, and only what is much larger is sure to show.
    monkeypatch.setattr(training, "preloaded", lambda: multiprocessing.get_context("fork"))
    shape = _shape(1)
    shape = replace(shape, arguments={**shape.arguments, "embed_dim": 384})
    sides = {side: scaling.prune_options(side, shape) for side in ("plain", "paper")}
    peaks = {name: side["peak_bytes"] for name, side in measure_memory(sides, shape, CPU, "fp32", 1)["sides"].items()}
    assert peaks["paper"] > peaks["plain"] >= 0 and peaks["paper"] > 50 * 2**20


def test_what_is_recorded_is_known_and_counted_as_the_model_counts() -> None:
    lines = read_lines(scaling.BENCH.part.lines)
    for line in lines:
        assert {"command", "commit", "hardware", "versions", "seconds", "date", "result"} <= line.keys()
        if line["table"] == "ranks" and line["result"]["ranks"] > 1:
            size = scaling.size_of(scaling.SHAPES[line["shape"]], line["result"]["batch"])
            for name, side in line["result"]["sides"].items():
                assert name == "plain" or side["bytes"] == scaling.handed_over(name, size)


def test_large_models_take_a_tenth_more_at_most_from_so_many_images_on() -> None:
    for _, size in large.sizes():
        images = large.fewest_images(large.DEFAULT, size)
        assert large.added(large.DEFAULT, replace(size, batch=images)) <= large.BUDGET
        assert large.added(large.DEFAULT, replace(size, batch=images - 1)) > large.BUDGET
    names = [name for name, _ in large.sizes()]
    assert all(f"| {name} (" in "\n".join(large.tables()) for name in names)
    assert dict(large.sizes())["ViT-L/16"].parameters == 304_326_632  # as timm counts vit_large_patch16_224
