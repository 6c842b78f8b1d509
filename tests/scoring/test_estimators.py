"""Whatever measures the benefit of a block: what adds nothing is worth nothing, what tells the label helps, ranks agree."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from p3b.errors import ConfigError, TrainingError
from p3b.methods.block_benefit import BlockBenefit
from p3b.scoring.estimator import BenefitEstimator
from p3b.scoring.estimators import ESTIMATORS, ProbeSettings, create_estimator
from p3b.scoring.ridge import RidgeProbes
from p3b.scoring.subsampled import Subsampled
from p3b.vit.layout import ModelLayout, read_layout
from thinning import thinned
from tiny import CLASSES, VARIANTS, images, in_ranks, labels, tiny_vit

CE = nn.functional.cross_entropy
YES = torch.tensor(True)
EVERY_ESTIMATOR = pytest.mark.parametrize("name", ESTIMATORS)


def _alone(tensor: Tensor) -> Tensor:
    return tensor


def _estimator(name: str, layout: ModelLayout, reduce: Callable[[Tensor], Tensor] = _alone, **changed: Any) -> Any:
    return create_estimator(name, ProbeSettings(layout, reduce, torch.device("cpu"), torch.float32, **changed))


def _learn(estimator: BenefitEstimator, stream: list[Tensor], targets: Tensor, steps: int) -> list[Tensor]:
    """Benefits of so many steps on one batch, of those that are due."""
    found = []
    for _ in range(steps):
        if estimator.due():
            benefits, loss = estimator.observe(stream, CE, targets)
            found.append(benefits)
            if loss.requires_grad:
                loss.backward()
        estimator.train(YES, None)
    return found


def _told(samples: int = 40, depth: int = 1, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """A stream whose first block adds the label to noise and whose others add nothing."""
    targets = torch.arange(samples) % CLASSES
    noise = 0.3 * torch.randn(samples, 17, 24, generator=torch.Generator().manual_seed(seed))
    told = noise.clone()
    told[:, :, :CLASSES] += nn.functional.one_hot(targets, CLASSES)[:, None]
    return [noise, *[told] * (2 * depth)], targets


@EVERY_ESTIMATOR
def test_a_block_that_adds_nothing_has_exactly_no_benefit_and_one_that_adds_the_label_has_some(name: str) -> None:
    layout = read_layout(tiny_vit(depth=2))
    estimator = _estimator(name, layout, lr=0.01)
    found = [benefits for step in range(60) for benefits in _learn(estimator, *_told(depth=2, seed=step), steps=1)]
    assert len(found) == (15 if name == "subsampled" else 60)
    assert all((benefits[:, 1:] == 0).all() for benefits in found)
    assert (found[-1][:, 0] > 0.2).all()
    assert found[-1].shape == (2, 4) and not found[-1].requires_grad


@pytest.mark.parametrize(
    ("name", "variant"), thinned(ESTIMATORS, ["plain", "distilled", "registers", "no class token"], 2, whole=0)
)
def test_every_kind_of_prefix_and_of_target_is_read(name: str, variant: str) -> None:
    layout = read_layout(tiny_vit(**VARIANTS[variant]))
    generator = torch.Generator().manual_seed(1)
    stream = [torch.randn(8, layout.tokens, 24, generator=generator) for _ in range(5)]
    soft = nn.functional.one_hot(labels(8), CLASSES).float()
    hard_found, soft_found = (_learn(_estimator(name, layout), stream, targets, 9)[-1] for targets in (labels(8), soft))
    assert hard_found.isfinite().all() and (hard_found != 0).all()
    torch.testing.assert_close(hard_found, soft_found, rtol=1e-3, atol=1e-4)
    changed = [x.clone() for x in stream]
    for x in changed:
        x[:, 1 : layout.prefix_tokens] = 7.0  # distillation and register tokens are nobody's business
    torch.testing.assert_close(_learn(_estimator(name, layout), changed, labels(8), 9)[-1], hard_found, rtol=0, atol=0)


@EVERY_ESTIMATOR
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_two_ranks_measure_and_learn_what_one_process_does_on_the_joint_batch(name: str, micro_batches: int) -> None:
    layout = read_layout(tiny_vit())
    generator = torch.Generator().manual_seed(1)
    stream, targets = [torch.randn(16, 17, 24, generator=generator) for _ in range(5)], labels(16)
    initial = _estimator(name, layout).state_dict()

    def run(rank: int, reduce: Callable[[Tensor], Tensor], ranks: int = 2) -> tuple[Tensor, dict[str, Tensor]]:
        settings = ProbeSettings(layout, reduce, torch.device("cpu"), torch.float32, lr=1e-3)
        inner = Subsampled(ESTIMATORS["paper"](settings), every=2, share=1.0)  # another share is of other samples
        estimator: Any = inner if name == "subsampled" else create_estimator(name, settings)
        estimator.load_state_dict(deepcopy(initial))
        sums = torch.zeros(2, 4)
        for _ in range(10):
            if estimator.due():
                for micro in range(micro_batches):
                    share = slice(micro + micro_batches * rank, None, ranks * micro_batches)
                    benefits, loss = estimator.observe([x[share] for x in stream], CE, targets[share])
                    (loss / micro_batches).backward() if loss.requires_grad else None
                    sums = sums + benefits / micro_batches
            estimator.train(YES, None)
        return sums, _tensors(estimator.state_dict())

    (first, state), (second, other_state) = in_ranks(2, run)
    whole, whole_state = run(0, _alone, ranks=1)
    assert all(torch.equal(state[key], other_state[key]) for key in state)
    torch.testing.assert_close((first + second) / 2, whole, rtol=2e-3, atol=2e-4)
    moments = [key for key in state if "exp_avg_sq" not in key]
    assert all(torch.allclose(state[key].double(), whole_state[key].double(), rtol=5e-2, atol=5e-3) for key in moments)


@EVERY_ESTIMATOR
def test_going_on_from_a_state_is_going_on_bit_for_bit(name: str) -> None:
    layout = read_layout(tiny_vit())
    generator = torch.Generator().manual_seed(2)
    batches = [([torch.randn(8, 17, 24, generator=generator) for _ in range(5)], labels(8, seed=s)) for s in range(12)]
    straight, stopped = (_estimator(name, layout) for _ in range(2))
    expected = [benefits for stream, targets in batches for benefits in _learn(straight, stream, targets, 1)]
    found = [benefits for stream, targets in batches[:5] for benefits in _learn(stopped, stream, targets, 1)]
    resumed = _estimator(name, layout, seed=9)
    resumed.load_state_dict(deepcopy(stopped.state_dict()))
    _learn(stopped, *batches[0], 3)  # what goes on elsewhere does not reach into the state
    found += [benefits for stream, targets in batches[5:] for benefits in _learn(resumed, stream, targets, 1)]
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))
    ours, theirs = _tensors(resumed.state_dict()), _tensors(straight.state_dict())
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@EVERY_ESTIMATOR
def test_a_step_whose_gradients_are_not_finite_teaches_nothing(name: str) -> None:
    layout = read_layout(tiny_vit())
    stream, targets = [torch.randn(8, 17, 24) for _ in range(5)], labels(8)
    estimator = _estimator(name, layout)
    before = _tensors(deepcopy(estimator.state_dict()))
    _, loss = estimator.observe(stream, CE, targets)
    if loss.requires_grad:
        loss.backward()
    estimator.train(torch.tensor(False), None)
    after = _tensors(estimator.state_dict())
    assert all(torch.equal(after[key], before[key]) for key in before if "prior" not in key)


@EVERY_ESTIMATOR
def test_memory_is_not_quadratic_in_the_classes(name: str) -> None:
    sizes = {}
    for classes in (1_000, 10_000):
        layout = read_layout(tiny_vit(num_classes=classes, depth=1))
        estimator = _estimator(name, layout)
        _learn(estimator, [torch.randn(4, 17, 24) for _ in range(3)], torch.tensor([0, 1, 2, classes - 1]), 1)
        tensors = _tensors(estimator.state_dict()).values()
        sizes[classes] = sum(tensor.numel() for tensor in tensors)
        assert max(tensor.numel() for tensor in tensors) <= 6 * 24 * max(classes, 24 * 9)
    assert sizes[10_000] < 10.5 * sizes[1_000]


@EVERY_ESTIMATOR
def test_under_autocast_benefits_are_nearly_those_of_float32(name: str) -> None:
    layout = read_layout(tiny_vit())
    stream, targets = [torch.randn(16, 17, 24, generator=torch.Generator().manual_seed(s)) for s in range(5)], labels(16)
    wide = _learn(_estimator(name, layout), stream, targets, 9)[-1]
    with torch.autocast("cpu", torch.bfloat16):
        narrow = _learn(_estimator(name, layout), stream, targets, 9)[-1]
    torch.testing.assert_close(narrow, wide, rtol=0.3, atol=0.05)


@EVERY_ESTIMATOR
def test_a_model_is_pruned_by_it_and_its_gradients_are_those_without(name: str) -> None:
    model, plain = tiny_vit(), tiny_vit()
    method = BlockBenefit(model, read_layout(model), 0.4, _alone, estimator=name)
    params = {block.name: 100 for block in read_layout(model).blocks}
    for step in range(5):
        loss = CE(model(images(4)), labels(4))
        (loss + method.loss(CE, labels(4))).backward()
        CE(plain(images(4)), labels(4)).backward()
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            assert ours.grad is not None and theirs.grad is not None
            assert torch.equal(ours.grad, theirs.grad)
        method.collect(YES)
        method.train_own(YES, None)
        decision = method.renew(params, 1.0, 0.1)  # after every step, so that some intervals see no benefit
        looked = name != "subsampled" or step % 4 == 0
        assert all((block.benefit_cls is not None) == looked for block in decision.blocks)
        assert all(block.importance is not None for block in decision.blocks)
    method.detach()


@pytest.mark.parametrize("name", ["linear", "low_rank"])
def test_the_class_token_is_read_as_in_the_paper(name: str) -> None:
    """Its probe is linear there too, and begins with the same weights: only the patches are read by other means."""
    layout = read_layout(tiny_vit())
    batches = [_told(depth=2, seed=seed) for seed in range(4)]
    paper, cheap = _estimator("paper", layout), _estimator(name, layout)
    for stream, targets in batches:
        (theirs,), (ours,) = _learn(paper, stream, targets, 1), _learn(cheap, stream, targets, 1)
        torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=1e-6)
        assert not torch.equal(ours[1, :1], theirs[1, :1])


def test_between_its_steps_a_subsampled_estimator_keeps_nothing_of_the_stream() -> None:
    model = tiny_vit()
    method = BlockBenefit(model, read_layout(model), 0.4, _alone, estimator="subsampled")
    for step in range(6):
        loss = CE(model(images(4)), labels(4))
        assert len(method._taps._stream_SND) == (5 if step % 4 == 0 else 0)
        added = method.loss(CE, labels(4))
        assert added.requires_grad == (step % 4 == 0) and (added > 0) == (step % 4 == 0)
        (loss + added).backward()
        method.collect(YES)
        method.train_own(YES, None)


def test_a_ridge_probe_solves_its_equations_and_does_not_mind_scale_or_shift() -> None:
    layout = read_layout(tiny_vit(depth=1))
    stream, targets = _told(200)
    scale, shift = torch.logspace(-3, 3, 24), torch.linspace(-50, 50, 24)
    plain, moved = RidgeProbes(layout, _alone, torch.device("cpu")), RidgeProbes(layout, _alone, torch.device("cpu"))
    _learn(plain, stream, targets, 1)
    tokens = torch.cat([stream[0][:, 0], stream[1][:, 0]]).double()
    centred, y = tokens - tokens.mean(0), nn.functional.one_hot(targets, CLASSES).double().repeat(2, 1)
    covariance = centred.T @ centred / 400
    expected = torch.linalg.solve(covariance + 0.03 * covariance.diagonal().diag(), centred.T @ (y - y.mean(0)) / 400)
    torch.testing.assert_close(plain._state["weight"][0, 0].double(), expected, rtol=1e-4, atol=1e-6)
    far = [x * scale + shift * scale for x in stream]
    far[0][:, :, 7] = far[1][:, :, 7] = far[2][:, :, 7] = 1e4  # a channel that never moves
    _learn(moved, far, targets, 1)
    a, b = (_learn(each, features, targets, 20)[-1] for each, features in ((plain, stream), (moved, far)))
    torch.testing.assert_close(a, b, rtol=0.05, atol=0.02)


def test_the_factor_of_a_ridge_probe_comes_to_the_least_cross_entropy() -> None:
    layout = read_layout(tiny_vit(depth=1))
    probes = RidgeProbes(layout, _alone, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        targets = torch.randint(CLASSES, (64,), generator=generator)
        x = torch.randn(64, 17, 24, generator=generator)
        x[:, :, :CLASSES] += 0.8 * nn.functional.one_hot(targets, CLASSES)[:, None]
        _learn(probes, [x, x, x], targets, 1)
    state = probes._state
    signal = CLASSES * (x[:, 0] @ state["weight"][0, 0] + state["offset"][0, 0])
    losses = {a: CE(state["prior"].log() + a * signal, targets).item() for a in torch.arange(0.0, 4.0, 0.1).tolist()}
    found = CE(state["prior"].log() + state["factor"][0, 0].float() * signal, targets).item()
    assert min(losses.values()) - 1e-3 < found < min(losses.values()) + 0.02 < losses[0.0] - 0.1


@pytest.mark.parametrize("name", ["linear", "low_rank"])
def test_a_state_of_other_probes_is_refused_in_words(name: str) -> None:
    """Those of another estimator, and those of an earlier version, which kept every block's apart."""
    layout = read_layout(tiny_vit())
    estimator = _estimator(name, layout)
    before = deepcopy(estimator.state_dict())
    for other in (_estimator("paper", layout), _estimator(name, read_layout(tiny_vit(depth=1)))):
        with pytest.raises(ValueError, match=r"its probes are not those .* version of P3B"):
            estimator.load_state_dict(other.state_dict())
    after = _tensors(estimator.state_dict())
    assert all(torch.equal(after[key], value) for key, value in _tensors(before).items())


