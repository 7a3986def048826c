"""Finds, parses and loads the native part of kvlink.

The two C headers that describe it are the only description: they are parsed here for cffi, so Python and C cannot drift
apart. Nothing is opened on import; the engine library is loaded when its first function is used, so that listing
channels, printing help and checking a configuration work without a build.
"""

from __future__ import annotations

import os
import re
import sys
import threading
from pathlib import Path
from typing import Any

import cffi

from .errors import ChannelUnavailableError

NATIVE_DIR_VARIABLE = "KVLINK_NATIVE_DIR"

_BUILD_HINT = (
    "install the kvlink wheel, or build with `cmake -S . -B build/native && cmake --build build/native` "
    f"and set {NATIVE_DIR_VARIABLE}=build/native/lib"
)


def _package_folders() -> list[Path]:
    """Every folder of the package: an editable install may have the Python files and the libraries in two places."""
    package = sys.modules.get("kvlink")
    folders = [Path(entry) for entry in getattr(package, "__path__", ())]
    here = Path(__file__).resolve().parent
    if here not in folders:
        folders.append(here)
    return folders


def find_header(installed: str, in_tree: str) -> Path:
    """Returns the path of one of kvlink's C headers.

    Args:
        installed: Its place below the package folder.
        in_tree: Its place below a checkout's root.

    Raises:
        ChannelUnavailableError: It is in neither; names every place searched.
    """
    candidates = [folder / installed for folder in _package_folders()]
    candidates += [folder.parent.parent / in_tree for folder in _package_folders()]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    searched = ", ".join(str(candidate) for candidate in candidates)
    raise ChannelUnavailableError(
        f"the header {Path(in_tree).name} is missing from this kvlink; searched {searched}", hint=_BUILD_HINT
    )


def get_include() -> str:
    """Returns the folder to add to a compiler's include path so that ``#include <kvlink/provider.h>`` works.

    Raises:
        ChannelUnavailableError: This installation has no header.
    """
    return str(find_header("include/kvlink/provider.h", "include/kvlink/provider.h").parent.parent)


def declarations(header: str) -> str:
    """Strips from a C header what cffi does not parse.

    Args:
        header: The text of provider.h or engine.h.

    Returns:
        The declarations: no comments, no preprocessor lines, no ``extern "C"`` and no brace that closes it.
    """
    text = re.sub(r"/\*.*?\*/", " ", header, flags=re.S)
    # The guarded block is dropped as a whole: what stands in it is C++ and never a declaration.
    text = re.sub(r"^#ifdef __cplusplus$.*?^#endif$", "", text, flags=re.S | re.M)
    return re.sub(r"^\s*#.*$", "", text, flags=re.M)


def _make_ffi() -> Any:
    ffi = cffi.FFI()
    ffi.cdef(declarations(Path(get_include(), "kvlink", "provider.h").read_text(encoding="utf-8")))
    ffi.cdef(declarations(find_header("_native/engine.h", "src/engine/engine.h").read_text(encoding="utf-8")))
    return ffi


def library_path(name: str) -> Path:
    """Returns the path of a native library of kvlink.

    Args:
        name: "engine", "host", "hook" or "limits".

    Returns:
        The absolute path of libkvlink_NAME.so: in ``$KVLINK_NATIVE_DIR`` when that is set, else in the package.

    Raises:
        ChannelUnavailableError: It was not built; says where it was searched and how to build it.
    """
    file_name = f"libkvlink_{name}.so"
    override = os.environ.get(NATIVE_DIR_VARIABLE)
    folders = [Path(override)] if override else [folder / "_native" for folder in _package_folders()]
    for folder in folders:
        candidate = folder / file_name
        if candidate.is_file():
            return candidate.resolve()
    searched = ", ".join(str(folder) for folder in folders)
    raise ChannelUnavailableError(f"{file_name} is missing; searched {searched}", hint=_BUILD_HINT)


class _Engine:
    """The engine library. The first use of any function loads it and binds all of them as plain attributes.

    All at once, because cffi looks functions up under a lock that it also holds while it parses: a finalizer that the
    collector runs in the middle of that, on the same thread, must find its function without the lock.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._library: Any = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        with self._lock:
            if self._library is None:
                self._load()
        try:
            return self.__dict__[name]
        except KeyError:
            raise self._missing(name) from None

    def _load(self) -> None:
        path = library_path("engine")
        try:
            library = ffi.dlopen(str(path))
        except OSError as error:
            raise ChannelUnavailableError(f"cannot load {path}: {error}", operation="load", hint=_BUILD_HINT) from error
        for name in dir(library):
            if not name.startswith("kve_"):
                continue
            try:
                setattr(self, name, getattr(library, name))
            except AttributeError as error:
                raise self._missing(name) from error
        self._library = library

    @staticmethod
    def _missing(name: str) -> ChannelUnavailableError:
        return ChannelUnavailableError(
            f"{library_path('engine')} has no {name}: it was built from another version of kvlink",
            operation="load",
            hint=_BUILD_HINT,
        )


ffi: Any = _make_ffi()
lib: Any = _Engine()
