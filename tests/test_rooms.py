"""Imports run downwards only, files and functions stay short, and what has to start quickly does not load torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import p3b
from processes import SparePython

SOURCE = Path(p3b.__file__).parent

ANATOMY = {"vit", "core"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "core": {"core"},
    "vit": ANATOMY,
    "scoring": {"scoring", *ANATOMY},
    "methods": {"methods", "scoring", *ANATOMY},
    "data": {"data"},
    "storage": {"storage", "__init__", *ANATOMY},
    "train": {"train", "methods.base", "storage", *ANATOMY},
    # Prediction takes image files, and an export is checked on real ones: both are prepared by the code that training prepares
    # them with. `data` imports nothing of ours, so no circle can come of it.
    "deploy": {"deploy", "storage", "data", "__init__", *ANATOMY},
    "report": {"report"},
    "pruner": {"methods", "methods.base", "scoring.meter", "train.distributed", *ANATOMY},
    "__init__": {"core.schedule", "deploy", "pruner", "storage", "vit.cost"},
    "run": {"run", "deploy", "train", "storage", "data", "methods", "report", "pruner", "__init__", *ANATOMY},
    "commands": {"commands", "run", "deploy", "train", "storage", "data", "methods", "report", "pruner", "__init__", *ANATOMY},
    "__main__": {"commands"},
}
"""Rooms and what each may import, beside `errors`, which is common ground. A name covers everything inside it."""

ROOT = {"__init__", "__main__", "pruner", "errors"}
"""The files at the root of the package: its face, the library's front door, and the errors."""

LIGHT = (
    "errors",
    "storage.files",
    "report",
    "run.options",
    "run.option_checks",
    "run.flags",
    "run.deploy_options",
    "run.model_options",
    "commands.settings",
    "commands.command_line",
    "__init__",
)
"""These load neither torch nor timm when they are imported (a command loads them when it is carried out)."""

LONGEST_FILE, LONGEST_FUNCTION = 450, 60
"""Lines, docstrings and comments included."""
TOO_LONG = {
    "storage.artifact",  # being taken apart
    "vit.compact",  # being taken apart
    "data.datasets.open_data",  # being taken apart
    "report.figures._draw_last_update",  # being taken apart
}
"""Files and functions that are longer for now."""


def _modules() -> dict[str, Path]:
    """All modules by their name inside the package: "core.masks", "core" for a room's own file."""
    names = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return names


MODULES = _modules()


def _imports(name: str, *, of_ours: bool) -> set[str]:
    """What a module imports anywhere in it, lazily or for types alone included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                is_module = inner.removeprefix("p3b.") in MODULES and node.module.split(".")[0] == "p3b"
                found.add(inner if is_module else node.module)
    ours = {module for module in found if module.split(".")[0] == "p3b"}
    if of_ours:
        return {"__init__" if module == "p3b" else module.removeprefix("p3b.") for module in ours}
    return {module.split(".")[0] for module in found - ours}


def _room(name: str) -> str:
    """The row of the table that a module stands in."""
    return name.split(".", maxsplit=1)[0]


def _inside(name: str, room: str) -> bool:
    return name == room or name.startswith(f"{room}.")


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_downwards_only(name: str) -> None:
    room = _room(name)
    assert room in MAY_IMPORT, f"{name} stands in no room: give it a row in the table"
    allowed = MAY_IMPORT[room] | {"errors"}
    wrong = {imported for imported in _imports(name, of_ours=True) if not any(_inside(imported, a) for a in allowed)}
    assert not wrong, f"{name} must not import {sorted(wrong)}"


def test_no_circle_of_imports() -> None:
    """Whatever imports what it imports itself, at the top of the file, in a function or for types alone."""
    imports = {name: _imports(name, of_ours=True) & MODULES.keys() for name in MODULES}
    # The face of the package hands on names of every room; what a room takes from it is the version.
    graph = {name: imported - {"__init__"} for name, imported in imports.items() if name != "__init__"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


def _functions(name: str) -> dict[str, int]:
    """Lines of every function in a module, by its name inside the package."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = [node for node in ast.walk(ast.parse(MODULES[name].read_text())) if isinstance(node, functions)]
    return {f"{name}.{node.name}": (node.end_lineno or node.lineno) - node.lineno + 1 for node in found}


