"""A run that computes active elements alone and fine-tunes in the quick form."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from p3b.errors import ConfigError
from p3b.run.method_options import require_taken
from p3b.run.option_checks import check
from p3b.run.options import CompareConfig, MachineOptions, PhaseOptions, PruneConfig, PruneOptions, RunOptions, TrainingOptions
from p3b.run.series_plan import Run, config_of
from runs import CALM, PHASES, colour_folders, flags, lines, run, weights


def test_a_run_says_what_it_computes_and_both_forms_train_the_same_model(tmp_path: Path) -> None:
    data = colour_folders(tmp_path / "data")
    given = (*CALM, *PHASES, "--prune-ratio", "0.7", "--prune-compute", "active", "--finetune-epochs", "1", "--model-ema")
    for form in ("saved", "quick"):
        assert run("prune", *flags(data, tmp_path / form, *given, "--small-form", form)) == 0
    updates = lines(tmp_path / "quick" / "prune" / "blocks.jsonl")
    assert all(0 < line["computed"] <= 1 and line["left_out"] >= 0 for line in updates[:-1])
    saved, quick = (weights(tmp_path / form / "pruned") for form in ("saved", "quick"))
    assert list(saved) == list(quick)
    assert all(torch.allclose(value, quick[key], atol=2e-5) for key, value in saved.items())


def test_it_is_refused_with_a_compiler_and_where_no_method_takes_it() -> None:
    folder = RunOptions(output_dir=Path("out"))
    active = PruneOptions(prune_compute="active")
    with pytest.raises(ConfigError, match="--compile"):
        check(PruneConfig(training=TrainingOptions(compile=True), prune=active, run=folder))
    with pytest.raises(ConfigError, match="--prune-compute active"):
        require_taken(PhaseOptions(prune_compute="active"), ["savit"])
    series = CompareConfig(prune=PhaseOptions(prune_compute="active"), run=MachineOptions(output_dir=Path("out")))
    computes = {row: config_of(series, Run(row, 0.5, 0)).prune.prune_compute for row in ("savit", "uniform")}  # type: ignore[union-attr]
    assert computes == {"savit": "full", "uniform": "active"}
