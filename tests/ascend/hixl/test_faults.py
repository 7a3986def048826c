"""Every simulated fault: a clear error, in bounded time, and what works afterwards."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvlink import errors

from .simulated import MIB, Cell, Ends, two_processes

CELL = Cell("hixl", "8.5.0")
CELLS = [CELL, Cell("hixl", "9.1")]
BOTH = pytest.mark.parametrize("cell", CELLS, ids=[cell.flavour for cell in CELLS])


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fails when the block takes longer."""
    start = time.monotonic()
    yield
    took = time.monotonic() - start
    assert took < seconds, f"it took {took:.1f} s (at most {seconds:g})"


def _ready(ends: Ends, nbytes: int = MIB) -> None:
    ends.open()
    ends.memory(nbytes=nbytes)
    ends.connect()


def _close(ends: Ends) -> None:
    for end in (ends.a, ends.b):
        took = end.close(grace=1.0)
        assert took < 5.0, f"close took {took:.1f} s"


@pytest.mark.parametrize(
    ("faults", "text"),
    [
        ("Hixl::Initialize=fail:503900", "503900.*Hixl::Initialize"),
        ("Hixl::Initialize=fail:103900", "103900.*Hixl::Initialize"),
        ("aclInit=fail:507000", "507000.*aclInit"),
        ("aclrtSetDevice=fail:507899", "507899.*aclrtSetDevice"),
    ],
)
def test_open_fails(faults: str, text: str, tmp_path: Path) -> None:
    with two_processes(CELL, tmp_path, a={"CANN_SIM_FAULTS": faults}) as ends, within(10):
        with pytest.raises(errors.KvlinkError, match=text):
            ends.a.open()
        ends.b.open()


def test_registration_fails(tmp_path: Path) -> None:
    """The name is free again and the next attempt works."""
    # The first registration is the engine's own.
    with two_processes(CELL, tmp_path, a={"CANN_SIM_FAULTS": "Hixl::RegisterMem@2=fail:503900"}) as ends:
        ends.open()
        with pytest.raises(errors.KvlinkError, match=r"503900.*Hixl::RegisterMem"):
            ends.memory()
        ends.memory()
        ends.connect()
        ends.check_put()


@BOTH
@pytest.mark.parametrize(
    "faults",
    ["Hixl::Connect@1=fail:503900", "HcclCommInitClusterInfoMemConfig@1=fail:7"],
)
def test_transient_connect_failure(cell: Cell, faults: str, tmp_path: Path) -> None:
    """Tried again within the deadline."""
    with two_processes(cell, tmp_path, a={"CANN_SIM_FAULTS": faults}) as ends, within(20):
        ends.open()
        ends.memory()
        ends.connect(timeout=15.0)
        ends.check_put()
        retries = [end.call("provider_statistics")["connect_retries"] for end in (ends.a, ends.b)]
        assert max(retries) >= 1  # the call that failed may have been the half that answers the peer


@pytest.mark.parametrize(
    ("faults", "text"),
    [
        ("Hixl::Connect=fail:503900", "503900"),
        ("Hixl::Connect=fail:103901", "103901.*TIMEOUT"),
        ("Hixl::Connect=fail:103905", "103905.*HCCS"),
        ("HcclCommBindMem=fail:7", "(503900|103901)"),
    ],
)
def test_connect_fails(faults: str, text: str, tmp_path: Path) -> None:
    with two_processes(CELL, tmp_path, a={"CANN_SIM_FAULTS": faults}) as ends:
        ends.open()
        ends.memory()
        with within(9), pytest.raises(errors.KvlinkError, match=rf"{text}.*Hixl::Connect|Hixl::Connect.*{text}"):
            ends.connect(timeout=6.0)
        _close(ends)


def test_nic_port_taken(tmp_path: Path) -> None:
    """Port 16666 is somebody else's (torch.distributed): the vendor's own message, within the deadline."""
    with two_processes(CELL, tmp_path, CANN_SIM_PORTS_TAKEN="16666") as ends:
        ends.open()
        ends.memory()
        with (
            within(9),
            pytest.raises(errors.KvlinkError, match=r"Hixl::Connect.*(16666|ports)|(16666|ports).*Hixl::Connect"),
        ):
            ends.connect(timeout=6.0)
        _close(ends)


@BOTH
def test_communicator_init_hangs(cell: Cell, tmp_path: Path) -> None:
    """Given up at the deadline; the channel says that it is degraded, later connects fail at theirs, close returns."""
    hang = {"CANN_SIM_FAULTS": "HcclCommInitClusterInfoMemConfig=hang"}
    with two_processes(cell, tmp_path, a=hang) as ends:
        ends.open()
        ends.memory()
        for _ in range(2):
            with within(6), pytest.raises(errors.KvlinkError, match="Hixl::Connect"):
                ends.connect(timeout=3.0)
        with within(6), pytest.raises(errors.KvlinkError, match=r"degraded.*Hixl::Connect"):
            ends.connect(timeout=2.0)
        assert ends.a.call("provider_statistics")["degraded"] == 1
        ends.a.memory("more", MIB, 3, kind="device")  # what needs no connection goes on
        with within(5):
            ends.a.close(grace=1.0)
        with within(5):
            ends.b.close(grace=1.0)
        with within(15):
            assert ends.a.child.stop() == 0


