"""Fixtures of the simulator's own tests: installed hosts, made once for each combination."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from .install import install

ROOT = Path(__file__).resolve().parents[2]
Hosts = Callable[..., dict[str, str]]


def built_libraries() -> Path:
    """The folder with the built flavours: $CANN_SIM_LIBS, beside $KVLINK_NATIVE_DIR, or where `make native` builds."""
    if "CANN_SIM_LIBS" in os.environ:
        return Path(os.environ["CANN_SIM_LIBS"])
    if "KVLINK_NATIVE_DIR" in os.environ:
        return Path(os.environ["KVLINK_NATIVE_DIR"]) / "cann_sim"
    return ROOT / "build" / "native" / "lib" / "cann_sim"


@pytest.fixture(scope="session")
def libs() -> Path:
    """Built libraries; a missing build is a failure, not a skip."""
    path = built_libraries()
    if not (path / "8.5.0" / "libascendcl.so").exists():
        pytest.fail(f"{path} holds no built simulator: run make native, or set CANN_SIM_LIBS=<build>/lib/cann_sim")
    return path


@pytest.fixture(scope="session")
def make_host(libs: Path, tmp_path_factory: pytest.TempPathFactory) -> Hosts:
    """`make_host(flavour, soc, link, devices, **more)`: the environment of an installed host, each made once."""
    made: dict[str, dict[str, str]] = {}

    def make(
        flavour: str = "8.5.0", soc: str = "A2", link: str = "roce", devices: int = 2, **more: object
    ) -> dict[str, str]:
        key = repr((flavour, soc, link, devices, sorted(more.items())))
        if key not in made:
            out = tmp_path_factory.mktemp("host") / "root"
            made[key] = install(flavour, soc, link, devices, libs=libs, out=out, **more)  # type: ignore[arg-type]
        return made[key]

    return make


@pytest.fixture(scope="session")
def host(make_host: Hosts) -> dict[str, str]:
    """CANN 8.5.0, A2, RoCE, two devices."""
    return make_host()
