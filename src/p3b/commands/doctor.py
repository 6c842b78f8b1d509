"""`p3b doctor`: what the records of a run say of its accuracy, each finding with its evidence and the setting to try."""

from __future__ import annotations

from p3b.report.diagnosis import CHECKS, Finding, diagnose
from p3b.report.record import read_run
from p3b.report.run_report import answer
from p3b.run.look_options import DoctorConfig


def doctor(config: DoctorConfig) -> list[Finding]:
    """Print the findings of every stage of a run; returns them.

    Raises:
        RunFolderError: the folder holds no run, or a file is damaged.
    """
    found: list[Finding] = []
    for stage in read_run(config.run):
        print(f"{stage.name}: {answer(stage)}")
        of_stage = diagnose(stage)
        for finding in of_stage:
            print(f"\n  {finding.says}\n    evidence: {finding.evidence}\n    try:      {finding.advice}")
        if not of_stage:
            print(f"  None of the {len(CHECKS)} checks found anything.")
        found += of_stage
    return found
