"""One warm-up for several pruning runs: the steps before pruning starts, trained once and gone on from by each of them.

Until pruning starts nothing is masked and no method has looked at the budget. So runs that differ in nothing but the budget
(or in methods that have no state of their own by then) train the same steps first. A warm-up is a stage of its own,

    <folder>/warm-up/   config.json, log.txt, metrics.jsonl   as of any stage
                        checkpoints/                          the state in which pruning starts
                        summary.json                          written last; with `depends_on`, all that the state depends on

and a run that goes on from it begins with its checkpoint and its lines, as if it had been resumed at that step: what comes out
is what it would have been without.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from p3b.core.schedule import Schedule, parse_duration
from p3b.errors import ConfigError, RunFolderError
from p3b.methods import own_in_warm_up
from p3b.pruner import Pruner
from p3b.run.folder import StageFolder
from p3b.run.options import PruneConfig, to_plain
from p3b.run.stage import Session
from p3b.train.checkpoint import Checkpoints, newest_for_all

WARM_UP = "warm-up"
"""Name of the stage."""
DEPENDS_ON = "depends_on"
"""Under this name its summary says what the state depends on."""

_LATER = {"epochs", "min_lr", "warmup_epochs"}
"""Settings of training that come into play after the warm-up: how long it is is told in steps, and its rate is constant."""
_PLACES = {"data_path", "val_path", "test_path", "model_path", "teacher_path", "download", "num_workers", "cache"}
"""Settings that say where things lie, and how quickly they come: what lies there is compared instead."""


def warm_up_name(config: PruneConfig, options: Mapping[str, Any]) -> str | None:
    """Name of the warm-up that a run may share with others, among runs that differ in method, its options, budget and seed.

    Args:
        config: of the run.
        options: that its method is built with.

    Returns:
        None where there is nothing to share: pruning starts at once, or the method has to be there from the first step on.

    Raises:
        ScheduleError: --prune-start-epoch is no duration.
    """
    own = own_in_warm_up(config.prune.prune_method, options)
    if own is None or parse_duration(config.prune.prune_start_epoch, 1, 1) == 0:
        return None
    return "-".join([own["method"], own["estimator"]] if own else ["plain"]) + f"-seed{config.run.seed}"


def depends_on(session: Session, model: nn.Module, options: Mapping[str, Any], schedule: Schedule) -> dict[str, Any]:
    """All that the state at the end of the warm-up depends on, as plain values by name.

    Args:
        session: whose data is open.
        model: as it is opened, on which nothing is trained yet.
        options: of the method.
        schedule: of the run.
    """
    config = session.config
    assert isinstance(config, PruneConfig)
    plain = to_plain(config)
    settings = {
        f"--{key.replace('_', '-')}": value
        for group in ("data", "model", "training", "augment")
        for key, value in plain[group].items()
        if key not in _LATER | _PLACES
    }
    of_method = own_in_warm_up(config.prune.prune_method, options) or {}
    return {
        **settings,
        "--seed": config.run.seed,
        **{f"{key} of the probes" if key != "method" else "--prune-method": value for key, value in of_method.items()},
        "steps before pruning starts (--prune-start-epoch)": schedule.start,
        "steps of an epoch": session.steps_per_epoch,
        "number of processes": session.processes.world_size,
        "number format": str(session.precision.dtype),
        "images": [None if part is None else len(part) for part in (session.splits.train, session.splits.val)],
        "classes": list(session.splits.class_names),
        "preprocessing": to_plain(session.preprocessing),
        "the weights that training starts from": _digest(model),
    }


class WarmUp:
    """A warm-up that is done.

    Args:
        folder: that it was trained in.

    Raises:
        RunFolderError: there is none, or it has not come to its end.
    """

    def __init__(self, folder: Path) -> None:
        self._stage = StageFolder(folder, WARM_UP)
        if not self._stage.finished:
            raise RunFolderError(
                f"{folder} holds no finished warm-up to go on from; the command that writes it trains it first."
            )

    def require(self, terms: Mapping[str, Any]) -> None:
        """Refuse to go on from a state that the run would not have come to by itself.

        Args:
            terms: what `depends_on` finds for the run.

        Raises:
            ConfigError: names every setting that differs.
        """
        before = self._stage.read_json("summary.json")[DEPENDS_ON]
        changed = [
            f"{key} was {_short(before.get(key))}, now {_short(terms.get(key))}"
            for key in {**terms, **before}
            if before.get(key) != terms.get(key)
        ]
        if changed:
            raise ConfigError(
                f"The warm-up in {self._stage.path} was trained with other settings: {'; '.join(changed)}. Give those, or "
                f"remove {self._stage.root} to train it again."
            )

    def take_up(self, session: Session, pruner: Pruner, options: Mapping[str, Any]) -> dict[str, Any] | None:
        """Let a run begin where the warm-up ended: its lines go before those of the run.

        Args:
            session: of a run that has begun and trained nothing.
            pruner: of the run, as it was built.
            options: of its method.

        Returns:
            The checkpoint to go on from; None where pruning starts with the first step.

        Raises:
            WeightsError, RunFolderError: what was kept is damaged.
        """
        if not pruner.schedule.start:
            return None
        found = newest_for_all(Checkpoints(self._stage.path / "checkpoints"))
        if found is None:
            raise RunFolderError(f"{self._stage.path} has lost its checkpoints; remove {self._stage.root} to train it again.")
        content = found.content
        lines = content["progress"]["lines"]
        session.on_main(lambda: session.folder.take_lines(self._stage, lines))
        config = session.config
        assert isinstance(config, PruneConfig)
        if not own_in_warm_up(config.prune.prune_method, options):  # what stands there may be another method's, as empty
            content["pruner"] = {**content["pruner"], "method": pruner.state_dict()["method"]}
        session.display.say(f"the warm-up of {content['progress']['place']['step']} steps is taken from {self._stage.path}")
        return content


def _digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."
