"""The device stream that orders a pull behind the kernels that were launched before it."""

from __future__ import annotations

import importlib


def current_stream(device: str) -> int | None:
    """Returns the handle of the stream to which this thread's next kernels on ``device`` go.

    Ask anew for every pull: an engine may change its current stream between steps, and on NPUs it is torch_npu's getter
    of the handle that makes sure that everything launched so far has reached the stream and is not still in a queue of
    the host's.

    Args:
        device: "cpu", "npu:0".

    Returns:
        The handle, or None where no stream orders anything (host memory).
    """
    kind, _, index = device.partition(":")
    if kind != "npu":
        return None
    npu = importlib.import_module("torch_npu").npu
    return int(npu.current_stream(int(index or 0)).npu_stream)
