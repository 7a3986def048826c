"""Every fault of the simulator: a clear error naming vendor call, code and fix, in bounded time, and life goes on."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from kvlink import errors

from .ends import Ends, two_ends

TRANSFER_ERRORS = (errors.TransferError, errors.PeerLost)
REFUSED = (errors.KvlinkError,)


def check_text(error: errors.KvlinkError, call: str, code: int) -> None:
    """The message names the vendor's call, its raw code and one thing to do."""
    text = str(error)
    assert call in text or error.site == call, text
    assert str(code) in text and (error.vendor_code in (code, 0)), (error.vendor_code, text)
    assert "Fix:" in text, text


def reconnects(ends: Ends) -> None:
    """The same two processes make another link, and it works."""
    ends.a.wait_peers(0, timeout=5.0)
    ends.b.wait_peers(0, timeout=5.0)
    ends.connect()
    ends.round_trip()


# ---- connecting


def test_transient_error_7_at_init_is_retried(tmp_path: Path) -> None:
    with two_ends(tmp_path, a={"CANN_SIM_FAULTS": "HcclCommInitClusterInfoMemConfig@1-3=fail:7"}) as ends:
        ends.open()
        ends.connect(timeout=20.0)
        ends.round_trip()
        assert ends.a.counter("connect_retries") == 3


def test_permanent_error_7_at_init_ends_at_the_deadline(tmp_path: Path) -> None:
    with two_ends(tmp_path, a={"CANN_SIM_FAULTS": "HcclCommInitClusterInfoMemConfig=fail:7"}) as ends:
        ends.open()
        start = time.monotonic()
        with pytest.raises(REFUSED) as caught:
            ends.connect(timeout=3.0)
        assert time.monotonic() - start < 5.0
        assert "7" in str(caught.value) or isinstance(caught.value, errors.ConnectTimeout)


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ("HcclCommInitClusterInfoMemConfig", 1),
        ("HcclCommBindMem", 7),
        ("HcclCommPrepare", 4),
        ("HcclCommPrepare", 5),
        ("HcclCommPrepare", 9),
        ("HcclCommPrepare", 13),
        ("HcclCommPrepare", 15),
        ("HcclCommPrepare", 19),
    ],
)
def test_a_connect_that_the_vendor_refuses(tmp_path: Path, fault: str, code: int) -> None:
    with two_ends(tmp_path) as ends:
        ends.open()
        ends.a.faults(f"{fault}@1=fail:{code}")
        start = time.monotonic()
        with pytest.raises(REFUSED) as caught:
            ends.connect(timeout=6.0)
        assert time.monotonic() - start < 7.0
        check_text(caught.value, fault, code)
        reconnects(ends)


def test_the_peer_refuses(tmp_path: Path) -> None:
    """The acceptor's vendor fails: the initiator hears why, long before its own time-out."""
    with two_ends(tmp_path) as ends:
        ends.open()
        ends.b.faults("HcclCommPrepare@1=fail:19")
        start = time.monotonic()
        with pytest.raises(REFUSED) as caught:
            ends.connect(timeout=20.0)
        assert time.monotonic() - start < 10.0
        assert "19" in str(caught.value) or "peer" in str(caught.value)
        reconnects(ends)


@pytest.mark.parametrize("call", ["HcclCommInitClusterInfoMemConfig", "HcclCommPrepare"])
def test_a_call_that_never_returns(tmp_path: Path, call: str) -> None:
    """Given up at the deadline; later connects fail at theirs; the channel says it is degraded; close() returns."""
    with two_ends(tmp_path) as ends:
        ends.open()
        ends.a.faults(f"{call}=hang")
        for _ in range(2):
            start = time.monotonic()
            with pytest.raises(REFUSED) as caught:
                ends.connect(timeout=2.0)
            assert time.monotonic() - start < 4.0
            assert str(caught.value)
        assert ends.a.counter("degraded") == 1
        assert ends.a.counter("calls_abandoned") >= 1
        assert ends.a.close(grace=1.0) < 5.0
        assert ends.b.close(grace=1.0) < 5.0
        start = time.monotonic()
        assert ends.a.child.stop(timeout=8.0) == 0, ends.a.child.error_output()
        assert time.monotonic() - start < 5.0


def test_port_16666_is_taken(tmp_path: Path) -> None:
    """Somebody else's listener on the device: the error names it, and option device_port is the way out."""
    with two_ends(tmp_path, CANN_SIM_PORTS_TAKEN="16666") as ends:
        ends.open()
        start = time.monotonic()
        with pytest.raises(REFUSED) as caught:
            ends.connect(timeout=6.0)
        assert time.monotonic() - start < 8.0
        check_text(caught.value, "HcclCommPrepare", 7)
        assert "device_port" in str(caught.value)
    with two_ends(tmp_path / "again", options={"device_port": 17_001}, CANN_SIM_PORTS_TAKEN="16666") as ends:
        ends.open()
        ends.connect()
        ends.round_trip()


