"""P3B: Pruning by Block Benefit. Make a pretrained Vision Transformer small while it moves to your images.

`import p3b` stays light: torch and timm are loaded when a name below is first used. Where timm is imported, before or after, it
gets to know the models that p3b saved (`p3b.deploy.timm_model`).
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Pruner", "Schedule", "count_macs", "count_parameters", "from_transformers", "load", "push", "save", "with_layout"]

if TYPE_CHECKING:
    from p3b.core.schedule import Schedule
    from p3b.deploy.choice import load, with_layout
    from p3b.deploy.hub import push
    from p3b.pruner import Pruner
    from p3b.storage.artifact import save
    from p3b.storage.from_transformers import from_transformers
    from p3b.vit.cost import count_macs, count_parameters

_HOME = {
    "Pruner": "p3b.pruner",
    "Schedule": "p3b.core.schedule",
    "count_macs": "p3b.vit.cost",
    "count_parameters": "p3b.vit.cost",
    "from_transformers": "p3b.storage.from_transformers",
    "load": "p3b.deploy.choice",
    "push": "p3b.deploy.hub",
    "save": "p3b.storage.artifact",
    "with_layout": "p3b.deploy.choice",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    try:
        return importlib.import_module(f"p3b.{name}")  # p3b.core.allocation and its like, without an import of their own
    except ModuleNotFoundError as error:
        if error.name != f"p3b.{name}":
            raise
        raise AttributeError(f"module 'p3b' has no attribute '{name}'") from None


def __dir__() -> list[str]:
    return __all__


class _AfterTimm(importlib.abc.MetaPathFinder):
    """Finds timm as Python would, and lets our models be registered as soon as timm has been imported."""

    _looks = False

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "timm" or self._looks:
            return None
        self._looks = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._looks = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                importlib.import_module("p3b.deploy.timm_model")

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if "timm" in sys.modules:
    importlib.import_module("p3b.deploy.timm_model")
else:
    sys.meta_path.insert(0, _AfterTimm())
