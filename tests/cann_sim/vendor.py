"""The simulated libraries through ctypes, for the small clients of the tests; runs in their own processes."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Any

HUGE_FIRST, HUGE_ONLY, NORMAL_ONLY = 0, 1, 2
HOST_TO_HOST, HOST_TO_DEVICE, DEVICE_TO_HOST, DEVICE_TO_DEVICE, DEFAULT = 0, 1, 2, 3, 4
MIB = 1 << 20

_LETTERS = {
    "p": ctypes.c_void_p,  # an address or a handle
    "z": ctypes.c_size_t,
    "q": ctypes.c_uint64,
    "i": ctypes.c_int32,
    "u": ctypes.c_uint32,
    "s": ctypes.c_char_p,
    "P": ctypes.POINTER(ctypes.c_void_p),
    "I": ctypes.POINTER(ctypes.c_int32),
    "U": ctypes.POINTER(ctypes.c_uint32),
    "L": ctypes.POINTER(ctypes.c_int64),
    "Q": ctypes.POINTER(ctypes.c_uint64),
    "Z": ctypes.POINTER(ctypes.c_size_t),
    "*": ctypes.c_void_p,  # a struct by address
}

ACL = {
    "aclInit": "s",
    "aclFinalize": "",
    "aclFinalizeReference": "Q",
    "aclrtGetLastError": "i",
    "aclrtPeekAtLastError": "i",
    "aclsysGetCANNVersion": "i*",
    "aclsysGetVersionStr": "s*",
    "aclsysGetVersionNum": "sI",
    "aclrtSetDevice": "i",
    "aclrtGetDevice": "I",
    "aclrtResetDevice": "i",
    "aclrtResetDeviceForce": "i",
    "aclrtGetDeviceCount": "U",
    "aclrtCreateContext": "Pi",
    "aclrtDestroyContext": "p",
    "aclrtSetCurrentContext": "p",
    "aclrtGetCurrentContext": "P",
    "aclrtGetPhyDevIdByLogicDevId": "iI",
    "aclrtGetPhyDevIdByUserDevId": "iI",
    "aclrtGetDeviceInfo": "uiL",
    "aclrtMalloc": "Pzi",
    "aclrtFree": "p",
    "aclrtMallocHost": "Pz",
    "aclrtFreeHost": "p",
    "aclrtMemcpy": "pzpzi",
    "aclrtMemcpyAsync": "pzpzip",
    "aclrtMemset": "pziz",
    "aclrtPointerGetAttributes": "p*",
    "aclrtHostRegister": "pqiP",
    "aclrtHostUnregister": "p",
    "aclrtHostRegisterV2": "pqu",
    "aclrtHostGetDevicePointer": "pPu",
    "aclrtGetMemInfo": "iZZ",
    "aclrtCreateStream": "P",
    "aclrtCreateStreamWithConfig": "Puu",
    "aclrtDestroyStream": "p",
    "aclrtDestroyStreamForce": "p",
    "aclrtSynchronizeStream": "p",
    "aclrtSynchronizeStreamWithTimeout": "pi",
    "aclrtStreamQuery": "pI",
    "aclrtStreamAbort": "p",
    "aclrtSetStreamFailureMode": "pq",
    "aclrtCreateEvent": "P",
    "aclrtCreateEventWithFlag": "Pu",
    "aclrtCreateEventExWithFlag": "Pu",
    "aclrtDestroyEvent": "p",
    "aclrtRecordEvent": "pp",
    "aclrtStreamWaitEvent": "pp",
    "aclrtSynchronizeEvent": "p",
    "aclrtQueryEventStatus": "pI",
    "aclrtQueryEvent": "pI",
}
RUNTIME = {"rtPointerGetAttributes": "*p", "rtGetDevicePhyIdByIndex": "uU"}
CORE = {
    "cann_sim_set_faults": "s",
    "cann_sim_release": "",
    "cann_sim_live": "s",
    "cann_sim_violations": "",
    "cann_sim_poke": "ppz",
    "cann_sim_peek": "ppz",
    "cann_sim_refuse_pointer": "pz",
}


class PointerAttributes(ctypes.Structure):
    """aclrtPtrAttributes."""

    _fields_ = (
        ("device", ctypes.c_uint32),
        ("type", ctypes.c_uint32),
        ("page_size", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32 * 4),
    )


class RuntimePointerAttributes(ctypes.Structure):
    """rtPointerAttributes_t."""

    _fields_ = (
        ("memory_type", ctypes.c_int32),
        ("location_type", ctypes.c_int32),
        ("device", ctypes.c_uint32),
        ("page_size", ctypes.c_uint32),
    )


class Library:
    """A vendor library with declared prototypes: a name not in the table is a mistake, never a guessed call."""

    def __init__(self, name: str, prototypes: dict[str, str]) -> None:
        self.path = name
        self._library = ctypes.CDLL(name)
        self._prototypes = prototypes

    def has(self, name: str) -> bool:
        return hasattr(self._library, name)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        letters = self._prototypes[name]
        function = getattr(self._library, name)
        function.argtypes = [_LETTERS[letter] for letter in letters]
        function.restype = ctypes.c_int32
        setattr(self, name, function)
        return function


class Core(Library):
    """libcann_sim.so: what tests may ask the simulator itself."""

    def __init__(self) -> None:
        super().__init__("libcann_sim.so", CORE)
        self._library.cann_sim_begun.restype = ctypes.c_int64
        self._library.cann_sim_live.restype = ctypes.c_int64
        self._library.cann_sim_live.argtypes = [ctypes.c_char_p]

    def live(self, name: str) -> int:
        return int(self._library.cann_sim_live(name.encode()))

    def await_begun(self, count: int, timeout: float = 10.0) -> None:
        """Waits until streams have begun so many operations since the process started."""
        deadline = time.monotonic() + timeout
        while self._library.cann_sim_begun() < count:
            assert time.monotonic() < deadline, f"only {self._library.cann_sim_begun()} operations began"
            time.sleep(0.001)

    def peek(self, address: int, count: int) -> bytes:
        buffer = ctypes.create_string_buffer(count)
        assert self.cann_sim_peek(ctypes.addressof(buffer), address, count) == 0
        return buffer.raw

    def poke(self, address: int, data: bytes) -> None:
        buffer = ctypes.create_string_buffer(data, len(data))
        assert self.cann_sim_poke(address, ctypes.addressof(buffer), len(data)) == 0

    def faults(self, spec: str) -> None:
        self.cann_sim_set_faults(spec.encode())


class Acl(Library):
    """libascendcl.so, with short forms that insist on success."""

    def __init__(self, device: int | None = 0, *, init: bool = True) -> None:
        super().__init__("libascendcl.so", ACL)
        if init:
            assert self.aclInit(None) == 0
        if device is not None:
            assert self.aclrtSetDevice(device) == 0

    def error(self) -> str | None:
        self._library.aclGetRecentErrMsg.restype = ctypes.c_char_p
        text = self._library.aclGetRecentErrMsg()
        return None if text is None else text.decode()

    def soc(self) -> str | None:
        self._library.aclrtGetSocName.restype = ctypes.c_char_p
        name = self._library.aclrtGetSocName()
        return None if name is None else name.decode()

    def _pointer(self, function: str, *arguments: object) -> int:
        out = ctypes.c_void_p()
        code = getattr(self, function)(ctypes.byref(out), *arguments)
        assert code == 0, f"{function}: {code} {self.error()}"
        assert out.value is not None
        return out.value

    def malloc(self, count: int, policy: int = HUGE_ONLY) -> int:
        return self._pointer("aclrtMalloc", count, policy)

    def malloc_host(self, count: int) -> int:
        return self._pointer("aclrtMallocHost", count)

    def stream(self) -> int:
        return self._pointer("aclrtCreateStream")

    def event(self) -> int:
        return self._pointer("aclrtCreateEventExWithFlag", 1)

    def context(self, device: int) -> int:
        return self._pointer("aclrtCreateContext", device)

    def current_context(self) -> int:
        return self._pointer("aclrtGetCurrentContext")

    def event_complete(self, event: int) -> tuple[int, bool]:
        status = ctypes.c_int32(-1)
        return self.aclrtQueryEventStatus(event, ctypes.byref(status)), status.value == 1

    def stream_complete(self, stream: int) -> tuple[int, bool]:
        status = ctypes.c_int32(-1)
        return self.aclrtStreamQuery(stream, ctypes.byref(status)), status.value == 0