def test_the_peer_dies_while_connecting(tmp_path: Path) -> None:
    with two_ends(tmp_path, b={"CANN_SIM_FAULTS": "HcclCommPrepare=crash"}) as ends:
        ends.open()
        start = time.monotonic()
        with pytest.raises(REFUSED) as caught:
            ends.connect(timeout=6.0)
        assert time.monotonic() - start < 8.0
        assert str(caught.value)
        assert ends.a.close() < 5.0


# ---- transfers


@pytest.mark.parametrize("events", ["complete", "error", "hang"])
def test_a_stream_that_failed_is_no_success(tmp_path: Path, events: str) -> None:
    """Its event may complete, fail or never complete: the transfer fails with the stream's code all the same."""
    with two_ends(tmp_path, a={"CANN_SIM_STOPPED_EVENTS": events}) as ends:
        ends.open()
        ends.connect()
        ends.a.faults("op.put@1=fail:507013")
        start = time.monotonic()
        with pytest.raises(TRANSFER_ERRORS) as caught:
            ends.put(timeout=5.0)
        assert time.monotonic() - start < 3.0
        assert "507013" in str(caught.value), str(caught.value)
        reconnects(ends)
        assert ends.a.counter("stream_failures") == 1
        assert ends.a.call("violations") == 0


@pytest.mark.parametrize(
    ("call", "code"),
    [
        ("HcclBatchPut", 4),
        ("HcclBatchPut", 6),
        ("aclrtRecordEvent", 507899),
        ("aclrtQueryEventStatus", 507056),
        ("aclrtSynchronizeStreamWithTimeout", 507057),
        ("HcclGetCommAsyncError", 21),
    ],
)
def test_a_call_of_the_data_path_fails(tmp_path: Path, call: str, code: int) -> None:
    with two_ends(tmp_path) as ends:
        ends.open()
        ends.connect()
        ends.a.faults(f"{call}@1=fail:{code}")
        start = time.monotonic()
        with pytest.raises(TRANSFER_ERRORS) as caught:
            ends.put(timeout=5.0)
        assert time.monotonic() - start < 3.0
        check_text(caught.value, call, code)
        reconnects(ends)


@pytest.mark.parametrize(("call", "code"), [("aclrtCreateStream", 207008), ("aclrtCreateEventExWithFlag", 207007)])
def test_no_stream_is_to_be_had(tmp_path: Path, call: str, code: int) -> None:
    """The transfer fails, the link lives, and the next one works."""
    with two_ends(tmp_path) as ends:
        ends.open()
        ends.connect()
        ends.a.faults(f"{call}@1=fail:{code}")
        with pytest.raises(TRANSFER_ERRORS) as caught:
            ends.put(timeout=5.0)
        check_text(caught.value, call, code)
        ends.round_trip()


def test_streams_are_exhausted(tmp_path: Path) -> None:
    """With room for a single stream, transfers take turns on it."""
    with two_ends(tmp_path, options={"streams": 8}, CANN_SIM_MAX_STREAMS="1") as ends:
        ends.open()
        ends.connect()
        numbers = [ends.a.submit("put", ends.peer, "a", "b", [(0, 0, 4096)]) for _ in range(16)]
        for number in numbers:
            ends.a.wait(number)
        ends.round_trip()


def test_slow_completions(tmp_path: Path) -> None:
    with two_ends(tmp_path, CANN_SIM_DELAY_US="20000:60000") as ends:
        ends.open()
        ends.connect()
        numbers = [ends.a.submit("put", ends.peer, "a", "b", [(0, 0, 4096)]) for _ in range(10)]
        for number in numbers:
            ends.a.wait(number)
        ends.round_trip()


def test_a_deadline_passes_on_the_device(tmp_path: Path) -> None:
    """The link is closed on both sides before the transfer ends, and nothing is written afterwards."""
    with two_ends(tmp_path) as ends:
        ends.open()
        ends.connect()
        ends.a.faults("op.put@1=delay:3000")
        start = time.monotonic()
        with pytest.raises(errors.TransferTimeout):
            ends.put(timeout=0.4)
        assert time.monotonic() - start < 3.0
        ends.b.wait_peers(0, timeout=5.0)
        ends.a.fill("a", 9)
        ends.connect()
        # Longer than the delay: what was stopped would have been written by now.
        while time.monotonic() - start < 3.5:
            ends.b.verify("b", 2, what="memory of a put whose deadline had passed")
        ends.round_trip()


