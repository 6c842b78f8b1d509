"""int8: layers that lose too much stay in float, and a file that loses too much is not written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from exported import PREPROCESSING, photos, small_vit
from p3b.deploy.agreement import compare
from p3b.deploy.choice import with_layout
from p3b.deploy.export import FP32, WRITTEN, Evidence, ExportPlan, export
from p3b.deploy.int8 import by_sensitivity, dynamic_writer, quantisable, quantise, static_writer
from p3b.deploy.metadata import Metadata
from p3b.deploy.onnx_file import OnnxRunner, write_onnx
from p3b.deploy.photos import Preparation, logits_of
from p3b.errors import ExportError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.usefixtures("onnx_is_listed_once")

METADATA = Metadata(None, PREPROCESSING)
IMAGES = photos(8)
LAYERS = [f"layer {number}" for number in range(8)]
HARM = {"layer 2": 30.0, "layer 5": 20.0, "layer 7": 5.0}
"""Points that a layer costs when it is quantised."""


def write(file: Path, layers: Sequence[str]) -> None:
    file.write_text("\n".join(layers))


def harm(file: Path) -> float:
    return sum(HARM.get(layer, 0.1) for layer in file.read_text().splitlines())


def test_layers_that_lose_the_most_stay_in_float_and_no_more_than_needed(tmp_path: Path) -> None:
    file = tmp_path / "file"
    found = quantise(LAYERS, write, file, loss=harm, error=harm, max_loss=6.0)
    assert found.in_float == ("layer 2", "layer 5") and found.layers == 8
    assert harm(file) == pytest.approx(found.loss) and set(file.read_text().splitlines()) == set(LAYERS) - {
        "layer 2",
        "layer 5",
    }


def test_nothing_is_measured_where_all_layers_can_be_quantised(tmp_path: Path) -> None:
    def never(_file: Path) -> float:
        raise AssertionError

    found = quantise(LAYERS, write, tmp_path / "file", loss=harm, error=never, max_loss=60.0)
    assert found.in_float == ()


def test_more_than_half_of_the_layers_in_float_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"4 of 8 layers in float; --max-loss allows 0\.1"):
        quantise(LAYERS, write, tmp_path / "file", loss=harm, error=harm, max_loss=0.1)
    with pytest.raises(ExportError, match="no layer that can be quantised"):
        quantise([], write, tmp_path / "file", loss=harm, error=harm, max_loss=1.0)


def test_sensitivity_is_measured_for_each_layer_alone(tmp_path: Path) -> None:
    assert by_sensitivity(LAYERS, write, tmp_path / "file", harm)[:3] == ["layer 2", "layer 5", "layer 7"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A float32 file for each kind."""
    folder, example = tmp_path_factory.mktemp("fp32"), torch.zeros(2, 3, 32, 32)
    found = {kind: folder / f"{kind}.onnx" for kind in ("static", "dynamic")}
    for kind, file in found.items():
        write_onnx(with_layout(small_vit(), "folded"), example, file, flat=kind == "static")
    return found


LOSS = 0.2
"""Largest relative difference of a logit in int8. Processors without VNNI saturate sums of products, which costs some more."""


def count(file: Path, kind: str) -> int:
    """Nodes of a kind in a file."""
    return sum(node.op_type == kind for node in onnx.load(file).graph.node)


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_int8_is_close_and_spares_the_layers_that_stay_in_float(files: dict[str, Path], tmp_path: Path, kind: str) -> None:
    source, prepared = files[kind], [Preparation(METADATA)(image) for image in IMAGES]
    writer = static_writer(source, [np.stack(prepared)]) if kind == "static" else dynamic_writer(source)
    layers = quantisable(source, kind)
    assert len(layers) == (10 if kind == "static" else 6), "queries, keys, values and proj have a Gemm each, patches too"
    expected, file = logits_of(OnnxRunner(source, METADATA), prepared), tmp_path / "int8.onnx"
    differences, quantised = [], []
    for chosen in (layers, layers[:1]):
        writer(file, chosen)
        quantised.append(count(file, "QuantizeLinear" if kind == "static" else "MatMulInteger"))
        differences.append(compare(expected, logits_of(OnnxRunner(file, METADATA), prepared)).difference)
    assert differences[0] < LOSS and differences[1] > 1e-5
    assert quantised[0] > quantised[1] == 1


def test_an_int8_file_says_what_it_is_and_what_it_loses(tmp_path: Path) -> None:
    """In dynamic int8; static int8 says so at the end of `p3b export` (tests/commands/test_export_command.py)."""
    file = tmp_path / "int8.onnx"
    labelled = [(image, number % 5) for number, image in enumerate(IMAGES)]
    plan = ExportPlan(file, ("folded",), int8="dynamic", max_loss=100)
    report = export(small_vit(), METADATA, plan, Evidence(PREPROCESSING, IMAGES, IMAGES, labelled))
    assert OnnxRunner(file).metadata.precision == "int8 dynamic"
    base, written = report.sides[FP32], report.sides[WRITTEN]
    assert report.quantised is not None and base.top1 is not None and written.top1 is not None
    assert report.quantised.loss == pytest.approx(base.top1 - written.top1)
    assert written.agreement is not None and 1e-4 < written.agreement.difference < LOSS
