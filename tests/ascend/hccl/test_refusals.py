"""Bad input and hosts that do not fit: a clear error at the earliest moment, naming the call, the code and one fix."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvlink import errors

from .ends import CELL, SIZE, Ends, end, two_ends
from .simulated import PAIRS, Cell, cells, on_host


def probe(provider: str, environment: dict[str, str]) -> tuple[bool, str]:
    """Asks in a process with exactly this environment on top of ours; the vendor's calls happen in its child."""
    code = (
        "import json, sys, kvlink; r = kvlink.probe(sys.argv[1]); print(json.dumps([r.usable, r.reason]));"
        "print(any('libascendcl' in line for line in open('/proc/self/maps')), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, provider],
        env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stderr.strip().endswith("False"), "the probe loaded the vendor's library into the asking process"
    usable, reason = json.loads(done.stdout)
    return bool(usable), str(reason)


# ---- hosts


@pytest.mark.parametrize("provider", ["hccl", "hcomm_onesided"])
def test_without_cann(tmp_path: Path, provider: str) -> None:
    empty = dict.fromkeys(("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME", "LD_LIBRARY_PATH"), "")
    with on_host(CELL, tmp_path):
        usable, reason = probe(provider, {**empty, "KVLINK_ASCEND_SYSROOT": str(tmp_path / "nothing")})
    assert not usable
    assert "libascendcl.so" in reason and "ASCEND_HOME_PATH" in reason, reason


@pytest.mark.parametrize(
    ("provider", "flavour", "usable"),
    [
        ("hccl", "8.3", True),
        ("hccl", "8.5.0", True),
        ("hcomm_onesided", "8.3", False),
        ("hcomm_onesided", "8.5.0", True),
        ("hcomm_onesided", "9.1", True),
    ],
)
def test_which_cann_serves(tmp_path: Path, provider: str, flavour: str, usable: bool) -> None:
    with on_host(Cell(provider, flavour), tmp_path) as environment:
        found, reason = probe(provider, environment)
    assert found == usable, reason
    if not usable:
        assert "libhcomm.so" in reason and "8.5" in reason, reason


def test_stub_libraries(tmp_path: Path) -> None:
    with on_host(Cell("hccl", "devlib"), tmp_path) as environment:
        usable, reason = probe("hccl", environment)
    assert not usable
    assert "stub" in reason and "driver" in reason, reason


def test_no_device(tmp_path: Path) -> None:
    with on_host(CELL, tmp_path, CANN_SIM_FAULTS="aclrtGetDeviceCount=fail:207004") as environment:
        usable, reason = probe(CELL.provider, environment)
    assert not usable
    assert "207004" in reason, reason


@pytest.mark.parametrize("provider", ["hccl", "hcomm_onesided"])
def test_ascend950_is_for_hixl(tmp_path: Path, provider: str) -> None:
    cell = Cell(provider, "9.1", soc="950")
    with on_host(cell, tmp_path) as environment:
        usable, reason = probe(provider, environment)
        with end(cell, "a", "npu:0") as a, pytest.raises(errors.ChannelUnavailableError) as caught:
            a.open()
    assert not usable
    for text in (reason, str(caught.value)):
        assert "hixl" in text and "64" in text, text


@pytest.mark.parametrize(("device", "words"), [("npu:77", "npu:77 does not exist"), ("npu:x", "npu")])
def test_wrong_device(tmp_path: Path, device: str, words: str) -> None:
    with on_host(CELL, tmp_path), end(CELL, "a", device) as a:
        with pytest.raises(errors.ConfigError) as caught:
            a.open()
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"HCCL_INTRA_ROCE_ENABLE": "1", "HCCL_INTRA_PCIE_ENABLE": "1"}, "HCCL_INTRA_PCIE_ENABLE"),
        ({"HCCL_INTRA_ROCE_ENABLE": "0", "HCCL_INTRA_PCIE_ENABLE": ""}, "HCCL_INTRA_ROCE_ENABLE"),
        ({"HCCL_CONNECT_TIMEOUT": "7"}, "HCCL_CONNECT_TIMEOUT"),
        ({"HCCL_CONNECT_TIMEOUT": "soon"}, "HCCL_CONNECT_TIMEOUT"),
    ],
)
def test_an_environment_that_hccl_refuses(tmp_path: Path, variables: dict[str, str], words: str) -> None:
    """Said when the channel opens, not when the first peer connects."""
    with on_host(CELL, tmp_path), end(CELL, "a", "npu:0", **variables) as a:
        with pytest.raises(errors.ConfigError) as caught:
            a.open()
        assert words in str(caught.value)


def test_no_device_ip(tmp_path: Path) -> None:
    with on_host(CELL, tmp_path) as environment:
        root = Path(environment["KVLINK_ASCEND_SYSROOT"])
        (root / "etc" / "hccn.conf").unlink()
        for tool in root.glob("usr/local/Ascend/driver/tools/*"):
            tool.unlink()
        with end(CELL, "a", "npu:0") as a:
            with pytest.raises(errors.KvlinkError) as caught:
                a.open()
            assert "hccn.conf" in str(caught.value) and "device_ip" in str(caught.value)
            a.open(options={"device_ip": "192.168.100.100"})


