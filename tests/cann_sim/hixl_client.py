"""hixl::Hixl for the rule tests: one engine a process, called through the C++ client library of the test build."""

from __future__ import annotations

import ctypes
import os
import time
from ctypes import byref, c_char_p, c_int, c_uint32, c_uint64, c_void_p
from typing import Any

from .hccl_client import Client

READ, WRITE = 0, 1
WAITING, COMPLETED, FAILED = 0, 1, 3
ABSENT = 0xFFFFFFFF


class HixlClient(Client):
    """A process with a HIXL engine; methods return the vendor's statuses."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("libmetadef.so", "libcann_hixl.so"):
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        self.hixl = ctypes.CDLL(os.environ["CANN_SIM_HIXL_CLIENT"])
        for name in ("initialize", "register", "deregister", "connect", "disconnect", "transfer", "transfer_async"):
            getattr(self.hixl, f"hixl_client_{name}").restype = c_uint32
        for name in ("status", "batch_status", "notify", "connect_async", "connect_status", "capability"):
            getattr(self.hixl, f"hixl_client_{name}").restype = c_uint32
        self.hixl.hixl_client_new.restype = c_void_p
        self._engines = [c_void_p(self.hixl.hixl_client_new())]

    def another_engine(self) -> int:
        """A second Hixl object of this process; pass its number as `which`."""
        self._engines.append(c_void_p(self.hixl.hixl_client_new()))
        return len(self._engines) - 1

    def hx_initialize(self, name: str, options: dict[str, str] | None = None, which: int = 0) -> int:
        flat = [text.encode() for pair in (options or {}).items() for text in pair]
        array = (c_char_p * max(1, len(flat)))(*flat)
        return self.hixl.hixl_client_initialize(self._engines[which], name.encode(), array, c_uint32(len(flat) // 2))

    def hx_finalize(self, which: int = 0) -> None:
        self.hixl.hixl_client_finalize(self._engines[which])

    def hx_delete(self, which: int = 0) -> None:
        self.hixl.hixl_client_delete(self._engines[which])

    def hx_register(self, address: int, size: int, kind: int = 0, which: int = 0) -> tuple[int, int]:
        out = c_void_p()
        code = self.hixl.hixl_client_register(
            self._engines[which], c_uint64(address), c_uint64(size), c_int(kind), byref(out)
        )
        return code, out.value or 0

    def hx_deregister(self, handle: int, which: int = 0) -> int:
        return self.hixl.hixl_client_deregister(self._engines[which], c_void_p(handle))

    def hx_connect(self, peer: str, timeout_ms: int = 5000) -> int:
        return self.hixl.hixl_client_connect(self._engines[0], peer.encode(), c_int(timeout_ms))

    def hx_timed_connect(self, peer: str, timeout_ms: int) -> tuple[int, float]:
        start = time.monotonic()
        return self.hx_connect(peer, timeout_ms), time.monotonic() - start

    def hx_disconnect(self, peer: str, timeout_ms: int = 5000) -> int:
        return self.hixl.hixl_client_disconnect(self._engines[0], peer.encode(), c_int(timeout_ms))

    @staticmethod
    def _triples(ops: list[tuple[int, int, int]]) -> Any:
        flat = [value for op in ops for value in op]
        return (c_uint64 * max(1, len(flat)))(*flat)

    def hx_transfer(self, peer: str, operation: int, ops: list[tuple[int, int, int]], timeout_ms: int = 5000) -> int:
        """ops: (local, remote, bytes)."""
        return self.hixl.hixl_client_transfer(
            self._engines[0],
            peer.encode(),
            c_int(operation),
            self._triples(ops),
            c_uint32(len(ops)),
            c_int(timeout_ms),
        )

    def hx_start(self, peer: str, operation: int, ops: list[tuple[int, int, int]]) -> tuple[int, int]:
        request = c_void_p()
        code = self.hixl.hixl_client_transfer_async(
            self._engines[0], peer.encode(), c_int(operation), self._triples(ops), c_uint32(len(ops)), byref(request)
        )
        return code, request.value or 0

    def hx_status(self, request: int) -> tuple[int, int]:
        status = c_int(-1)
        return self.hixl.hixl_client_status(self._engines[0], c_void_p(request), byref(status)), status.value

    def hx_wait(self, request: int, timeout: float = 10.0) -> tuple[int, int]:
        """Polls until the request is no longer WAITING."""
        end = time.monotonic() + timeout
        while True:
            code, status = self.hx_status(request)
            if code != 0 or status != WAITING or time.monotonic() > end:
                return code, status
            time.sleep(0.001)

    def hx_batch_status(self) -> int:
        return self.hixl.hixl_client_batch_status(self._engines[0])

    def hx_notify(self, peer: str, name: str, message: str, timeout_ms: int = 5000) -> int:
        return self.hixl.hixl_client_notify(
            self._engines[0], peer.encode(), name.encode(), message.encode(), c_int(timeout_ms)
        )

    def hx_notifies(self) -> list[str]:
        text = ctypes.create_string_buffer(1 << 16)
        count = self.hixl.hixl_client_notifies(self._engines[0], text, ctypes.c_size_t(len(text)))
        lines = text.value.decode().splitlines()
        assert count == len(lines)
        return lines

    def hx_connect_async(self, peer: str, timeout_ms: int = 5000) -> int:
        return self.hixl.hixl_client_connect_async(self._engines[0], peer.encode(), c_int(timeout_ms))

    def hx_connect_status(self, peer: str) -> tuple[int, int]:
        status = c_int(-1)
        return self.hixl.hixl_client_connect_status(self._engines[0], peer.encode(), byref(status)), status.value

    def hx_capability(self, feature: int) -> tuple[int, int]:
        value = c_int(-1)
        return self.hixl.hixl_client_capability(c_int(feature), byref(value)), value.value
