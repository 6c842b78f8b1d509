"""Models that people bring: odd layers, frozen parts, calls in any order. All come out exact or are refused in words.

Three kinds of cases, each drawn at random:

    layer    a layer of a tiny ViT is wrapped, subclassed, hooked, masked, parametrized, patched, shared or given other settings
    frozen   a random subset of its parameters is frozen
    order    compiling, wrapping, freezing, saving, exchanging, stepping come at a moment that nobody would choose

Exact means: the small network computes what the masked one did, what was frozen is frozen, masks are those that would have been
decided had nothing been frozen, and what is loaded computes what was saved. Refused means: an error of p3b, before training
starts where the model was as it is by then.
"""

from __future__ import annotations

import copy
import random
import shutil
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import p3b
from p3b.errors import UserError
from tiny import images, labels, tiny_vit

PLAN = p3b.Schedule(start=1, sparse=2, final=4, update_every=1)
METHODS = ("block_benefit", "taylor", "uniform", "magnitude", "wdpruning", "savit")
LEAVES = ("norm1", "attn", "attn.qkv", "attn.proj", "norm2", "mlp", "mlp.fc1", "mlp.act", "mlp.fc2", "ls1", "ls2")
OUTSIDE = ("patch_embed", "patch_embed.proj", "norm", "head", "pos_drop", "head_drop", "fc_norm")
KINDS = ("layer", "frozen", "order")


def cases(count: int, seed: int, work: Path) -> Iterator[dict[str, Any]]:
    """So many cases, a third of each kind.

    Args:
        count: cases in all.
        seed: the same seed draws the same cases.
        work: folder to save models in; it is emptied again.

    Yields:
        One case each: part, kind, case, ok, detail, and the outcome ("exact" or "refused", or what was wrong).
    """
    torch.set_num_threads(1)
    chance = random.Random(seed)
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        name, outcome, detail = {"layer": try_layer, "frozen": try_frozen, "order": try_order}[kind](chance, work / "model")
        ok = outcome in ("exact", "refused")
        yield {"part": "modules", "kind": kind, "case": name, "ok": ok, "detail": detail, "outcome": outcome}


def try_layer(chance: random.Random, folder: Path) -> tuple[str, str, str]:
    """Change one layer of a model, then prune, shrink, save and load it."""
    name = chance.choice(list(CHANGES))
    block, leaf = chance.randrange(3), chance.choice((*LEAVES, *OUTSIDE))
    place = leaf if leaf in OUTSIDE else f"blocks.{block}.{leaf}"
    method = chance.choice(METHODS)
    model = _model(init_values=chance.choice((None, 0.1)))
    try:
        CHANGES[name](model, place)
    except (AttributeError, TypeError, RuntimeError, ValueError, KeyError):  # this change does not go with such a layer
        CHANGES["a subclass"](model, place)
        name = "a subclass"
    outcome, detail = _pruned(model, method, folder)
    if outcome == "refused" and place.split(".")[-1] not in detail and "blocks" not in detail:
        return f"{name}: {place}, {method}", "unclear", detail
    return f"{name}: {place}, {method}", outcome, detail


def try_frozen(chance: random.Random, folder: Path) -> tuple[str, str, str]:
    """Freeze a random subset; masks must be what they are without, and what is frozen must stay so."""
    method = chance.choice(METHODS)
    share = chance.choice((0.1, 0.5, 0.9, 1.0))
    model, free = _model(), _model()
    keys = [key for key, _ in model.named_parameters()]
    frozen = {key for key in keys if chance.random() < share and (share < 1 or not key.startswith("head"))}
    for key in frozen:
        model.get_parameter(key).requires_grad_(False)
    name = f"{len(frozen)} of {len(keys)} frozen, {method}"
    try:
        first, second = (_run(each, method, lr=0.0) for each in (model, free))
        for pruner in (first, second):
            pruner.decide_last()
        apart = [gate for gate, mask in first.gates.masks.items() if not torch.equal(mask, second.gates.masks[gate])]
        if apart:
            return name, "wrong", f"masks of {', '.join(apart[:3])} are others than without freezing"
        outcome, detail = _shrunk(first, model, folder)
        thawed = [key for key, parameter in model.named_parameters() if key in frozen and parameter.requires_grad]
        bound = [
            key for key, parameter in model.named_parameters() if key in set(keys) - frozen and not parameter.requires_grad
        ]
    except UserError as error:
        return name, "refused", str(error)
    return (name, "wrong", f"{(thawed + bound)[:3]} changed sides") if thawed or bound else (name, outcome, detail)


def try_order(chance: random.Random, folder: Path) -> tuple[str, str, str]:
    """Do something at a moment that nobody would choose."""
    event, moment = chance.choice(list(EVENTS)), chance.randrange(5)
    method = chance.choice(METHODS)
    name = f"{event} before step {moment}, {method}"
    model = _model()
    try:
        if moment == 0:
            EVENTS[event](model, None, folder)
        pruner = _run(model, method, at=moment, event=lambda made: EVENTS[event](model, made, folder))
        pruner.decide_last()
        return (name, *_shrunk(pruner, model, folder))
    except UserError as error:
        return name, "refused", str(error)
    except Exception as error:
        return name, "broke", f"{type(error).__name__}: {error}"[:300]


