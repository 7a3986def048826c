"""Rules 21 and 23 as far as ACL shows them: operations complete later, in order, and failures show late."""

from __future__ import annotations

import ctypes
import threading
import time

import pytest

from .client import Outcome, run_client
from .conftest import Hosts
from .vendor import HOST_TO_DEVICE, Acl, Core


def later() -> None:
    acl, core = Acl(0), Core()
    stream, event, device, pinned = acl.stream(), acl.event(), acl.malloc(4096), acl.malloc_host(4096)
    core.poke(device, b"old")
    ctypes.memset(pinned, ord("n"), 4096)
    assert acl.event_complete(event) == (0, True)  # not recorded yet
    assert acl.aclrtMemcpyAsync(device, 4096, pinned, 4096, HOST_TO_DEVICE, stream) == 0
    assert acl.aclrtRecordEvent(event, stream) == 0
    assert core.peek(device, 3) == b"old"  # nothing is visible yet
    assert acl.event_complete(event) == (0, False)
    assert acl.stream_complete(stream) == (0, False)
    old = ctypes.c_int32(-1)
    assert acl.aclrtQueryEvent(event, ctypes.byref(old)) == 0
    assert old.value == 1  # the deprecated call's values are the other way round
    core.cann_sim_release()
    assert acl.aclrtSynchronizeEvent(event) == 0
    assert core.peek(device, 3) == b"nnn"
    assert acl.event_complete(event) == (0, True)
    assert acl.aclrtSynchronizeStream(stream) == 0
    assert acl.stream_complete(stream) == (0, True)
    # A query is too early by design; a client that trusts submission alone must fail here.
    assert acl.aclrtSynchronizeStreamWithTimeout(stream, 0) == 107000


def test_rule_21_nothing_is_visible_before_completion(host: dict[str, str]) -> None:
    run_client(later, host=host, env={"CANN_SIM_FAULTS": "op.memcpy=hang"}).refused(23, 107000)


def trusting() -> None:
    acl, core = Acl(0), Core()
    stream, device, pinned = acl.stream(), acl.malloc(4096), acl.malloc_host(4096)
    ctypes.memset(pinned, ord("n"), 4096)
    assert acl.aclrtMemcpyAsync(device, 4096, pinned, 4096, HOST_TO_DEVICE, stream) == 0
    assert core.peek(device, 3) == b"nnn", "read before completion"  # the wrong client: no synchronisation


def test_rule_21_a_client_that_does_not_wait_reads_old_bytes(host: dict[str, str]) -> None:
    outcome = run_client(trusting, host=host, env={"CANN_SIM_FAULTS": "op.memcpy=hang"})
    assert outcome.code == 1
    assert "read before completion" in outcome.errors


def ordered() -> None:
    acl, core = Acl(0), Core()
    stream, device = acl.stream(), acl.malloc(4096)
    sources = [acl.malloc_host(4096) for _ in range(20)]
    for number, source in enumerate(sources):
        ctypes.memset(source, number, 4096)
        assert acl.aclrtMemcpyAsync(device, 4096, source, 4096, HOST_TO_DEVICE, stream) == 0
    assert acl.aclrtSynchronizeStream(stream) == 0
    assert core.peek(device, 1) == bytes([19])
    # Two streams: the second waits for the first only because it is told to.
    other, event = acl.stream(), acl.event()
    core.faults("op.memcpy@1=delay:100")
    assert acl.aclrtMemcpyAsync(device, 4096, sources[1], 4096, HOST_TO_DEVICE, stream) == 0
    assert acl.aclrtRecordEvent(event, stream) == 0
    assert acl.aclrtStreamWaitEvent(other, event) == 0
    assert acl.aclrtMemcpyAsync(device, 4096, sources[2], 4096, HOST_TO_DEVICE, other) == 0
    assert acl.aclrtSynchronizeStream(other) == 0
    assert core.peek(device, 1) == bytes([2])
    assert acl.event_complete(event) == (0, True)
    # And unordered without: the held first copy lands last.
    core.faults("op.memcpy@1=hang")
    assert acl.aclrtMemcpyAsync(device, 4096, sources[3], 4096, HOST_TO_DEVICE, stream) == 0
    core.await_begun(23)  # the held one, so that the count of the fault is its own
    assert acl.aclrtMemcpyAsync(device, 4096, sources[4], 4096, HOST_TO_DEVICE, other) == 0
    assert acl.aclrtSynchronizeStream(other) == 0
    assert core.peek(device, 1) == bytes([4])
    core.cann_sim_release()
    assert acl.aclrtSynchronizeStream(stream) == 0
    assert core.peek(device, 1) == bytes([3])


def test_rule_21_order_holds_on_a_stream_and_not_between_them(host: dict[str, str]) -> None:
    run_client(ordered, host=host).succeeded()


