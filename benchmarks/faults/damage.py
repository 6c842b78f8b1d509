"""Does a damaged or hostile file give one clear error, or exactly what was saved?

Originals are damaged at random places: saved models as folders and as .pth, dense and pruned, a folder that a stop of
`p3b.save` has left behind, and checkpoints to resume from. The hostile files are those of `tests/hostile.py`. Each file is
opened in a process that does nothing else (`opening.py`); a process that dies or hangs is a failed case.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import p3b
from faults.opening import SECONDS, Opener
from hostile import HOSTILE, MARK, pruned
from p3b.storage.artifact import CONFIG_FILE, save_checkpoint
from p3b.train.checkpoint import Checkpoints
from tiny import tiny_vit

MEGABYTES = 500.0
"""What opening a file may take at most."""


def cases(count: int, seed: int, work: Path) -> Iterator[dict[str, Any]]:
    """Hostile files, and damages of good ones until there are `count` of both; at least one damage of each original.

    Args:
        count: cases in all.
        seed: of the damages.
        work: folder to work in; what is damaged there is removed again.

    Yields:
        One case each: part, kind, case, ok, detail, what came of it, and the figures seconds and megabytes.
    """
    chance, hostile = random.Random(seed), 0
    with Opener() as opener:
        # Half of a small number are hostile ones, from everywhere in the table.
        for name in list(HOSTILE)[:: max(1, 2 * len(HOSTILE) // max(count, 1)) if count < len(HOSTILE) else 1]:
            hostile += 1
            folder = work / "hostile"
            folder.mkdir(parents=True)
            path = HOSTILE[name](folder)
            yield _judged("made to harm", name, opener.open(path), path, folder, ())
            shutil.rmtree(folder)

        originals = _originals(work / "originals")
        wanted = {name: opener.open(path)["content"] for name, path in originals.items()}
        fallback = opener.open(_without_newest(originals["checkpoints"], work / "older"))["content"]
        for number in range(max(count - hostile, len(originals))):
            name = list(originals)[number % len(originals)]
            path = work / "damaged" / originals[name].name
            copy_of(originals[name], path)
            done = _damage(path, chance)
            allowed = (wanted[name], fallback) if name == "checkpoints" else (wanted[name],)
            yield _judged(f"{name}, damaged by chance", f"{name}: {done}", opener.open(path), path, work, allowed)
            shutil.rmtree(work / "damaged")


def copy_of(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy(source, target)


def _judged(
    kind: str, case: str, seen: Mapping[str, Any], path: Path, folder: Path, allowed: tuple[str, ...]
) -> dict[str, Any]:
    """Whether what was seen is one clear error in time, or content that is allowed."""
    message = seen.get("message", "")
    files = (str(path), *(file.name for file in path.iterdir())) if path.is_dir() else (str(path),)
    clear = (
        seen.get("user_error", False) and any(name in message for name in files) and "\n" not in message and len(message) < 2000
    )
    harm = [*seen.get("actions", ()), *(str(mark) for mark in folder.rglob(MARK))]
    cheap = seen["seconds"] < SECONDS and seen.get("megabytes", 0.0) < MEGABYTES
    same = seen.get("content") in allowed
    detail = f"{seen['outcome']}: {message}" if message else seen["outcome"] + (" as saved" if same else ", ANOTHER MODEL")
    return {
        "part": "damage",
        "kind": kind,
        "case": case,
        "ok": bool((clear or same) and cheap and not harm),
        "detail": detail.replace(str(path), path.name)[:400] + (f"; DID {harm}" if harm else ""),
        "refused_with_a_message": bool(clear),
        "read_as_it_was_saved": same,
        "seconds": round(seen["seconds"], 3),
        "megabytes": round(seen.get("megabytes", 0.0), 1),
    }


# ------------------------------------------------------------------------------------------------------- damage by chance


def _originals(folder: Path) -> dict[str, Path]:
    folder.mkdir(parents=True)
    names = [f"class {index}" for index in range(5)]
    described = {"class_names": names, "preprocessing": {"mean": [0.485, 0.456, 0.406]}, "provenance": {"seed": 3}}
    originals = {}
    for kind, model in {"dense": tiny_vit(), "pruned": pruned(), "pruned, layer scale": pruned(init_values=0.1)}.items():
        originals[f"{kind} folder"] = p3b.save(model, folder / kind.replace(", ", "_").replace(" ", "_"), **described)
        originals[f"{kind} .pth"] = save_checkpoint(model, folder / f"{kind.split()[-1]}.pth", **described)
    interrupted = p3b.save(tiny_vit(), folder / "interrupted")
    earlier = (interrupted / CONFIG_FILE).read_text()
    p3b.save(pruned(), interrupted)
    (interrupted / CONFIG_FILE).rename(interrupted / f"{CONFIG_FILE}.new")
    (interrupted / CONFIG_FILE).write_text(earlier)
    originals["interrupted save"] = interrupted
    checkpoints = Checkpoints(folder / "checkpoints")
    model = tiny_vit()
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(2):
        model(torch.ones(1, 3, 32, 32)).sum().backward()
        optimizer.step()
        content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "progress": {"step": step}}
        checkpoints.write({**content, "random": [torch.get_rng_state()]})
    return {**originals, "checkpoints": folder / "checkpoints"}


def _without_newest(checkpoints: Path, folder: Path) -> Path:
    copy_of(checkpoints, folder / "checkpoints")
    max((folder / "checkpoints").iterdir()).unlink()
    return folder / "checkpoints"


def _damage(path: Path, chance: random.Random) -> str:
    """Damage a file, or files of a folder, in one way by chance; says in which."""
    if path.name == "checkpoints":
        files = sorted(path.iterdir())
        chosen = files if chance.random() < 0.3 else files[-1:]
        return "; ".join(f"{file.name.split('-')[0]} {_damage_bytes(file, chance)}" for file in chosen)
    if path.is_dir():
        file = chance.choice(sorted(path.iterdir()))
        if chance.random() < 0.1:
            file.unlink()
            return f"{file.name} removed"
        return f"{file.name} {_damage_bytes(file, chance)}"
    return _damage_bytes(path, chance)


def _damage_bytes(file: Path, chance: random.Random) -> str:
    content = bytearray(file.read_bytes())
    # Half of the places lie where a file describes itself, which is little of it.
    size = len(content)
    place = chance.choice(
        (chance.randrange(size), chance.randrange(min(size, 4096)), size - 1 - chance.randrange(min(size, 4096)))
    )
    length = min(chance.choice((1, 8, 100, 5000)), size - place)
    kind = chance.choice(("bit", "bit", "bit", "bytes", "zeros", "truncate", "truncate", "insert", "remove", "append", "digit"))
    if kind == "bit":
        bit = chance.randrange(8)
        content[place] ^= 1 << bit
        done = f"bit {bit} of byte {place} flipped"
    elif kind == "digit":
        digits = [index for index, byte in enumerate(content[:20_000]) if chr(byte).isdigit()] or [0]
        place = chance.choice(digits)
        content[place] = ord("0") + (content[place] - ord("0") + 1) % 10
        done = f"digit at byte {place} counted up"
    elif kind in ("bytes", "zeros"):
        content[place : place + length] = chance.randbytes(length) if kind == "bytes" else bytes(length)
        done = f"{length} {kind} at byte {place}"
    elif kind == "truncate":
        del content[place:]
        done = f"cut to {place} of {size} bytes"
    elif kind == "remove":
        del content[place : place + length]
        done = f"{length} bytes removed at byte {place}"
    else:
        place = place if kind == "insert" else size
        content[place:place] = chance.randbytes(length)
        done = f"{length} bytes put in at byte {place}"
    file.write_bytes(content)
    return done
