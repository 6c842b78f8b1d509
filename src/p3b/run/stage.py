"""One stage of a run while it runs: its data, folder, screen and checkpoints, shared by the commands."""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import p3b
from p3b.data import DataSplits, Preprocessing, TrainBatches, eval_batches, keep_decoded, mixup, train_batches, worker_death
from p3b.errors import ConfigError, RunFolderError, TrainingError, UserError
from p3b.methods.base import Decision
from p3b.run.folder import StageFolder, launch_name, restarted_by
from p3b.run.inputs import OpenedModel, answer_teacher_apart, augmentation, num_workers, open_model, open_splits, training_loss
from p3b.run.interruption import Interruption
from p3b.run.options import TrainConfig, check, to_plain
from p3b.run.screen import Display
from p3b.storage import saved_model as artifact
from p3b.train.checkpoint import Checkpoint, Checkpoints, newest_for_all, seed_everything
from p3b.train.compiled import require_compiler
from p3b.train.distributed import Processes, all_reduce_sum, gather, lost_process, process_group, wait_for_all
from p3b.train.evaluate import Accuracy, evaluate
from p3b.train.loop import steps_per_epoch
from p3b.train.optim import Precision, build_optimizer, scaled_lr
from p3b.vit.attention import choose_attention
from p3b.vit.cost import count_parameters

PRODUCTS = {"train": "dense", "prune": "pruned", "finetune": "finetuned"}
"""Where each stage leaves its model, in the output folder; a stage that is not here leaves none."""
SPARSE_CHECKPOINT = "first_sparse_checkpoint.pth"
"""The shrunk model before fine-tuning, under its published name, in the output folder."""


