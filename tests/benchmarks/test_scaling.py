"""What the cost model says on paper is what torch counts, keeps and averages; the page says what the lines say."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import scaling
from bench import Entry, Machine, Shape, Training
from cost_model import (
    ESTIMATED,
    TRAINED,
    Rates,
    Size,
    Wire,
    Work,
    fit,
    gates,
    memory_gates,
    memory_plain,
    memory_probes,
    plain,
    probes,
    update,
    wire,
    wire_gradients,
)
from p3b.scoring.ridge import SOLVE_EVERY
from records import ROOT, read_lines
from tiny import VIT, in_ranks

CPU = Machine(torch.device("cpu"))
ATEN = torch.ops.aten
IN_PLACE = {op: lambda _into, a, b, **_: 2 * math.prod(a) * b[-1] for op in (ATEN.addmm_, ATEN.baddbmm_)}
"""What torch's counter does not know of itself."""
SIDES = ("plain", "gated", *ESTIMATED)


def _shape(depth: int = 2, classes: int = 7) -> Shape:
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": depth, "num_heads": 2}
    return Shape(f"depth {depth}", VIT, 4, 2, arguments, classes)


def _settled(side: str, shape: Shape) -> Training:
    """A side past its first steps, at which optimizers make their states, at a step at which ridge solves nothing."""
    trained = scaling.training(side, shape, CPU, "fp32")
    trained.step()
    return trained


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


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", [_shape(1, 7), _shape(2, 40)], ids=lambda shape: shape.title)
def test_products_are_what_torch_counts(side: str, shape: Shape) -> None:
    trained = _settled(side, shape)
    for block in trained._model.blocks:
        block.attn.fused_attn = False  # the counter does not know the fused kernel of a CPU
    size = replace(scaling.size_of(shape, 4), fused=False)
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        trained.step()
    work = scaling.predicted(side, size)
    assert counter.get_total_flops() == 2 * (work.macs + work.macs64)
    assert plain(replace(size, fused=True)).macs > plain(size).macs


@pytest.mark.parametrize("side", SIDES)
def test_operators_are_as_many_as_counted(side: str) -> None:
    shape = _shape(3)
    trained = _settled(side, shape)
    cycle = SOLVE_EVERY if side == "ridge" else 1
    with _Operators() as operators:
        for _ in range(cycle):
            trained.step()
    assert operators.count / cycle == pytest.approx(scaling.predicted(side, scaling.size_of(shape, 4)).operators, rel=0.05)


@pytest.mark.parametrize("side", [side for side in SIDES if side != "ridge"])  # ridge lets go of its graphs one by one
def test_what_autograd_keeps_is_what_the_model_says(side: str) -> None:
    shape = _shape()
    size = scaling.size_of(shape, 4)
    trained = _settled(side, shape)
    held = list(trained._model.parameters())
    if side in ESTIMATED:
        held += _estimator(trained).probes.parameters()
    with _kept_for_backward(held) as kept:
        trained.step()
    expected = scaling.predicted_bytes(side, size) - size.parameters * TRAINED
    expected -= memory_probes(side, size).held if side in ESTIMATED else 0
    if side == "linear":  # its tokens are held by name, and by autograd those of one probe alone
        expected -= (size.places - 2) * size.batch * size.width * size.feature_bytes
    assert sum(p.numel() for p in trained._model.parameters()) == size.parameters
    assert kept.most == pytest.approx(expected, rel=2e-3)  # targets and drop path are left out
    assert memory_gates(size) > 0 and memory_plain(size) > size.parameters * TRAINED


@pytest.mark.parametrize("estimator", ESTIMATED)
def test_what_an_estimator_holds_is_what_the_model_says(estimator: str) -> None:
    shape = _shape()
    trained = _settled(estimator, shape)
    size = scaling.size_of(shape, 4)
    memory = memory_probes(estimator, size)
    if estimator == "ridge":
        assert memory.held == sum(tensor.nbytes for tensor in _estimator(trained)._state.values())
        assert memory.passing < memory.held
        return
    numbers = sum(parameter.numel() for parameter in _estimator(trained).probes.parameters())
    states = _estimator(trained)._optimizer.state_dict()["state"].values()
    moments = sum(tensor.nbytes for state in states for name, tensor in state.items() if name != "step")
    assert memory.held == numbers * TRAINED == 2 * moments


@pytest.mark.parametrize("estimator", ESTIMATED)
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

    expected = wire(estimator, size)
    assert in_ranks(2, rank) == 2 * [{"step": expected.step, "update": expected.update}]
    assert wire(None, size).step == 4
    assert wire_gradients(size) == 4 * size.parameters
    assert Wire.sent(100, 2) == 100 and Wire.sent(100, 1) == 0


