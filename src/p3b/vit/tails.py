"""Classifiers behind a block in the middle: what timm's model does after its last block, done after another one.

A tail is a model of the same class that holds what comes after the blocks and nothing else: final norm, pooling, head. So every
kind of pooling, and DeiT's distilled pair of heads, is timm's own, and a tail's weights fit into the model's places.

S samples, N tokens, D width, C classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import cast

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from p3b.errors import ModelError
from p3b.vit.families import family_of

_BEFORE_THE_END = ("patch_embed", "pos_drop", "patch_drop", "rope", "norm_pre", "blocks")


class MiddleClassifiers:
    """Tails after some of a model's timm blocks, each beginning as a copy of the model's own.

    Args:
        model: whose blocks are listened to; it is not changed until `install`.
        after: numbers of the blocks, counted from 1: a network that is cut there keeps so many.

    Raises:
        ModelError: the model's blocks do not lie in one row, or have streams of several widths.
    """

    def __init__(self, model: VisionTransformer, after: Sequence[int]) -> None:
        stages = {block.stage for block in family_of(model).blocks(model)}
        if after and (len(stages) > 1 or not hasattr(model, "blocks")):
            raise ModelError(
                f"Classifiers behind blocks in the middle are not covered for {type(model).__name__}; leave them out."
            )
        self.tails = nn.ModuleDict({str(number): _tail_of(model) for number in after})
        self._features_SND: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = [
            model.blocks[int(name) - 1].register_forward_hook(_recorder(self._features_SND, name)) for name in self.tails
        ]

    def logits(self) -> list[Tensor]:
        """(S, C) of every tail for the last forward pass that built a graph, part of that graph; handed over once.

        Empty where no such pass was recorded.
        """
        features = {name: self._features_SND.pop(name) for name in self.tails if name in self._features_SND}
        return [_answer(self.tails[name], x_SND) for name, x_SND in features.items()]

    @torch.no_grad()
    def install(self, model: VisionTransformer, number: int) -> None:
        """Put the weights of a tail into the places of the model's own."""
        weights = self.tails[str(number)].state_dict()
        places = model.state_dict()
        for key, value in weights.items():
            places[key].copy_(value)

    def detach(self) -> None:
        """Stop listening and let go of what was heard."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._features_SND.clear()


def _tail_of(model: VisionTransformer) -> VisionTransformer:
    tail = copy.copy(model)  # shares everything with the model: what it may change of it is replaced first
    tail._parameters = {}
    tail._modules = {
        name: nn.Identity() if name in _BEFORE_THE_END else copy.deepcopy(module) for name, module in model.named_children()
    }
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_buffers"):
        setattr(tail, hooks, type(getattr(model, hooks))())
    if isinstance(tail, VisionTransformerDistilled):
        tail.distilled_training = False  # one answer, the mean of both heads
    return tail.train()


def _answer(tail: nn.Module, x_SND: Tensor) -> Tensor:
    logits: Tensor = cast("VisionTransformer", tail).forward_head(tail.norm(x_SND))
    return logits


def _recorder(features_SND: dict[str, Tensor], name: str) -> Callable[[nn.Module, object, Tensor], None]:
    """A plain function, so that a copy of the model carries no copies of tails along."""

    def record(_block: nn.Module, _inputs: object, output: Tensor) -> None:
        if torch.is_grad_enabled():
            features_SND[name] = output

    return record
