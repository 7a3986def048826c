"""A device stream for the conformance kit, made through ACL as a framework would: ``--stream`` names :func:`make`."""

from __future__ import annotations

import ctypes
import functools
import os

from ..errors import ChannelUnavailableError

DEVICE_VARIABLE = "KVLINK_HARDWARE_DEVICE"
_REPEAT_INITIALIZE = 100002


@functools.cache
def make() -> int:
    """Returns the handle of a stream, one a process, of the device that ``KVLINK_HARDWARE_DEVICE`` counts (0).

    The device's context becomes current in the calling thread.

    Raises:
        ChannelUnavailableError: An ACL call failed; names it and its code.
    """
    acl = ctypes.CDLL("libascendcl.so")
    stream = ctypes.c_void_p()
    device = ctypes.c_int32(int(os.environ.get(DEVICE_VARIABLE, "0")))
    calls = (
        ("aclInit", (None,)),
        ("aclrtSetDevice", (device,)),
        ("aclrtCreateStream", (ctypes.byref(stream),)),
    )
    for name, arguments in calls:
        code = getattr(acl, name)(*arguments)
        if code not in (0, _REPEAT_INITIALIZE):
            raise ChannelUnavailableError(f"{name} answers {code}", operation="test", site=name, vendor_code=code)
    return int(stream.value or 0)