@BOTH
@pytest.mark.parametrize("call", ["Hixl::TransferAsync", "Hixl::GetTransferStatus"])
@pytest.mark.parametrize("code", [503900, 103902, 507057])
def test_transfer_fails(cell: Cell, call: str, code: int, tmp_path: Path) -> None:
    """It ends with the vendor's call and code, the link is down, and a new connection works."""
    with two_processes(cell, tmp_path, a={"CANN_SIM_FAULTS": f"{call}@1=fail:{code}"}) as ends:
        _ready(ends)
        with within(5), pytest.raises(errors.KvlinkError, match=str(code)) as caught:
            ends.put()
        assert call in str(caught.value)
        ends.a.wait_peers(0)
        ends.b.wait_peers(0)
        ends.connect()
        ends.check_put()
        _close(ends)


@BOTH
def test_vendor_out_of_streams(cell: Cell, tmp_path: Path) -> None:
    """Not an error: the transfer waits until there are some."""
    faults = {"CANN_SIM_FAULTS": "Hixl::TransferAsync@1-5=fail:203900"}
    with two_processes(cell, tmp_path, a=faults) as ends, within(20):
        _ready(ends)
        ends.check_put()
        assert ends.a.call("provider_statistics")["out_of_streams"] == 5


def test_stream_failed_though_its_event_completed(tmp_path: Path) -> None:
    """COMPLETE is not success: 8.5 finds out when it synchronises the stream."""
    with two_processes(CELL, tmp_path, a={"CANN_SIM_FAULTS": "op.put@1=fail:507013"}) as ends:
        _ready(ends)
        with within(6), pytest.raises(errors.KvlinkError, match="Hixl::GetTransferStatus"):
            ends.put(timeout=5.0)
        ends.a.wait_peers(0)
        ends.connect()
        ends.check_put()


def test_stream_failed_in_91(tmp_path: Path) -> None:
    """9.1 never says so, its flag just stays unset: the deadline ends the transfer and the link."""
    with two_processes(Cell("hixl", "9.1"), tmp_path, a={"CANN_SIM_FAULTS": "op.put@1=fail:507013"}) as ends:
        _ready(ends)
        with within(6), pytest.raises(errors.KvlinkError):
            ends.put(timeout=2.0)
        ends.a.wait_peers(0)
        ends.connect()
        ends.check_put()


@BOTH
def test_delayed_completions(cell: Cell, tmp_path: Path) -> None:
    with two_processes(cell, tmp_path, CANN_SIM_FAULTS="op=delay:40") as ends, within(30):
        _ready(ends)
        ends.check_put()


@BOTH
def test_deadline_passes(cell: Cell, tmp_path: Path) -> None:
    """Both sides close the link before the memory is used again; then everything goes on."""
    with two_processes(cell, tmp_path, a={"CANN_SIM_FAULTS": "op.put@1=delay:3000"}) as ends:
        _ready(ends)
        with within(4), pytest.raises(errors.TransferTimeout):
            ends.put(timeout=0.5)
        ends.a.wait_peers(0)
        ends.b.wait_peers(0)
        ends.connect()
        ends.check_put()
        _close(ends)


@BOTH
def test_peer_dropped(cell: Cell, tmp_path: Path) -> None:
    with two_processes(cell, tmp_path, a={"CANN_SIM_FAULTS": "peer@1=drop"}) as ends:
        _ready(ends)
        with within(8), pytest.raises(errors.KvlinkError):
            ends.put(timeout=4.0)
        ends.a.wait_peers(0)
        _close(ends)


@BOTH
@pytest.mark.parametrize("fault", ["fail:503900", "hang:1500"])
def test_disconnect_fails(cell: Cell, fault: str, tmp_path: Path) -> None:
    """A close ends in time all the same, and one can connect again."""
    with two_processes(cell, tmp_path, a={"CANN_SIM_FAULTS": f"Hixl::Disconnect@1={fault}"}) as ends:
        _ready(ends)
        ends.check_put()
        with within(5):
            ends.a.call("close_peer", peer=ends.peers["a"])
            ends.b.wait_peers(0)
        ends.connect()
        ends.check_put()
        _close(ends)


def test_finalize_hangs(tmp_path: Path) -> None:
    with two_processes(CELL, tmp_path, a={"CANN_SIM_FAULTS": "Hixl::Finalize=hang"}) as ends:
        _ready(ends)
        ends.check_put()
        with within(5):
            ends.a.close(grace=1.0)
        with within(15):
            assert ends.a.child.stop() == 0


def test_close_ends_a_connect_that_waits_for_its_turn(tmp_path: Path) -> None:
    """A first Connect hangs; the second waits behind it, and close() waits for neither."""
    with two_processes(CELL, tmp_path, a={"CANN_SIM_FAULTS": "HcclCommInitClusterInfoMemConfig=hang"}) as ends:
        ends.open()
        ends.memory()
        ends.b.open(channel="other")
        other = str(ends.b.call("address", channel="other"))
        pending = [ends.a.start("connect", address=address, timeout=30.0) for address in (ends.address, other)]
        ends.b.wait_peers(0)
        with within(5):
            ends.a.close(grace=1.0)
        for future in pending:
            with within(5), pytest.raises(errors.KvlinkError):
                future.result(10)