class Session:
    """A stage between its first check and its summary.

    `open_model` and whatever else can refuse come first; `begin` is the first to write; then `train_part`, `save_model`.
    """

    def __init__(self, config: TrainConfig, stage: str, processes: Processes, device: torch.device) -> None:
        assert config.run.output_dir is not None
        self.config, self.stage, self.processes, self.device = config, stage, processes, device
        self.display = Display(processes.is_main)
        products = (PRODUCTS[stage], SPARSE_CHECKPOINT) if stage == "prune" else (PRODUCTS[stage],) if stage in PRODUCTS else ()
        self.folder = StageFolder(config.run.output_dir, stage, products)
        # A launcher that starts a failed run again means this run, whatever stands in its flags.
        again = self.folder.begun_by(restarted_by())
        self.resume, self._overwrite = config.run.resume or again, config.run.overwrite and not again
        self.folder.check(self.resume, self._overwrite)
        self.checkpoints = Checkpoints(self.folder.path / "checkpoints")
        self.interruption = Interruption(config.run.checkpoint_minutes, processes.is_main)
        self.precision = Precision.choose(config.training.precision, device)
        if config.training.compile:
            require_compiler(device)
        seed_everything(config.run.seed, processes.rank)
        self.splits: DataSplits = open_splits(config.data, config.run.seed, processes)
        if self.splits.val is None and self.splits.test is None:
            raise ConfigError("There is nothing to evaluate on: give --val-path, --test-path or a --val-share above 0.")
        self._cache_line = keep_decoded(self.splits, config.data.cache, processes.local_world_size)
        self.started = time.time()
        self._resumed: Checkpoint | None = None
        self.began = False
        self.last_top1 = "not evaluated yet"

    def open_model(self) -> VisionTransformer:
        """The model with its weights, and the batches that suit it."""
        opened: OpenedModel = open_model(self.config.model, len(self.splits.class_names), self.config.run.seed)
        artifact.model_config(opened.model)  # what could not be saved is refused now, not after hours
        self.preprocessing: Preprocessing = opened.preprocessing
        self.report = opened.report
        self.notes = _class_notes(opened, self.splits.class_names)
        training = self.config.training
        self.loss = training_loss(training, opened.model, len(self.splits.class_names), self.device)
        self.batches: TrainBatches = train_batches(
            self.splits.train,
            self.preprocessing,
            augmentation(self.config.augment),
            batch_size=training.batch_size,
            num_workers=self._workers(),
            device=self.device,
            seed=self.config.run.seed,
            rank=self.processes.rank,
            world_size=self.processes.world_size,
        )
        self.mixup = mixup(
            len(self.splits.class_names),
            mixup_alpha=training.mixup,
            cutmix_alpha=training.cutmix,
            label_smoothing=training.smoothing,
        )
        if self.mixup is not None and self.batches.batch_size % 2:
            raise ConfigError(
                f"Mixup pairs images, but a batch has {self.batches.batch_size} of them. Give an even --batch-size, or turn it "
                "off with --mixup 0 --cutmix 0."
            )
        self.steps_per_epoch = steps_per_epoch(self.batches, training.grad_accum_steps)
        build_optimizer(opened.model, training.opt, training.lr, training.weight_decay)  # refused now, if it cannot be
        return choose_attention(opened.model, self.device, self.precision.dtype).to(self.device)

    def reopen_sparse_checkpoint(self) -> VisionTransformer:
        """The shrunk model before fine-tuning, in the state of training that it was shrunk in."""
        options = replace(self.config.model, model_path=self.folder.root / SPARSE_CHECKPOINT, model_pretrained=False)
        opened = open_model(options, len(self.splits.class_names), self.config.run.seed)
        answer_teacher_apart(opened.model, enable=self.config.training.teacher_model is not None)
        return choose_attention(opened.model, self.device, self.precision.dtype).to(self.device)

    def begin(self, model: VisionTransformer) -> dict[str, Any] | None:
        """Claim the folder and say what will be done.

        Returns:
            The checkpoint to go on from, where the run is resumed and there is one.
        """
        plain, resolved = to_plain(self.config), self._resolved(model)
        self.folder.claim_for_all(self.processes.is_main, self.display.say, resume=self.resume, overwrite=self._overwrite)
        if self.resume and self.folder.has_begun:
            self._require_same_settings(plain, resolved)
            self._resumed = newest_for_all(self.checkpoints)
        wait_for_all()  # no rank may still be looking when the main one begins to write
        self.began = True
        if self.processes.is_main:
            if self._resumed is None:
                self.folder.begin({**plain, "resolved": resolved, "launch": launch_name()}, self._overwrite or self.resume)
            else:
                self.folder.tidy()
                self.checkpoints.tidy()
                self.folder.cut_lines(self._resumed.content["progress"]["lines"])
            self.display.log_to(self.folder.path / "log.txt")
        wait_for_all()
        self.display.say(
            f"{self.stage}: {self.config.model.model}, {count_parameters(model):,} parameters, seed {self.config.run.seed}"
        )
        self.display.say(f"data: {self.splits.description}")
        self.display.say(self._cache_line)
        for line in [*self._weights_lines(), *self.notes]:
            self.display.say(line)
        self.display.say(
            f"{self.processes.world_size} process(es) on {self.device}, "
            f"{str(self.precision.dtype or torch.float32).removeprefix('torch.')}, {self.global_batch} images a step, "
            f"{self.steps_per_epoch} steps an epoch"
        )
        if self._resumed is None:
            return None
        for damaged in self._resumed.passed_over:
            self.display.say(f"a checkpoint was passed over: {damaged}")
        place = self._resumed.content["progress"]["place"]
        self.display.say(f"resumed after {place['epoch']} epochs, at step {place['step']}, from {self._resumed.file.name}")
        return self._resumed.content

    def evaluate(self, model: nn.Module, part: str | None = None) -> tuple[str, Accuracy]:
        """Accuracy on a part of the data, by default on the one that is watched: val where there is one, else test.

        Returns:
            Name of the part, and the accuracy over all its images.
        """
        name = part or ("val" if self.splits.val is not None else "test")
        dataset = self.splits.val if name == "val" else self.splits.test
        assert dataset is not None
        accuracy = evaluate_split(
            model, dataset, self.preprocessing, self.precision, self.processes, self.config.training.batch_size,
            self._workers(), self.config.run.dist_eval,
        )  # fmt: skip
        self.last_top1 = f"{name} top-1 {accuracy.top1:.1f} %"
        return name, accuracy

    @property
    def global_batch(self) -> int:
        """Images of an optimizer step over all ranks."""
        return self.batches.batch_size * self.processes.world_size * self.config.training.grad_accum_steps

    def on_main(self, act: Callable[[], object]) -> None:
        """Do it on one rank alone, such as writing."""
        if self.processes.is_main:
            act()

    def description(self) -> dict[str, Any]:
        """What a saved model says of itself, besides its shape."""
        return {
            "class_names": self.splits.class_names,
            "preprocessing": self.preprocessing.to_dict(),
            "provenance": self._provenance(),
        }

    def log_epoch(self, line: dict[str, Any], epochs: int, name: str, accuracy: Accuracy) -> None:
        """Add a line to metrics.jsonl and say it in short."""
        self.on_main(lambda: self.folder.append_line("metrics.jsonl", line))
        skipped = f"  {line['skipped_steps']} steps skipped, not finite" if line["skipped_steps"] else ""
        self.display.say(
            f"epoch {line['epoch']:>3}/{epochs}  {line['phase']:<9} loss {line['train_loss']:.4f}  "
            f"{name} top-1 {accuracy.top1:6.2f} %  {line['kept_params']:,} parameters  {line['seconds']:.1f} s{skipped}"
        )

    def log_decision(self, decision: Decision, phase: str, steps_done: int, kept_params: int) -> None:
        """Add a line to blocks.jsonl: the decision was made at the end of step `steps_done` and keeps so many parameters."""
        line = {
            "epoch": steps_done / self.steps_per_epoch,
            "step": steps_done,
            "phase": phase,
            "progress": decision.progress,
            "tau": decision.tau,
            "kept_params": kept_params,
            "blocks": [asdict(block) for block in decision.blocks],
        }
        if decision.note is not None:
            line["note"] = decision.note
            self.display.say(decision.note)
        self.on_main(lambda: self.folder.append_line("blocks.jsonl", line))

    def returned(self) -> dict[str, int]:
        """How often pruned elements came back, over all mask updates of the stage, from blocks.jsonl.

        Returns:
            "elements": that came back, each as often as it did; "updates": mask updates, the last decision with them;
            "chances": elements that were pruned before an update, summed over the updates: as many could have come back. All 0
            on a rank that writes nothing.
        """
        file = self.folder.path / "blocks.jsonl"
        if not self.processes.is_main or not file.exists():
            return {"elements": 0, "updates": 0, "chances": 0}
        updates = [json.loads(line)["blocks"] for line in file.read_text(encoding="utf-8").splitlines()]
        return {
            "elements": sum(block["returned"] for blocks in updates for block in blocks),
            "updates": len(updates),
            "chances": sum(block["pruned"] for blocks in updates[:-1] for block in blocks),
        }

    def say_what_returned(self) -> None:
        """Say in the log how often pruned elements came back."""
        found = self.returned()
        self.display.say(
            f"{found['elements']:,} times a pruned element came back in {found['updates']} mask updates, of "
            f"{found['chances']:,} that could have"
        )

    def save_model(self, model: VisionTransformer) -> Path:
        """Write the stage's model folder."""
        folder = self.folder.root / PRODUCTS[self.stage]
        self.on_main(lambda: artifact.save(model, folder, **self.description()))
        wait_for_all()
        return folder

    def save_sparse_checkpoint(self, model: VisionTransformer) -> Path:
        """Write the shrunk model before fine-tuning under its published name."""
        file = self.folder.root / SPARSE_CHECKPOINT
        self.on_main(lambda: artifact.save_checkpoint(model, file, **self.description()))
        wait_for_all()
        return file

    def draw_figures(self) -> list[Path]:
        """Draw what blocks.jsonl holds."""
        if not self.processes.is_main or not (self.folder.path / "blocks.jsonl").exists():
            return []
        from p3b.report.figures import draw_figures  # matplotlib would take half a second of every start

        return draw_figures(self.folder.path, self.config.run.figure_format)

    def write_summary(self, summary: dict[str, Any]) -> dict[str, Any]:
        """Write summary.json, the last file of the stage."""
        unreadable = count_unreadable(self.splits)
        summary = {"stage": self.stage, **summary, "seconds": time.time() - self.started, "unreadable_images": unreadable}
        summary["provenance"] = self._provenance()
        if unreadable:
            self.display.say(f"{unreadable} unreadable image(s) were skipped")
        self.on_main(lambda: self.folder.write_json("summary.json", summary))
        wait_for_all()
        return summary

    def _weights_lines(self) -> list[str]:
        """Where the weights come from, every mismatch by name."""
        if self.report is not None:
            return self.report.lines()
        if self.config.model.model_pretrained:
            return [f"weights: timm's pretrained {self.config.model.model}"]
        return ["weights: none given, training starts from random ones"]

    def _workers(self) -> int:
        return num_workers(self.config.data, self.processes, self.device)

    def _provenance(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "model": self.config.model.model,
            "data": self.splits.description,
            "seed": self.config.run.seed,
            "processes": self.processes.world_size,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else platform.processor() or "cpu",
            "precision": str(self.precision.dtype or torch.float32).removeprefix("torch."),
            "versions": {"p3b": p3b.__version__, "torch": str(torch.__version__), "timm": timm.__version__},
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
        }

    def _resolved(self, model: VisionTransformer) -> dict[str, Any]:
        return {
            "params": count_parameters(model),
            "classes": len(self.splits.class_names),
            "preprocessing": self.preprocessing.to_dict(),
            "global_batch": self.global_batch,
            "steps_per_epoch": self.steps_per_epoch,
            "lr": scaled_lr(self.config.training.lr, self.global_batch),
            "num_workers": self._workers(),
            "processes": self.processes.world_size,
            "precision": str(self.precision.dtype or torch.float32).removeprefix("torch."),
        }

    def _require_same_settings(self, plain: dict[str, Any], resolved: dict[str, Any]) -> None:
        """A resumed run is told what the first was told and finds as much data in as many processes: else it is neither."""
        before, defaults = self.folder.read_json("config.json"), to_plain(type(self.config)())
        places = {"output_dir", "data_path", "val_path", "test_path", "model_path", "teacher_path", "dense_run"}
        free = places | {
            "resume",
            "overwrite",
            "device",
            "num_workers",
            "cache",
            "figure_format",
            "layout",
            "checkpoint_minutes",
            "timeout_minutes",
        }
        changed = [
            f"--{key.replace('_', '-')} was {was!r}, now {value!r}"
            for group, values in plain.items()
            for key, value in values.items()
            # A setting that an earlier version did not know does by default what was done without it.
            if key not in free and (was := before.get(group, {}).get(key, defaults[group][key])) != value
        ]
        lengths = before.get("resolved", {})
        changed += [
            f"{key} was {lengths.get(key)}, now {resolved[key]} (from the data and the number of processes)"
            for key in ("global_batch", "steps_per_epoch")
            if lengths.get(key) != resolved[key]
        ]
        if changed:
            raise ConfigError(f"--resume needs the settings that the run began with: {'; '.join(changed)}.")


