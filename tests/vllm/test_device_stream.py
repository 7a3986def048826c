"""Which stream a pull waits for. torch_npu does not run here: a module of its name stands in for its three calls."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from kvlink_vllm.device_stream import current_stream


@pytest.fixture
def streams(monkeypatch):
    """The stream of each device, to be changed by the test; counts how often a handle was read."""
    state = SimpleNamespace(current={0: 0x1000, 1: 0x2000}, reads=0)

    class Stream:
        def __init__(self, handle):
            self._handle = handle

        @property
        def npu_stream(self):
            state.reads += 1  # this is where torch_npu drains its queue
            return self._handle

    module = ModuleType("torch_npu")
    module.npu = SimpleNamespace(current_stream=lambda device: Stream(state.current[device]))
    monkeypatch.setitem(sys.modules, "torch_npu", module)
    return state


def test_host_memory_has_none(streams):
    assert current_stream("cpu") is None
    assert streams.reads == 0


def test_the_devices_own_stream(streams):
    assert current_stream("npu:0") == 0x1000
    assert current_stream("npu:1") == 0x2000
    assert current_stream("npu") == 0x1000


def test_read_anew_each_time(streams):
    assert current_stream("npu:0") == 0x1000
    streams.current[0] = 0x3000
    assert current_stream("npu:0") == 0x3000
    assert streams.reads == 2


def test_a_pull_carries_the_stream_of_the_step_that_ordered_it(streams, monkeypatch):
    """The worker asks once a step that orders pulls, on the thread that launched the kernels, and hands it down."""
    from kvlink_vllm.metadata import KVLinkMetadata
    from kvlink_vllm.worker import KVLinkWorker

    worker = KVLinkWorker.__new__(KVLinkWorker)
    ordered = []
    worker._device, worker._started = "npu:0", None
    worker._pulls = SimpleNamespace(start=lambda read, stream: ordered.append((read, stream)))
    first, second, empty = (KVLinkMetadata() for _ in range(3))
    first.reads, second.reads = ["a", "b"], ["c"]
    worker.start_reads(first)
    worker.start_reads(first)  # again for the same step: nothing more
    streams.current[0] = 0x3000
    worker.start_reads(empty)
    worker.start_reads(second)
    assert ordered == [("a", 0x1000), ("b", 0x1000), ("c", 0x3000)]
    assert streams.reads == 2
