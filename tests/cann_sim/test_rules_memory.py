"""Rules 6 to 9: device memory, copies, the pointer probe, host registration."""

from __future__ import annotations

import ctypes
import mmap
import threading

import pytest

from .client import run_client
from .conftest import Hosts
from .vendor import (
    DEFAULT,
    DEVICE_TO_DEVICE,
    DEVICE_TO_HOST,
    HOST_TO_DEVICE,
    HOST_TO_HOST,
    HUGE_FIRST,
    HUGE_ONLY,
    MIB,
    NORMAL_ONLY,
    RUNTIME,
    Acl,
    Core,
    Library,
    PointerAttributes,
    RuntimePointerAttributes,
)

HOST, DEVICE, UNREGISTERED = 0, 1, 2


def touch(how: str) -> None:
    address = Acl(0).malloc(2 * MIB)
    if how == "read":
        ctypes.string_at(address, 8)
    else:
        ctypes.memset(address, 0, 8)


@pytest.mark.parametrize("how", ["read", "write"])
def test_rule_06_the_cpu_faults_on_device_memory(host: dict[str, str], how: str) -> None:
    outcome = run_client(touch, how, host=host)
    assert outcome.code == -11 or "SEGV" in outcome.errors, (outcome.code, outcome.errors)


def alignment() -> None:
    acl = Acl(0)
    for size in (100, 4096, 3 * MIB):
        assert acl.malloc(size, HUGE_ONLY) % (2 * MIB) == 0
        for policy in (HUGE_FIRST, NORMAL_ONLY, 99):
            address = acl.malloc(size, policy)
            assert address % 64 == 0
            assert address % 128 != 0
    out = ctypes.c_void_p()
    assert acl.aclrtMalloc(ctypes.byref(out), 0, HUGE_ONLY) == 107000
    assert acl.aclrtMalloc(None, 64, HUGE_ONLY) == 107000
    assert acl.aclrtFree(None) == 107000


def test_rule_06_only_huge_pages_are_aligned(host: dict[str, str]) -> None:
    run_client(alignment, host=host).refused(6, 107000)


def exhaust() -> None:
    acl, out = Acl(0), ctypes.c_void_p()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    first = acl.malloc(40 * MIB)
    assert acl.aclrtGetMemInfo(1, ctypes.byref(free), ctypes.byref(total)) == 0
    assert (free.value, total.value) == (24 * MIB, 64 * MIB)
    assert acl.aclrtMalloc(ctypes.byref(out), 40 * MIB, HUGE_ONLY) == 207001
    assert acl.aclrtFree(first) == 0
    second = acl.malloc(40 * MIB)
    assert second != first  # a freed address comes back late, so that a stale one shows
    for _ in range(300):  # and the address space does not run out
        assert acl.aclrtFree(second) == 0
        second = acl.malloc(60 * MIB)


def test_rule_06_device_memory_runs_out(host: dict[str, str]) -> None:
    run_client(exhaust, host=host, env={"CANN_SIM_HBM_MIB": "64"}).refused(6, 207001)


def free_twice() -> None:
    acl = Acl(0)
    address = acl.malloc(4096)
    assert acl.aclrtFree(address) == 0
    acl.aclrtFree(address)


def test_rule_06_a_second_free_stops_the_client(host: dict[str, str]) -> None:
    run_client(free_twice, host=host).violated(6)


def free_in_flight() -> None:
    acl = Acl(0)
    stream, pinned, memory = acl.stream(), acl.malloc_host(4096), acl.malloc(4096)
    assert acl.aclrtMemcpyAsync(memory, 4096, pinned, 4096, HOST_TO_DEVICE, stream) == 0
    assert acl.aclrtFree(memory) == 0  # returns at once, with the copy still to come
    Core().cann_sim_release()
    acl.aclrtSynchronizeStream(stream)


def test_rule_06_memory_freed_under_a_copy_is_found(host: dict[str, str]) -> None:
    run_client(free_in_flight, host=host, env={"CANN_SIM_FAULTS": "op.memcpy=hang"}).violated(6)


def past_the_end() -> None:
    acl = Acl(0)
    memory, pinned = acl.malloc(4096), acl.malloc_host(8192)
    acl.aclrtMemcpy(memory, 8192, pinned, 4097, HOST_TO_DEVICE)


def test_rule_06_a_copy_past_an_allocation_stops_the_client(host: dict[str, str]) -> None:
    run_client(past_the_end, host=host).violated(6)