def _class_notes(opened: OpenedModel, class_names: tuple[str, ...]) -> list[str]:
    """What to say where a saved model was trained for other classes of the same number: its head is kept."""
    if opened.class_names is None or opened.class_names == class_names or len(opened.class_names) != len(class_names):
        return []
    return [
        f"the saved head was trained for other classes ({', '.join(opened.class_names[:5])} ...); it is kept and learns "
        f"{', '.join(class_names[:5])} ..."
    ]


@contextmanager
def open_session(config: TrainConfig, stage: str) -> Iterator[Session]:
    """Check the config, join the process group, open data and folder; at the end let go of them.

    Raises:
        UserError: whatever the user can mend, also where it shows itself as some library's error in the middle of a run.
    """
    check(config)
    with process_group(config.run.device, config.run.timeout_minutes) as (processes, device):
        session = Session(config, stage, processes, device)
        try:
            with explained(processes, session.folder.root, lambda: session.began):
                yield session
        finally:
            session.folder.release()


@contextmanager
def explained(processes: Processes, folder: Path | None, work_has_begun: Callable[[], bool]) -> Iterator[None]:
    """Turn the machine's errors into ones that a user can mend, and let a rank that meets one alone say so.

    Args:
        folder: where the run writes.
        work_has_begun: until then every rank meets the same errors, and the main one's word is enough.
    """
    try:
        yield
    except (UserError, OSError, RuntimeError) as error:
        cause = error if isinstance(error, UserError) else explain(error, folder)
        if cause is None:
            raise
        if work_has_begun() and not processes.is_main:
            print(f"p3b, process {processes.rank}: {cause}", file=sys.stderr, flush=True)
        if cause is error:
            raise
        raise cause from error


