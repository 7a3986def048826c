"""The steps of a hardware test that only look: host, versions, symbols, open.

``python -m kvlink.testing.hardware_facts STEP`` runs one. Each prints what it finds and leaves judging to the reader.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from .._engine import EngineChannel, EngineProvider
from .._engine_types import Capability
from ..config import validate_options
from ..errors import KvlinkError
from ..registry import find, find_info, kvlink_version
from .cli import parse_pairs

LIBRARIES = (
    "ascendcl",
    "acl_rt",
    "runtime",
    "hccl",
    "hcomm",
    "hccl_v2",
    "cann_hixl",
    "metadef",
    "graph_base",
    "llm_datadist",
    "ascend_hal",
)
DEFAULT_ROOTS = ("/usr/local/Ascend/cann", "/usr/local/Ascend/ascend-toolkit/latest")
_OF_INTEREST = re.compile(
    r"\b(acl\w*|rtPointerGetAttributes|rtGetDevicePhyIdByIndex|Hccl\w+|_ZN\w*(hixl|AscendString)\w*)$"
)
_VARIABLES = re.compile(r"^(ASCEND|HCCL|CANN|KVLINK|ACL|LD_LIBRARY_PATH|TOOLCHAIN_HOME|NPU|RANK)")
_SECRET = re.compile(r"SECRET|TOKEN|PASSWORD|KEY", re.I)


def system_path(path: str) -> Path:
    """Returns a path of the system, under ``KVLINK_ASCEND_SYSROOT`` where that is set, as the providers see it."""
    return Path(os.environ.get("KVLINK_ASCEND_SYSROOT", "") + path)


def toolkit_root() -> Path | None:
    """Returns the toolkit's folder, by the same order as the providers."""
    named = os.environ.get("ASCEND_HOME_PATH") or os.environ.get("ASCEND_TOOLKIT_HOME")
    candidates = [Path(named)] if named else [system_path(root) for root in DEFAULT_ROOTS]
    return next((path for path in candidates if path.is_dir()), None)


def _show(title: str, path: Path, limit: int = 4000) -> None:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")[:limit].rstrip()
    except OSError as error:
        text = f"({error.strerror})"
    print(f"--- {title} {path}\n{text}")


def _tool(*command: str) -> None:
    """Runs a tool of the vendor's, when there is one, for half a minute at most."""
    found = shutil.which(command[0])
    print(f"--- {' '.join(command)}", flush=True)
    if found is None:
        print("(not found)")
        return
    try:
        result = subprocess.run(
            [found, *command[1:]], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=30, check=False
        )
        print(result.stdout.decode("utf-8", "replace")[:20_000].rstrip() or f"(exit code {result.returncode})")
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"({error})")


def host(devices: Sequence[str]) -> None:
    """Prints what this host is, the driver, the device addresses and the variables that matter."""
    print(
        f"kernel {platform.release()} {platform.machine()}, {platform.python_implementation()} {sys.version.split()[0]}"
    )
    print(f"C library {' '.join(platform.libc_ver())}, page {os.sysconf('SC_PAGESIZE')} bytes, {os.cpu_count()} cores")
    for name in sorted(filter(_VARIABLES.search, os.environ)):
        print(f"{name}={'(hidden)' if _SECRET.search(name) else os.environ[name]}")
    _show("driver", system_path("/usr/local/Ascend/driver/version.info"))
    _show("install", system_path("/etc/ascend_install.info"))
    _show("device addresses", system_path("/etc/hccn.conf"))
    _tool("npu-smi", "info")
    tool = str(system_path("/usr/local/Ascend/driver/tools/hccn_tool"))
    for device in devices:
        for question in ("-ip", "-link", "-tls"):
            _tool(tool, "-i", device.partition(":")[2], question, "-g")


def versions(channel: str) -> None:
    """Prints the versions of kvlink, the provider and the toolkit, from every file that says one."""
    info = find_info(channel)
    print(f"kvlink {kvlink_version()}, {info.distribution} {info.version}, library {info.spec.library_path()}")
    root = toolkit_root()
    if root is None:
        print("no toolkit: ASCEND_HOME_PATH and ASCEND_TOOLKIT_HOME are unset, and no default root exists")
        return
    print(f"toolkit {root} -> {root.resolve()}")
    for pattern in ("version.cfg", "*-linux/ascend_*_install.info", "share/info/*/version.info"):
        for path in sorted(root.glob(pattern)):
            _show("version", path, 1500)


def library_folders() -> Iterator[Path]:
    """Yields the folders that the loader would look into for the vendor's libraries."""
    seen: set[Path] = set()
    folders = [Path(entry) for entry in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if entry]
    root = toolkit_root()
    if root is not None:
        folders += [root / "lib64", *sorted(root.glob("*-linux/lib64"))]
    driver = system_path("/usr/local/Ascend/driver/lib64")
    folders += [driver, driver / "common", driver / "driver"]
    for folder in folders:
        resolved = folder.resolve()
        if resolved.is_dir() and resolved not in seen:
            seen.add(resolved)
            yield folder


def symbols() -> None:
    """Prints the symbols of interest of each vendor library; all of them go to files beside the report."""
    if shutil.which("nm") is None:
        print("nm is not installed (package binutils): no symbols are listed")
        return
    report = Path(os.environ.get("KVLINK_REPORT_FOLDER", "."))
    missing = []
    for name in LIBRARIES:
        file_name = f"lib{name}.so"
        path = next((folder / file_name for folder in library_folders() if (folder / file_name).is_file()), None)
        if path is None:
            missing.append(file_name)
            continue
        command = ["nm", "-D", "--defined-only", str(path)]
        result = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, check=False
        )
        (report / f"nm-{file_name}.txt").write_text(f"{path} -> {path.resolve()}\n{result.stdout}", encoding="utf-8")
        found = sorted(line.split()[-1] for line in result.stdout.splitlines() if _OF_INTEREST.search(line))
        print(f"--- {path} -> {path.resolve()}: {len(result.stdout.splitlines())} symbols, of interest {len(found)}")
        print(" ".join(found))
    print(f"--- not found: {' '.join(missing) or 'none'}")


def open_engine(channel: str, device: str, options: Sequence[str]) -> None:
    """Opens the provider's engine on a device, prints what it declares, and closes it."""
    spec = find(channel)
    provider = EngineProvider.load(spec.library_path())
    print(f"{provider.name} {provider.version}, wire version {provider.wire_version}, {', '.join(provider.path_names)}")
    engine = EngineChannel.open(provider, options=validate_options(spec, parse_pairs(list(options))), device=device)
    attributes = engine.attributes
    for name, value in sorted(dataclasses.asdict(attributes).items()):
        print(f"{name}: {value}")
    print("claims " + ", ".join(str(flag.name) for flag in Capability if flag in attributes.capabilities))
    engine.close()
    print("closed")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one step.

    Returns:
        0, or 1 when the provider gave an error.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}.hardware_facts")
    parser.add_argument("step", choices=("host", "versions", "symbols", "open"))
    parser.add_argument("--channel", default="")
    parser.add_argument("--devices", default="")
    parser.add_argument("--device", default="")
    parser.add_argument("--option", action="append", default=[])
    parsed = parser.parse_args(arguments)
    try:
        if parsed.step == "host":
            host([name for name in parsed.devices.split(",") if name])
        elif parsed.step == "versions":
            versions(parsed.channel)
        elif parsed.step == "symbols":
            symbols()
        else:
            open_engine(parsed.channel, parsed.device, parsed.option)
    except KvlinkError as error:
        print(f"{type(error).__name__}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