def test_no_file_and_no_function_is_too_long() -> None:
    files = {name for name, path in MODULES.items() if len(path.read_text().splitlines()) > LONGEST_FILE}
    lengths = [found for name in MODULES for found in _functions(name).items()]
    assert len(lengths) > 500
    functions = {name for name, length in lengths if length > LONGEST_FUNCTION}
    assert files | functions <= TOO_LONG, sorted((files | functions) - TOO_LONG)


def test_only_the_face_the_front_door_and_the_errors_stand_at_the_root() -> None:
    assert {path.stem for path in SOURCE.glob("*.py")} == ROOT


def test_no_method_imports_another() -> None:
    methods = [name for name in MODULES if name.startswith("methods.") and name != "methods.base"]
    assert methods
    for name in methods:
        others = {imported for imported in _imports(name, of_ours=True) if _inside(imported, "methods")}
        assert others <= {"methods.base"}, name


def test_the_loop_names_no_method() -> None:
    source = MODULES["train.loop"].read_text()
    methods = {name.removeprefix("methods.") for name in MODULES if name.startswith("methods.")} - {"base"}
    assert methods
    assert not [method for method in methods if method in source]


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("core")])
def test_core_is_arithmetic_alone(name: str) -> None:
    outside = _imports(name, of_ours=False) - set(sys.stdlib_module_names)
    assert outside <= {"torch", "numpy"}
    source = MODULES[name].read_text()
    assert "nn.Module" not in source
    assert "distributed" not in source


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith(("core", "scoring"))])
def test_core_and_scoring_know_no_process_group(name: str) -> None:
    assert "torch.distributed" not in MODULES[name].read_text()


@pytest.mark.parametrize("name", [name for name in MODULES if _room(name) in ("core", "scoring", "methods", "train", "pruner")])
def test_only_the_anatomy_room_knows_blocks_by_their_parts(name: str) -> None:
    tree = ast.parse(MODULES[name].read_text())
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not attributes & {"qkv", "proj", "fc1", "fc2", "norm1", "norm2", "ls1", "ls2"}


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("report")])
def test_the_report_needs_neither_torch_nor_timm(name: str) -> None:
    assert not _imports(name, of_ours=False) & {"torch", "timm", "torchvision", "safetensors"}


def test_what_has_to_start_quickly_loads_no_torch() -> None:
    names = [name for name in MODULES if any(_inside(name, light) for light in LIGHT)]
    assert len(names) >= len(LIGHT)
    modules = ["p3b" if name == "__init__" else f"p3b.{name}" for name in names]
    script = """
import importlib, sys
for module in sys.argv[1:]:
    importlib.import_module(module)
    loaded = sorted({"torch", "timm", "torchvision"} & set(sys.modules))
    if loaded:
        sys.exit(f"importing {module} loads {loaded}")
"""
    result = subprocess.run([sys.executable, "-c", script, *modules], check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_public_names_are_there_and_a_wrong_one_is_an_attribute_error() -> None:
    assert {name for name in p3b.__all__ if getattr(p3b, name, None) is None} == set()
    assert set(dir(p3b)) == set(p3b.__all__)
    assert p3b.core.allocation.keep_ratios.__name__ == "keep_ratios"
    with pytest.raises(AttributeError, match="has no attribute 'prune'"):
        _ = p3b.prune


def test_the_commands_load_what_draws_and_exports_only_when_it_is_needed(python: SparePython) -> None:
    costly = "{'matplotlib', 'onnx', 'sklearn'}"
    commands = "p3b.commands.prune, p3b.commands.evaluate, p3b.commands.sweep"
    script = f"import sys, {commands}; sys.exit(', '.join({costly} & set(sys.modules)) or None)"
    result = python.run(script)
    assert result.status == 0, f"importing the commands loads {result.errors}"
