"""What a user gets wrong, or a machine lacks: a clear error at the earliest moment, with call, code and a fix."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from kvlink import errors, registry

from .simulated import MIB, Cell, Ends, host_environment, on_host, provider_paths, two_processes

CELL = Cell("hixl", "8.5.0")
HCCS = Cell("hixl", "9.1", "A3", "hccs")


def _probe(folder: Path, cell: Cell, **environment: str) -> str:
    with on_host(cell, folder, **environment):
        result = registry.probe("hixl", refresh=True)
    assert result.usable == (not result.reason)
    return result.reason


def test_usable_where_everything_is(tmp_path: Path) -> None:
    assert _probe(tmp_path, CELL) == ""


def test_no_cann(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for entry in reversed(provider_paths(tmp_path / "metadata")):
        monkeypatch.syspath_prepend(entry)
    monkeypatch.setenv("KVLINK_ASCEND_SYSROOT", str(tmp_path))
    for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME", "LD_LIBRARY_PATH"):
        monkeypatch.delenv(name, raising=False)
    result = registry.probe("hixl", refresh=True)
    assert not result.usable
    assert "libascendcl.so" in result.reason
    assert "ASCEND_HOME_PATH" in result.reason or "set_env.sh" in result.reason


def test_cann_too_old(tmp_path: Path) -> None:
    reason = _probe(tmp_path, replace(CELL, flavour="8.3"))
    assert "needs CANN 8.5.0" in reason
    assert "8.3" in reason
    assert "hccl" in reason


def test_stub_libraries(tmp_path: Path) -> None:
    reason = _probe(tmp_path, replace(CELL, flavour="devlib"))
    assert "stub" in reason
    assert "driver" in reason


def test_no_device(tmp_path: Path) -> None:
    reason = _probe(tmp_path, CELL, CANN_SIM_DEVICES="0", CANN_SIM_PHYSICAL_IDS="")
    assert "NPU" in reason
    assert "npu-smi" in reason


def test_wrong_device(tmp_path: Path) -> None:
    with two_processes(CELL, tmp_path, devices=("npu:17", "gpu:0")) as ends:
        with pytest.raises(errors.KvlinkError, match=r"npu:17 does not exist.*ASCEND_RT_VISIBLE_DEVICES"):
            ends.a.open()
        with pytest.raises(errors.KvlinkError, match="npu"):
            ends.b.open()


def _forget_addresses(folder: Path) -> None:
    (folder / "host" / "etc" / "hccn.conf").write_text("")


def test_device_address_missing(tmp_path: Path) -> None:
    """At open where the user asked for RoCE, else when the peers meet and their link turns out to be RoCE."""
    with two_processes(CELL, tmp_path) as ends:
        _forget_addresses(tmp_path)
        with pytest.raises(errors.KvlinkError, match=r"device_ip.*hccn"):
            ends.a.open(options={"link": "roce"})
        ends.open()
        ends.memory()
        start = time.monotonic()
        with pytest.raises(errors.KvlinkError, match=r"device_ip.*hccn.conf"):
            ends.connect()
        assert time.monotonic() - start < 5.0


def _unaligned(ends: Ends) -> None:
    ends.a.call("register_device", name="a", nbytes=MIB, offset=4096, device="npu:0")


def test_unaligned_memory_with_link_hccs(tmp_path: Path) -> None:
    """Refused at registration, and aligned memory beside it is taken."""
    with two_processes(HCCS, tmp_path) as ends:
        ends.open(*({"options": {"link": "hccs"}},) * 2)
        with pytest.raises(errors.KvlinkError, match=r"multiple of 2 MiB.*link: roce"):
            _unaligned(ends)
        ends.memory()
        ends.connect()
        ends.check_put()


@pytest.mark.parametrize("side", ["a", "b"])
def test_unaligned_memory_with_link_auto(side: str, tmp_path: Path) -> None:
    """Refused when the peers meet over HCCS, before any vendor call, whoever has it; over RoCE it works."""
    log = tmp_path / "log"
    with two_processes(HCCS, tmp_path, CANN_SIM_LOG=str(log)) as ends:
        ends.open()
        end = ends.a if side == "a" else ends.b
        end.call("register_device", name=side, nbytes=MIB, offset=4096, device=f"npu:{'ab'.index(side)}")
        with pytest.raises(errors.KvlinkError, match=r"2 MiB.*HCCS.*503900.*RoCE") as caught:
            ends.connect()
        assert caught.value.operation == "connect"
        assert "Hixl::Initialize" in log.read_text()
        assert "Hixl::Connect" not in log.read_text()


def test_unaligned_memory_over_roce(tmp_path: Path) -> None:
    with two_processes(CELL, tmp_path) as ends:
        ends.open()
        _unaligned(ends)
        ends.b.memory("b", MIB, 2, kind="device")
        ends.connect()
        ends.put()


def test_host_memory_above_the_limit_at_registration(tmp_path: Path) -> None:
    with two_processes(CELL, tmp_path) as ends:
        ends.open({"options": {"host_limit": "1MiB"}})
        ends.a.memory("fits", MIB, 1, kind="allocated")
        with pytest.raises(errors.KvlinkError, match=r"limit of 1048576.*host_staging"):
            ends.a.memory("too much", 4096, 1, kind="allocated")


def test_host_memory_above_the_limit_that_only_the_nic_knows(tmp_path: Path) -> None:
    """The driver refuses it in Connect with a general code; the error says what that usually means."""
    with two_processes(CELL, tmp_path, CANN_SIM_HOST_MR_MIB="1") as ends:
        ends.open()
        ends.memory("allocated", 2 * MIB)
        start = time.monotonic()
        with pytest.raises(errors.ConnectError, match="503900") as caught:
            ends.connect(timeout=8.0)
        assert time.monotonic() - start < 12.0
        assert "Hixl::Connect" in str(caught.value)
        assert "host" in str(caught.value)


def test_the_same_memory_twice(tmp_path: Path) -> None:
    """An exact duplicate shares the vendor's handle, which lives until both are closed; an overlap names the owner."""
    with two_processes(CELL, tmp_path) as ends:
        ends.open()
        ends.memory()
        address = int(ends.a.call("register_device", name="own", nbytes=MIB, offset=0, device="npu:0"))
        ends.a.call("register_address", name="same", address=address, nbytes=MIB, device="npu:0")
        with pytest.raises(errors.KvlinkError, match=r"overlap.*hixl channel 127\.0\.0\.1:\d+ on npu:0"):
            ends.a.call("register_address", name="part", address=address + 4096, nbytes=4096, device="npu:0")
        ends.connect()
        ends.a.transfer("put", ends.peers["a"], "same", "b", [(0, 0, 4096)])


