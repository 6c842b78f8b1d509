"""docs/api.md, made from signatures and docstrings."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Sequence
from dataclasses import is_dataclass
from typing import Any

import p3b
from made_markdown import MADE, cell, field_texts, page, table

CALLED = ("Pruner", "Schedule", "save", "load", "with_layout", "push", "from_transformers", "count_parameters", "count_macs")
"""Names of `p3b` in the order in which they are needed."""
FURTHER = (
    ("p3b.core.allocation", "block_importance"),
    ("p3b.core.allocation", "keep_ratios"),
    ("p3b.core.masks", "soft_mask"),
    ("p3b.data", "read_image"),
    ("p3b.data", "prepare_image"),
)
"""Functions outside of `p3b` itself that are kept stable."""


HEAD = """`import p3b` is light: torch and timm are loaded when a name is first used.
[Your own training loop](own_loop.md) shows how the names work together. Errors are subclasses of `p3b.errors.UserError`.
Their message says what was got, what is expected and how to fix it."""


def api_page() -> str:
    """The page: public names with their signatures and docstrings."""
    lines = [MADE, "", "# Python API", "", HEAD, ""]
    for name in CALLED:
        lines += _documented(f"p3b.{name}", getattr(p3b, name))
    lines += ["## Parts of the method, and images", ""]
    for module, name in FURTHER:
        lines += _documented(f"{module}.{name}", getattr(importlib.import_module(module), name), "###")
    return page(lines)


def _documented(name: str, found: Any, level: str = "##") -> list[str]:
    """A name with its signature and its docstring; of a class its public methods too."""
    lines = [f"{level} {name}", "", *_signature(name, found), *_text(inspect.getdoc(found) or "")]
    if inspect.isclass(found):
        if is_dataclass(found):
            lines += [*table(("field", "meaning"), [(f"`{key}`", cell(text)) for key, text in field_texts(found).items()])]
        for key, member in vars(found).items():
            function = member.__func__ if isinstance(member, classmethod) else member
            if key.startswith("_") or not (inspect.isfunction(function) or isinstance(function, property)):
                continue
            short = f"{found.__name__}.{key}"
            signature = [] if isinstance(function, property) else _signature(short, function)
            lines += [f"{level}# {short}", "", *signature, *_text(inspect.getdoc(function) or "")]
    return lines


def _signature(name: str, found: Any) -> list[str]:
    """A call as it stands in the source, without self."""
    if inspect.isclass(found) and is_dataclass(found):
        parts, result = [str(each).replace("'", "") for each in inspect.signature(found).parameters.values()], ""
    else:
        source = textwrap.dedent(inspect.getsource(found.__init__ if inspect.isclass(found) else found))
        tree = ast.parse(source).body[0]
        assert isinstance(tree, ast.FunctionDef)
        for arguments in (tree.args.posonlyargs, tree.args.args):
            arguments[:] = [each for each in arguments if each.arg not in ("self", "cls")]
        parts = _parameters(tree.args)
        result = f" -> {ast.unparse(tree.returns)}" if tree.returns is not None and not inspect.isclass(found) else ""
    text = f"{name}({', '.join(parts)}){result}"
    if len(text) > 100:
        text = "\n".join([f"{name}(", *(f"    {part}," for part in parts), f"){result}"])
    return ["<!-- not run: a signature -->", "```python", text, "```", ""]


def _parameters(arguments: ast.arguments) -> list[str]:
    """Each parameter by itself, with annotation and default; the star before those that are given by name."""
    first = len(arguments.args) - len(arguments.defaults)
    parts = [
        _parameter(each, arguments.defaults[place - first] if place >= first else None)
        for place, each in enumerate(arguments.args)
    ]
    if arguments.kwonlyargs:
        parts.append("*")
    parts += map(_parameter, arguments.kwonlyargs, arguments.kw_defaults)
    return parts + ([f"**{_parameter(arguments.kwarg, None)}"] if arguments.kwarg else [])


def _parameter(argument: ast.arg, default: ast.expr | None) -> str:
    return (ast.unparse(argument) + ("" if default is None else f" = {ast.unparse(default)}")).replace("'", '"')


_SECTION = re.compile(r"^(Args|Returns|Raises|Attributes|Source):(.*)$")
_ENTRY = re.compile(r"^    (\S.*?): (.*)$")


def _text(docstring: str) -> list[str]:
    """A docstring as Markdown: paragraphs stay, code stays code, what is told of each argument becomes a list."""
    lines: list[str] = []
    inside = ""
    for line in docstring.splitlines():
        section = _SECTION.match(line)
        if section is not None:
            inside = section[1]
            lines += ["", f"**{section[1]}**:{section[2]}", ""]
        elif inside and line and not line.startswith(" "):
            inside = ""
            lines += ["", line]
        elif inside in ("Args", "Attributes", "Raises") and (entry := _ENTRY.match(line)):
            lines += [*([""] if lines[-1] and not lines[-1].startswith(("-", "  ")) else []), f"- `{entry[1]}`: {entry[2]}"]
        elif inside and line.strip():
            lines.append(f"  {line.strip()}" if lines and lines[-1].startswith(("-", "  ")) else line.strip())
        else:
            lines.append(line)
    return [*_code_in_fences(lines), ""]


def _code_in_fences(lines: Sequence[str]) -> list[str]:
    """Blocks that are indented by four become fenced ones, which every reader of Markdown takes for code."""
    written: list[str] = []
    code = False
    for line in lines:
        indented = line.startswith("    ")
        if indented and not code:
            written += ["", "<!-- not run: runs on the page of one's own loop -->", "```python"]
        if code and not indented:
            written += ["```", ""]
        code = indented
        written.append(re.sub(r" {2,}#", "  #", line[4:]) if indented else line)
    return [*written, *(["```"] if code else [])]
