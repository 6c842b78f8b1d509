"""Commands that must be refused: what they say, and that they leave everything as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from runs import everything_in, run


class Refusals:
    """Runs that must be refused: what they say, and that the output folder is as it was."""

    def __init__(self, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.out, self._capsys = out, capsys

    def __call__(self, command: str, *given: str, telling: tuple[str, ...]) -> str:
        before = everything_in(self.out) if self.out.exists() else None
        self._capsys.readouterr()
        assert run(command, *given) == 2
        said = " ".join(self._capsys.readouterr().err.replace("│", " ").split())
        for words in telling:
            assert words in said, said
        assert "Traceback" not in said
        assert (everything_in(self.out) if self.out.exists() else None) == before, "nothing half written"
        return said
