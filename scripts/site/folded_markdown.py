"""What stands in <details> on a page is Markdown for the site, as it is where the repository is looked at.

Python-Markdown takes the inside of an HTML element for HTML unless the element says `markdown="1"`; this says it for the pages.
"""

from __future__ import annotations

import re

from markdown import Markdown
from markdown.extensions import Extension
from markdown.preprocessors import Preprocessor

_FENCE = re.compile(r"^\s*(```|~~~)")


class FoldedAsMarkdown(Preprocessor):
    def run(self, lines: list[str]) -> list[str]:
        written, fenced = [], False
        for line in lines:
            fenced ^= _FENCE.match(line) is not None
            written.append('<details markdown="1">' if line.strip() == "<details>" and not fenced else line)
        return written


class Folded(Extension):
    def extendMarkdown(self, md: Markdown) -> None:
        md.preprocessors.register(FoldedAsMarkdown(md), "folded", 28)  # before fences (25) and HTML (20) are taken out


def makeExtension(**settings: object) -> Folded:
    return Folded(**settings)
