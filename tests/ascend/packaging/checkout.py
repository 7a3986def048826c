"""Processes that have the Ascend providers installed: those of the environment, or those of this checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path

from tests.ascend.packaging.compiling import ROOT, environment

BACKENDS = ("hccl", "hcomm_onesided", "hixl")


def native() -> Path:
    """The folder of the native build: ``$KVLINK_NATIVE_DIR``, else where ``make native`` puts it."""
    return Path(os.environ.get("KVLINK_NATIVE_DIR") or ROOT / "build" / "native" / "lib").resolve()


def _paths(folder: Path) -> list[str]:
    """What makes the providers known that are not installed: their packages, and metadata written to ``folder``."""
    installed = {point.name for point in entry_points(group="kvlink.channels")}
    paths = []
    for name in BACKENDS:
        if name in installed:
            continue
        package = f"kvlink_{name}"
        metadata = folder / "metadata" / f"{package}-0.1.0.dist-info"
        metadata.mkdir(parents=True, exist_ok=True)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.1.0\n")
        (metadata / "entry_points.txt").write_text(f"[kvlink.channels]\n{name} = {package}:SPEC\n")
        paths += [str(ROOT / "backends" / name / "src"), str(metadata.parent)]
    return paths


def process_environment(folder: Path, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Returns the environment of a process with the providers, on a host that has no CANN unless ``more`` names one."""
    empty = folder / "no-cann"
    empty.mkdir(exist_ok=True)
    env = environment({"KVLINK_ASCEND_SYSROOT": str(empty), "HOME": str(empty), **(more or {})})
    env["PYTHONPATH"] = os.pathsep.join([*_paths(folder), *(entry for entry in sys.path if entry)])
    # An installed provider has its own library; one of the checkout is found where the build put it.
    if "KVLINK_NATIVE_DIR" in os.environ or native().is_dir():
        env["KVLINK_NATIVE_DIR"] = str(native())
    return env


def python(
    arguments: Sequence[str], env: Mapping[str, str], *, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Runs this Python with these arguments to its end."""
    return subprocess.run(
        [sys.executable, *arguments],
        env=dict(env),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