@pytest.mark.parametrize("flavour", ["8.3", "8.5.0"])
def test_a_second_device_of_a_process_before_cann_9(tmp_path: Path, flavour: str) -> None:
    cell = Cell("hccl", flavour)
    with on_host(cell, tmp_path), end(cell, "a", "npu:0") as a:
        a.open()
        with pytest.raises(errors.UnsupportedError) as caught:
            a.open(channel="second", device="npu:1")
        assert "one device a process" in str(caught.value)


def test_a_second_ascend_provider_in_a_process(tmp_path: Path) -> None:
    with on_host(CELL, tmp_path), end(CELL, "a", "npu:0") as a:
        a.open()
        with pytest.raises(errors.StateError) as caught:
            a.call("open", channel="second", provider="hccl", device="npu:0")
        assert "hcomm_onesided" in str(caught.value) and "hccl" in str(caught.value)


# ---- memory


def test_unaligned_device_memory_with_link_hccs(tmp_path: Path) -> None:
    """Refused where it is registered."""
    cell = Cell("hcomm_onesided", "8.5.0", link="hccs")
    with on_host(cell, tmp_path), end(cell, "a", "npu:0") as a:
        a.open(options={"link": "hccs"})
        a.memory("a", 4 << 20, 1, kind="device")
        start = a.call("address_of", name="a")
        a.close_region("a")
        with pytest.raises(errors.ConfigError) as caught:
            a.call("register_address", name="odd", address=start + 4096, nbytes=4096, device="npu:0")
        assert "2 MiB" in str(caught.value)


def test_unaligned_device_memory_on_a_link_that_turns_out_hccs(tmp_path: Path) -> None:
    """Refused when the two sides meet, before any vendor call."""
    cell = Cell("hcomm_onesided", "8.5.0", link="hccs")
    log = tmp_path / "log.jsonl"
    with two_ends(tmp_path, cell, CANN_SIM_LOG=str(log)) as ends:
        ends.open()
        start = ends.b.call("address_of", name="b")
        ends.b.close_region("b")
        ends.b.call("register_address", name="odd", address=start + 4096, nbytes=4096, device="npu:1")
        with pytest.raises(errors.KvlinkError) as caught:
            ends.a.connect(ends.address, timeout=5.0)
        assert "2 MiB" in str(caught.value)
        assert "HcclCommInit" not in log.read_text(encoding="utf-8")


def test_unaligned_device_memory_over_roce(tmp_path: Path) -> None:
    with two_ends(tmp_path) as ends:
        ends.open()
        start = ends.b.call("address_of", name="b")
        ends.b.close_region("b")
        ends.b.call("register_address", name="odd", address=start + 4096, nbytes=8192, device="npu:1")
        peer = ends.a.connect(ends.address)
        ends.a.wait_region(peer, "odd")
        ends.a.transfer("put", peer, "a", "odd", [(0, 0, 8192)])


def test_unaligned_host_memory(tmp_path: Path) -> None:
    with on_host(CELL, tmp_path), end(CELL, "a", "npu:0") as a:
        a.open()
        a.memory("host", 65_536, 1, kind="plain", alignment=4096)
        start = a.call("address_of", name="host")
        a.close_region("host")
        with pytest.raises(errors.UnsupportedError) as caught:
            a.call("register_address", name="odd", address=start + 64, nbytes=4096, device="cpu")
        assert "4096" in str(caught.value) and "host_staging" in str(caught.value)


def test_host_memory_above_the_drivers_limit(tmp_path: Path) -> None:
    """Only the NIC knows how much it takes: the connect names call, code and fix."""
    with two_ends(tmp_path, CANN_SIM_HOST_MR_MIB="1") as ends:
        ends.open()
        ends.a.memory("large", 4 << 20, 1, kind="allocated")
        with pytest.raises(errors.KvlinkError) as caught:
            ends.connect(timeout=5.0)
        text = str(caught.value)
        assert "HcclCommPrepare" in text and "19" in text and "Fix:" in text, text


def test_memory_registered_twice(tmp_path: Path) -> None:
    """Exactly the same shares a registration; an overlap is refused and names whose the other is."""
    with two_ends(tmp_path) as ends:
        ends.open()
        start = ends.b.call("address_of", name="b")
        ends.b.call("register_address", name="again", address=start, nbytes=SIZE, device="npu:1")
        with pytest.raises(errors.ConfigError) as caught:
            ends.b.call("register_address", name="part", address=start + 4096, nbytes=4096, device="npu:1")
        assert "overlap" in str(caught.value) and "hcomm_onesided on npu:1" in str(caught.value)
        ends.connect()
        ends.a.wait_region(ends.peer, "again")
        ends.a.transfer("put", ends.peer, "a", "again", [(0, 0, 4096)])
        ends.b.verify("b", 2, [(0, 1, 0, 4096)])


