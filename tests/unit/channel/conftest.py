import threading
import time
from pathlib import Path

import numpy as np
import pytest

import kvlink

SECRET = b"a secret of the unit tests"


def eventually(condition, timeout=5.0):
    """Waits until ``condition()`` is true and returns its value."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.002)
    return value


def count_descriptors():
    """How many descriptors this process has open."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.fixture
def open_channel():
    """Opens channels of the host provider and closes them at the end."""
    opened = []

    def open_one(**arguments):
        arguments.setdefault("secret", SECRET)
        channel = kvlink.open("host", **arguments)
        opened.append(channel)
        return channel

    yield open_one
    for channel in reversed(opened):
        channel.close()


class Pair:
    """Two channels in this process, connected: ``a`` has region "a", ``b`` has region "b", 1 MiB each."""

    def __init__(self, open_channel, **arguments):
        self.a, self.b = open_channel(**arguments), open_channel(**arguments)
        self.memory_a = np.arange(1 << 20, dtype=np.uint32).view(np.uint8)[: 1 << 20]
        self.memory_b = np.zeros(1 << 20, dtype=np.uint8)
        self.region_a = self.a.register(self.memory_a, name="a")
        self.region_b = self.b.register(self.memory_b, name="b")
        self.peer_b = self.a.connect(self.b.address, timeout=10)  # b as seen by a
        self.peer_a = eventually(lambda: self.b.peers().get(self.a.id))

    def ranges(self, blocks=((0, 0, 4096),)):
        return kvlink.ranges(self.region_a, self.peer_b.regions["b"], np.array(blocks))


@pytest.fixture
def pair(open_channel):
    return Pair(open_channel)


@pytest.fixture
def tcp_pair(open_channel):
    return Pair(open_channel, options={"path": "tcp"})


class Recorder:
    """A handler that keeps what it was called with."""

    def __init__(self):
        self.calls = []
        self._changed = threading.Condition()

    def __call__(self, *arguments):
        with self._changed:
            self.calls.append(arguments)
            self._changed.notify_all()

    @property
    def messages(self):
        return [call[-1] for call in self.calls]

    def wait(self, count, timeout=10.0):
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.calls) >= count, timeout), self.calls
        return self.calls


@pytest.fixture
def recorder():
    return Recorder()