@pytest.mark.parametrize(
    ("a", "b", "text"),
    [
        ({"HCCL_INTRA_ROCE_ENABLE": "1", "HCCL_INTRA_PCIE_ENABLE": "0"}, None, "HCCL_INTRA_ROCE_ENABLE"),
        ({"HCCL_INTRA_ROCE_ENABLE": "1", "HCCL_INTRA_PCIE_ENABLE": "1"}, None, "HCCL_INTRA_PCIE_ENABLE"),
        ({"HCCL_CONNECT_TIMEOUT": "5"}, None, "HCCL_CONNECT_TIMEOUT"),
    ],
    ids=["sides-differ", "both-set", "timeout-too-small"],
)
def test_environment(a: dict[str, str], b: dict[str, str] | None, text: str, tmp_path: Path) -> None:
    """What HCCL would refuse with a bare 1, or answer with a timeout, is named before."""
    with two_processes(HCCS, tmp_path, a=a, b=b) as ends:
        start = time.monotonic()
        with pytest.raises(errors.KvlinkError, match=text):
            ends.open()
            ends.memory()
            ends.connect()
        assert time.monotonic() - start < 8.0


def _other(change: Callable[[Cell], Cell], tmp_path: Path) -> dict[str, str]:
    return host_environment(change(CELL), tmp_path / "other")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda cell: replace(cell, flavour="9.1"),
            r"runs CANN (8\.5\.0|9\.1\.0) and the peer CANN (8\.5\.0|9\.1\.0).*EI0008",
        ),
        (lambda cell: replace(cell, soc="A3"), "SoC family"),
    ],
    ids=["cann", "soc"],
)
def test_peers_that_do_not_fit(change: Callable[[Cell], Cell], text: str, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with two_processes(CELL, tmp_path, b=_other(change, tmp_path)) as ends:
        ends.open()
        ends.memory()
        with pytest.raises(errors.KvlinkError, match=text):
            ends.connect()


def test_one_device_on_both_sides(tmp_path: Path) -> None:
    with two_processes(CELL, tmp_path, devices=("npu:0", "npu:0")) as ends:
        ends.open()
        ends.memory()
        with pytest.raises(errors.KvlinkError, match="both sides are on NPU 0"):
            ends.connect()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rdma_traffic_class": 5}, "multiples of 4"),
        ({"rdma_traffic_class": 256}, "rdma_traffic_class"),
        ({"engine_host": "no.such.host.invalid"}, "no.such.host.invalid"),
        ({"max_in_flight": 0}, "max_in_flight"),
    ],
)
def test_wrong_options(options: dict[str, object], text: str, tmp_path: Path) -> None:
    with two_processes(CELL, tmp_path) as ends, pytest.raises(errors.KvlinkError, match=text):
        ends.a.open(options=options)


def test_engine_port_taken(tmp_path: Path) -> None:
    with two_processes(CELL, tmp_path) as ends, socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        with pytest.raises(errors.KvlinkError, match=rf"503900.*engine_port={port}"):
            ends.a.open(options={"engine_port": port})
