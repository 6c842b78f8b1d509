"""One shot in the library: a trained model is measured on some images and cut; no weight moves but by compensation."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch

import p3b
from loops import CE
from p3b.errors import ConfigError, ScheduleError, TrainingError
from p3b.methods import METHODS
from tiny import images, labels, parameters_of, tiny_vit

BATCHES = [(images(4, seed=seed), labels(4, seed=seed)) for seed in range(3)]
PHOTOS = [batch for batch, _ in BATCHES]
ONE_SHOT_METHODS = [name for name in METHODS if name != "wdpruning"]


@pytest.mark.parametrize("method", ONE_SHOT_METHODS)
def test_one_shot_meets_the_budget_and_changes_nothing_before_the_cut(method: str) -> None:
    model = tiny_vit()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    answers = model(PHOTOS[0]).detach()
    pruner = p3b.Pruner(model, 0.4, method)
    assert pruner.calibrate(BATCHES, CE) == 12
    assert torch.allclose(model(PHOTOS[0]), answers, atol=1e-4)
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert all(".attn." in name for name in moved)
    assert (not moved) == (method == "savit")
    assert all(parameter.grad is None for parameter in model.parameters())
    small = pruner.finalize()
    assert abs(parameters_of(small) / sum(map(torch.numel, before.values())) - 0.6) < 0.01
    assert torch.equal(small.pos_embed, before["pos_embed"]) or method == "savit"


def test_without_compensation_what_stays_is_what_was_there() -> None:
    model, masked = tiny_vit(dtype=torch.float64), tiny_vit(dtype=torch.float64)
    batches = [(batch.double(), targets) for batch, targets in BATCHES]
    pruner, other = (p3b.Pruner(each, 0.5, "uniform") for each in (model, masked))
    for each in (pruner, other):
        each.calibrate(batches, CE)
    other.decide_last()
    small = pruner.finalize()
    assert torch.allclose(small(PHOTOS[0].double()), masked(PHOTOS[0].double()), rtol=0, atol=1e-10)


def test_compensation_keeps_the_size_and_comes_nearer_to_the_dense_model() -> None:
    dense = tiny_vit()
    answers, found = dense(torch.cat(PHOTOS)).detach(), {}
    for compensated in (False, True):
        pruner = p3b.Pruner(deepcopy(dense), 0.4, "uniform")
        pruner.calibrate(BATCHES, CE)
        small = pruner.finalize(PHOTOS if compensated else None)
        missed = (small(torch.cat(PHOTOS)) - answers).square().mean()
        found[compensated] = parameters_of(small), float(missed.detach())
    assert found[True][0] == found[False][0]
    assert found[True][1] < 0.5 * found[False][1]


def test_compensation_at_the_end_of_training_as_well(tmp_path: Any) -> None:
    model = tiny_vit()
    pruner = p3b.Pruner(model, 0.4, "uniform", p3b.Schedule(0, 1, 2, 1))
    for batch, targets in BATCHES[:2]:
        CE(model(batch), targets).backward()
        pruner.step()
    small = pruner.finalize(PHOTOS)
    p3b.save(small, tmp_path / "small")
    assert torch.allclose(p3b.load(tmp_path / "small")(PHOTOS[0]), small(PHOTOS[0]), atol=1e-6)


def test_modes_and_randomness_stay_as_they_were() -> None:
    model = tiny_vit(drop_path_rate=0.5).train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    pruner = p3b.Pruner(model, 0.4, "uniform")
    state = torch.get_rng_state()
    pruner.calibrate(BATCHES, CE)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_frozen_layers_are_scored_in_one_shot() -> None:
    scores = []
    for frozen in (False, True):
        model = tiny_vit()
        model.blocks.requires_grad_(not frozen)
        pruner = p3b.Pruner(model, 0.4, "uniform")
        pruner.calibrate(BATCHES, CE, order=False)
        scores.append(pruner.decide_last().masks)
    assert all(torch.equal(scores[0][gate], scores[1][gate]) for gate in scores[0])


def test_mistakes_of_one_shot_are_told() -> None:
    pruner = p3b.Pruner(tiny_vit(), 0.4, "uniform")
    with pytest.raises(ScheduleError, match=r"without a schedule, for one shot: call calibrate"):
        pruner.step()
    with pytest.raises(TrainingError, match="Nothing has been measured"):
        pruner.finalize()
    with pytest.raises(TrainingError, match="no images to calibrate on"):
        pruner.calibrate([], CE)
    with pytest.raises(TrainingError, match="No gradient of the calibration was finite"):
        pruner.calibrate([(images() * torch.nan, labels())], CE)
    with pytest.raises(ConfigError, match="wdpruning learns while the model trains"):
        p3b.Pruner(tiny_vit(), 0.4, "wdpruning")
    with pytest.raises(TrainingError, match="has a schedule, by which it measures"):
        p3b.Pruner(tiny_vit(), 0.4, schedule=p3b.Schedule(0, 1, 2, 1)).calibrate(BATCHES, CE)
