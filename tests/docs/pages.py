"""The pages of the documentation as Markdown: their code blocks, links and headings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md")))

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<code>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)
_NOT_RUN = re.compile(r"<!-- not run: (.+?) -->\s*\Z")
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_SPAN = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
_LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+)\)")
_SOURCE = re.compile(r"<(?:img|source)\b[^>]*?\bsrc(?:set)?=\"([^\"]+)\"")
_HEADING = re.compile(r"^#{1,6} +(.+?) *#*$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: where it stands.
        line: of its first line of code.
        language: what is written behind the fence; may be empty.
        code: the lines.
        not_run: why it is not run; empty where it is.
    """

    page: Path
    line: int
    language: str
    code: str
    not_run: str


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in _FENCE.finditer(text):
        before = text[: found.start()]
        reason = _NOT_RUN.search(before)
        yield Block(page, before.count("\n") + 2, found["language"], found["code"], reason[1] if reason else "")


@cache
def prose(page: Path) -> str:
    """A page without its fenced blocks and comments; lines keep their places."""
    text = page.read_text(encoding="utf-8")
    for pattern in (_FENCE, _COMMENT):
        text = pattern.sub(lambda found: "\n" * found[0].count("\n"), text)
    return text


def spans(page: Path) -> list[str]:
    """What stands in backticks within the text."""
    return [" ".join(found[2].split()) for found in _SPAN.finditer(prose(page))]


def links(page: Path) -> list[str]:
    """Addresses of links and pictures."""
    text = _SPAN.sub("", prose(page))
    return [*_LINK.findall(text), *_SOURCE.findall(text)]


@cache
def anchors(page: Path) -> frozenset[str]:
    """What a page can be linked to by: its headings as GitHub and the site write them."""
    found: list[str] = []
    for heading in _HEADING.findall(prose(page)):
        slug = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()).replace(" ", "-")
        times = found.count(slug)
        found.append(f"{slug}-{times}" if times else slug)
    return frozenset(found)
