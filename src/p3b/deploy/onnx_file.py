"""A model as ONNX: written by torch's exporter (dynamo), run by ONNX Runtime on the CPU."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from timm.models.hiera import MaskUnitAttention
from timm.models.vision_transformer_sam import Attention as SamAttention
from torch import Tensor, nn

from p3b.deploy.agreement import Logits
from p3b.deploy.flat import for_onnx
from p3b.deploy.metadata import Metadata
from p3b.deploy.program import dynamic_axes
from p3b.errors import ConfigError, WeightsError
from p3b.storage.untrusted import first_line

if TYPE_CHECKING:
    import onnx_ir as ir

OPSET = 20
"""Of the exported graph: the first with a Gelu of its own, and known to the runtimes of 2024 and later."""
INPUT, OUTPUT = "images", "logits"
_NEEDED = ("onnx", "onnxruntime", "onnxscript")


def write_onnx(model: nn.Module, example: Tensor, file: Path, *, optimize: bool = True, flat: bool = True) -> None:
    """Export a model with a dynamic number of images (and, for uint8 images, a dynamic height and width).

    Args:
        model: in evaluation mode.
        example: (2 or more, C, H, W) images that it takes.
        file: written in one piece, weights included.
        optimize: tidy the graph, which takes half of the time; ONNX Runtime computes as quickly without.
        flat: in the form that ONNX Runtime is quick with (`p3b.deploy.flat`); dynamic int8 knows MatMul alone.

    Raises:
        ConfigError: onnx, onnxruntime or onnxscript is not installed.
    """
    require_onnx()
    written = for_onnx(model) if flat else model
    # Without gradients: a mask that wants one takes another way through attention, of other strides.
    with _quiet(), _unfused(written), torch.no_grad():
        program = torch.onnx.export(
            written, (example,), dynamo=True, verbose=False, opset_version=OPSET,
            input_names=[INPUT], output_names=[OUTPUT], dynamic_shapes=(dynamic_axes(example),), optimize=optimize,
        )  # fmt: skip
        assert program is not None
        narrow_indices(program.model)
        program.save(file, external_data=False)


@contextlib.contextmanager
def _unfused(model: nn.Module) -> Iterator[None]:
    """Let the attentions of SAM and Hiera compute in plain steps: they hand three dimensions, or five, to the fused operation,
    of which torch's exporter takes four alone.
    """
    odd = (SamAttention, MaskUnitAttention)
    fused: list[Any] = [module for module in model.modules() if isinstance(module, odd) and module.fused_attn]
    try:
        for module in fused:
            module.fused_attn = False
        yield
    finally:
        for module in fused:
            module.fused_attn = True


def narrow_indices(model: ir.Model) -> None:
    """Let gathers by element read indices of 32 bits (torch has 64 alone): spread over all tokens, they are half the memory.

    Args:
        model: is changed. Indices that are no constants spread by Expand stay as they are.
    """
    import onnx_ir as ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    narrow: dict[str, ir.Value] = {}
    for node in [node for node in model.graph if node.op_type == "GatherElements"]:
        spread = node.inputs[1].producer() if node.inputs[1] is not None else None
        if spread is not None and spread.op_type == "Cast":  # from int64 to int64, where the graph was not tidied
            spread = spread.inputs[0].producer() if spread.inputs[0] is not None else None
        wide = spread.inputs[0] if spread is not None and spread.op_type == "Expand" else None
        if spread is None or wide is None or wide.name is None or wide.const_value is None:
            continue
        if wide.dtype == ir.DataType.INT64:
            if wide.name not in narrow:
                tensor = ir.tensor(wide.const_value.numpy().astype(np.int32), name=f"{wide.name}_int32")
                narrow[wide.name] = ir.val(tensor.name, tensor.dtype, wide.shape, const_value=tensor)
                model.graph.register_initializer(narrow[wide.name])
            spread.replace_input_with(0, narrow[wide.name])
            spread.outputs[0].dtype = ir.DataType.INT32
        node.replace_input_with(1, spread.outputs[0])
    RemoveUnusedNodesPass()(model)


def describe_onnx(file: Path, metadata: Metadata) -> None:
    """Put the description into the file."""
    import onnx

    model = onnx.load(file)
    onnx.helper.set_model_props(model, metadata.to_text())
    onnx.save(model, file)


class OnnxRunner:
    """An ONNX file in ONNX Runtime.

    Args:
        file: that `p3b export` wrote.
        metadata: of the model; by default what the file says.
        threads: that it computes with; by default as many as torch.

    Raises:
        ConfigError: ONNX Runtime is not installed. WeightsError: the file is damaged, or not written by `p3b export`.
    """

    def __init__(self, file: Path, metadata: Metadata | None = None, threads: int | None = None) -> None:
        require_onnx("onnxruntime")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 3
        try:
            self._session: Any = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its errors share no class below this
            raise WeightsError(f"{file} cannot be opened by ONNX Runtime ({first_line(error)}).") from error
        self.metadata = metadata or Metadata.from_text(self._session.get_modelmeta().custom_metadata_map, str(file))

    def __call__(self, images: NDArray[Any]) -> Logits:
        """(N, C, H, W) images, as the metadata says, to (N, classes) logits."""
        logits: Logits = self._session.run([OUTPUT], {INPUT: images})[0]
        return np.asarray(logits, dtype=np.float32)


def require_onnx(*packages: str) -> None:
    """ConfigError where a package (all three by default) is not installed."""
    if missing := [name for name in packages or _NEEDED if find_spec(name) is None]:
        raise ConfigError(f"{', '.join(missing)} is not installed, which ONNX needs: pip install 'p3b[onnx]'.")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's warnings about its own insides, and with what it prints on standard error."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
