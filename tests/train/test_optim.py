"""Optimizer groups, learning rates, precision."""

from __future__ import annotations

import pytest
import torch

from p3b.errors import ConfigError
from p3b.train.optim import Precision, build_optimizer, cosine_schedule, scaled_lr
from tiny import tiny_vit

CPU = torch.device("cpu")


def names_by_decay(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> dict[float, set[str]]:
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    return {group["weight_decay"]: {name_of[id(p)] for p in group["params"]} for group in optimizer.param_groups}


def test_every_parameter_is_in_its_group() -> None:
    model = tiny_vit(init_values=0.1, reg_tokens=2, depth=1)
    groups = names_by_decay(build_optimizer(model, "adamw", 0.1, 0.05), model)
    block = "blocks.0"
    assert groups == {
        0.05: {
            "patch_embed.proj.weight", f"{block}.attn.qkv.weight", f"{block}.attn.proj.weight", f"{block}.mlp.fc1.weight",
            f"{block}.mlp.fc2.weight", "head.weight",
        },
        0.0: {
            "cls_token", "reg_token", "pos_embed", "patch_embed.proj.bias", "norm.weight", "norm.bias", "head.bias",
            f"{block}.norm1.weight", f"{block}.norm1.bias", f"{block}.attn.qkv.bias", f"{block}.attn.proj.bias",
            f"{block}.ls1.gamma", f"{block}.norm2.weight", f"{block}.norm2.bias", f"{block}.mlp.fc1.bias",
            f"{block}.mlp.fc2.bias", f"{block}.ls2.gamma",
        },
    }  # fmt: skip


def test_both_heads_and_tokens_of_a_distilled_model_are_in_their_group() -> None:
    model = tiny_vit("deit_tiny_distilled_patch16_224", depth=1)
    groups = names_by_decay(build_optimizer(model, "adamw", 0.1, 0.05), model)
    assert {"cls_token", "dist_token", "head_dist.bias"} <= groups[0.0]
    assert {"head.weight", "head_dist.weight"} <= groups[0.05]
    assert groups[0.0] | groups[0.05] == {name for name, _ in model.named_parameters()}


def test_frozen_parameters_are_in_no_group() -> None:
    model = tiny_vit(depth=1)
    model.patch_embed.requires_grad_(False)
    groups = names_by_decay(build_optimizer(model, "sgd", 0.1, 0.05), model)
    assert not any(name.startswith("patch_embed") for names in groups.values() for name in names)


def test_layers_learn_more_slowly_towards_the_images() -> None:
    """Whatever the decay, the groups together are those of a plain optimizer; timm counts the tokens' layer as one."""
    model = tiny_vit(depth=2)
    optimizer = build_optimizer(model, "adamw", 0.1, 0.05, layer_decay=0.5)
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    rate = {name_of[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    decays = {name_of[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    plain = names_by_decay(build_optimizer(model, "adamw", 0.1, 0.05), model)
    assert {decay: {name for name, own in decays.items() if own == decay} for decay in plain} == plain
    assert rate["head.weight"] == 0.1 and rate["blocks.1.mlp.fc1.weight"] == pytest.approx(0.05)
    assert rate["blocks.0.mlp.fc1.weight"] == pytest.approx(0.025) and rate["pos_embed"] == pytest.approx(0.0125)
    scheduler = cosine_schedule(optimizer, 4, 10, 0.01, 0)
    for step, head in ((0, 0.1), (40, 0.01)):
        scheduler.step_update(step)
        now = {name_of[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert now["head.weight"] == pytest.approx(head) and now["blocks.0.mlp.fc1.weight"] == pytest.approx(head / 4)


def test_learning_rate_is_meant_for_512_images_a_step() -> None:
    assert scaled_lr(5e-4, 512) == 5e-4
    assert scaled_lr(5e-4, 64 * 4 * 2) == 5e-4
    assert scaled_lr(5e-4, 64) == 5e-4 / 8


@pytest.mark.parametrize("warmup_epochs", [0, 1, 3])
def test_cosine_starts_at_the_rate_and_ends_at_the_least(warmup_epochs: int) -> None:
    epochs, steps = 5, 4
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = cosine_schedule(optimizer, epochs, steps, 0.01, warmup_epochs)
    rates = [optimizer.param_groups[0]["lr"]]
    for done in range(1, epochs * steps + 1):
        schedule.step_update(done)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[-1] == pytest.approx(0.01)
    assert max(rates) == pytest.approx(rates[warmup_epochs * steps]) == pytest.approx(0.1)
    assert rates[: warmup_epochs * steps + 1] == sorted(rates[: warmup_epochs * steps + 1])
    falling = rates[warmup_epochs * steps :]
    assert falling == sorted(falling, reverse=True)
    middle = (warmup_epochs * steps + epochs * steps) / 2
    if middle.is_integer():
        assert rates[int(middle)] == pytest.approx(0.055)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("adamv", "Unknown optimizer 'adamv'. Did you mean .*'adamw'"),
        ("adahessian", "second derivatives"),
        ("lookahead_adamv", "Unknown optimizer"),
    ],
)
def test_an_optimizer_that_cannot_be_used_is_refused(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build_optimizer(tiny_vit(depth=1), name, 0.1, 0.05)


def test_precision_by_name() -> None:
    assert Precision.choose("fp32", CPU).dtype is None
    assert Precision.choose("bf16", CPU).dtype is torch.bfloat16
    assert Precision.choose("fp16", CPU).dtype is torch.float16
    native = torch.cpu.get_capabilities().get("avx512_bf16", False)
    assert Precision.choose("auto", CPU).dtype is (torch.bfloat16 if native else None), "where it is emulated it is slow"
    with pytest.raises(ConfigError, match=r"Unknown precision 'fp8'.*fp16"):
        Precision.choose("fp8", CPU)


def test_only_fp16_scales_its_loss() -> None:
    assert [Precision.choose(name, CPU).scaler().is_enabled() for name in ("fp32", "bf16", "fp16")] == [False, False, True]


def test_autocast_computes_in_its_dtype() -> None:
    layer, x = torch.nn.Linear(4, 4), torch.ones(1, 4)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        with Precision.choose(name, CPU).autocast():
            assert layer(x).dtype is dtype
