import array
import mmap

import numpy as np
import pytest

from kvlink._memory import DEVICE, HOST, MemoryView, access_name, describe, host_buffer, parse_access, parse_device
from kvlink.errors import ConfigError


class FakeTensor:
    """What kvlink touches of a device tensor."""

    def __init__(self, pointer, shape, device, *, contiguous=True):
        self.shape, self.device = shape, device
        self._pointer, self._contiguous = pointer, contiguous

    def data_ptr(self):
        return self._pointer

    def numel(self):
        return int(np.prod(self.shape))

    def element_size(self):
        return 2

    def is_contiguous(self):
        return self._contiguous

    def stride(self):
        return (1,) * len(self.shape)


def test_array():
    memory = np.zeros((4, 5), np.float32)
    view = describe(memory)
    assert (view.address, view.nbytes, view.kind, view.device) == (memory.ctypes.data, 80, HOST, -1)
    assert view.device_name == "cpu"
    assert view.keepalive is memory


def test_a_view_inside_an_array_is_described_where_it_is():
    memory = np.zeros((4, 8), np.uint8)
    assert describe(memory[2]).address == memory.ctypes.data + 16


def test_bytearray_stays_put_while_described():
    memory = bytearray(b"abcd")
    view = describe(memory)
    assert bytes(host_buffer(view.address, view.nbytes)) == b"abcd"
    host_buffer(view.address, 4)[1:3] = b"XY"
    assert memory == b"aXYd"
    with pytest.raises(BufferError):
        memory.extend(b"more")


@pytest.mark.parametrize("memory", [array.array("q", [1, 2]), memoryview(bytearray(16)), mmap.mmap(-1, 16)])
def test_other_buffers(memory):
    view = describe(memory)
    assert view.nbytes == 16
    assert not view.readonly


def test_pointer_and_device():
    assert describe((4096, 10, "cpu")) == MemoryView(4096, 10, HOST, -1, "cpu", False, None)
    assert describe((4096, 10, "npu:3")) == MemoryView(4096, 10, DEVICE, 3, "npu:3", False, None)


def test_device_tensor():
    tensor = FakeTensor(1 << 40, (3, 4), "npu:1")
    view = describe(tensor)
    assert (view.address, view.nbytes, view.kind, view.device, view.keepalive) == (1 << 40, 24, DEVICE, 1, tensor)


def test_tensor_that_is_not_contiguous_names_its_shape():
    with pytest.raises(ConfigError, match=r"\(3, 4\).*untyped_storage"):
        describe(FakeTensor(1 << 40, (3, 4), "npu:1", contiguous=False))


def test_torch_tensor_and_storage():
    torch = pytest.importorskip("torch")
    tensor = torch.zeros(6, 4, dtype=torch.bfloat16)
    assert describe(tensor).address == tensor.data_ptr()
    assert describe(tensor).nbytes == 48
    assert describe(tensor[2:]).address == tensor.data_ptr() + 16
    assert describe(tensor.untyped_storage()).nbytes == 48
    assert describe(tensor.permute(1, 0).untyped_storage()).address == tensor.data_ptr()
    with pytest.raises(ConfigError, match="not contiguous"):
        describe(tensor.permute(1, 0))
    with pytest.raises(ConfigError, match="no memory"):
        describe(torch.zeros(3, device="meta"))
    with pytest.raises(ConfigError, match="empty"):
        describe(torch.zeros(0))


@pytest.mark.parametrize("memory", [b"abcd", memoryview(b"abcd")])
def test_read_only_memory_is_for_reading_peers_only(memory):
    for access in ("w", "rw"):
        with pytest.raises(ConfigError, match="read-only"):
            describe(memory, access=access)
    assert describe(memory, access="r").readonly


def test_read_only_array():
    memory = np.zeros(4)
    memory.flags.writeable = False
    with pytest.raises(ConfigError, match="read-only"):
        describe(memory)
    assert describe(memory, access="r").readonly


@pytest.mark.parametrize(
    "memory",
    [
        np.zeros((4, 4))[:, :2],
        np.zeros((4, 4), order="F"),
        np.array([object()]),
        np.zeros(0),
        bytearray(),
        memoryview(bytearray(8))[::2],
        (0, 10, "cpu"),
        (4096, 0, "cpu"),
        (4096, -1, "cpu"),
        (2**64 - 1, 2, "cpu"),
        (4096, 10),
        (4096, 10, "cpu:x"),
        (4096, 10, 0),
        "text",
        None,
        object(),
        5,
    ],
)
def test_what_cannot_be_registered_is_refused(memory):
    with pytest.raises(ConfigError) as caught:
        describe(memory)
    assert str(caught.value)


@pytest.mark.parametrize(("text", "bits"), [("r", 1), ("w", 2), ("rw", 3)])
def test_access(text, bits):
    assert parse_access(text) == bits
    assert access_name(bits) == text


@pytest.mark.parametrize("text", ["", "x", "rwx", "R"])
def test_other_access_is_refused(text):
    with pytest.raises(ConfigError, match="expected 'r', 'w' or 'rw'"):
        parse_access(text)


@pytest.mark.parametrize(("text", "parsed"), [("cpu", ("cpu", -1)), ("npu", ("npu", 0)), ("npu:12", ("npu", 12))])
def test_device(text, parsed):
    assert parse_device(text) == parsed


@pytest.mark.parametrize("text", ["", ":0", "npu:", "npu:-1", "npu:a", "n pu"])
def test_other_devices_are_refused(text):
    with pytest.raises(ConfigError, match="device is"):
        parse_device(text)
