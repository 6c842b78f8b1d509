"""Weights of a random model, under random names in a random file, loaded into another random model: the same, said, or refused.

The source is a Vision Transformer of random make or a model of another family (rotary, BEiT, EVA, CaiT, XCiT, Swin, ...). Its
state dict gets a random prefix, envelope and file ending. The target is a Vision Transformer of random make. Then either the
target computes the source's features, or the report names what differs, or the weights are refused. Anything else would be a
model that silently computes something else.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from p3b.errors import UserError
from p3b.storage.load_report import LoadReport
from p3b.storage.models import build_model

TARGET = "vit_tiny_patch16_224"
SIZE = 32
SHAPE: dict[str, Any] = {"img_size": SIZE, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
MAKES: tuple[dict[str, Any], ...] = (
    {},
    {"init_values": 0.1},
    {"qkv_bias": False},
    {"reg_tokens": 2},
    {"class_token": False, "global_pool": "avg"},
    {"class_token": False, "global_pool": "map"},
    {"pre_norm": True},
    {"global_pool": "avg", "fc_norm": True},
    {"no_embed_class": True, "reg_tokens": 4},
    {"mlp_ratio": 2.0},
    {"depth": 3},
    {"patch_size": 4},
    {"img_size": 48},
    {"in_chans": 1},
    {"embed_dim": 36},
)
FAMILIES = (
    "vit_small_patch16_dinov3",
    "vit_small_patch16_rope_224",
    "vit_small_patch16_rope_ape_224",
    "vit_small_patch16_rope_mixed_224",
    "eva02_tiny_patch14_224",
    "beit_base_patch16_224",
    "cait_xxs24_224",
    "vit_relpos_small_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "xcit_nano_12_p16_224",
)
PREFIXES = ("", "", "module.", "model.", "_orig_mod.module.", "backbone.", "teacher.backbone.", "timm_model.")
ENVELOPES = (None, None, "model", "state_dict", "model_state_dict", "teacher", "ema")
ENDINGS = (".pth", ".pt", ".bin", ".ckpt", ".pth.tar", ".pkl", ".safetensors")


def cases(count: int, seed: int, work: Path) -> Iterator[dict[str, Any]]:
    """So many random pairs of models.

    Args:
        count: cases in all.
        seed: the same seed draws the same cases.
        work: folder for the files.

    Yields:
        One case each: part, kind, case, ok, detail, and the outcome: "exact", "said" (a difference that the report names),
        "refused", or what was wrong.
    """
    torch.set_num_threads(1)
    chance = random.Random(seed)
    for number in range(count):
        kind, name, make, source = _source(chance, number)
        target = make if chance.random() < 0.5 else chance.choice(MAKES)
        file = _write(chance, source.state_dict(), work)
        outcome, detail = _load(source, target, file)
        file.unlink()
        case = f"{number}: {name} in {file.name.partition('.')[2]} into {target or 'a plain ViT'}"
        ok = outcome in ("exact", "said", "refused")
        yield {"part": "weights", "kind": kind, "case": case, "ok": ok, "detail": detail, "outcome": outcome}


def _source(chance: random.Random, number: int) -> tuple[str, str, dict[str, Any], nn.Module]:
    """Kind, name, make of the nearest Vision Transformer, and the model that the weights are of."""
    torch.manual_seed(number)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if chance.random() < 0.35:
            name = chance.choice(FAMILIES)
            own = {} if name.startswith("xcit") else {"patch_size": SHAPE["patch_size"]}
            sized = {key: SHAPE[key] for key in ("img_size", "embed_dim", "depth", "num_heads")}
            model = timm.create_model(name, num_classes=5, **{**sized, **own})
            return "another family", name, {}, model.eval()
        make = chance.choice(MAKES)
        model = timm.create_model(TARGET, num_classes=5, **{**SHAPE, **make})
        return "a Vision Transformer", str(make), make, model.eval()


def _write(chance: random.Random, state: dict[str, Tensor], work: Path) -> Path:
    """The state dict as people keep it; returns the file."""
    prefix, envelope, ending = chance.choice(PREFIXES), chance.choice(ENVELOPES), chance.choice(ENDINGS)
    named = {f"{prefix}{key}": value.contiguous() for key, value in state.items()}
    file = work / f"weights{ending}"
    if ending == ".safetensors":
        safetensors.torch.save_file(named, file)
    else:
        torch.save(named if envelope is None else {"epoch": 3, envelope: named}, file)
    return file


def _load(source: nn.Module, target: dict[str, Any], file: Path) -> tuple[str, str]:
    arguments = {**SHAPE, **target}
    try:
        model, report = build_model(TARGET, num_classes=5, model_kwargs=arguments, weights=file)
    except UserError as error:
        return "refused", str(error)[:300]
    assert report is not None
    found = _features(model.eval(), arguments)
    expected = _features(source, arguments)
    if (
        found is not None
        and expected is not None
        and found.shape == expected.shape
        and torch.allclose(found, expected, atol=1e-5)
    ):
        return "exact", "the same features"
    return (
        ("said", "; ".join(_said(report))[:300]) if _said(report) else ("silent", "other features, and nothing is said of it")
    )


def _said(report: LoadReport) -> list[str]:
    """What the report says that a user must know: the notes on names and files alone say nothing of other features."""
    doubts = [note for note in report.notes if "guess" in note]
    return [*report.replaced, *report.resampled, *report.missing, *report.unexpected, *doubts]


@torch.no_grad()
def _features(model: nn.Module, arguments: dict[str, Any]) -> Tensor | None:
    """Features of the same random images; None where the model takes none of this size."""
    shape = (2, arguments.get("in_chans", 3), arguments["img_size"], arguments["img_size"])
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    try:
        features: Tensor = model.forward_features(images)  # type: ignore[operator]
    except (RuntimeError, AssertionError, ValueError):
        return None
    return features
