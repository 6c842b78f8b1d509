"""A narrower residual stream: fewer of its channels in the whole model, the budget met, nothing gathered, the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import p3b
from kinds import ARCHITECTURES, FAMILIES, dense_of
from loops import Loop
from p3b.core.masks import count_to_prune
from p3b.errors import BudgetError, ConfigError, ModelError
from p3b.methods import method_dims
from p3b.vit.cost import count_parameters, dense_params, other_params
from p3b.vit.layout import read_layout
from p3b.vit.narrow_stream import LEAST_STREAM, NarrowStream, narrow_stream
from p3b.vit.parts import ReadChannels, WriteChannels
from tiny import images, tiny_vit

PLAN = p3b.Schedule(start=1, sparse=3, final=5, update_every=1)
OF_FIXED_WIDTH = (
    "attention pool", "Perception Encoder", "Qwen3", "RoPE, mixed", "shared positions", "SAM", "Swin", "Swin v2", "Hiera",
    "Hiera, positions in windows",
)  # fmt: skip
"""Kinds whose stream, or whose whole heads, cannot be pruned."""
OPTIONS: dict[str, dict[str, Any]] = {"block_benefit": {"estimator": "linear"}, "uniform": {}}


def loop(method: str = "block_benefit", **options: Any) -> Loop:
    model = tiny_vit(embed_dim=32, num_heads=4, depth=3).double()
    pruner = p3b.Pruner(model, schedule=PLAN, method=method, **OPTIONS.get(method, {}), **options)
    return Loop(pruner, model, torch.optim.SGD(model.parameters(), lr=0.01))


@pytest.mark.parametrize("align", [1, 4])
@pytest.mark.parametrize("method", OPTIONS)
@pytest.mark.parametrize(("prune_ratio", "stream", "width"), [(0.5, 0.25, 24), (0.8, 0.5, 16)])
def test_the_small_network_equals_the_masked_one_and_has_no_index(
    method: str, align: int, prune_ratio: float, stream: float, width: int
) -> None:
    trained = loop(method, prune_ratio=prune_ratio, stream=stream, align=align).steps(PLAN.final)
    model, pruner = trained.model.eval(), trained.pruner
    dense = count_parameters(model)
    decision = pruner.decide_last()
    with torch.no_grad():
        masked = model(images().double())
        small = pruner.shrink()
        assert (small(images().double()) - masked).abs().max() < 1e-10
    assert small.embed_dim == width == int(decision.masks["stream"].sum())
    assert not [module for module in small.modules() if isinstance(module, (ReadChannels, WriteChannels))]
    largest_element = 4 * 4 * width + 8  # one channel of every head
    assert abs(count_parameters(small) - (1 - prune_ratio) * dense) <= largest_element
    if align > 1:
        hidden = [int(decision.masks[block.gate("hidden")].sum()) for block in pruner.layout.blocks if block.kind == "mlp"]
        assert sum(count % align > 0 for count in hidden) <= 1, "one alone takes up what multiples leave over"
    assert sum(block.kept_params for block in decision.blocks) + other_params(pruner.layout, width) == count_parameters(small)
    for block in decision.blocks:
        assert 0 <= block.keep_ratio <= 1 and block.keep_ratio_goal == pytest.approx(block.keep_ratio)


def test_the_stream_walks_to_its_width_as_keep_ratios_do() -> None:
    trained, widths = loop(prune_ratio=0.8, stream=0.5), []
    for _ in range(PLAN.final):
        trained.steps(1)
        widths.append(int((trained.pruner.gates.masks["stream"] >= 0.5).sum()))
    assert widths == sorted(widths, reverse=True)
    assert widths[0] == 32 and 16 < widths[1] < 32 and widths[2:] == [16] * 3


def test_channels_with_the_lowest_scores_go() -> None:
    layout = read_layout(tiny_vit(embed_dim=32, num_heads=4), method_dims("uniform", {"stream": 0.5}))
    narrow = NarrowStream(layout, 16, 0.8, blocks_only=False)
    scores = torch.rand(32, generator=torch.Generator().manual_seed(0))
    hard, soft = narrow.mask(scores, 1.0, 0.0), narrow.mask(scores, 1.0, 0.1)
    assert hard.bool().equal(scores >= scores.sort().values[16])
    assert (soft >= 0.5).equal(hard.bool()) and 0 < soft.min() < soft.max() < 1
    assert narrow.mask(scores, 0.0, 0.1).equal(torch.ones(32))


def test_the_budget_of_the_blocks_is_what_the_stream_leaves() -> None:
    layout = read_layout(tiny_vit(embed_dim=32, num_heads=4), method_dims("uniform", {"stream": 0.5}))
    for blocks_only in (False, True):
        narrow = NarrowStream(layout, 16, 0.8, blocks_only)
        dense = sum(map(dense_params, layout.blocks))
        others = 0 if blocks_only else layout.other_params
        assert (1 - narrow.ratio) * (narrow.in_blocks + narrow.others) == pytest.approx(0.2 * (dense + others))
    assert narrow.others == 0


def test_the_width_follows_from_the_share_or_from_the_budget() -> None:
    layout = read_layout(tiny_vit(embed_dim=32, num_heads=4), method_dims("uniform", {"stream": 0.5}))

    def width(share: float | str, multiple: int, prune_ratio: float, *, blocks_only: bool = True) -> int | None:
        narrow = narrow_stream(layout, share, multiple, prune_ratio, blocks_only)
        return None if narrow is None else narrow.goal

    assert width(0.999, 1, 0.999) == LEAST_STREAM
    assert width(0.4, 8, 0.8) == 16, "19.2 in multiples of 8"
    assert [width("auto", 1, prune_ratio) for prune_ratio in (0.0, 0.5, 0.75, 0.9)] == [32, 26, 21, 16]
    assert [width("auto", 8, prune_ratio) for prune_ratio in (0.1, 0.9)] == [32, 16]
    assert width("auto", 1, 0.9, blocks_only=False) < 16, "what lies outside the blocks would take all of the budget"
    assert width(0, 1, 0.5) is None


def test_what_cannot_be_met_is_refused_before_training() -> None:
    with pytest.raises(ConfigError, match=r'stream must be "auto" or lie in \[0, 1\), got 1.0'):
        loop(stream=1.0)
    with pytest.raises(BudgetError, match=r"0.5 with 3 of 32 channels.*Narrow the stream less"):
        loop(prune_ratio=0.5, stream=0.9)
    with pytest.raises(BudgetError, match=r"0.99 with 24 of 32 channels.*Narrow the stream further"):
        loop(prune_ratio=0.99, stream=0.25)
    for other in ({"keep_ratios": [0.5] * 6}, {"spare": ["blocks.0"]}):
        with pytest.raises(ConfigError, match=f"stream cannot be combined with {next(iter(other))}"):
            loop(prune_ratio=0.8, stream=0.5, **other)
    with pytest.raises(BudgetError, match=r"must lie in \[0, 1\), got 1"):
        loop("uniform", prune_ratio=1.0, stream=0.5)


def test_a_run_goes_on_from_its_state_bit_for_bit() -> None:
    whole = loop(prune_ratio=0.8, stream=0.5, align=4)
    whole.steps(3)
    other = loop(prune_ratio=0.8, stream=0.5, align=4)
    other.model.load_state_dict(whole.model.state_dict())
    other.pruner.load_state_dict(whole.pruner.state_dict())
    first, second = whole.pruner.decide_last(), other.pruner.decide_last()
    assert first.masks.keys() == second.masks.keys()
    assert all(mask.equal(second.masks[gate]) for gate, mask in first.masks.items())


def test_a_narrowed_model_is_saved_and_loaded(tmp_path: Any) -> None:
    trained = loop(prune_ratio=0.8, stream=0.5, align=4).steps(PLAN.final)
    small: nn.Module = trained.pruner.finalize().eval()
    p3b.save(small, tmp_path / "small.safetensors")
    with torch.no_grad():
        assert p3b.load(tmp_path / "small.safetensors").eval()(images().double()).equal(small(images().double()))


def test_a_share_below_what_a_constant_takes_gives_up_all() -> None:
    remaining = torch.tensor([100.0, 60.0, 8.0])
    assert count_to_prune(remaining, 4.0) == 2
    assert count_to_prune(remaining, 4.0, surplus=-60.0) == 1, "what the blocks before have missed is made good"


def test_auto_says_what_the_most_is_where_no_width_will_do() -> None:
    with pytest.raises(BudgetError, match=r"0.999 cannot be met: even with 4 of 32 channels.*at most 9\d.\d% can go"):
        loop(prune_ratio=0.999, stream="auto", align=4)


@pytest.mark.parametrize("kind", [kind for kind in (*ARCHITECTURES, *FAMILIES) if kind not in OF_FIXED_WIDTH])
def test_every_kind_that_has_one_stream_is_cut_exactly_and_comes_back_bit_for_bit(kind: str, tmp_path: Any) -> None:
    model = dense_of(kind).double()
    dense = count_parameters(model)
    pruner = p3b.Pruner(model, prune_ratio=0.5, method="random", stream="auto", align=4, schedule=PLAN)
    pruner.decide_last()
    batch = images().double()
    with torch.no_grad():
        masked = model.eval()(batch)
        small = pruner.shrink()
        after = small(batch)
    assert (after - masked).abs().max() < 1e-10
    assert count_parameters(small) == pytest.approx(dense / 2, rel=5e-3), "an element of such a small model is much"
    p3b.save(small, tmp_path / "small")
    with torch.no_grad():
        assert p3b.load(tmp_path / "small")(batch).equal(after)


@pytest.mark.parametrize("kind", OF_FIXED_WIDTH)
def test_a_stream_that_cannot_be_narrowed_is_refused_with_the_reason(kind: str) -> None:
    with pytest.raises(ModelError, match=r"cannot be pruned|not covered|prune th"):
        p3b.Pruner(dense_of(kind), prune_ratio=0.5, stream="auto", align=4, schedule=PLAN)