def test_memory_of_the_wrong_kind(tmp_path: Path) -> None:
    with on_host(CELL, tmp_path), end(CELL, "a", "npu:0") as a:
        a.open()
        a.memory("host", 65_536, 1, kind="plain", alignment=4096)
        a.memory("device", 65_536, 1, kind="device")
        host, device = (a.call("address_of", name=name) for name in ("host", "device"))
        a.close_region("host"), a.close_region("device")
        for address, kind in ((host, "npu:0"), (device, "cpu"), (device, "npu:1")):
            with pytest.raises(errors.ConfigError) as caught:
                a.call("register_address", name="wrong", address=address, nbytes=4096, device=kind)
            assert "npu" in str(caught.value) or "memory" in str(caught.value)


# ---- two sides that do not fit


def refused(ends: Ends, *words: str) -> None:
    """Both sides hear about it well before any time-out of the vendor."""
    ends.open()
    start = time.monotonic()
    with pytest.raises(errors.KvlinkError) as caught:
        ends.a.connect(ends.address, timeout=20.0)
    assert time.monotonic() - start < 5.0
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_contradictory_environments(tmp_path: Path) -> None:
    variables = {"HCCL_INTRA_ROCE_ENABLE": "0", "HCCL_INTRA_PCIE_ENABLE": "1"}
    with two_ends(tmp_path, b=variables) as ends:
        refused(ends, "HCCL_INTRA_ROCE_ENABLE")


def test_peers_of_different_cann(tmp_path: Path) -> None:
    with two_ends(tmp_path, b_cell=Cell("hcomm_onesided", "9.1")) as ends:
        refused(ends, "CANN", "8.5.0", "9.1.0")


def test_peers_of_different_soc(tmp_path: Path) -> None:
    with two_ends(tmp_path, b_cell=Cell("hcomm_onesided", "8.5.0", soc="A3")) as ends:
        refused(ends, "A2", "A3")


def test_both_sides_on_one_device(tmp_path: Path) -> None:
    with two_ends(tmp_path) as ends:
        ends.b.open_defaults = {**ends.b.open_defaults, "device": "npu:0"}
        refused(ends, "NPU 0")


@pytest.mark.parametrize(("link", "option"), [("roce", "hccs"), ("hccs", "roce")])
def test_a_link_that_is_not_what_was_asked_for(tmp_path: Path, link: str, option: str) -> None:
    with on_host(Cell("hcomm_onesided", "8.5.0", link=link), tmp_path), end(CELL, "a", "npu:0") as a:
        with pytest.raises(errors.ConfigError) as caught:
            a.open(options={"link": option})
        assert "link" in str(caught.value) and "HCCL_INTRA_ROCE_ENABLE" in str(caught.value)


# ---- the table's refusals

REFUSALS = [cell for cell in cells() if not cell.works]
DEFAULT = {Cell("hccl", "8.3", "A2", "hccs", PAIRS[1]), Cell("hcomm_onesided", "9.1", "A3", "hccs", PAIRS[2])}


@pytest.mark.parametrize(
    "cell",
    [pytest.param(cell, id=cell.id, marks=() if cell in DEFAULT else pytest.mark.slow) for cell in REFUSALS],
)
def test_cells_that_refuse(tmp_path: Path, cell: Cell) -> None:
    """The cells of the table in which nothing can move say so, at the import of the region or at the transfer."""
    with two_ends(tmp_path, cell) as ends:
        ends.open()
        if cell.nameless:
            with pytest.raises(errors.KvlinkError) as caught:
                ends.a.connect(ends.address)
            assert "super_device_id" in str(caught.value)
            return
        peer = ends.a.connect(ends.address)
        if cell.pair[1] == "allocated":
            with pytest.raises(errors.UnsupportedError) as caught:
                ends.a.wait_region(peer, "b")
        elif cell.soc == "A2":
            ends.a.wait_region(peer, "b")
            with pytest.raises(errors.KvlinkError) as caught:
                ends.a.transfer("put", peer, "a", "b", [(0, 0, 4096)])
        else:  # on A3 the local side may be host memory
            ends.a.wait_region(peer, "b")
            ends.a.transfer("put", peer, "a", "b", [(0, 0, 4096)])
            ends.b.verify("b", 2, [(0, 1, 0, 4096)])
            with pytest.raises(errors.UnsupportedError) as caught:
                ends.b.wait_region(ends.b.wait_peers(1)[0], "a")
        assert "HCCS" in str(caught.value) and "HCCL_INTRA_ROCE_ENABLE" in str(caught.value), str(caught.value)


def test_the_super_device_id_as_an_option(tmp_path: Path) -> None:
    """The way out that the refusal names."""
    cell = Cell("hccl", "8.3", soc="A3", link="hccs")
    with two_ends(tmp_path, cell) as ends:
        ends.a.open_defaults = {**ends.a.open_defaults, "options": {"super_device_id": 11}}
        ends.b.open_defaults = {**ends.b.open_defaults, "options": {"super_device_id": 12}}
        ends.open()
        ends.connect()
        ends.round_trip()


def test_every_cell_of_the_table_has_a_test() -> None:
    assert len(REFUSALS) + len([cell for cell in cells() if cell.works]) == len(cells()) == 128
