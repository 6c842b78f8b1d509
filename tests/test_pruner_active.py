"""Pruning that computes active elements alone: it resumes bit for bit, ends exactly, and is refused where it means nothing."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn

import p3b
from loops import Loop, prune_in_mixed_precision
from p3b.errors import ConfigError, WeightsError
from tiny import images, parameters_of, tiny_vit

PLAN = p3b.Schedule(start=2, sparse=6, final=14, update_every=2)
OPTIONS: dict[str, Any] = {"keep_ratios": [0.3, 0.3, 0.2, 0.3], "compute": "active"}
NARROW: dict[str, Any] = {"keep_ratios": None, "estimator": "linear", "align": 4, "stream": 0.5}
"""What is given in their place where the residual stream narrows, too; probes read it."""
WIDTHS = pytest.mark.parametrize("widths", [{}, NARROW], ids=["blocks", "stream"])


def _model(seed: int = 0) -> nn.Module:
    return tiny_vit(embed_dim=48, num_heads=2, seed=seed, drop_path_rate=0.2)


def _run(seed: int = 0, **options: Any) -> Loop:
    torch.manual_seed(0)
    model = _model(seed)
    pruner = p3b.Pruner(model, 0.7, schedule=PLAN, **{**OPTIONS, **options})
    return Loop(pruner, model, torch.optim.AdamW(model.parameters(), lr=1e-3), accumulate=2)


@WIDTHS
@pytest.mark.parametrize("stop", [2, 7, 12])
def test_stopping_and_resuming_equals_never_stopping_bit_for_bit(stop: int, widths: dict[str, Any]) -> None:
    straight, buffer = _run(**widths).steps(stop), io.BytesIO()
    kept = (straight.model.state_dict(), straight.optimizer.state_dict(), straight.pruner.state_dict(), torch.get_rng_state())
    torch.save(kept, buffer)
    ends = [straight.to_the_end()]
    buffer.seek(0)
    model_state, optimizer_state, pruner_state, random_state = torch.load(buffer, weights_only=True)
    after = _run(seed=5, **widths)
    after.model.load_state_dict(model_state)
    after.optimizer.load_state_dict(optimizer_state)
    after.pruner.load_state_dict(pruner_state)
    torch.set_rng_state(random_state)
    ends.append(after.to_the_end())
    assert all(torch.equal(a, b) for a, b in zip(*(end.state_dict().values() for end in ends), strict=True))
    later = straight.decisions[len(straight.decisions) - len(after.decisions) :]
    assert [(each.computed, each.left_out) for each in after.decisions] == [(each.computed, each.left_out) for each in later]


@WIDTHS
def test_less_is_computed_the_more_is_pruned_and_the_small_model_is_the_masked_one(widths: dict[str, Any]) -> None:
    run = _run(**widths)
    while not run.pruner.done:
        run.step()
    shares, differences = zip(*((each.computed, each.left_out) for each in run.decisions), strict=True)
    assert shares[-1] < 0.7 < shares[0]
    assert max(differences) < 0.05
    run.pruner.decide_last()
    masked = run.model.eval()(images())
    torch.testing.assert_close(run.pruner.shrink()(images()), masked, rtol=1e-5, atol=1e-5)
    assert parameters_of(run.model) < 0.5 * parameters_of(_model())


@WIDTHS
def test_everything_is_computed_in_the_warm_up_and_with_the_first_masks_no_bit_is_other(widths: dict[str, Any]) -> None:
    runs = [_run(**widths).steps(4), _run(**widths, compute="full").steps(4)]
    assert all(torch.equal(a, b) for a, b in zip(*(run.model.parameters() for run in runs), strict=True))
    assert all(torch.equal(mask, runs[1].pruner.gates.masks[gate]) for gate, mask in runs[0].pruner.gates.masks.items())
    assert runs[1].decisions[0].computed is None


@WIDTHS
def test_mixed_precision_and_frozen_layers_go_along(widths: dict[str, Any]) -> None:
    model = _model().train()
    model.blocks[0].mlp.fc1.requires_grad_(False)
    pruner = p3b.Pruner(model, 0.7, schedule=PLAN, **{**OPTIONS, **widths})
    small = prune_in_mixed_precision(model, pruner, torch.amp.GradScaler("cpu", init_scale=16.0))
    assert parameters_of(small) < 0.5 * parameters_of(_model())


def test_it_is_refused_where_it_means_nothing() -> None:
    with pytest.raises(ConfigError, match=r"compute.*'wide'.*full"):
        p3b.Pruner(_model(), schedule=PLAN, compute="wide")
    for method in ("wdpruning", "savit"):
        with pytest.raises(ConfigError, match=f"is not for {method}.*block_benefit"):
            p3b.Pruner(_model(), 0.5, method, PLAN, compute="active")
    with pytest.raises(ConfigError, match="one shot"):
        p3b.Pruner(_model(), 0.5, "uniform", compute="active")
    with pytest.raises(ConfigError, match="compiled anew"):
        p3b.Pruner(torch.compile(_model()), schedule=PLAN, compute="active")  # type: ignore[arg-type]
    state = _run().steps(5).pruner.state_dict()
    with pytest.raises(WeightsError, match="compute"):
        _run(compute="full").pruner.load_state_dict(state)
