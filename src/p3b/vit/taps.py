"""Taps: the residual stream before and after each block, as it flows by in an ordinary forward pass.

Section 2 of the method: x_b = x_{b-1} + f_b(x_{b-1}) for b = 1..B; x_0 enters the first block. In a hierarchy each stage has
a stream of its own, from what enters its first block to what its last one gives. Where that block pools the stream itself, its
stage begins with what it has made of it: what the second branch hears, less what the first one has added.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from p3b.errors import TrainingError
from p3b.vit.families import family_of


class Taps:
    """Records x_0 .. x_B, detached, in every forward pass that builds a graph.

    The input of a timm block is x after the block before, that of its second half's entry (norm2) is x between attention and
    MLP: both are tensors that autograd keeps anyway, so the features cost no second copy.
    """

    def __init__(self) -> None:
        self._stream_SND: list[Tensor] = []
        self._addend_SND: Tensor | None = None
        """What the first branch of a block that pools has added to the stream of its stage."""
        self._blocks, self._stages = 0, 1
        self._open = False
        """Between the first block of a forward pass and `take`: what gradient checkpointing computes again is no new pass."""
        self.grid: tuple[int, int] | None = None
        """(H, W) patches of the last pass where the model takes images of any size; None where its grid is fixed."""
        self._handles: list[RemovableHandle] = []
        self.recording = True
        """Off: forward passes go by unrecorded, and nothing of them is kept."""

    def attach(self, model: VisionTransformer) -> None:
        """Begin to record."""
        family = family_of(model)
        blocks = family.blocks(model)
        self._blocks = sum(len(block.halves) for block in blocks)
        self._stages = len({block.stage for block in blocks})
        self._handles.append(family.patch_embed(model).register_forward_hook(self._record_grid))
        for block in blocks:
            first, second, *_ = block.halves
            if block.pools:
                self._handles.append(first.exit(block.module).register_forward_hook(self._keep_addend))
                entry = second.entry(block.module)
                self._handles.append(entry.register_forward_pre_hook(self._record_before_addend))
            else:
                self._handles.append(block.module.register_forward_pre_hook(self._record_input))
            for half in block.halves[1:]:
                self._handles.append(half.entry(block.module).register_forward_pre_hook(self._record_input))
        self._handles.append(blocks[0].module.register_forward_pre_hook(self._start, prepend=True))
        for block, following in zip(blocks, [*blocks[1:], None], strict=True):
            if following is None or following.stage != block.stage:
                self._handles.append(block.module.register_forward_hook(self._record_output))

    def detach(self) -> None:
        """Stop recording and let go of what was recorded."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._stream_SND.clear()

    def take(self) -> list[Tensor]:
        """The features (S, N, D) of the last pass, one more than blocks in each stage; they are handed over once.

        Empty where no pass was recorded.

        Raises:
            TrainingError: what was recorded is no single whole pass.
        """
        stream, self._stream_SND, self._open = self._stream_SND, [], False
        if stream and len(stream) != self._blocks + self._stages:
            raise TrainingError(
                f"{len(stream)} features were recorded of {self._blocks} blocks: the last forward pass did not go through all "
                "of them once, one after the other. Where DataParallel or a loop of your own runs them, call model(images) "
                "itself, in one process for each GPU (DistributedDataParallel)."
            )
        return stream

    def _start(self, _block: nn.Module, _inputs: tuple[Tensor, ...]) -> None:
        self._stream_SND.clear()
        self._open = True

    def _record_grid(self, _embed: nn.Module, _inputs: tuple[Tensor, ...], output: Any) -> None:
        if isinstance(output, tuple):  # with its grid beside it
            rows, columns = output[1]
            self.grid = (int(rows), int(columns))
        else:
            self.grid = (output.shape[1], output.shape[2]) if output.ndim == 4 else None

    def _record_input(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if self._records():
            self._stream_SND.append(_as_tokens(inputs[0].detach()))

    def _keep_addend(self, _path: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if self._records():
            self._addend_SND = output.detach()

    def _record_before_addend(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if self._records():
            assert self._addend_SND is not None
            self._stream_SND.append(inputs[0].detach() - self._addend_SND)
            self._addend_SND = None

    def _record_output(self, _block: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if self._records():
            self._stream_SND.append(_as_tokens(output.detach()))

    def _records(self) -> bool:
        return self._open and self.recording and torch.is_grad_enabled()


def _as_tokens(x: Tensor) -> Tensor:
    """(S, N, D), also of features that lie in a map (S, H, W, D)."""
    return x.flatten(1, 2) if x.ndim == 4 else x