# ----------------------------------------------------------------------------------------------------- what is changed


class _Lora(nn.Linear):
    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, plain.bias is not None, dtype=plain.weight.dtype)
        self.load_state_dict(plain.state_dict())
        self.down = nn.Parameter(torch.randn(2, plain.in_features, dtype=plain.weight.dtype) / 4)
        self.up = nn.Parameter(torch.randn(plain.out_features, 2, dtype=plain.weight.dtype) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.down.T @ self.up.T


class _Wrapped(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base

    def forward(self, x: Tensor, **more: Any) -> Tensor:
        return 2 * self.base_layer(x, **more)


def _put(model: nn.Module, place: str, layer: nn.Module) -> None:
    owner, _, name = place.rpartition(".")
    setattr(model.get_submodule(owner), name, layer)


def _subclass(model: nn.Module, place: str) -> None:
    layer = model.get_submodule(place)
    kind = type(layer)
    layer.__class__ = type(f"My{kind.__name__}", (kind,), {"forward": lambda self, *a, **k: 2 * kind.forward(self, *a, **k)})


def _patch(model: nn.Module, place: str) -> None:
    layer = model.get_submodule(place)
    layer.forward = types.MethodType(lambda self, *a, **k: 2 * type(self).forward(self, *a, **k), layer)  # type: ignore[method-assign]


def _share(model: nn.Module, place: str) -> None:
    block, _, leaf = place.removeprefix("blocks.").partition(".")
    if not block.isdigit():
        raise ValueError("there is one of it")
    _put(model, place, model.get_submodule(f"blocks.{(int(block) + 1) % 3}.{leaf}"))


def _share_weight(model: nn.Module, place: str) -> None:
    block, _, leaf = place.removeprefix("blocks.").partition(".")
    other = model.get_submodule(f"blocks.{(int(block) + 1) % 3}.{leaf}")
    model.get_submodule(place).weight = other.weight


def _pass_on(_layer: nn.Module, args: tuple[Any, ...], output: Tensor | None = None) -> Any:
    return tuple(2 * x for x in args) if output is None else 2 * output


def _setting(model: nn.Module, place: str) -> None:
    layer = model.get_submodule(place)
    for key, value in {"eps": 0.1, "scale": 3.0, "num_heads": 1, "approximate": "tanh", "padding_mode": "reflect"}.items():
        if key in vars(layer):
            setattr(layer, key, value)
            return
    raise AttributeError("no such setting")


CHANGES: Mapping[str, Callable[[Any, str], object]] = {
    "a subclass": _subclass,
    "LoRA as a subclass": lambda model, place: _put(model, place, _Lora(model.get_submodule(place))),
    "a wrapper": lambda model, place: _put(model, place, _Wrapped(model.get_submodule(place))),
    "another layer": lambda model, place: _put(model, place, nn.Sequential(model.get_submodule(place))),
    "a weight norm": lambda model, place: nn.utils.parametrizations.weight_norm(model.get_submodule(place)),
    "a spectral norm": lambda model, place: nn.utils.parametrizations.spectral_norm(model.get_submodule(place)),
    "a mask of torch": lambda model, place: torch.nn.utils.prune.l1_unstructured(
        model.get_submodule(place), "weight", amount=0.5
    ),
    "a forward pre-hook": lambda model, place: model.get_submodule(place).register_forward_pre_hook(_pass_on),
    "a forward hook": lambda model, place: model.get_submodule(place).register_forward_hook(_pass_on),
    "a backward hook": lambda model, place: model.get_submodule(place).register_full_backward_hook(lambda *_: None),
    "a forward of its own": _patch,
    "one more parameter": lambda model, place: model.get_submodule(place).register_parameter(
        "more", nn.Parameter(torch.ones(3, dtype=torch.float64))
    ),
    "one more buffer": lambda model, place: model.get_submodule(place).register_buffer("more", torch.ones(3)),
    "one more layer": lambda model, place: model.get_submodule(place).add_module("more", nn.Linear(2, 2)),
    "a shared layer": _share,
    "a shared weight": _share_weight,
    "another setting": _setting,
    "compiled": lambda model, place: _put(model, place, torch.compile(model.get_submodule(place), backend="eager")),
    "a note": lambda model, place: setattr(model.get_submodule(place), "my_note", "kept"),
}
"""What may be done to a layer, by what it is called."""


def _compile(model: VisionTransformer, _pruner: p3b.Pruner | None, _folder: Path) -> None:
    torch.compile(model, backend="eager")(images(dtype=torch.float64))


def _second(model: VisionTransformer, _pruner: p3b.Pruner | None, _folder: Path) -> None:
    p3b.Pruner(model, 0.3, schedule=PLAN)


def _finish(_model: VisionTransformer, pruner: p3b.Pruner | None, _folder: Path) -> None:
    if pruner is not None:
        pruner.finalize()
        pruner.finalize()


def _lose_gradients(model: VisionTransformer, pruner: p3b.Pruner | None, _folder: Path) -> None:
    if pruner is not None:
        model.zero_grad()
        pruner.step()


EVENTS: Mapping[str, Callable[[VisionTransformer, p3b.Pruner | None, Path], object]] = {
    "compile and run": _compile,
    "a second pruner": _second,
    "finalize twice": _finish,
    "a step without gradients": _lose_gradients,
    "save": lambda model, _pruner, folder: p3b.save(model, folder),
    "save an average": lambda model, _pruner, folder: p3b.save(ModelEmaV3(AveragedModel(model)), folder),
    "save a copy": lambda model, _pruner, folder: p3b.save(copy.deepcopy(model), folder),
    "exchange the head": lambda model, _pruner, _folder: model.reset_classifier(3),
    "exchange a layer": lambda model, _pruner, _folder: _put(model, "blocks.1.mlp.fc1", copy.deepcopy(model.blocks[1].mlp.fc1)),
    "add an adapter": lambda model, _pruner, _folder: CHANGES["LoRA as a subclass"](model, "blocks.0.attn.proj"),
    "hook a layer": lambda model, _pruner, _folder: model.blocks[0].attn.proj.register_forward_hook(_pass_on),
    "hook a block": lambda model, _pruner, _folder: model.blocks[1].register_forward_hook(_pass_on),
    "freeze a layer": lambda model, _pruner, _folder: model.blocks[0].attn.requires_grad_(False),
    "freeze all blocks": lambda model, _pruner, _folder: model.blocks.requires_grad_(False),
    "change the dtype": lambda model, _pruner, _folder: model.float(),
    "checkpoint gradients": lambda model, _pruner, _folder: model.set_grad_checkpointing(True),
    "other images": lambda model, _pruner, _folder: model.set_input_size(img_size=(48, 48)),
    "detach": lambda _model, pruner, _folder: None if pruner is None else pruner.detach(),
}
"""What may happen at any moment, by what it is called."""


# ----------------------------------------------------------------------------------------------------------- judging


def _model(**changed: Any) -> VisionTransformer:
    return tiny_vit(depth=3, dtype=torch.float64, **changed)


def _run(
    model: VisionTransformer,
    method: str,
    lr: float = 1e-3,
    at: int = -1,
    event: Callable[[p3b.Pruner], object] = lambda _pruner: None,
) -> p3b.Pruner:
    """A plain loop to the end of the schedule, with something happening before one of its steps."""
    options = {"estimator": "linear"} if method == "block_benefit" else {}
    pruner = p3b.Pruner(model, 0.4, method, PLAN, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    step = 1
    while not pruner.done:
        if step == at:
            event(pruner)
        size, dtype = model.patch_embed.img_size[0], next(model.parameters()).dtype
        batch, targets = images(4, size=size, seed=step, dtype=dtype), labels(4, seed=step) % model.head.out_features
        loss = nn.functional.cross_entropy(model(batch), targets) + pruner.loss(nn.functional.cross_entropy, targets)
        if loss.requires_grad:
            loss.backward()
        pruner.step()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
    return pruner


def _pruned(model: VisionTransformer, method: str, folder: Path) -> tuple[str, str]:
    try:
        p3b.Pruner(model, 0.4, method, PLAN).detach()
    except UserError as error:
        return "refused", str(error)
    except Exception as error:
        return "broke", f"at Pruner: {type(error).__name__}: {error}"[:300]
    try:
        pruner = _run(model, method)
        pruner.decide_last()
        return _shrunk(pruner, model, folder)
    except Exception as error:  # an error of p3b as well: it comes too late
        return "late", f"{type(error).__name__}: {error}"[:300]


@torch.no_grad()
def _shrunk(pruner: p3b.Pruner, model: VisionTransformer, folder: Path) -> tuple[str, str]:
    """Compare the masked network, the small one and the one that is loaded; hooks of users are no part of what is saved."""
    batch = images(3, size=model.patch_embed.img_size[0], seed=9, dtype=next(model.parameters()).dtype)
    model.eval()
    masked = model(batch)
    small = pruner.shrink()
    off = float((small(batch) - masked).abs().max() / masked.abs().max())
    if not off < (1e-9 if masked.dtype is torch.float64 else 1e-4):
        return "wrong", f"the small network is off by {off:.1e}"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            loaded = p3b.load(p3b.save(small, folder))
        except UserError as error:
            heard = any(module._forward_hooks or module._forward_pre_hooks for module in small.modules())
            return ("exact", "saving it with a hook is refused") if heard else ("late", f"at save: {error}")
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    same = torch.equal(loaded(batch), small(batch))
    return ("exact", f"off by {off:.0e}") if same else ("wrong", "what is loaded is not what was saved")