def failing(mode: int) -> None:
    acl, core = Acl(0), Core()
    stream, event, device = acl.stream(), acl.event(), acl.malloc(4096)
    sources = [acl.malloc_host(4096) for _ in range(3)]
    for number, source in enumerate(sources):
        ctypes.memset(source, number + 1, 4096)
    core.poke(device, b"\0")
    assert acl.aclrtSetStreamFailureMode(stream, mode) == 0
    for source in sources:  # the second of the three fails
        assert acl.aclrtMemcpyAsync(device, 4096, source, 4096, HOST_TO_DEVICE, stream) == 0
    assert acl.aclrtRecordEvent(event, stream) == 0
    sync = acl.aclrtSynchronizeStream(stream)
    code, complete = acl.event_complete(event)
    print(f'{{"event": {code}, "complete": {int(complete)}, "sync": {sync}, "byte": {core.peek(device, 1)[0]}}}')


@pytest.mark.parametrize(
    ("mode", "events", "expected"),
    [
        (0, "complete", {"event": 0, "complete": 1, "sync": 507013, "byte": 3}),  # goes on
        (1, "complete", {"event": 0, "complete": 1, "sync": 507013, "byte": 1}),  # stops, and the event completes
        (1, "error", {"event": 507013, "complete": 0, "sync": 507013, "byte": 1}),
        (1, "hang", {"event": 0, "complete": 0, "sync": 507013, "byte": 1}),
    ],
)
def test_rule_23_a_stream_fails_though_its_event_completes(
    host: dict[str, str], mode: int, events: str, expected: dict[str, int]
) -> None:
    env = {"CANN_SIM_FAULTS": "op.memcpy@2=fail:507013", "CANN_SIM_STOPPED_EVENTS": events}
    outcome = run_client(failing, mode, host=host, env=env).refused(23, 507013)
    assert outcome.result() == expected


def impatient() -> None:
    acl, core = Acl(0), Core()
    stream, device, pinned = acl.stream(), acl.malloc(4096), acl.malloc_host(4096)
    ctypes.memset(pinned, ord("n"), 4096)
    core.poke(device, b"old")
    assert acl.aclrtMemcpyAsync(device, 4096, pinned, 4096, HOST_TO_DEVICE, stream) == 0
    assert acl.aclrtSynchronizeStreamWithTimeout(stream, 20) == 507046
    assert core.peek(device, 3) == b"old"
    core.cann_sim_release()
    assert acl.aclrtSynchronizeStreamWithTimeout(stream, 10000) == 0  # the copy went on
    assert core.peek(device, 3) == b"nnn"


def test_rule_23_a_timeout_does_not_stop_the_copy(host: dict[str, str]) -> None:
    run_client(impatient, host=host, env={"CANN_SIM_FAULTS": "op.memcpy=hang"}).refused(23, 507046)


def aborting() -> None:
    acl, core = Acl(0), Core()
    stream, event, device = acl.stream(), acl.event(), acl.malloc(4096)
    sources = [acl.malloc_host(4096) for _ in range(3)]
    for number, source in enumerate(sources):
        ctypes.memset(source, number + 1, 4096)
        assert acl.aclrtMemcpyAsync(device, 4096, source, 4096, HOST_TO_DEVICE, stream) == 0
    assert acl.aclrtRecordEvent(event, stream) == 0
    core.await_begun(1)
    core.poke(device, b"\0")
    assert acl.aclrtStreamAbort(stream) == 0
    assert acl.event_complete(event) == (0, True)  # what was queued is dropped, though its event completes
    assert core.peek(device, 1) == b"\0"
    assert acl.aclrtSynchronizeStream(stream) == 0
    assert core.peek(device, 1) == bytes([1])  # what had begun landed after the abort
    assert acl.aclrtDestroyStream(stream) == 0


def test_rule_23_an_abort_drops_the_queue_and_not_what_began(host: dict[str, str]) -> None:
    run_client(aborting, host=host, env={"CANN_SIM_FAULTS": "op.memcpy=delay:1000"}).succeeded()


def hanging() -> None:
    acl = Acl(0)
    stream, event, device, pinned = acl.stream(), acl.event(), acl.malloc(4096), acl.malloc_host(4096)
    assert acl.aclrtMemcpyAsync(device, 4096, pinned, 4096, HOST_TO_DEVICE, stream) == 0
    assert acl.aclrtRecordEvent(event, stream) == 0
    assert acl.aclrtSynchronizeStreamWithTimeout(stream, 100) == 507046
    assert acl.event_complete(event) == (0, False)
    context, codes = acl.current_context(), []

    def synchronize() -> None:
        assert acl.aclrtSetCurrentContext(context) == 0
        codes.append(acl.aclrtSynchronizeStream(stream))

    waiter = threading.Thread(target=synchronize)
    waiter.start()
    core, deadline = Core(), time.monotonic() + 10
    while core.live("synchronizing") == 0:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    began = time.monotonic()
    assert acl.aclrtDestroyStreamForce(stream) == 0
    waiter.join(10)
    assert time.monotonic() - began < 2
    assert codes == [107023], codes  # what was dropped is never reported as done


@pytest.mark.parametrize("flavour", ["8.3", "9.1"])
def test_rule_23_a_hung_stream_can_be_destroyed_by_force(make_host: Hosts, flavour: str) -> None:
    outcome: Outcome = run_client(hanging, host=make_host(flavour), env={"CANN_SIM_FAULTS": "op.memcpy=hang"})
    outcome.refused(23, 507046)
