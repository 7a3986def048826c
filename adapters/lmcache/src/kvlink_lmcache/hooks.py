"""Runs a function after a module was imported, whoever imports it and whenever.

vLLM loads plugins long before its worker is ready for lmcache: importing lmcache there makes vLLM 0.32's CPU worker die
(it walks ``sys.modules`` and trips over numba's library objects). So nothing is imported here; a finder on
``sys.meta_path`` lets the usual finders do their work and calls back when a module's code has run.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from types import ModuleType

Hook = Callable[[ModuleType], None]


class _Loader(Loader):
    """A module's own loader with a call after it."""

    def __init__(self, inner: Loader, hooks: list[Hook]) -> None:
        self._inner = inner
        self._hooks = hooks

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)
        if module.__spec__ is not None:
            module.__spec__.loader = self._inner
        module.__loader__ = self._inner
        for hook in self._hooks:
            hook(module)


class _Finder(MetaPathFinder):
    """Finds the modules that somebody waits for, once each."""

    def __init__(self) -> None:
        self.waiting: dict[str, list[Hook]] = {}
        self._lock = threading.RLock()
        self._busy = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.waiting or getattr(self._busy, "name", None) == fullname:
            return None
        self._busy.name = fullname
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._busy.name = None
        if spec is None or spec.loader is None:
            return None
        spec.loader = _Loader(spec.loader, self.waiting[fullname])
        return spec


_finder = _Finder()


def after_import(name: str, hook: Hook) -> None:
    """Calls ``hook(module)`` as soon as the module's code has run: now if it has, else at its import.

    An exception of the hook becomes the import's.

    Args:
        name: Full name of the module.
        hook: What to call.
    """
    module = sys.modules.get(name)
    if module is not None and not _being_imported(module):
        hook(module)
        return
    _finder.waiting.setdefault(name, []).append(hook)
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def _being_imported(module: ModuleType) -> bool:
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))
