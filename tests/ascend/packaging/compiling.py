"""Compiling small files and CMake projects in tests."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
DECLARATIONS = ROOT / "backends"
_DEADLINE = 240.0


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Returns this process's environment without what leads to a CANN, and with ``extra``."""
    unset = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME", "LD_PRELOAD")
    return {**{key: value for key, value in os.environ.items() if key not in unset}, **(extra or {})}


def run(
    command: list[str], *, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end, output and errors in one text."""
    return subprocess.run(
        command,
        env=dict(env) if env is not None else environment(),
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=_DEADLINE,
        check=False,
    )


def configure(
    source: Path, build: Path, *settings: str, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs CMake's first step with ``settings`` such as ``KVLINK_BACKENDS=auto``."""
    defines = [f"-D{setting}" for setting in settings]
    return run(["cmake", "-Wno-dev", "-S", str(source), "-B", str(build), *defines], env=env)


def compile_text(text: str, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Compiles C++17 text against the tree's declarations; nothing is kept."""
    source = folder / "text.cc"
    source.write_text(text, encoding="utf-8")
    includes = [f"-I{path}" for path in (DECLARATIONS, DECLARATIONS / "hixl" / "shim", ROOT / "include")]
    return run(["c++", "-std=c++17", "-fsyntax-only", "-w", *includes, *flags, str(source)])


def copy_declarations(folder: Path) -> Path:
    """Copies our declarations of the vendor's interfaces, so that a test may change them; returns the new root."""
    target = folder / "declarations" / "ascend"
    target.mkdir(parents=True)
    for path in (DECLARATIONS / "ascend").iterdir():
        if path.name.endswith(("_types.h", "_functions.inc")):
            shutil.copy(path, target)
    return target.parent


def flat(text: str) -> str:
    """Returns CMake's wrapped output as one line."""
    return " ".join(text.split())


def names_of(output: str, marker: str) -> set[str]:
    """Returns the words behind ``marker`` in the one line of ``output`` that has it."""
    lines: Iterable[str] = [line for line in output.splitlines() if marker in line]
    (line,) = lines
    return set(line.partition(marker)[2].split())
