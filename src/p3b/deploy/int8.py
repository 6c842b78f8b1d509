"""An ONNX file with 8-bit products, by ONNX Runtime's own quantisation; layers that lose the most stay in float.

    static      activations have scales of their own, found beforehand on calibration images (QDQ nodes around each product)
    dynamic     activations are scaled anew in every call; no calibration, fewer kinds of layers, slower

Weights are int8 with a scale for each output channel. Products with weights and the patch embedding are quantised; what
attention multiplies, norms, softmax and additions stay in float. So does the output of a product: it is not rounded
a second time.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from p3b.deploy.onnx_file import INPUT
from p3b.errors import ExportError

Kind = Literal["static", "dynamic"]
KINDS: Mapping[Kind, tuple[str, ...]] = {"static": ("Conv", "MatMul", "Gemm"), "dynamic": ("MatMul",)}
"""What is quantised, by ONNX's names."""
MOST_IN_FLOAT = 0.5
"""Share of the layers that may stay in float: beyond it nothing is gained."""


@dataclass(frozen=True)
class Quantised:
    """What came of it.

    Attributes:
        layers: how many layers can be quantised.
        in_float: those that stay in float, the most sensitive first.
        loss: that was measured, in points.
    """

    layers: int
    in_float: tuple[str, ...]
    loss: float


Writer = Callable[[Path, Sequence[str]], None]
"""Writes a file in which the layers of these names, one at least, are quantised, and no others."""


def quantise(
    layers: Sequence[str],
    write: Writer,
    file: Path,
    *,
    loss: Callable[[Path], float],
    error: Callable[[Path], float],
    max_loss: float,
) -> Quantised:
    """Quantise as many layers as the limit allows.

    All are tried first. Where that loses too much, each layer is quantised alone, to see what it does to the logits, and the
    worst 1, 2, 4, ... stay in float until the limit is met.

    Args:
        layers: names of those that can be quantised.
        write: writes a file with some of them quantised.
        file: is written; what is there at the end is the answer.
        loss: points of top-1 that a file loses.
        error: what a file does to the logits, >= 0.
        max_loss: points of top-1 that may be lost.

    Raises:
        ExportError: there is nothing to quantise, or with half of the layers in float it still loses more.
    """
    if not layers:
        raise ExportError("The model has no layer that can be quantised: nothing of its blocks is left. Leave --int8 out.")
    worst: list[str] = []
    count = 0
    while True:
        write(file, [layer for layer in layers if layer not in worst[:count]])
        found = loss(file)
        if found <= max_loss:
            return Quantised(len(layers), tuple(worst[:count]), found)
        count = max(1, 2 * count)
        if count > MOST_IN_FLOAT * len(layers):
            raise ExportError(
                f"In int8 the model loses {found:.2f} points of top-1 with {count // 2} of {len(layers)} layers in float; "
                f"--max-loss allows {max_loss:g}. Nothing was written. Allow more, calibrate on more or other images, or leave "
                "--int8 out."
            )
        worst = worst or by_sensitivity(layers, write, file, error)


def by_sensitivity(layers: Sequence[str], write: Writer, file: Path, error: Callable[[Path], float]) -> list[str]:
    """The layers, the one that does the most to the logits when it alone is quantised first."""
    errors = {}
    for layer in layers:
        write(file, [layer])
        errors[layer] = error(file)
    return sorted(layers, key=lambda layer: -errors[layer])


def quantisable(file: Path, kind: Kind) -> list[str]:
    """Names of the nodes that multiply by a weight."""
    import onnx

    graph = onnx.load(file).graph
    weights = {tensor.name for tensor in graph.initializer}
    return [node.name for node in graph.node if node.op_type in KINDS[kind] and node.input[1] in weights]


def dynamic_writer(source: Path) -> Writer:
    """Quantises products of an ONNX file, with scales of activations that are found in each call."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    def write(file: Path, layers: Sequence[str]) -> None:
        with _silent():
            quantize_dynamic(
                source,
                file,
                list(KINDS["dynamic"]),
                per_channel=True,
                weight_type=QuantType.QInt8,
                nodes_to_quantize=list(layers),
            )

    return write


def static_writer(source: Path, batches: Sequence[NDArray[Any]]) -> Writer:
    """Quantises layers of an ONNX file, with scales of activations that cover what the calibration images bring.

    Args:
        source: a float32 file.
        batches: calibration images as the model takes them, (N, C, H, W) each.
    """
    from onnxruntime.quantization import QDQQuantizer, QuantType, create_calibrator
    from onnxruntime.quantization.quant_utils import load_model_with_shape_infer

    types = list(KINDS["static"])
    with TemporaryDirectory() as scratch, _silent():
        calibrator = create_calibrator(source, types, str(Path(scratch) / "augmented.onnx"))
        calibrator.collect_data(_Reader(batches))
        ranges = calibrator.compute_data()

    def write(file: Path, layers: Sequence[str]) -> None:
        options = {"OpTypesToExcludeOutputQuantization": types, "QDQOpTypePerChannelSupportToAxis": {"MatMul": 1}}
        with _silent():
            quantizer = QDQQuantizer(
                load_model_with_shape_infer(source), True, False, QuantType.QInt8, QuantType.QUInt8, ranges, list(layers), [],
                types, options,
            )  # fmt: skip
            quantizer.quantize_model()
            quantizer.model.save_model_to_file(file, False)

    return write


class _Reader:
    """Calibration images as ONNX Runtime asks for them."""

    def __init__(self, batches: Sequence[NDArray[Any]]) -> None:
        self._batches: Iterator[NDArray[Any]] = iter(batches)

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        batch = next(self._batches, None)
        return None if batch is None else {INPUT: np.ascontiguousarray(batch)}


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without the advice that onnxruntime prints and logs on the root logger."""
    root = logging.getLogger()
    root.addFilter(_nothing)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        root.removeFilter(_nothing)


def _nothing(_record: logging.LogRecord) -> bool:
    return False
