"""The simulator of CANN for engines: a host with devices, and the settings that make a provider use it."""

from __future__ import annotations

import os
from pathlib import Path

from tests.cann_sim.install import install

ROOT = Path(__file__).parents[2]
# Each provider on a CANN of its own.
SIMULATED = {"hccl": "8.3", "hcomm_onesided": "8.5.0", "hixl": "9.1"}


def npus(ranks: int) -> tuple[dict[str, str], dict[str, str]]:
    """The devices of the prefiller and those of the decoder, as the seed gives them out."""
    numbers = [str(number) for number in range(2 * ranks)]
    return (
        {"ASCEND_RT_VISIBLE_DEVICES": ",".join(numbers[:ranks])},
        {"ASCEND_RT_VISIBLE_DEVICES": ",".join(numbers[ranks:])},
    )


def simulator(folder: Path, *, flavour: str, devices: int, soc: str = "A2", link: str = "roce") -> dict[str, str]:
    """Lays out a simulated host; returns the environment of processes on it.

    Args:
        folder: Where the host's files go.
        flavour: CANN version.
        devices: NPUs of the host.
        soc: "A2" or "A3".
        link: "roce" or "hccs".
    """
    native = Path(os.environ.get("KVLINK_NATIVE_DIR") or ROOT / "build" / "native" / "lib")
    libraries = native / "cann_sim"
    assert libraries.is_dir(), f"{libraries} is missing; `make native` builds it"
    return dict(
        install(flavour=flavour, soc=soc, link=link, devices=devices, libs=str(libraries), out=str(folder / "cann"))
    )
