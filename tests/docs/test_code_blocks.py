"""What the documentation shows as code works: Python is run in a tiny setting, commands are parsed by the real command line.

A block that cannot be run here says why in a comment above it: `<!-- not run: why -->`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from pages import PAGES, ROOT, Block, blocks, spans
from PIL import Image

import p3b
from flags_page import settings_class, settings_in
from p3b.commands.command_line import COMMANDS, _parse, published_main
from p3b.commands.words import FROM_SCRATCH, KEEP, OTHER_NAMES
from p3b.errors import UserError
from tiny import images, labels, tiny_vit

SHELLS = ("bash", "sh", "console", "")
VARIABLES = {"$PRUNE_RATIO": "0.5"}
"""Of the shell, where the text of their name is not a value."""
OF_ALL = {KEEP, FROM_SCRATCH, "--config", "--help", "--help-all", "--version", "--eval"}
"""Flags that are read before a command's own."""
FOREIGN = {
    "--nproc-per-node", "--nproc_per_node", "--nnodes", "--max-restarts", "--rdzv-id", "--signals-to-handle", "--signal",
    "--logdir", "--before",
}  # fmt: skip
"""Flags of torchrun, Slurm and TensorBoard that the text names, and one of a benchmark that is no more."""


@cache
def _of_scripts() -> set[str]:
    """Flags of the benchmarks and examples, which read them by argparse."""
    files = [file for folder in ("benchmarks", "examples", "scripts") for file in (ROOT / folder).rglob("*.py")]
    return {flag for file in files for flag in re.findall(r"[\"'](--[a-z][a-z-]*)[\"']", file.read_text(encoding="utf-8"))}


def _named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


PYTHON = {page: [block for block in blocks(page) if block.language == "python"] for page in PAGES}
RUN = [page for page, found in PYTHON.items() if any(not block.not_run for block in found)]


@pytest.fixture
def tiny_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Names that the blocks take for granted, and a folder with a saved model and a photo."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 32), (200, 120, 40)).save("photo.jpg")
    names = ["bird", "cat", "deer", "dog", "frog"]
    how = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "crop_pct": 1.0}
    p3b.save(tiny_vit(), "run/pruned", class_names=names, preprocessing=how)
    model = tiny_vit().train()
    return {
        "p3b": p3b,
        "timm": timm,
        "torch": torch,
        "model": model,
        "trained": tiny_vit(seed=1),
        "criterion": torch.nn.functional.cross_entropy,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3),
        "batches": [(images(4, seed=step), labels(4, seed=step)) for step in range(8)],
        "photos": [images(4, seed=step) for step in range(2)],
        "names": names,
        "how": how,
    }


@pytest.mark.parametrize("page", RUN, ids=_named)
def test_python_blocks_run(page: Path, tiny_setting: dict[str, Any]) -> None:
    """One after the other, as a reader would; schedules are a 500th as long."""
    for block in PYTHON[page]:
        if not block.not_run:
            code = compile(_short(block), f"{page}, line {block.line}", "exec")
            exec(code, tiny_setting)


def _short(block: Block) -> str:
    """The code with schedules of a few steps, at its line of the page so that errors name it."""

    def shorter(schedule: re.Match[str]) -> str:
        return re.sub(r"\d+", lambda number: str(max(1, int(number[0]) // 500)), schedule[0])

    return "\n" * (block.line - 1) + re.sub(r"Schedule\([^()]*\)", shorter, block.code)


def test_every_block_that_is_not_run_is_python_and_says_why() -> None:
    for page in PAGES:
        for block in blocks(page):
            assert not block.not_run or (block.language == "python" and len(block.not_run.split()) > 1), block


def _commands(text: str) -> Iterator[list[str]]:
    """The words behind `p3b`, `-m p3b` or `main.py` of each command line in shell code, by program."""
    for line in text.replace("\\\n", " ").splitlines():
        try:
            words = shlex.split(line, comments=True)
        except ValueError:
            continue
        words = [word for word in words if word != "..."]
        for place, word in enumerate(words):
            if word in ("p3b", "main.py") and (place == 0 or word == "main.py" or words[place - 1] == "-m"):
                yield [word, *_until_the_end(words[place + 1 :])]
                break


def _until_the_end(words: list[str]) -> list[str]:
    ends = [place for place, word in enumerate(words) if word in ("&&", "||", "|", ";", ">") or word.endswith(";")]
    return words[: ends[0]] if ends else words


def _in_blocks(page: Path) -> list[list[str]]:
    return [words for block in blocks(page) if block.language in SHELLS for words in _commands(block.code)]


@pytest.mark.parametrize("page", [page for page in PAGES if _in_blocks(page)], ids=_named)
def test_command_lines_are_understood(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the parser of the command itself; nothing is carried out."""
    monkeypatch.chdir(tmp_path)
    Path("compare.yaml").write_text(
        next(block.code for block in blocks(ROOT / "docs" / "compare.md") if block.language == "yaml")
    )
    for module in ("prune", "finetune"):
        monkeypatch.setattr(f"p3b.commands.{module}.{module}", lambda config: None)
    refused = [shlex.join(words) for words in _in_blocks(page) if not _understood(tuple(words))]
    assert not refused


@cache
def _understood(words: tuple[str, ...]) -> bool:
    program, *given = words
    if program == "main.py":
        return published_main([VARIABLES.get(word, word) for word in given]) == 0
    name, *flags = given
    if name not in COMMANDS or {"--help", "--help-all"} & set(flags):
        return name in {*COMMANDS, "completion", "--version"}
    try:
        _parse(name, flags, f"p3b {name}", published=False)
    except (UserError, SystemExit):
        return False
    return True


@pytest.mark.parametrize("page", PAGES, ids=_named)
def test_commands_and_their_flags_in_the_text_exist(page: Path) -> None:
    """What stands in backticks as `p3b <command> --flag`, whole or in part."""
    for span in spans(page):
        for program, *words in _commands(span):
            if program == "p3b" and words and not words[0].startswith(("-", "<")):
                name, *flags = words
                assert name in {*COMMANDS, "completion"}, span
                given = {word.partition("=")[0].replace("_", "-") for word in flags if word.startswith("--")}
                assert given <= _flags_of(name) | OF_ALL, span


@cache
def _flags_of(command: str) -> set[str]:
    if command not in COMMANDS:
        return set()
    own = {"--" + each.name.replace("_", "-") for each in settings_in(settings_class(command))}
    return own | {"--no-" + flag[2:] for flag in own}


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "experiments.md"], ids=_named)
def test_flags_in_the_text_exist(page: Path) -> None:
    known = OF_ALL | OTHER_NAMES.keys() | FOREIGN | _of_scripts()
    known |= {flag for command in COMMANDS for flag in _flags_of(command)}
    named = {flag for span in spans(page) for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", span)}
    unknown = {flag for flag in named if flag not in known and flag.replace("_", "-") not in known}
    assert not unknown
