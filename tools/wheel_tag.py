"""Gives wheels the platform tag that their libraries really need: ``python -m tools.wheel_tag dist/*.whl``.

A build makes ``linux_<arch>``, which promises this machine only. What a library needs of its host stands in its ELF
version requirements: the highest GLIBC, and GLIBCXX where it uses the shared C++ runtime. From them follows the oldest
``manylinux_2_NN`` that fits; a library that needs anything else of the host is refused.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

Version = tuple[int, ...]

HOST_LIBRARIES = {
    "libc.so.6",
    "libm.so.6",
    "libdl.so.2",
    "libpthread.so.0",
    "librt.so.1",
    "libgcc_s.so.1",
    "libstdc++.so.6",
    "ld-linux-x86-64.so.2",
    "ld-linux-aarch64.so.1",
}
"""What every distribution of a manylinux tag has."""

# The C++ runtime that distributions with that C library have at least: GLIBC, then the highest GLIBCXX and CXXABI.
RUNTIMES: tuple[tuple[Version, Version, Version], ...] = (
    ((2, 17), (3, 4, 19), (1, 3, 7)),
    ((2, 27), (3, 4, 24), (1, 3, 11)),
    ((2, 28), (3, 4, 24), (1, 3, 11)),
    ((2, 31), (3, 4, 28), (1, 3, 12)),
    ((2, 34), (3, 4, 29), (1, 3, 13)),
    ((2, 35), (3, 4, 30), (1, 3, 13)),
    ((2, 38), (3, 4, 32), (1, 3, 14)),
    ((2, 39), (3, 4, 33), (1, 3, 15)),
)


class WheelError(Exception):
    """A wheel cannot have a manylinux tag."""


@dataclass(frozen=True)
class Needs:
    """What libraries need of their host.

    Attributes:
        glibc: Highest version of the C library.
        glibcxx: Highest version of the shared C++ runtime; empty when it is not used.
        cxxabi: Highest version of its ABI symbols; empty when there are none.
        libraries: Names of the libraries that are loaded with them.
    """

    glibc: Version
    glibcxx: Version
    cxxabi: Version
    libraries: frozenset[str]

    def tag(self, machine: str) -> str:
        """Returns the platform tag.

        Args:
            machine: "x86_64" or "aarch64".

        Raises:
            WheelError: No known runtime has all that is needed.
        """
        for glibc, glibcxx, cxxabi in RUNTIMES:
            if self.glibcxx <= glibcxx and self.cxxabi <= cxxabi:
                major, minor = max(glibc if self.glibcxx or self.cxxabi else (2, 17), self.glibc)[:2]
                return f"manylinux_{major}_{minor}_{machine}"
        raise WheelError(f"needs GLIBCXX_{_text(self.glibcxx)} and CXXABI_{_text(self.cxxabi)}, newer than any known")


def _text(version: Version) -> str:
    return ".".join(map(str, version)) or "none"


def _read(*arguments: str) -> str:
    return subprocess.run(["readelf", "--wide", *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout


def needs_of(libraries: Iterable[Path]) -> Needs:
    """Reads what shared libraries need.

    Args:
        libraries: ELF files.

    Raises:
        WheelError: One needs a library that not every host has.
    """
    highest: dict[str, Version] = {}
    loaded: set[str] = set()
    for path in libraries:
        # Only the section of needed versions: a library that defines versions of its own lists those before it.
        _, _, needed = _read("--version-info", str(path)).partition("Version needs section")
        for name, version in re.findall(r"Name: (GLIBC|GLIBCXX|CXXABI)_(\d[\d.]*)", needed):
            number = tuple(map(int, version.split(".")))
            highest[name] = max(highest.get(name, ()), number)
        names = re.findall(r"\(NEEDED\).*\[(.*?)\]", _read("--dynamic", str(path)))
        own = {other.name for other in path.parent.glob("*.so*")}
        if foreign := set(names) - HOST_LIBRARIES - own:
            raise WheelError(f"{path.name} needs {', '.join(sorted(foreign))}, which not every host has")
        loaded |= set(names)
    return Needs(
        highest.get("GLIBC", (2, 17)), highest.get("GLIBCXX", ()), highest.get("CXXABI", ()), frozenset(loaded)
    )


def machine_of(library: Path) -> str:
    """Returns "x86_64" or "aarch64".

    Raises:
        WheelError: It is built for something else.
    """
    header = _read("--file-header", str(library))
    for text, machine in (("X86-64", "x86_64"), ("AArch64", "aarch64")):
        if text in header:
            return machine
    raise WheelError(f"{library.name} is built for an unknown machine")


def inspect(wheel: Path) -> tuple[Needs, str]:
    """Returns what a wheel's libraries need, and their machine.

    Raises:
        WheelError: It has no libraries, or they need what not every host has.
    """
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if re.search(r"\.so(\.\d+)*$", name)]
        archive.extractall(folder, names)
        libraries = [Path(folder, name) for name in names]
        if not libraries:
            raise WheelError(f"{wheel.name} has no shared library; it needs no tag")
        machines = {machine_of(path) for path in libraries}
        if len(machines) != 1:
            raise WheelError(f"{wheel.name} holds libraries for {' and '.join(sorted(machines))}")
        return needs_of(libraries), machines.pop()


def retag(wheel: Path) -> Path:
    """Writes the wheel anew with the tag it needs, and removes the old file.

    Args:
        wheel: ``NAME-VERSION-PYTHON-ABI-PLATFORM.whl``.

    Returns:
        The new file; the same path when the tag was right already.

    Raises:
        WheelError: See :func:`inspect`.
    """
    needs, machine = inspect(wheel)
    *stem, platform = wheel.stem.split("-")
    tag = needs.tag(machine)
    target = wheel.with_name("-".join([*stem, tag]) + ".whl")
    if target != wheel:
        partial = target.with_suffix(".partial")
        _rewrite(wheel, partial, platform, tag)
        partial.replace(target)
        wheel.unlink()
    print(f"{target.name}: GLIBC_{_text(needs.glibc)}, GLIBCXX_{_text(needs.glibcxx)}")
    return target


def _rewrite(wheel: Path, target: Path, old: str, new: str) -> None:
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as result:
        record_name = next(name for name in source.namelist() if name.endswith(".dist-info/RECORD"))
        wheel_name = record_name.removesuffix("RECORD") + "WHEEL"
        metadata = re.sub(rf"^(Tag: \S+)-{re.escape(old)}$", rf"\1-{new}", source.read(wheel_name).decode(), flags=re.M)
        digest = base64.urlsafe_b64encode(hashlib.sha256(metadata.encode()).digest()).decode().rstrip("=")
        line = f"{wheel_name},sha256={digest},{len(metadata.encode())}"
        record = re.sub(rf"^{re.escape(wheel_name)},.*$", line, source.read(record_name).decode(), flags=re.M)
        for item in source.infolist():
            changed = {wheel_name: metadata.encode(), record_name: record.encode()}.get(item.filename)
            result.writestr(item, source.read(item) if changed is None else changed)


def main(arguments: Sequence[str]) -> int:
    """Tags wheels.

    Returns:
        0, or 1 when one cannot be tagged.
    """
    parser = argparse.ArgumentParser(prog="python -m tools.wheel_tag", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("wheels", nargs="+", type=Path)
    try:
        for wheel in parser.parse_args(arguments).wheels:
            retag(wheel)
    except WheelError as error:
        print(f"wheel_tag: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