@pytest.mark.parametrize("name", ["paper", "linear", "low_rank"])
def test_weights_decay_and_biases_and_norms_do_not(name: str) -> None:
    """With no gradient AdamW does nothing but decay."""
    estimator = _estimator(name, read_layout(tiny_vit()), lr=0.1, weight_decay=0.5)
    before = {key: parameter.detach().clone() for key, parameter in estimator.probes.named_parameters()}
    for parameter in estimator.probes.parameters():
        parameter.grad = torch.zeros_like(parameter)
    estimator.train(YES, None)
    decayed = {key for key, parameter in estimator.probes.named_parameters() if not torch.equal(parameter, before[key])}
    if name == "paper":
        assert decayed == {key for key, parameter in before.items() if parameter.ndim > 1}
    else:
        convolutions = {"rows.narrow", "rows.first", "rows.second"} if name == "low_rank" else set()
        assert decayed == {"rows.cls_weight", "rows.patch_weight"} | convolutions


def test_wrong_names_and_targets_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"estimator of block benefit 'rigde'.*ridge"):
        BlockBenefit(tiny_vit(), read_layout(tiny_vit()), 0.4, _alone, estimator="rigde")
    layout = read_layout(tiny_vit())
    with pytest.raises(TrainingError, match=r"--prune-benefit linear"):
        _estimator("ridge", layout).observe([torch.zeros(4, 17, 24)] * 5, CE, torch.zeros(4, 3))


def _tensors(state: Any, prefix: str = "") -> dict[str, Tensor]:
    """All tensors in a state, by their way through it."""
    if isinstance(state, Tensor):
        return {prefix: state}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    return {key: tensor for name, value in items for key, tensor in _tensors(value, f"{prefix}/{name}").items()}