@pytest.mark.parametrize("operation", ["put", "get"])
def test_an_operation_that_never_ends(tmp_path: Path, operation: str) -> None:
    with two_ends(tmp_path) as ends:
        ends.open()
        ends.connect()
        ends.a.faults(f"op.{operation}@1=hang")
        start = time.monotonic()
        with pytest.raises(errors.TransferTimeout):
            ends.a.transfer(operation, ends.peer, "a", "b", [(0, 0, 4096)], timeout=0.3)
        assert time.monotonic() - start < 3.0
        reconnects(ends)


def test_a_stream_that_cannot_be_stopped_keeps_its_memory(tmp_path: Path) -> None:
    """Until the vendor lets go the memory is not given back; afterwards it is, and close() never waited for it."""
    with two_ends(tmp_path) as ends:
        ends.open()
        ends.connect()
        ends.a.faults("op.put@1=hang;aclrtStreamAbort=hang;aclrtDestroyStreamForce=hang")
        with pytest.raises(errors.TransferTimeout):
            ends.put(timeout=0.3)
        assert ends.a.counter("links_stuck") == 1
        with pytest.raises(errors.BusyError) as caught:
            ends.a.close_region("a", timeout=0.5)
        assert str(caught.value)
        ends.a.call("release")
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            try:
                ends.a.close_region("a", timeout=0.5)
                break
            except errors.BusyError:
                continue
        else:
            pytest.fail("the memory was never given back")
        assert ends.a.close() < 5.0


def test_the_peer_is_dropped(tmp_path: Path) -> None:
    with two_ends(tmp_path) as ends:
        ends.open()
        ends.connect()
        ends.a.faults("peer@1-=drop")
        start = time.monotonic()
        with pytest.raises(TRANSFER_ERRORS) as caught:
            ends.put(timeout=10.0)
        assert time.monotonic() - start < 4.0
        assert "50705" in str(caught.value) or "107020" in str(caught.value), str(caught.value)


# ---- memory and the end


@pytest.mark.parametrize(
    ("call", "code", "kind"),
    [
        ("HcclRegisterGlobalMem", 7, "device"),
        ("aclrtMalloc", 207001, "device"),
        ("aclrtMallocHost", 207001, "allocated"),
        ("aclrtMemset", 507899, "device"),
    ],
)
def test_memory_that_cannot_be_had(tmp_path: Path, call: str, code: int, kind: str) -> None:
    with two_ends(tmp_path) as ends:
        ends.open()
        ends.a.faults(f"{call}@1=fail:{code}")
        with pytest.raises(REFUSED) as caught:
            ends.a.memory("more", 4096, 5, kind=kind)
        check_text(caught.value, call, code)
        ends.a.memory("more", 4096, 5, kind=kind)
        ends.connect()
        ends.round_trip()


def test_deregistration_fails(tmp_path: Path) -> None:
    with two_ends(tmp_path) as ends:
        ends.open()
        ends.a.faults("HcclDeregisterGlobalMem@1-2=fail:1")
        with pytest.raises(REFUSED) as caught:
            ends.a.close_region("a")
        check_text(caught.value, "HcclDeregisterGlobalMem", 1)
        ends.a.close_region("a")


@pytest.mark.parametrize("fault", ["HcclCommDestroy@1-2=fail:20", "HcclCommDestroy@1=fail:20"])
def test_a_busy_communicator_is_destroyed_in_the_end(tmp_path: Path, fault: str) -> None:
    with two_ends(tmp_path) as ends:
        ends.open()
        ends.connect()
        ends.a.faults(fault)
        ends.a.call("close_peer", peer=ends.peer)
        reconnects(ends)
        assert ends.a.counter("links_stuck") == 0


@pytest.mark.parametrize("fault", ["HcclCommDestroy=fail:1", "HcclCommUnbindMem=fail:1", "HcclCommDestroy=hang"])
def test_a_communicator_that_stays(tmp_path: Path, fault: str) -> None:
    """What the vendor does not let go of stays bound; closing the channel still returns in time."""
    with two_ends(tmp_path) as ends:
        ends.open()
        ends.connect()
        ends.a.faults(fault)
        ends.a.call("close_peer", peer=ends.peer)
        ends.b.wait_peers(0, timeout=5.0)
        with pytest.raises(errors.BusyError):
            ends.a.close_region("a", timeout=0.5)
        assert ends.a.counter("links_stuck") == 1
        assert ends.a.close(grace=1.0) < 5.0
