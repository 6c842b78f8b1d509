"""Where in a checkpoint the weights lie: training scripts put them beside optimizers, settings and further copies."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from p3b.errors import WeightsError
from p3b.storage.naming import choose_tower, other_towers

_Place = tuple[str, ...]
_DEEPEST = 4
_NO_WEIGHTS = ("optim", "lr_sched", "scheduler", "scaler", "rng", "random", "callbacks", "loops", "loss", "criterion")
# Where nothing in it is known as a Vision Transformer, the message speaks of the first of these.
_USUAL = ("model", "state_dict", "model_state_dict", "model_ema", "state_dict_ema")


@dataclass(frozen=True)
class Opened:
    """A state dict taken out of a checkpoint, by its own names, and what is to be said of it."""

    state: dict[str, Tensor]
    notes: tuple[str, ...] = ()
    kind: str | None = None
    """Name of the architecture, where a training script has left it."""


def open_envelope(content: object, path: Path) -> Opened:
    """The state dict inside a checkpoint, in whatever envelopes it lies.

    Where a checkpoint holds copies of one model, the trained one is taken before its moving average, a teacher before its
    student, and that is said.

    Raises:
        WeightsError: it holds no weights, or several models of equal standing.
    """
    expected = "expected a state dict, bare or in an envelope such as 'model' or 'state_dict'"
    if not isinstance(content, Mapping):
        raise WeightsError(f"'{path}' holds a {type(content).__name__}; {expected}.")
    found = dict(_state_dicts(content, ()))
    if not found:
        shown = ", ".join([str(key) for key in content][:5]) or "nothing"
        raise WeightsError(f"'{path}' holds no weights but {shown}; {expected}.")
    flat = {_joined(place, name): place for place, state in found.items() for name in state}
    try:
        tower = choose_tower(flat)
    except WeightsError as error:
        raise WeightsError(f"'{path}': {error}") from error
    place = min(found, key=_usual) if tower is None else flat[tower.prefix + tower.scheme.patch]
    notes = [f"taken from '{'.'.join(place)}' of the file"] if place else []
    if tower is not None:
        others = {flat[prefix + tower.scheme.patch] for prefix in other_towers(flat, tower)} - {place}
        notes += [f"'{'.'.join(other)}' holds another copy of the model: not taken" for other in sorted(others)]
    return Opened(found[place], tuple(notes), _architecture(content))


def _state_dicts(
    content: Mapping[object, object], place: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Every mapping that holds tensors by name, with the way to it."""
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if tensors:
        yield place, tensors
    if len(place) < _DEEPEST:
        for name, value in content.items():
            if isinstance(name, str) and isinstance(value, Mapping) and not name.lower().startswith(_NO_WEIGHTS):
                yield from _state_dicts(value, (*place, name))


def _architecture(content: Mapping[object, object]) -> str | None:
    """timm's train.py leaves "arch", DeiT's and its like the options of their command line."""
    args = content.get("args")
    options = vars(args) if isinstance(args, Namespace) else args if isinstance(args, Mapping) else {}
    names = (content.get("arch"), options.get("arch"), options.get("model"))
    return next((name for name in names if isinstance(name, str)), None)


def _joined(place: tuple[str, ...], name: str) -> str:
    return ".".join((*place, name))


def _usual(place: tuple[str, ...]) -> int:
    return _USUAL.index(place[0]) if place and place[0] in _USUAL else len(_USUAL) if place else len(_USUAL) - 1
