"""Calls in an order that would lose something are refused, or cannot lose it."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DataParallel
from torch.optim.swa_utils import AveragedModel

import p3b
from p3b.errors import ModelError, TrainingError, UserError
from tiny import images, labels, tiny_vit

CE = nn.functional.cross_entropy
PLAN = p3b.Schedule(start=1, sparse=2, final=4, update_every=1)


def _pruner(model: nn.Module, method: str = "taylor", **options: Any) -> p3b.Pruner:
    return p3b.Pruner(model, 0.4, method, PLAN, **options)


def _step(model: nn.Module, pruner: p3b.Pruner, seed: int = 1) -> None:
    targets = labels(4, seed=seed)
    batch = images(4, seed=seed, dtype=next(model.parameters()).dtype)
    (CE(model(batch), targets) + pruner.loss(CE, targets)).backward()
    pruner.step()
    model.zero_grad()


def _to_the_end(model: nn.Module, pruner: p3b.Pruner) -> p3b.Pruner:
    while not pruner.done:
        _step(model, pruner, pruner.steps_done)
    return pruner


# --- wrappers


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: torch.compile(model, backend="eager"),
        DataParallel,
        lambda model: ModelEmaV3(DataParallel(model)),
        lambda model: AveragedModel(torch.compile(model, backend="eager")),
        lambda model: DataParallel(torch.compile(DataParallel(model), backend="eager")),
    ],
)
def test_wrappers_are_taken_off_for_pruning_and_saving(wrap: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    model = tiny_vit()
    assert torch.equal(p3b.load(p3b.save(wrap(model), tmp_path))(images()), model(images()))
    assert _pruner(wrap(model)).gates.masks


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = tiny_vit()


class _Mae(VisionTransformer):
    pass


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (_Net, r"got _Net\. It holds one: hand in model\.backbone"),
        (
            lambda: _Mae(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3),
            "got _Mae.*build timm's own VisionTransformer",
        ),
        (lambda: torch.jit.trace(tiny_vit(), images()), ".*scripted or traced from"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_to_hand_in_instead_is_told_and_saving_does_not_speak_of_pruning(
    make: Callable[[], nn.Module], told: str, tmp_path: Path
) -> None:
    for act, word in ((_pruner, "pruned"), (lambda model: p3b.save(model, tmp_path), "saved")):
        with pytest.raises(ModelError, match=f"models can be {word}, {told}"):
            act(make())


# --- the life of a pruner


def test_a_model_has_one_pruner_at_a_time() -> None:
    model = tiny_vit()
    before = model(images())
    first = _pruner(model)
    with pytest.raises(ModelError, match="A pruner is attached"):
        _pruner(model)
    _step(model, first)
    first.detach()
    assert torch.equal(model(images()), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    _to_the_end(model, _pruner(model)).finalize()


@pytest.mark.parametrize("call", ["finalize", "shrink", "decide_last", "step"])
def test_a_pruner_that_has_ended_says_so(call: str) -> None:
    model = tiny_vit()
    pruner = _to_the_end(model, _pruner(model))
    pruner.finalize()
    with pytest.raises(TrainingError, match="has ended"):
        getattr(pruner, call)()


def test_a_gated_model_is_not_saved(tmp_path: Path) -> None:
    model = tiny_vit()
    pruner = _to_the_end(model, _pruner(model))
    for gated in (model, deepcopy(model), ModelEmaV3(model)):
        with pytest.raises(ModelError, match=r"Masks are not saved: call pruner\.finalize\(\)"):
            p3b.save(gated, tmp_path)
    p3b.save(pruner.finalize(), tmp_path)


def test_an_optimizer_of_what_was_cut_away_takes_no_step() -> None:
    model = tiny_vit()
    old = torch.optim.SGD(model.parameters(), lr=0.1)
    small = _to_the_end(model, _pruner(model)).finalize()
    small(images()).sum().backward()
    with pytest.raises(TrainingError, match=r"holds blocks\.0\..* as it was before"):
        old.step()
    torch.optim.SGD(small.parameters(), lr=0.1).step()
    del old
    torch.optim.SGD(small.parameters(), lr=0.1).step()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_that_were_cleared_too_early_are_noticed(set_to_none: bool) -> None:
    model = tiny_vit()
    pruner = _pruner(model)
    with pytest.raises(TrainingError, match=r"before optimizer\.(step|zero_grad)\(\)"):
        while not pruner.done:
            CE(model(images()), labels()).backward()
            model.zero_grad(set_to_none)
            pruner.step()


def _heard(*_: object) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda model: model.reset_classifier(7), "head was exchanged"),
        (
            lambda model: setattr(model.blocks[0].mlp, "fc1", deepcopy(model.blocks[0].mlp.fc1)),
            r"blocks\.0\.mlp\.fc1 was exchanged",
        ),
        (lambda model: model.double(), "Move the model, or change its dtype, before"),
        (
            lambda model: model.blocks[1].attn.qkv.register_forward_hook(lambda *_: None),
            r"blocks\.1\.attn\.qkv has a forward hook",
        ),
    ],
)
def test_a_model_that_is_changed_under_its_pruner_is_refused(change: Callable[[nn.Module], object], told: str) -> None:
    model = tiny_vit()
    pruner = _pruner(model)
    _step(model, pruner)
    change(model)
    with pytest.raises(UserError, match=told):
        _to_the_end(model, pruner).finalize()


@torch._dynamo.config.patch(skip_nnmodule_hook_guards=True)
def test_what_was_compiled_before_the_pruner_came_is_compiled_anew() -> None:
    """torch does not watch hooks by default: it once went on with the model as it was without gates."""
    model = tiny_vit(dtype=torch.float64)
    wrapped = torch.compile(model, backend="eager")
    batch = images(dtype=torch.float64)
    dense = wrapped(batch)
    pruner = _to_the_end(model, _pruner(model))
    pruner.decide_last()
    with torch.no_grad():
        masked = wrapped(batch)
        assert not torch.allclose(masked, dense)
        torch.testing.assert_close(masked, model(batch), rtol=1e-9, atol=1e-9)
        small = pruner.shrink()
        torch.testing.assert_close(wrapped(batch), masked, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(small(batch), masked, rtol=1e-9, atol=1e-9)


# --- what is frozen, and what a user has set


@pytest.mark.parametrize("method", ["block_benefit", "taylor", "uniform", "savit"])
@pytest.mark.parametrize("scale", [None, 16.0])
def test_frozen_layers_get_the_masks_that_they_would_get_otherwise(method: str, scale: float | None) -> None:
    masks = []
    for freeze in (False, True):
        model = tiny_vit(dtype=torch.float64)
        pruner = _pruner(model, method, **({"estimator": "linear"} if method == "block_benefit" else {}))
        model.blocks.requires_grad_(not freeze)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        optimizer = torch.optim.SGD(model.head.parameters(), lr=0.0)
        rest = torch.optim.SGD(
            [p for key, p in model.named_parameters() if not key.startswith("head") and p.requires_grad], lr=0.0
        )
        while not pruner.done:
            targets = labels(4, seed=pruner.steps_done)
            loss = CE(model(images(4, seed=pruner.steps_done, dtype=torch.float64)), targets) + pruner.loss(CE, targets)
            scaler.scale(loss).backward()
            for each in (optimizer, rest):
                scaler.unscale_(each)
            pruner.step(scaler)
            for each in (optimizer, rest):
                scaler.step(each)
            scaler.update()
            model.zero_grad()
        pruner.decide_last()
        masks.append(pruner.gates.masks)
        assert all(p.grad is None for p in model.blocks.parameters())
        small = pruner.shrink()
        assert all(p.requires_grad is not freeze for p in small.blocks.parameters())
    assert all(torch.equal(mask, masks[1][gate]) for gate, mask in masks[0].items())


def test_freezing_after_pruning_has_begun_is_refused() -> None:
    model = tiny_vit()
    pruner = _pruner(model)
    for seed in range(2):
        _step(model, pruner, seed)
    model.blocks[1].mlp.requires_grad_(False)
    with pytest.raises(TrainingError, match=r"blocks\.1\.mlp\.fc1\.weight was frozen after"):
        _step(model, pruner)


def test_what_a_user_has_set_stays() -> None:
    model = tiny_vit(init_values=0.1)
    heard: list[int] = []
    model.blocks[0].register_forward_hook(lambda *_: heard.append(0))
    model.norm.register_forward_hook(lambda *_: heard.append(1))
    model.blocks[0].norm1.my_note = model.blocks[0].mlp.fc1.my_note = "kept"  # type: ignore[assignment]
    model.blocks[1].attn.proj.weight.lr_scale = 0.5  # type: ignore[attr-defined]
    pruner = _to_the_end(model, _pruner(model))
    model.train()
    model.blocks[1].eval()
    small = pruner.finalize()
    heard.clear()
    small(images())
    assert heard == [0, 1]
    assert small.blocks[0].norm1.my_note == small.blocks[0].mlp.fc1.my_note == "kept"
    assert small.blocks[1].attn.proj.weight.lr_scale == 0.5
    assert all(module.training for module in small.blocks[0].modules())
    assert not any(module.training for module in small.blocks[1].modules())


# --- images and heads


@pytest.mark.parametrize("estimator", ["low_rank", "paper", "subsampled", "linear", "ridge", "removal"])
def test_images_of_another_size_are_refused_where_probes_read_maps(estimator: str) -> None:
    model = tiny_vit(dynamic_img_size=True)
    pruner = _pruner(model, "block_benefit", estimator=estimator)
    for size in ((48, 48), (16, 64)):  # the second has as many patches, in other places
        batch = torch.randn(4, 3, *size)
        model(batch)
        if estimator in ("linear", "ridge", "removal"):
            pruner.loss(CE, labels(4))
        else:
            with pytest.raises(TrainingError, match=r"set_input_size.*'linear', 'ridge'"):
                pruner.loss(CE, labels(4))


@pytest.mark.parametrize("estimator", ["low_rank", "paper", "subsampled", "linear", "ridge", "removal"])
def test_patch_dropout_is_refused_where_probes_read_maps(estimator: str) -> None:
    model = tiny_vit(patch_drop_rate=0.25).train()
    if estimator in ("linear", "ridge", "removal"):
        _to_the_end(model, _pruner(model, "block_benefit", estimator=estimator)).finalize()
        return
    with pytest.raises(ModelError, match=r"patch_drop_rate=0\.25"):
        _pruner(model, "block_benefit", estimator=estimator)


def test_a_model_without_head_is_pruned_by_methods_without_probes() -> None:
    with pytest.raises(ModelError, match="reset_classifier"):
        _pruner(tiny_vit(num_classes=0), "block_benefit")
    model = tiny_vit(num_classes=0)
    pruner = _pruner(model)
    while not pruner.done:
        model(images(4)).square().sum().backward()
        pruner.step()
    assert pruner.finalize()(images()).shape == (2, 24)


def test_a_head_that_was_replaced_by_hand_counts_as_it_is(tmp_path: Path) -> None:
    model = tiny_vit(num_classes=100)
    model.head = nn.Linear(24, 5)
    small = _to_the_end(model, _pruner(model, "block_benefit")).finalize()
    p3b.save(small, tmp_path, class_names=list("abcde"))
    assert torch.equal(p3b.load(tmp_path)(images()), small.eval()(images()))
