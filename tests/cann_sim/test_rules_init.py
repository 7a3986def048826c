"""Rules 4, 5 and 10: initialisation, the current device of a thread, streams and their context."""

from __future__ import annotations

import ctypes
import threading

import pytest

from .client import run_client
from .conftest import Hosts
from .vendor import RUNTIME, Acl, Library


def init_twice() -> None:
    acl = Acl(device=None)
    assert acl.aclInit(None) == 100002


def test_rule_10_second_init_is_refused(host: dict[str, str]) -> None:
    run_client(init_twice, host=host).refused(10, 100002)


def no_init() -> None:
    acl = Acl(device=None, init=False)
    assert acl.aclrtSetDevice(0) == 100001


def test_rule_10_a_call_before_init_is_refused(host: dict[str, str]) -> None:
    run_client(no_init, host=host).refused(10, 100001)


def error_text() -> None:
    acl = Acl(device=None)
    assert acl.error() is None
    assert acl.aclrtSetDevice(99) == 107001
    other: list[str | None] = []
    thread = threading.Thread(target=lambda: other.append(acl.error()))
    thread.start()
    thread.join()
    text = acl.error()
    assert text is not None and "99" in text, text
    assert acl.error() is None  # it was cleared
    assert other == [None]  # and it is of this thread
    assert acl.aclrtPeekAtLastError(0) == 107001
    assert acl.aclrtGetLastError(0) == 107001
    assert acl.aclrtGetLastError(0) == 0


def test_rule_10_error_text_is_cleared_and_of_one_thread(host: dict[str, str]) -> None:
    run_client(error_text, host=host).refused(4, 107001)


def no_device() -> None:
    acl = Acl(device=None)
    out, number = ctypes.c_void_p(), ctypes.c_int32()
    assert acl.aclrtMalloc(ctypes.byref(out), 4096, 0) == 107002
    assert acl.aclrtCreateStream(ctypes.byref(out)) == 107002
    assert acl.aclrtGetDevice(ctypes.byref(number)) == 107002
    assert acl.aclrtSynchronizeStream(None) == 107002
    assert acl.aclrtSetDevice(0) == 0
    assert acl.aclrtMalloc(ctypes.byref(out), 4096, 0) == 0


def test_rule_04_a_thread_without_a_device_is_refused(host: dict[str, str]) -> None:
    run_client(no_device, host=host).refused(4, 107002)


def other_thread() -> None:
    acl = Acl(0)
    context = acl.current_context()
    codes: list[int] = []

    def work() -> None:
        number = ctypes.c_int32(-1)
        codes.append(acl.aclrtGetDevice(ctypes.byref(number)))
        codes.append(acl.aclrtSetCurrentContext(context))
        codes.append(acl.aclrtGetDevice(ctypes.byref(number)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert codes == [107002, 0, 0], codes


def test_rule_04_the_current_device_is_of_one_thread(host: dict[str, str]) -> None:
    run_client(other_thread, host=host).refused(4, 107002)


def references() -> None:
    acl = Acl(0)
    number = ctypes.c_int32()
    assert acl.aclrtSetDevice(0) == 0
    assert acl.aclrtResetDevice(0) == 0
    assert acl.aclrtGetDevice(ctypes.byref(number)) == 0  # one reference left
    assert acl.aclrtResetDevice(0) == 0
    assert acl.aclrtGetDevice(ctypes.byref(number)) == 107002
    assert acl.aclrtResetDevice(0) == 107001  # one too many


def test_rule_04_set_and_reset_are_counted(host: dict[str, str]) -> None:
    run_client(references, host=host).refused(4, 107001)


def ids(flavour: str) -> None:
    acl = Acl(None)
    count, physical = ctypes.c_uint32(), ctypes.c_int32()
    assert acl.aclrtGetDeviceCount(ctypes.byref(count)) == 0
    assert count.value == 2
    if flavour == "8.3":
        runtime = Library("libruntime.so", RUNTIME)
        index = ctypes.c_uint32()
        assert runtime.rtGetDevicePhyIdByIndex(0, ctypes.byref(index)) == 0
        assert index.value == 6
        assert not acl.has("aclrtGetPhyDevIdByLogicDevId")
    else:
        assert acl.aclrtGetPhyDevIdByLogicDevId(0, ctypes.byref(physical)) == 0
        assert physical.value == 6
        assert acl.aclrtGetPhyDevIdByLogicDevId(1, ctypes.byref(physical)) == 0
        assert physical.value == 4
    assert acl.aclrtSetDevice(2) == 107001  # a third device exists, but is not visible


@pytest.mark.parametrize("flavour", ["8.3", "8.5.0", "9.1"])
def test_rule_04_user_logic_and_physical_ids_differ(make_host: Hosts, flavour: str) -> None:
    host = make_host(flavour, devices=3, physical_ids=(4, 5, 6))
    run_client(ids, flavour, host=host, env={"ASCEND_RT_VISIBLE_DEVICES": "2,0"}).refused(4, 107001)


def foreign_stream() -> None:
    acl = Acl(0)
    stream, event, memory, host = acl.stream(), acl.event(), acl.malloc(4096), acl.malloc_host(4096)
    acl.context(0)  # another context of the same device becomes current
    assert acl.aclrtMemcpyAsync(memory, 4096, host, 4096, 1, stream) == 107003
    assert acl.aclrtRecordEvent(event, stream) == 107003
    assert acl.aclrtDestroyStream(stream) == 107003


def test_rule_05_a_stream_of_another_context_is_refused(host: dict[str, str]) -> None:
    run_client(foreign_stream, host=host).refused(5, 107003)


def many_streams() -> None:
    acl = Acl(0)
    streams = [acl.stream() for _ in range(3)]
    out = ctypes.c_void_p()
    assert acl.aclrtCreateStream(ctypes.byref(out)) == 207008
    assert acl.aclrtDestroyStream(streams[0]) == 0
    assert acl.aclrtCreateStream(ctypes.byref(out)) == 0
    assert acl.aclrtSetDevice(1) == 0
    assert acl.aclrtCreateStream(ctypes.byref(out)) == 0  # the limit is of each device


def test_rule_05_streams_run_out(host: dict[str, str]) -> None:
    run_client(many_streams, host=host, env={"CANN_SIM_MAX_STREAMS": "3"}).refused(5, 207008)


def destroyed(what: str) -> None:
    acl = Acl(0)
    if what == "stream":
        stream = acl.stream()
        acl.aclrtDestroyStream(stream)
        acl.aclrtSynchronizeStream(stream)
    elif what == "event":
        event = acl.event()
        acl.aclrtDestroyEvent(event)
        acl.event_complete(event)
    else:
        context = acl.context(0)
        acl.aclrtDestroyContext(context)
        acl.aclrtSetCurrentContext(context)


@pytest.mark.parametrize(("what", "rule"), [("stream", 5), ("event", 5), ("context", 33)])
def test_rule_05_a_destroyed_handle_stops_the_client(host: dict[str, str], what: str, rule: int) -> None:
    run_client(destroyed, what, host=host).violated(rule)


def destroy_default_context() -> None:
    acl = Acl(0)
    assert acl.aclrtDestroyContext(acl.current_context()) == 107000


def test_rule_05_a_default_context_is_not_destroyed(host: dict[str, str]) -> None:
    run_client(destroy_default_context, host=host).refused(5, 107000)
