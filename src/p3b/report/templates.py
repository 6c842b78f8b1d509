"""The pages' templates."""

from __future__ import annotations

from functools import cache

import jinja2


@cache
def template(name: str) -> jinja2.Template:
    """A template of this folder; compiled once, since a series of runs writes a page for each."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("p3b.report", "."), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    return environment.get_template(name)
