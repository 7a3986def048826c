"""HCCL's one-sided service and enough ACL to use it, called with ctypes as a C client would.

Runs in the agent processes of the rule tests; methods take and return plain values.
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
import threading
import time
from ctypes import POINTER, byref, c_char, c_char_p, c_int, c_int32, c_size_t, c_uint32, c_uint64, c_void_p
from typing import Any

DEVICE, HOST = 0, 1
HUGE_FIRST, HUGE_ONLY = 0, 1
MIB = 1 << 20


class HcclMem(ctypes.Structure):
    """A registered range."""

    _fields_ = [("type", c_int), ("addr", c_void_p), ("size", c_uint64)]


class OpDesc(ctypes.Structure):
    """One descriptor of a batch."""

    _fields_ = [("local", c_void_p), ("remote", c_void_p), ("count", c_uint64), ("data_type", c_int)]


class MemDesc(ctypes.Structure):
    """The opaque description of the per-communicator flavour."""

    _fields_ = [("desc", c_char * 512)]


class MemDescs(ctypes.Structure):
    """A list of descriptions."""

    _fields_ = [("array", POINTER(MemDesc)), ("length", c_uint32)]


def config(name: str, *, version: int = 5, size: int = 300, magic: int = 0xF0F0F0F0, buffer_mb: int = 200) -> bytes:
    """Builds an HcclCommConfig of 300 bytes, the prefix every release accepts."""
    head = struct.pack("<QIIQ", size, magic, version, 0)
    body = struct.pack("<II128s128sIII", buffer_mb, 0xFFFFFFFF, name.encode(), b"", 0, 0xFFFFFFFF, 0xFFFFFFFF)
    return head + body


def rank_table(ranks: list[dict[str, str]], *, pods: dict[str, list[str]] | None = None, **fields: Any) -> str:
    """Builds a rank table.

    Args:
        ranks: One dict a rank, in order, with `server_id` and the device's fields; `rank_id` is filled in.
        pods: Super-pod id -> server ids, which makes it version 1.2.
        **fields: Top-level fields to replace; None removes one.

    Returns:
        The JSON text.
    """
    servers: dict[str, list[dict[str, Any]]] = {}
    for index, rank in enumerate(ranks):
        device = {"rank_id": str(index), **{key: value for key, value in rank.items() if key != "server_id"}}
        servers.setdefault(rank["server_id"], []).append(device)
    table: dict[str, Any] = {
        "status": "completed",
        "version": "1.2" if pods else "1.0",
        "server_count": str(len(servers)),
        "server_list": [{"server_id": key, "device": devices} for key, devices in servers.items()],
    }
    if pods:
        table["super_pod_list"] = [
            {"super_pod_id": pod, "server_list": [{"server_id": one} for one in ids]} for pod, ids in pods.items()
        ]
    table.update(fields)
    return json.dumps({key: value for key, value in table.items() if value is not None})


class Client:
    """One process's view of the simulated libraries; methods return the vendor's codes, never raise for them."""

    def __init__(self) -> None:
        self.sim = ctypes.CDLL("libcann_sim.so")
        self.acl = ctypes.CDLL("libascendcl.so")
        try:
            self.hccl = ctypes.CDLL("libhcomm.so")
        except OSError:
            self.hccl = ctypes.CDLL("libhccl.so")  # up to 8.4
        self.acl.aclGetRecentErrMsg.restype = c_char_p
        self.sim.cann_sim_live.restype = ctypes.c_int64
        self.sim.cann_sim_violations.restype = ctypes.c_int64
        self._buffers: dict[int, Any] = {}

    # ---- ACL ---------------------------------------------------------------------------------------------------------
    def start(self, device: int | None = 0) -> int:
        """aclInit, and aclrtSetDevice unless device is None."""
        self.acl.aclInit(None)
        return 0 if device is None else self.acl.aclrtSetDevice(c_int32(device))

    def reset_device(self, device: int) -> int:
        return self.acl.aclrtResetDevice(c_int32(device))

    def set_device(self, device: int) -> int:
        return self.acl.aclrtSetDevice(c_int32(device))

    def malloc(self, size: int, policy: int = HUGE_ONLY) -> int:
        address = c_void_p()
        assert self.acl.aclrtMalloc(byref(address), c_size_t(size), c_int(policy)) == 0
        return address.value or 0

    def free(self, address: int) -> int:
        return self.acl.aclrtFree(c_void_p(address))

    def malloc_host(self, size: int) -> int:
        address = c_void_p()
        assert self.acl.aclrtMallocHost(byref(address), c_size_t(size)) == 0
        return address.value or 0

    def free_host(self, address: int) -> int:
        return self.acl.aclrtFreeHost(c_void_p(address))

    def plain_host(self, size: int) -> int:
        """Ordinary page-aligned memory of this process."""
        import mmap

        memory = mmap.mmap(-1, size)
        address = ctypes.addressof(c_char.from_buffer(memory))
        self._buffers[address] = memory
        return address

    def host_register(self, address: int, size: int) -> int:
        out = c_void_p()
        return self.acl.aclrtHostRegister(c_void_p(address), c_uint64(size), c_int(0), byref(out))

    def poke(self, address: int, data: bytes) -> int:
        """Writes device memory past every rule."""
        return self.sim.cann_sim_poke(c_void_p(address), data, c_size_t(len(data)))

    def peek(self, address: int, size: int) -> bytes:
        buffer = ctypes.create_string_buffer(size)
        assert self.sim.cann_sim_peek(buffer, c_void_p(address), c_size_t(size)) == 0
        return buffer.raw

    def write_host(self, address: int, data: bytes) -> None:
        ctypes.memmove(address, data, len(data))

    def read_host(self, address: int, size: int) -> bytes:
        return ctypes.string_at(address, size)

    def stream(self) -> int:
        out = c_void_p()
        assert self.acl.aclrtCreateStream(byref(out)) == 0
        return out.value or 0

    def destroy_stream(self, stream: int) -> int:
        return self.acl.aclrtDestroyStream(c_void_p(stream))

    def destroy_stream_force(self, stream: int) -> int:
        return self.acl.aclrtDestroyStreamForce(c_void_p(stream))

    def sync(self, stream: int, timeout_ms: int = 10000) -> int:
        return self.acl.aclrtSynchronizeStreamWithTimeout(c_void_p(stream), c_int32(timeout_ms))

    def create_context(self, device: int) -> int:
        out = c_void_p()
        assert self.acl.aclrtCreateContext(byref(out), c_int32(device)) == 0
        return out.value or 0

    def error_text(self) -> str:
        text = self.acl.aclGetRecentErrMsg()
        return text.decode() if text else ""

    # ---- HCCL --------------------------------------------------------------------------------------------------------
    def register(self, address: int, size: int, kind: int = DEVICE) -> tuple[int, int]:
        handle = c_void_p()
        code = self.hccl.HcclRegisterGlobalMem(byref(HcclMem(kind, address, size)), byref(handle))
        return code, handle.value or 0

    def register_null(self) -> int:
        return self.hccl.HcclRegisterGlobalMem(None, byref(c_void_p()))

    def deregister(self, handle: int) -> int:
        return self.hccl.HcclDeregisterGlobalMem(c_void_p(handle))

    def init(self, table: str | None, rank: int, name: str = "", raw: bytes | None = None) -> tuple[int, int]:
        comm = c_void_p()
        text = None if table is None else table.encode()
        blob = ctypes.create_string_buffer(config(name) if raw is None else raw)
        code = self.hccl.HcclCommInitClusterInfoMemConfig(text, c_uint32(rank), blob, byref(comm))
        return code, comm.value or 0

    def init_in_threads(self, table: str, rank: int, names: list[str]) -> list[int]:
        """Starts all initialisations at once."""
        codes = [-1] * len(names)
        barrier = threading.Barrier(len(names))

        def work(index: int) -> None:
            self.acl.aclrtSetDevice(c_int32(0))
            barrier.wait(10)
            codes[index] = self.init(table, rank, names[index])[0]

        threads = [threading.Thread(target=work, args=(index,)) for index in range(len(names))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        return codes

    def bind(self, comm: int, handle: int) -> int:
        return self.hccl.HcclCommBindMem(c_void_p(comm), c_void_p(handle))

    def unbind(self, comm: int, handle: int) -> int:
        return self.hccl.HcclCommUnbindMem(c_void_p(comm), c_void_p(handle))

    def prepare(self, comm: int, timeout: int = 5, null: bool = False) -> int:
        blob = None if null else ctypes.create_string_buffer(32)
        return self.hccl.HcclCommPrepare(c_void_p(comm), blob, c_int(timeout))

    def timed_prepare(self, comm: int, timeout: int) -> tuple[int, float]:
        start = time.monotonic()
        return self.prepare(comm, timeout), time.monotonic() - start

    def _batch(self, function: Any, comm: int, peer: int, ops: list[tuple[int, ...]] | None, stream: int) -> int:
        """ops: (local, remote, count[, data type])."""
        if ops is None:
            return function(c_void_p(comm), c_uint32(peer), None, c_uint32(1), c_void_p(stream))
        array = (OpDesc * max(1, len(ops)))()
        for index, op in enumerate(ops):
            array[index] = OpDesc(op[0], op[1], op[2], op[3] if len(op) > 3 else 7)
        return function(c_void_p(comm), c_uint32(peer), array, c_uint32(len(ops)), c_void_p(stream))

    def put(self, comm: int, peer: int, ops: list[tuple[int, ...]] | None, stream: int) -> int:
        return self._batch(self.hccl.HcclBatchPut, comm, peer, ops, stream)

    def get(self, comm: int, peer: int, ops: list[tuple[int, ...]] | None, stream: int) -> int:
        return self._batch(self.hccl.HcclBatchGet, comm, peer, ops, stream)

    def async_error(self, comm: int) -> tuple[int, int]:
        out = c_int(-1)
        return self.hccl.HcclGetCommAsyncError(c_void_p(comm), byref(out)), out.value

    def destroy(self, comm: int) -> int:
        return self.hccl.HcclCommDestroy(c_void_p(comm))

    # The per-communicator flavour; descriptions travel as bytes.
    def own_register(self, comm: int, peer: int, kind: int, address: int, size: int) -> tuple[int, bytes]:
        desc = MemDesc()
        code = self.hccl.HcclRegisterMem(
            c_void_p(comm), c_uint32(peer), c_int(kind), c_void_p(address), c_uint64(size), byref(desc)
        )
        return code, bytes(desc)

    def own_deregister(self, comm: int, desc: bytes) -> int:
        return self.hccl.HcclDeregisterMem(c_void_p(comm), byref(MemDesc.from_buffer_copy(desc)))

    def own_exchange(
        self, comm: int, peer: int, descs: list[bytes], timeout: int = 5, room: int = 8
    ) -> tuple[int, list[bytes]]:
        ours = (MemDesc * max(1, len(descs)))(*[MemDesc.from_buffer_copy(desc) for desc in descs])
        theirs = (MemDesc * room)()
        count = c_uint32(0)
        code = self.hccl.HcclExchangeMemDesc(
            c_void_p(comm),
            c_uint32(peer),
            byref(MemDescs(ours, len(descs))),
            c_int(timeout),
            byref(MemDescs(theirs, room)),
            byref(count),
        )
        return code, [bytes(desc) for desc in theirs[: count.value]]

    def own_enable(self, comm: int, desc: bytes) -> tuple[int, tuple[int, int, int]]:
        """Returns (type, address, size) of the remote memory."""
        mem = HcclMem()
        code = self.hccl.HcclEnableMemAccess(c_void_p(comm), byref(MemDesc.from_buffer_copy(desc)), byref(mem))
        return code, (mem.type, mem.addr or 0, mem.size)

    def own_disable(self, comm: int, desc: bytes) -> int:
        return self.hccl.HcclDisableMemAccess(c_void_p(comm), byref(MemDesc.from_buffer_copy(desc)))

    # ---- the simulator -----------------------------------------------------------------------------------------------
    def faults(self, spec: str) -> None:
        self.sim.cann_sim_set_faults(spec.encode())

    def release(self) -> None:
        self.sim.cann_sim_release()

    def live(self, name: str) -> int:
        return self.sim.cann_sim_live(name.encode())

    def violations(self) -> int:
        return self.sim.cann_sim_violations()

    def setenv(self, name: str, value: str) -> None:
        """As a C client's setenv: os.environ writes through to the process's environment."""
        os.environ[name] = value

    def pid(self) -> int:
        return os.getpid()
