"""Simulated hosts for the tests of the HCCL providers, and what makes the providers of a checkout known there."""

from __future__ import annotations

import importlib.util
import itertools
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

from tests.cann_sim.install import install

ROOT = Path(__file__).resolve().parents[3]
COMM = "8.3-comm"
"""CANN 8.3 without HcclCommPrepare: memory is registered with every communicator."""
FLAVOURS: Mapping[str, tuple[str, ...]] = {
    "hccl": (COMM, "8.3", "8.5.0", "9.0", "9.1"),
    "hcomm_onesided": ("8.5.0", "9.0", "9.1"),
}
SOCS = ("A2", "A3")
LINKS = ("roce", "hccs")
PAIRS = (("device", "device"), ("device", "allocated"), ("allocated", "device"), ("allocated", "allocated"))
DEVICES = 6


def native() -> Path:
    """The folder of the native build: ``$KVLINK_NATIVE_DIR``, else where ``make native`` puts it."""
    return Path(os.environ.get("KVLINK_NATIVE_DIR") or ROOT / "build" / "native" / "lib").resolve()


@dataclass(frozen=True)
class Cell:
    """One field of the table: provider, CANN flavour, SoC, link, and the kinds of memory of the two sides."""

    provider: str
    flavour: str
    soc: str = "A2"
    link: str = "roce"
    pair: tuple[str, str] = ("device", "device")

    @property
    def works(self) -> bool:
        """Whether bytes move; over HCCS HCCL reaches device memory only, and CANN 8.3 does not know an A3's SDID."""
        if self.link == "roce":
            return True
        return self.pair == ("device", "device") and not self.nameless

    @property
    def nameless(self) -> bool:
        """Whether HCCS needs an id that this CANN does not tell."""
        return self.flavour in (COMM, "8.3") and (self.soc, self.link) == ("A3", "hccs")

    @property
    def id(self) -> str:
        """Its name in test ids."""
        return "-".join((self.provider, self.flavour, self.soc, self.link, *self.pair))


def cells() -> list[Cell]:
    """The whole table."""
    return [
        Cell(provider, flavour, soc, link, pair)
        for provider, flavours in FLAVOURS.items()
        for flavour, soc, link, pair in itertools.product(flavours, SOCS, LINKS, PAIRS)
    ]


def _known(provider: str) -> bool:
    return any(point.name == provider for point in entry_points(group="kvlink.channels"))


def provider_paths(folder: Path) -> list[str]:
    """What goes on the path so that the providers are found: nothing when they are installed.

    Args:
        folder: Where their metadata may be written.
    """
    paths: list[str] = []
    for provider in (*FLAVOURS, "hixl"):
        package = f"kvlink_{provider}"
        if importlib.util.find_spec(package) is not None and _known(provider):
            continue
        metadata = folder / f"{package}-0.1.0.dist-info"
        metadata.mkdir(parents=True, exist_ok=True)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.1.0\n")
        (metadata / "entry_points.txt").write_text(f"[kvlink.channels]\n{provider} = {package}:SPEC\n")
        paths += [str(ROOT / "backends" / provider / "src"), str(folder)]
    return list(dict.fromkeys(paths))


def host_environment(cell: Cell, folder: Path, **more: str) -> dict[str, str]:
    """Lays out a host and returns the variables of a process on it.

    Args:
        cell: Flavour, SoC and link.
        folder: An empty folder, or one that does not exist.
        **more: Further variables: ``CANN_SIM_FAULTS`` and the like.
    """
    made = install(
        cell.flavour.removesuffix("-comm"),
        cell.soc,
        cell.link,
        DEVICES,
        libs=native() / "cann_sim",
        out=folder / "host",
        prepare=cell.flavour != COMM,
    )
    return {**made, "KVLINK_NATIVE_DIR": str(native()), **more}


@contextmanager
def on_host(cell: Cell, folder: Path, **more: str) -> Iterator[dict[str, str]]:
    """Makes this process's children run on a simulated host; this process itself stays where it is."""
    before, path = dict(os.environ), list(sys.path)
    extra = provider_paths(folder / "metadata")
    environment = host_environment(cell, folder, **more)
    os.environ.update(environment)
    sys.path[:0] = [*extra, str(ROOT)]
    try:
        yield environment
    finally:
        sys.path[:] = path
        os.environ.clear()
        os.environ.update(before)