def directions(flavour: str) -> None:
    acl, core = Acl(0), Core()
    device, other = acl.malloc(4096), acl.malloc(4096, NORMAL_ONLY)
    pinned = acl.malloc_host(4096)
    plain = ctypes.create_string_buffer(b"kv" * 2048, 4096)
    host = ctypes.addressof(plain)
    assert acl.aclrtMemcpy(device, 4096, host, 4096, HOST_TO_DEVICE) == 0
    assert core.peek(device, 4) == b"kvkv"
    assert acl.aclrtMemcpy(other, 4096, device, 4096, DEVICE_TO_DEVICE) == 0
    assert acl.aclrtMemcpy(pinned, 4096, other, 4096, DEVICE_TO_HOST) == 0
    assert ctypes.string_at(pinned, 4) == b"kvkv"
    assert acl.aclrtMemcpy(pinned, 4096, host, 4096, HOST_TO_HOST) == 0
    assert acl.aclrtMemcpy(device, 4096, host, 4096, DEFAULT) == (107000 if flavour == "8.3" else 0)
    for to, source, kind in (
        (device, host, DEVICE_TO_HOST),
        (device, host, DEVICE_TO_DEVICE),
        (host, device, HOST_TO_DEVICE),
        (host, device, HOST_TO_HOST),
        (pinned, host, HOST_TO_DEVICE),
        (device, other, HOST_TO_DEVICE),
    ):
        assert acl.aclrtMemcpy(to, 4096, source, 4096, kind) == 107000
    assert acl.aclrtMemcpy(device, 4095, host, 4096, HOST_TO_DEVICE) == 107000  # destMax too small
    assert acl.aclrtMemset(device, 4096, 0x5A, 16) == 0
    assert core.peek(device, 17) == b"\x5a" * 16 + b"k"


@pytest.mark.parametrize("flavour", ["8.3", "9.0"])
def test_rule_07_the_direction_must_be_the_real_one(make_host: Hosts, flavour: str) -> None:
    run_client(directions, flavour, host=make_host(flavour)).refused(7, 107000)


def asynchronous() -> None:
    acl, core = Acl(0), Core()
    stream, device = acl.stream(), acl.malloc(4096)
    pinned, plain = acl.malloc_host(4096), ctypes.create_string_buffer(b"A" * 4096, 4096)
    ctypes.memset(pinned, ord("B"), 4096)
    assert acl.aclrtMemcpyAsync(pinned, 4096, ctypes.addressof(plain), 4096, HOST_TO_HOST, stream) == 207000
    # From pageable memory the call is synchronous.
    assert acl.aclrtMemcpyAsync(device, 4096, ctypes.addressof(plain), 4096, HOST_TO_DEVICE, stream) == 0
    assert core.peek(device, 2) == b"AA"
    # From pinned memory it returns at once; a buffer reused too early is what arrives.
    assert acl.aclrtMemcpyAsync(device, 4096, pinned, 4096, HOST_TO_DEVICE, stream) == 0
    assert core.peek(device, 2) == b"AA"
    ctypes.memset(pinned, ord("C"), 4096)
    core.cann_sim_release()
    assert acl.aclrtSynchronizeStream(stream) == 0
    assert core.peek(device, 2) == b"CC"


def test_rule_07_asynchronous_copies(host: dict[str, str]) -> None:
    run_client(asynchronous, host=host, env={"CANN_SIM_FAULTS": "op.memcpy@2=hang"}).refused(7, 207000)


def probe() -> None:
    acl, core = Acl(0), Core()
    plain = mmap.mmap(-1, 1 << 16)
    base = ctypes.addressof(ctypes.c_char.from_buffer(plain))
    seen = PointerAttributes()

    def kind(address: int) -> int:
        assert acl.aclrtPointerGetAttributes(address, ctypes.addressof(seen)) == 0
        return seen.type

    assert kind(acl.malloc(4096) + 100) == DEVICE
    assert kind(acl.malloc_host(4096) + 100) == HOST
    assert kind(base) == UNREGISTERED
    mapped = ctypes.c_void_p()
    assert acl.aclrtHostRegister(base, 1 << 16, 0, ctypes.byref(mapped)) == 0
    assert kind(base) == HOST
    assert acl.aclrtHostUnregister(base) == 0
    core.cann_sim_refuse_pointer(base, 4096)
    assert acl.aclrtPointerGetAttributes(base + 8, ctypes.addressof(seen)) == 507899
    assert kind(base + 4096) == UNREGISTERED


def test_rule_08_what_the_pointer_probe_says(host: dict[str, str]) -> None:
    run_client(probe, host=host).refused(8, 507899)


def runtime_probe() -> None:
    acl, runtime = Acl(0), Library("libruntime.so", RUNTIME)
    seen = RuntimePointerAttributes()
    plain = ctypes.create_string_buffer(64)
    for address, expected in ((acl.malloc(64), 2), (acl.malloc_host(64), 1), (ctypes.addressof(plain), 5)):
        assert runtime.rtPointerGetAttributes(ctypes.addressof(seen), address) == 0
        assert seen.memory_type == expected
    assert not acl.has("aclrtPointerGetAttributes")
    assert runtime.rtPointerGetAttributes(None, 1) == 107000


def test_rule_08_the_runtime_probe_of_old_toolkits(make_host: Hosts) -> None:
    run_client(runtime_probe, host=make_host("8.3")).refused(8, 107000)


def probe_wrong(what: str) -> None:
    acl = Acl(0)
    seen = PointerAttributes()
    if what == "freed":
        address = acl.malloc(4096)
        acl.aclrtFree(address)
    else:
        mapped = ctypes.c_void_p()
        assert acl.aclrtHostRegister(acl.malloc_host(4096), 4096, 0, ctypes.byref(mapped)) == 0
        address = mapped.value or 0
    acl.aclrtPointerGetAttributes(address, ctypes.addressof(seen))


