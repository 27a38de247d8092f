"""Run something when a module of another package is imported, without importing it."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
import warnings
from collections.abc import Callable
from typing import Any


def when_imported(name: str, do: Callable[[], object]) -> None:
    """Calls `do` once, right after the module `name` was imported; now, if it is already.

    What `do` raises becomes a warning: the import of somebody else's module must not fail for it.
    """
    if name in sys.modules:
        _try(do)
    else:
        sys.meta_path.insert(0, _Finder(name, do))


def _try(do: Callable[[], object]) -> None:
    try:
        do()
    except Exception as error:
        warnings.warn(f"torchlin: {type(error).__name__}: {error}", RuntimeWarning, stacklevel=2)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds nothing by itself: it has the others find the module, and adds `do` to what runs it."""

    def __init__(self, name: str, do: Callable[[], object]) -> None:
        self.name, self.do = name, do

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != self.name or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        run, do = spec.loader.exec_module, self.do

        def exec_module(module: Any) -> None:
            run(module)
            _try(do)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
