"""The check over timm's models finds what is wrong, and asks each model once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
from torch import nn

import timm_models
from harness.records import read_lines
from p3b.storage.catalogue import entry
from p3b.vit.anatomy.attention import SelfAttention
from p3b.vit.layout import read_layout
from tiny import tiny_vit

STAGES = {"patch_size": 2, "embed_dim": 12, "depths": (1, 1), "num_heads": (2, 3), "window_size": 4, "img_size": 16}


@pytest.fixture(autouse=True)
def _classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm_models, "CLASSES", 5)


@pytest.mark.parametrize(
    "build",
    [tiny_vit, lambda: timm.create_model("swinv2_tiny_window8_256", num_classes=5, **STAGES)],
    ids=["ViT", "Swin v2"],
)
def test_what_is_exact_has_no_problems(build: type[nn.Module]) -> None:
    assert not timm_models.problems_of(build())


def test_a_cut_that_forgets_to_scale_queries_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SelfAttention, "rescale", lambda *_: None)
    found = timm_models.problems_of(tiny_vit())
    assert any("small and masked differ" in each for each in found)


def test_an_element_costs_what_goes_with_it_at_most() -> None:
    block = read_layout(tiny_vit()).blocks[0]
    assert (
        timm_models.costliest_element(block) == 24 * 3 * 3 + 9 + 24 * 3
    )  # a channel of three heads: q, k, v with biases, and proj


def test_names_that_are_one_model_here_are_known_as_one() -> None:
    small, large, other = (entry(name) for name in ("vit_tiny_patch16_224", "vit_tiny_patch16_384", "deit3_small_patch16_224"))
    first, again, third = (timm_models.same_model(each, timm_models.arguments_of(each)) for each in (small, large, other))
    assert first == again != third


def test_what_crashes_or_is_refused_after_all_is_told() -> None:
    told = timm_models.check(entry("vit_tiny_patch16_224"), {"depth": 1, "img_size": 32, "patch_drop_rate": 0.5})
    assert told[0].startswith("accepted, then refused: patch_drop_rate=0.5")
    headless = {"depth": 1, "img_size": 32, "num_classes": 0}
    assert not timm_models.check(entry("vit_tiny_patch16_224"), headless)
    crashed = timm_models.check(replace(entry("vit_tiny_patch16_224"), name="no such model"), {})
    assert crashed[0].startswith("crashed")


def test_a_module_becomes_a_row() -> None:
    made_by = {"command": "c", "commit": "0" * 40, "hardware": {"machine": "m", "cores": 2, "accelerator": None}}
    lines = [{"name": module, "result": timm_models.look(module), **made_by} for module in ("convit",)]
    text = "\n".join(timm_models.tables(lines))
    assert "| `convit` | none | 0 of 3 |" in text and "Not looked at yet: vision_transformer, " in text


def test_what_is_recorded_holds() -> None:
    for line in read_lines(timm_models.PART.lines):
        assert {"command", "commit", "hardware", "versions", "seconds", "date"} <= line.keys()
        result = line["result"]
        assert not result["wrong"] and result["exact"] + len(result["unasked"]) == result["accepted"]