def explain(error: OSError | RuntimeError, folder: Path | None = None) -> UserError | None:
    """What went wrong with the machine, for a user who can mend it; None where it may be a mistake of ours.

    Args:
        error: some library's.
        folder: where the run writes: a file that is not there, or forbidden, is the user's to mend if it lies in it.
    """
    if (cause := worker_death(error) or lost_process(error)) is not None:
        return cause
    if isinstance(error, torch.OutOfMemoryError) or _OUT_OF_MEMORY.search(str(error)):
        return TrainingError(
            f"The memory is full ({str(error).splitlines()[0][:200]}). Lower --batch-size and raise --grad-accum-steps by as "
            "much: the steps stay the same. --resume needs the same settings, so start again with --overwrite."
        )
    if isinstance(error, OSError) and (error.errno in _DISK_ERRORS or _lies_in(error.filename, folder)):
        return RunFolderError(f"{error}. The run stops; its last checkpoint stays. Mend that, then --resume goes on.")
    return None


_OUT_OF_MEMORY = re.compile(r"not enough memory|can't allocate memory")
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE}
"""Full, read-only, broken, gone."""


def _lies_in(file: Any, folder: Path | None) -> bool:
    return (
        isinstance(file, (str, os.PathLike)) and folder is not None and Path(file).absolute().is_relative_to(folder.absolute())
    )


def count_unreadable(splits: DataSplits) -> int:
    """Images of all parts that some rank has found unreadable and skipped."""
    parts = (part for part in (splits.train, splits.val, splits.test) if part is not None)
    return len(set().union(*gather([name for part in parts for name in part.unreadable])))


def evaluate_split(
    model: nn.Module,
    dataset: Any,
    preprocessing: Preprocessing,
    precision: Precision,
    processes: Processes,
    batch_size: int,
    num_workers: int,
    shared: bool,
) -> Accuracy:
    """Accuracy over a data set, each image counted once: shared among the ranks, or all of it on each."""
    batches = eval_batches(
        dataset,
        preprocessing,
        batch_size=batch_size,
        num_workers=num_workers,
        device=precision.device,
        rank=processes.rank if shared else 0,
        world_size=processes.world_size if shared else 1,
    )
    return evaluate(model, batches, precision, all_reduce_sum if shared else _alone)


def _alone(tensor: Tensor) -> Tensor:
    return tensor