@pytest.mark.parametrize("what", ["freed", "mapped"])
def test_rule_08_probes_that_stop_the_client(host: dict[str, str], what: str) -> None:
    run_client(probe_wrong, what, host=host).violated(8)


def register(flavour: str) -> None:
    new = flavour != "8.3"
    acl, mapped = Acl(0), ctypes.c_void_p()
    out = ctypes.byref(mapped)
    memory = mmap.mmap(-1, 1 << 20)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert acl.aclrtHostRegister(base + 64, 4096, 0, out) == 107000  # 4 KiB alignment
    assert acl.aclrtHostRegister(base, 0, 0, out) == 107000
    assert acl.aclrtHostRegister(base, 4096, 3, out) == 107000  # no such type
    assert acl.aclrtHostRegister(base, 1 << 16, 0, out) == 0
    assert mapped.value not in (None, base)
    already, absent = (507910, 507911) if new else (507899, 507899)
    assert acl.aclrtHostRegister(base, 1 << 16, 0, out) == already
    assert acl.aclrtHostRegister(base + 4096, 4096, 0, out) == already
    assert acl.aclrtHostUnregister(base + 4096) == absent
    assert acl.aclrtHostUnregister(base) == 0
    assert acl.aclrtHostUnregister(base) == absent
    assert acl.aclrtHostRegister(acl.malloc(4096), 4096, 0, out) == 107000  # device memory
    assert acl.aclrtHostRegister(0x10000, 4096, 0, out) == 507899  # nothing there
    if new:
        pinned = acl.malloc_host(4096)
        assert acl.aclrtHostRegisterV2(pinned, 4096, 0x10000000) == 107000  # PINNED, and it is
        assert acl.aclrtHostRegisterV2(pinned, 4096, 0x2) == 0
        assert acl.aclrtHostGetDevicePointer(pinned, out, 0) == 0


@pytest.mark.parametrize(("flavour", "code"), [("8.3", 507899), ("8.5.0", 507910), ("9.1", 507911)])
def test_rule_09_host_registration(make_host: Hosts, flavour: str, code: int) -> None:
    run_client(register, flavour, host=make_host(flavour)).refused(9, code)


def register_large() -> None:
    acl, mapped = Acl(0), ctypes.c_void_p()
    assert acl.aclrtHostRegister(acl.malloc_host(2 * MIB), 2 * MIB, 0, ctypes.byref(mapped)) == 207001
    assert acl.aclrtHostRegister(acl.malloc_host(MIB), MIB, 0, ctypes.byref(mapped)) == 0


def test_rule_09_a_host_can_pin_so_much(host: dict[str, str]) -> None:
    run_client(register_large, host=host, env={"CANN_SIM_HOST_PIN_MIB": "1"}).refused(9, 207001)


def register_old_kernel() -> None:
    acl, mapped = Acl(0), ctypes.c_void_p()
    memory = mmap.mmap(-1, 4096)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert acl.aclrtHostRegister(base, 4096, 0, ctypes.byref(mapped)) == 507899
    assert acl.aclrtHostRegister(acl.malloc_host(4096), 4096, 0, ctypes.byref(mapped)) == 0


def test_rule_09_an_old_kernel_takes_pinned_memory_only(host: dict[str, str]) -> None:
    run_client(register_old_kernel, host=host, env={"CANN_SIM_OLD_KERNEL": "1"}).refused(9, 507899)


def copy_mapped() -> None:
    acl, mapped = Acl(0), ctypes.c_void_p()
    pinned = acl.malloc_host(4096)
    assert acl.aclrtHostRegister(pinned, 4096, 0, ctypes.byref(mapped)) == 0
    acl.aclrtMemcpy(mapped, 4096, pinned, 4096, HOST_TO_DEVICE)


def test_rule_09_the_mapped_address_is_not_for_copies(host: dict[str, str]) -> None:
    run_client(copy_mapped, host=host).violated(9)


def many_threads() -> None:
    acl = Acl(0)
    core = Core()
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            assert acl.aclrtSetDevice(number % 2) == 0
            stream, pinned = acl.stream(), acl.malloc_host(4096)
            for _ in range(50):
                memory = acl.malloc(4096, NORMAL_ONLY)
                assert acl.aclrtMemcpyAsync(memory, 4096, pinned, 4096, HOST_TO_DEVICE, stream) == 0
                assert acl.aclrtSynchronizeStream(stream) == 0
                assert acl.aclrtFree(memory) == 0
            assert acl.aclrtDestroyStream(stream) == 0
            assert acl.aclrtFreeHost(pinned) == 0
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    for name in ("stream", "device_memory", "host_memory", "host_registration"):
        assert core.live(name) == 0, name


def test_objects_are_counted_and_go(host: dict[str, str]) -> None:
    run_client(many_threads, host=host).succeeded()
