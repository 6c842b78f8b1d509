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
from p3b.run.method_options import method_options_of
from p3b.run.option_checks import check
from p3b.run.options import PruneConfig, to_plain
from p3b.run.pace import Course, Phase
from p3b.run.prune_plan import plan_pruning
from p3b.run.stage import Stage, finished_summary, open_stage
from p3b.run.training import Epochs, train_epochs
from p3b.train.checkpoint import Checkpoints, newest_for_all
from p3b.vit.cost import count_parameters

WARM_UP = "warm-up"
"""Name of the stage."""
DEPENDS_ON = "depends_on"
"""Under this name its summary says what the state depends on."""

_LATER = {"epochs", "min_lr", "warmup_epochs", "small_form"}
"""Settings of training that come into play after the warm-up: how long it is is told in steps, and its rate is constant."""
_PLACES = {"data_path", "val_path", "test_path", "model_path", "teacher_path", "download", "num_workers", "cache"}
"""Settings that say where things lie, and how quickly they come: what lies there is compared instead."""


def train_warm_up(config: PruneConfig) -> dict[str, Any]:
    """Train the steps before pruning starts, for all runs that differ in the budget alone; returns the summary.

    Args:
        config: of one of these runs, with an output folder of the warm-up's own; the budget plays no part.
    """
    options = method_options_of(config.prune, config.run.seed)
    check(config)
    if (summary := finished_summary(config, WARM_UP)) is not None:
        return summary
    with open_stage(config, WARM_UP) as stage:
        epochs, recipe = config.training.epochs, stage.recipe
        plan = plan_pruning(config.prune, epochs, recipe.steps_per_epoch, recipe.options.grad_accum_steps)
        pruner = Pruner(stage.model, config.prune.prune_ratio, config.prune.prune_method, plan.schedule, **options)
        terms = depends_on(stage, config.prune.prune_method, options, plan.schedule)
        checkpoint = stage.begin()
        before_pruning = Epochs("prune", plan.epochs, config.training.lr, until=plan.schedule.start)
        stage.screen.follow(Course((Phase(WARM_UP, plan.schedule.start),), count_parameters(stage.model)))
        train_epochs(stage, stage.model, before_pruning, pruner=pruner, checkpoint=checkpoint)
        return stage.write_summary({"steps": plan.schedule.start, DEPENDS_ON: terms})


def warm_up_name(method: str, options: Mapping[str, Any], start: str, seed: int) -> str | None:
    """Name of the warm-up that a run may share with others, among runs that differ in method, its options, budget and seed.

    Args:
        method: name of it.
        options: that it is built with.
        start: when pruning starts, as of --prune-start-epoch.
        seed: of the run.

    Returns:
        None where there is nothing to share: pruning starts at once, or the method has to be there from the first step on.

    Raises:
        ScheduleError: --prune-start-epoch is no duration.
    """
    own = own_in_warm_up(method, options)
    if own is None or parse_duration(start, 1, 1) == 0:
        return None
    return "-".join([own["method"], own["estimator"]] if own else ["plain"]) + f"-seed{seed}"


def depends_on(stage: Stage, method: str, options: Mapping[str, Any], schedule: Schedule) -> dict[str, Any]:
    """All that the state at the end of the warm-up depends on, as plain values by name.

    Args:
        stage: on whose model nothing is trained yet.
        method: name of it.
        options: that it is built with.
        schedule: of the run.
    """
    settings = {
        f"--{key.replace('_', '-')}": value
        for group in ("data", "model", "training", "augment")
        for key, value in stage.settings.given[group].items()
        if key not in _LATER | _PLACES
    }
    of_method = own_in_warm_up(method, options) or {}
    return {
        **settings,
        "--seed": stage.provenance["seed"],
        **{f"{key} of the probes" if key != "method" else "--prune-method": value for key, value in of_method.items()},
        "steps before pruning starts (--prune-start-epoch)": schedule.start,
        "steps of an epoch": stage.recipe.steps_per_epoch,
        "number of processes": stage.machine.processes.world_size,
        "number format": str(stage.machine.precision.dtype),
        "images": [None if part is None else len(part) for part in (stage.splits.train, stage.splits.val)],
        "classes": list(stage.splits.class_names),
        "preprocessing": to_plain(stage.preprocessing),
        "the weights that training starts from": _digest(stage.model),
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
            raise RunFolderError(f"{folder} holds no finished warm-up; the command that needs it trains it first.")

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

    def take_up(self, stage: Stage, pruner: Pruner, *, keeps_method: bool) -> dict[str, Any] | None:
        """Let a run begin where the warm-up ended: its lines go before those of the run.

        Args:
            stage: that has begun and trained nothing.
            pruner: of the run, as it was built.
            keeps_method: whether the method's state is taken, too. What stands there may be another method's, as empty.

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
        stage.machine.on_main(lambda: stage.folder.take_lines(self._stage, lines))
        stage.records.tracking.catch_up()
        if not keeps_method:
            content["pruner"] = {**content["pruner"], "method": pruner.state_dict()["method"]}
        stage.screen.say(f"the warm-up of {content['progress']['place']['step']} steps is taken from {self._stage.path}")
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
