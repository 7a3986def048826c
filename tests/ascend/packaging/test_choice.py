"""What ``transfer_channel: auto`` takes at run time: the matrix of toolkits, chips and devices, on the simulator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.ascend.packaging.checkout import BACKENDS, native, process_environment, python
from tests.cann_sim.install import install

CHOOSE = """
import json, sys
from kvlink.errors import KvlinkError
from kvlink.registry import probe, select
answer = {}
for device in ("npu:0", "cpu"):
    try:
        answer[device] = select("auto", device).name
    except KvlinkError as error:
        answer[device] = None
        answer["error"] = str(error)
for name in ("hccl", "hcomm_onesided", "hixl"):
    result = probe(name)
    answer[name] = result.reason if not result.usable else ""
print(json.dumps(answer))
"""


def choose(tmp_path: Path, flavour: str = "", soc: str = "A2", **more: str) -> dict[str, Any]:
    """What a process on such a host says: the choice by device, and each provider's reason ("" when usable)."""
    env = {**more}
    if flavour:
        env.update(install(flavour, soc, "roce", 1, libs=native() / "cann_sim", out=tmp_path / "host"))
    result = python(["-c", CHOOSE], process_environment(tmp_path, env))
    assert result.returncode == 0, result.stderr
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def test_no_cann(tmp_path: Path) -> None:
    answer = choose(tmp_path)
    assert answer["cpu"] == "host"
    assert answer["npu:0"] is None
    for name in BACKENDS:
        assert "no CANN toolkit was found" in answer[name]
        assert f"{name}: " in answer["error"], "the error gives each one's reason"


def test_8_3_takes_hccl(tmp_path: Path) -> None:
    answer = choose(tmp_path, "8.3")
    assert (answer["npu:0"], answer["cpu"]) == ("hccl", "host")
    assert answer["hccl"] == ""
    for name, library in (("hcomm_onesided", "libhcomm.so"), ("hixl", "libmetadef.so")):
        assert library in answer[name], answer[name]
        assert "8.5" in answer[name] and "8.3.RC1" in answer[name], answer[name]


@pytest.mark.parametrize("flavour", ["8.5.0", "9.1"])
@pytest.mark.parametrize("soc", ["A2", "A3"])
def test_8_5_and_later_take_hcomm_onesided(tmp_path: Path, flavour: str, soc: str) -> None:
    answer = choose(tmp_path, flavour, soc)
    assert (answer["npu:0"], answer["cpu"]) == ("hcomm_onesided", "host")
    assert [answer[name] for name in BACKENDS] == ["", "", ""], "all three work here"


def test_the_950_takes_hixl(tmp_path: Path) -> None:
    answer = choose(tmp_path, "9.1", "950")
    assert (answer["npu:0"], answer["cpu"]) == ("hixl", "host")
    for name in ("hccl", "hcomm_onesided"):
        assert "950" in answer[name] and "hixl" in answer[name], answer[name]


def test_link_time_stubs_are_no_cann(tmp_path: Path) -> None:
    """A container without the driver mounted loads stub libraries: they answer, but no device is behind them."""
    answer = choose(tmp_path, "devlib")
    assert answer["npu:0"] is None
    for name in BACKENDS:
        assert "stub" in answer[name] and "/usr/local/Ascend/driver" in answer[name], answer[name]
