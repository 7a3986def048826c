"""A stream of the device for the conformance kit, made through ACL as a framework does."""

from __future__ import annotations

import ctypes
import functools


@functools.cache
def make() -> int:
    """Returns the handle of a stream of npu:0, one a process; the device's context becomes current in this thread."""
    acl = ctypes.CDLL("libascendcl.so")
    for call in (lambda: acl.aclInit(None), lambda: acl.aclrtSetDevice(ctypes.c_int32(0))):
        code = call()
        assert code in (0, 100002), f"ACL answers {code}"
    stream, event = ctypes.c_void_p(), ctypes.c_void_p()
    assert acl.aclrtCreateStream(ctypes.byref(stream)) == 0
    # Used once, so that what a stream makes with its first work is there.
    assert acl.aclrtCreateEventExWithFlag(ctypes.byref(event), ctypes.c_uint32(1)) == 0
    assert acl.aclrtRecordEvent(event, stream) == 0
    assert acl.aclrtSynchronizeStream(stream) == 0
    assert acl.aclrtDestroyEvent(event) == 0
    assert stream.value is not None
    return stream.value
