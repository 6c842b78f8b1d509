"""An export computes what the saved model computes, says what it is, and is not there where it does not."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import venv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from exported import NAMES, PREPROCESSING, photos, small_vit
from p3b.deploy import export as export_module
from p3b.deploy.agreement import Agreement, Limit, compare, require
from p3b.deploy.export import FP32, WRITTEN, Evidence, ExportPlan, Tried, choose, distinct, export
from p3b.deploy.metadata import Metadata
from p3b.deploy.photos import Preparation, logits_of, photo_crops
from p3b.deploy.prepared import Prepared
from p3b.deploy.program import ProgramRunner
from p3b.deploy.runners import TorchRunner, open_runner
from p3b.errors import ConfigError, ExportError, WeightsError
from tiny import tiny_vit

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.usefixtures("onnx_is_listed_once")

METADATA = Metadata(NAMES, PREPROCESSING, {"stage": "a test"})
IMAGES = photos(8)
EVIDENCE = Evidence(PREPROCESSING, IMAGES, IMAGES, [(image, number % 5) for number, image in enumerate(IMAGES)])


@pytest.fixture(scope="module")
def model() -> VisionTransformer:
    return small_vit()


@pytest.fixture(scope="module")
def onnx_file(model: VisionTransformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("onnx") / "small.onnx"
    export(model, METADATA, ExportPlan(file, ("folded",)), EVIDENCE)
    return file


@pytest.fixture(scope="module")
def program_file(model: VisionTransformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("pt2") / "small.pt2"
    export(model, METADATA, ExportPlan(file, ("folded",), with_preprocessing=True), EVIDENCE)
    return file


def expected_of(model: VisionTransformer, images: list[Image.Image]) -> Any:
    return logits_of(TorchRunner(model, METADATA), map(Preparation(METADATA), images))


def answers_of(file: Path, images: list[Image.Image], batch_size: int = 32) -> Any:
    runner = open_runner(file)
    return logits_of(runner, map(Preparation(runner.metadata), images), batch_size)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_an_onnx_file_computes_the_model_at_any_batch_size(model: VisionTransformer, onnx_file: Path, batch_size: int) -> None:
    found = compare(expected_of(model, IMAGES), answers_of(onnx_file, IMAGES, batch_size))
    assert found.difference < 1e-5 and found.top1 == 1


def test_a_program_with_preprocessing_takes_images_as_they_are(model: VisionTransformer, program_file: Path) -> None:
    found = compare(expected_of(model, IMAGES), answers_of(program_file, IMAGES))
    assert found.difference < 2e-2 and found.top1 == 1
    assert Preparation(open_runner(program_file).metadata)(IMAGES[1]).shape == (3, 37, 64)


def test_the_description_travels_inside(onnx_file: Path, program_file: Path) -> None:
    for file, takes in ((onnx_file, "tensors"), (program_file, "images")):
        assert open_runner(file).metadata == replace(METADATA, layout="folded", takes=takes)


def test_exports_run_in_an_environment_without_p3b_and_timm(
    model: VisionTransformer, onnx_file: Path, program_file: Path, tmp_path: Path
) -> None:
    """Of torch, numpy, onnxruntime and what these ask for; linked from here, so that nothing is downloaded."""
    python = environment_of(("torch", "numpy", "onnxruntime"), tmp_path / "environment")
    write_inputs(tmp_path)
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    said = subprocess.run(
        [python, "-c", STANDALONE, str(onnx_file), str(program_file), str(tmp_path)],
        check=True, capture_output=True, text=True, env=clean,
    ).stdout  # fmt: skip
    assert_standalone(model, tmp_path, json.loads(said))


def environment_of(packages: Sequence[str], folder: Path) -> Path:
    """The Python of a new environment that holds these packages of ours, what they ask for, and nothing else."""
    venv.create(folder, with_pip=False)
    site = next(folder.glob("lib/python*/site-packages"))
    asked, seen = list(packages), set()
    while asked:
        name = asked.pop()
        try:
            installed = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # asked for elsewhere: on Windows, in older Pythons
            continue
        if installed.name in seen:
            continue
        seen.add(installed.name)
        asked += [requirement.name for each in installed.requires or () if not (requirement := Requirement(each)).extras]
        for part in {file.parts[0] for file in installed.files or ()} - {"..", "__pycache__"}:
            if not (site / part).exists():
                (site / part).symlink_to(str(installed.locate_file(part)))
    return folder / "bin" / "python"


STANDALONE = """
import importlib.util, json, sys
import numpy as np, onnxruntime, torch
for name in ("p3b", "timm", "torchvision"):
    assert importlib.util.find_spec(name) is None, name
