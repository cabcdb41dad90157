"""Names in place of torchvision, which has no CPU build on the package index.

vLLM's vision-language models import it to read images; their weights are made and loaded without it.
"""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__version__ = "0.28.0"


class Names(ModuleType):
    """A module in which every name is a class that does nothing."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return Members(name, (), {})


class Members(type):
    """A class of which every attribute is its own name, as an enumeration's members could be."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class Finder(MetaPathFinder, Loader):
    """Finds every module of torchvision."""

    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self, is_package=True) if name.startswith("torchvision.") else None

    def create_module(self, spec):
        return Names(spec.name)

    def exec_module(self, module): ...


sys.meta_path.insert(0, Finder())