def test_rates_that_made_the_times_are_found_again() -> None:
    sizes = [scaling.size_of(shape, 8) for shape in scaling.SHAPES.values()]
    true = Rates(2e-11, 4e-11, 1e-10, 2e-5)
    found = fit([(plain(size), true.seconds(plain(size))) for size in sizes])
    assert (found.mac, found.mac64, found.byte, found.operator) == pytest.approx((2e-11, 4e-11, 1e-10, 2e-5), rel=1e-6)
    without_traffic = [(plain(size), 3e-11 * plain(size).macs) for size in sizes]
    assert fit(without_traffic).mac == pytest.approx(3e-11) and fit(without_traffic).operator < 1e-9
    falling = [(Work(macs=1, traffic=1), 1.0), (Work(macs=2, traffic=1), 0.5), (Work(macs=3, traffic=2), 0.9)]
    assert min(fit(falling).mac, fit(falling).byte, fit(falling).operator) >= 0


@pytest.mark.parametrize("estimator", ESTIMATED)
def test_what_grows_with_classes_grows_linearly(estimator: str) -> None:
    few, many, more = (Size(3, 128, 2, 8, 8, classes, 8) for classes in (1_000, 2_000, 3_000))
    for part in (lambda size: probes(estimator, size).traffic, lambda size: memory_probes(estimator, size).total):
        assert part(more) - part(many) == pytest.approx(part(many) - part(few)) and part(many) > part(few)
    assert gates(many).traffic - gates(few).traffic == 4 * (many.parameters - few.parameters)
    assert update(many) == update(few)


def test_a_projection_is_the_arithmetic_of_its_assumptions() -> None:
    low, high = (scaling.project(None, scaling.DATA[1], share) for share in scaling.GPU.share)
    size = scaling.deit_base(1_000)
    assert low.plain_step == pytest.approx(2 * plain(size).macs / (0.30 * 312e12))
    assert low.epoch == pytest.approx(1_281_167 // 512 * low.plain_step / 3600)
    assert low.epoch / high.epoch == pytest.approx(0.45 / 0.30)
    assert low.finetuning == pytest.approx(300 * 0.5 * low.epoch)
    assert high.pruning > 50 * high.epoch and high.ratio > 1
    assert size.parameters == 86_567_656  # DeiT-Base, as timm counts it


def test_entries_become_lines_and_rows(tmp_path: Path) -> None:
    shapes = {"depth-2": _shape(2), "classes-40": _shape(2, 40)}
    entries = {
        "time-depth-2": Entry("time", "depth-2", "fp32", scaling.measure_time, {}),
        "time-classes-40": Entry("time", "classes-40", "fp32", scaling.measure_time, {}),
    }
    lines, page = tmp_path / "scaling.jsonl", tmp_path / "page.md"
    page.write_text(f"Before.\n{scaling.BEGIN}\nreplaced\n{scaling.END}\nAfter.\n")
    for only in ("time-", "time-depth-2"):
        assert (
            scaling.main(["run", "--only", only, "--rounds", "1"], entries=entries, shapes=shapes, lines=lines, page=page) == 0
        )
    assert [line["name"] for line in read_lines(lines)] == ["time-classes-40", "time-depth-2"]
    assert set(read_lines(lines)[0]["result"]["sides"]) == {*SIDES, "update"}
    assert all(side["ratio"] > 0 for side in read_lines(lines)[0]["result"]["sides"].values())
    text = page.read_text()
    assert text.startswith("Before.") and text.endswith("After.\n") and "replaced" not in text and "\n| 40 |" in text
    with pytest.raises(SystemExit):
        scaling.main(["run", "--only", "nonsense"], entries=entries, lines=lines, page=page)


def test_processes_of_their_own_tell_their_peaks_and_what_they_average() -> None:
    shape = _shape()
    peaks = scaling.measure_memory(shape, CPU, "fp32", rounds=1)["sides"]
    assert set(peaks) == set(SIDES) and all(side["peak_bytes"] > 0 for side in peaks.values())
    size = scaling.size_of(shape, 4)
    sides = scaling.measure_ranks(shape, CPU, "fp32", rounds=1, ranks=2)["sides"]
    for name in ("gradients", "update", *ESTIMATED):
        assert sides[name]["bytes"] == scaling.handed_over(name, size) and sides[name]["seconds"] > 0


def test_the_page_says_what_the_lines_say(tmp_path: Path) -> None:
    text = scaling.PAGE.read_text()
    copy = tmp_path / "scaling.md"
    copy.write_text(text)
    scaling.write_page(copy, read_lines(scaling.LINES))
    assert copy.read_text() == text, "docs/scaling.md and docs/results/scaling.jsonl differ: run `scaling.py table`"
    assert text.count(scaling.BEGIN) == text.count(scaling.END) == 1


def test_what_is_recorded_is_known_and_counted_as_the_model_counts() -> None:
    lines = read_lines(scaling.LINES)
    assert len({(line["name"], line["device"]) for line in lines}) == len(lines)
    for line in lines:
        assert line["name"] in scaling.ENTRIES
        assert {"command", "commit", "hardware", "versions", "seconds", "date", "result"} <= line.keys()
        if line["table"] == "ranks" and line["result"]["ranks"] > 1:
            size = scaling.size_of(scaling.SHAPES[line["shape"]], line["result"]["batch"])
            for name, side in line["result"]["sides"].items():
                assert name == "plain" or side["bytes"] == scaling.handed_over(name, size)
    assert str(ROOT) not in json.dumps(lines)
