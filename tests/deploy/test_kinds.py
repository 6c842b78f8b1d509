"""Masked = small = reloaded = .pt2 = ONNX Runtime = OpenVINO, for every kind of model that is pruned."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import p3b
from exported import NAMES, PREPROCESSING
from kinds import KINDS, masked_and_small
from p3b.deploy.agreement import compare
from p3b.deploy.export import Evidence, ExportPlan, export
from p3b.deploy.flat import for_onnx
from p3b.deploy.metadata import Metadata
from p3b.deploy.photos import Preparation, logits_of, photo_crops
from p3b.deploy.runners import TorchRunner, open_runner
from tiny import images, parameters_of

METADATA = Metadata(NAMES, PREPROCESSING, {"stage": "a test"})


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_masked_small_reloaded_and_what_onnx_is_made_of_compute_the_same(kind: str, tmp_path: Path) -> None:
    """Everything but the exporters and the runtimes, which take minutes for all kinds."""
    masked, small = masked_and_small(kind)
    assert parameters_of(small) < parameters_of(masked)
    batch = images(3)
    expected = masked(batch).numpy()
    for model in (small, p3b.load(p3b.save(small, tmp_path)), for_onnx(small)):
        found = compare(expected, model(batch).numpy())
        assert found.top1 == 1 and found.difference < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".onnx", ".pt2"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_agrees_on_256_photos(kind: str, ending: str, tmp_path: Path) -> None:
    """Masked, small, reloaded, run in torch or ONNX Runtime and, where it is installed, in OpenVINO."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    (masked, small), crops, file = masked_and_small(kind), photo_crops(256), tmp_path / f"small{ending}"
    prepared = [Preparation(METADATA)(crop) for crop in crops]
    reloaded: Any = p3b.load(p3b.save(small, tmp_path / "saved"))
    export(reloaded, METADATA, ExportPlan(file, ("folded",)), Evidence(PREPROCESSING, crops))
    expected = logits_of(TorchRunner(masked, METADATA), prepared)
    answers = [logits_of(runner, prepared) for runner in (TorchRunner(small, METADATA), TorchRunner(reloaded, METADATA))]
    answers.append(logits_of(open_runner(file), prepared))
    if ending == ".onnx" and importlib.util.find_spec("openvino"):
        answers.append(openvino_answers(file, np.stack(prepared)))
    for got in answers:
        agreement = compare(expected, got)
        assert agreement.images == 256 and agreement.top1 == 1 and agreement.difference < 1e-4


def openvino_answers(file: Path, batch: Any) -> Any:
    import openvino

    model = openvino.Core().compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1})
    return np.concatenate([model(batch[start : start + 32])[model.output(0)] for start in range(0, len(batch), 32)])