onnx_file, program_file, folder = sys.argv[1:]
prepared, image = np.load(folder + "/prepared.npy"), np.load(folder + "/image.npy")
session = onnxruntime.InferenceSession(onnx_file)
names = session.get_modelmeta().custom_metadata_map["class_names"]
np.save(folder + "/onnx.npy", session.run(["logits"], {"images": prepared})[0])
extra = {"p3b.json": ""}
program = torch.export.load(program_file, extra_files=extra).module()
np.save(folder + "/program.npy", program(torch.from_numpy(image)).detach().numpy())
print(json.dumps([json.loads(names), json.loads(json.loads(extra["p3b.json"])["class_names"])]))
"""


def write_inputs(folder: Path) -> None:
    np.save(folder / "prepared.npy", np.stack([Preparation(METADATA)(image) for image in IMAGES]))
    np.save(folder / "image.npy", Preparation(replace(METADATA, takes="images"))(IMAGES[0])[None])


def assert_standalone(model: VisionTransformer, folder: Path, names: list[list[str]]) -> None:
    expected = expected_of(model, IMAGES)
    assert names == [list(NAMES)] * 2
    assert compare(expected, np.load(folder / "onnx.npy")).difference < 1e-5
    assert compare(expected[:1], np.load(folder / "program.npy")).difference < 2e-2


def test_half_precision_halves_the_weights_and_keeps_the_answers(model: VisionTransformer, tmp_path: Path) -> None:
    report = export(model, METADATA, ExportPlan(tmp_path / "half.pt2", ("index",), half=True, max_loss=20), EVIDENCE)
    assert report.metadata.precision == "fp16" and set(report.sides) == {FP32, WRITTEN}
    assert {value.dtype for value in torch.export.load(tmp_path / "half.pt2").state_dict.values()} == {torch.float16}
    assert next(model.parameters()).dtype is torch.float32, "the model itself stays as it was"
    found = compare(expected_of(model, IMAGES), answers_of(tmp_path / "half.pt2", IMAGES))
    assert 0 < found.difference < 1e-2


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_preprocessing_in_the_graph_is_the_one_of_training_to_a_grey_level(mode: str) -> None:
    preprocessing = replace(PREPROCESSING, interpolation=mode)
    metadata = replace(METADATA, preprocessing=preprocessing)
    inside, outside = Preparation(replace(metadata, takes="images")), Preparation(metadata)
    graph = Prepared(torch.nn.Identity(), preprocessing)
    level = (1 / 255 / torch.tensor(preprocessing.std)).view(3, 1, 1)
    for image in [*photos(4), *photo_crops(3), Image.new("L", (31, 90), 128)]:
        off = (graph.prepare(torch.from_numpy(inside(image))[None])[0] - torch.from_numpy(outside(image))).abs()
        assert (off < 1.01 * level).all()


def test_preprocessing_that_no_graph_can_hold_is_refused() -> None:
    with pytest.raises(ConfigError, match="lanczos"):
        Prepared(torch.nn.Identity(), replace(PREPROCESSING, interpolation="lanczos"))


def test_the_smallest_of_the_quickest_layouts_is_taken() -> None:
    tried = {"index": Tried(1.06, 90), "folded": Tried(1.02, 100), "zeros": Tried(1.0, 145)}
    assert choose(tried) == "folded"
    assert choose({"index": Tried(2.0, 1), "zeros": Tried(1.0, 9)}) == "zeros"


def test_layouts_that_come_to_the_same_are_tried_once(model: VisionTransformer) -> None:
    assert distinct(tiny_vit(), ("index", "folded", "zeros")) == ["index"]
    assert distinct(model, ("index", "folded")) == ["index", "folded"]


def test_an_export_that_differs_fails_and_leaves_what_was_there(
    model: VisionTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "small.pt2"
    file.write_text("earlier")
    monkeypatch.setitem(export_module.LIMITS, "fp32", Limit(0.0, 1.0))  # no runtime is exact to the last bit
    changed = replace(EVIDENCE, check=photos(2))
    with pytest.raises(ExportError, match="does not compute what the model computes"):
        export(model, METADATA, ExportPlan(file, ("zeros",)), changed)
    assert [path.name for path in tmp_path.iterdir()] == ["small.pt2"] and file.read_text() == "earlier"


def test_agreement_is_refused_by_either_figure_and_where_a_logit_is_not_finite() -> None:
    expected = np.array([[1.0, 2.0], [4.0, 3.0]], np.float32)
    assert compare(expected, expected) == Agreement(2, 0.0, 1.0)
    swapped = compare(expected, np.array([[1.0, 2.0], [3.0, 3.2]], np.float32))
    assert (swapped.difference, swapped.top1) == (pytest.approx(0.25), 0.5)
    for found in (swapped, compare(expected, np.full((2, 2), np.nan, np.float32))):
        with pytest.raises(ExportError):
            require(found, Limit(0.5, 1.0), "it")
    with pytest.raises(ExportError, match="shape"):
        compare(expected, expected[:1])


def test_int8_is_refused_for_a_program_and_beside_half_precision(model: VisionTransformer, tmp_path: Path) -> None:
    for plan in (ExportPlan(tmp_path / "a.pt2", int8="static"), ExportPlan(tmp_path / "a.onnx", int8="static", half=True)):
        with pytest.raises(ConfigError, match="int8"):
            export(model, METADATA, plan, EVIDENCE)


def test_a_program_that_brings_objects_is_refused(program_file: Path, tmp_path: Path) -> None:
    import zipfile

    file = tmp_path / "hostile.pt2"
    file.write_bytes(program_file.read_bytes())
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("archive/data/constants/opaque_obj_0", b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(WeightsError, match="could run code"):
        ProgramRunner(file)


@pytest.mark.parametrize("ending", [".onnx", ".pt2"])
def test_a_file_that_is_none_is_refused(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"nothing{ending}"
    with pytest.raises(WeightsError, match="There is no"):
        open_runner(file)
    file.write_bytes(b"no model")
    with pytest.raises(WeightsError):
        open_runner(file)
