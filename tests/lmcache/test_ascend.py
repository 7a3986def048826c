"""LMCache-Ascend's channel contract: buffers by id, reads that return an event, and who wins a name."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lmcache")

from lmcache_pools import free_port  # noqa: E402

from kvlink_lmcache.ascend import AscendChannel, create_transfer_channel  # noqa: E402

PAGE = 4096


class Item:
    """A memory object as far as a channel looks at it."""

    def __init__(self, memory: Any, page: int, nbytes: int = PAGE) -> None:
        self.raw_data = memory[page * PAGE : page * PAGE + nbytes]
        self.data_ptr = self.raw_data.data_ptr()
        self.meta = SimpleNamespace(address=page)

    def fill(self) -> Item:
        self.raw_data.copy_(torch.randint(1, 255, self.raw_data.shape, dtype=torch.uint8))
        return self


class Side:
    """Two buffers, of four and of six pages, and a channel."""

    def __init__(self, role: str, port: int) -> None:
        self.memory = [torch.zeros(4 * PAGE, dtype=torch.uint8), torch.zeros(6 * PAGE, dtype=torch.uint8)]
        self.url = f"127.0.0.1:{port}"
        self.channel: AscendChannel = create_transfer_channel(
            "host",
            False,
            role,
            [item.data_ptr() for item in self.memory],
            [item.numel() for item in self.memory],
            [PAGE, PAGE],
            0,
            self.url,
            buffer_type=["cpu", "cpu"],
        )

    def item(self, buffer: int, page: int, nbytes: int = PAGE) -> Item:
        return Item(self.memory[buffer], page, nbytes)


@pytest.fixture
def pair() -> Iterator[tuple[Side, Side]]:
    one, two = Side("sender", free_port()), Side("receiver", free_port())
    one.channel.lazy_init_peer_connection("one", "two", two.url)
    yield one, two
    one.channel.close()
    two.channel.close()


def test_write_across_buffers(pair: tuple[Side, Side]) -> None:
    one, two = pair
    objects = [one.item(0, 1).fill(), one.item(1, 5).fill(), one.item(1, 0, 100).fill()]
    targets = [two.item(1, 2), two.item(0, 3), two.item(1, 5)]
    uuids, pages = two.channel.get_local_buffer_refs(targets)
    assert pages == [2, 3, 5] and uuids[0] == uuids[2] != uuids[1]
    spec = {"receiver_id": "two", "remote_buffer_uuids": uuids, "remote_mem_indexes": pages}
    assert one.channel.batched_write(objects, spec) == 3
    assert torch.equal(targets[0].raw_data, objects[0].raw_data) and torch.equal(
        targets[1].raw_data, objects[1].raw_data
    )
    assert torch.equal(targets[2].raw_data[:100], objects[2].raw_data) and not targets[2].raw_data[100:].any()


def test_submitted_read_and_its_event(pair: tuple[Side, Side]) -> None:
    one, two = pair
    held = [one.item(1, 4).fill(), one.item(0, 0).fill()]
    uuids, pages = one.channel.get_local_buffer_refs(held)
    into = [two.item(0, 2), two.item(1, 1)]
    spec = {"receiver_id": "one", "remote_buffer_uuids": uuids, "remote_mem_indexes": pages, "stream": Stream()}
    event = two.channel.submit_batched_read(buffers=into, transfer_spec=spec)
    event.wait(None)
    assert event.query() and spec["stream"].synchronized
    assert all(torch.equal(a.raw_data, b.raw_data) for a, b in zip(held, into, strict=True))
    empty = two.channel.submit_batched_read([], {"sender_id": "one", "remote_indexes": []})
    assert empty.query()


class Stream:
    """A device stream that the host has to wait for, as the provider takes none."""

    synchronized = False

    def synchronize(self) -> None:
        self.synchronized = True


def test_async_forms_and_plain_indexes_mean_the_first_buffer(pair: tuple[Side, Side]) -> None:
    one, two = pair
    data = one.item(1, 3).fill()

    async def go() -> None:
        assert await one.channel.async_batched_write([data], {"receiver_id": "two", "remote_indexes": [3]}) == 1
        back = one.item(0, 2)
        assert await one.channel.async_batched_read([back], {"sender_id": "two", "remote_indexes": [3]}) == 1
        assert torch.equal(back.raw_data, data.raw_data)

    asyncio.run(asyncio.wait_for(go(), 20))
    assert torch.equal(two.item(0, 3).raw_data, data.raw_data)
    assert isinstance(one.channel.handle_device, int)


def test_what_is_refused(pair: tuple[Side, Side]) -> None:
    one, _ = pair
    item = one.item(0, 0)
    stranger = Item(torch.zeros(PAGE, dtype=torch.uint8), 0)
    with pytest.raises(ValueError, match="none of the 2 registered buffers"):
        one.channel.get_local_buffer_refs([stranger])
    with pytest.raises(ValueError, match="'nowhere' is none of the peer's"):
        one.channel.batched_write(
            [item], {"receiver_id": "two", "remote_buffer_uuids": ["nowhere"], "remote_mem_indexes": [0]}
        )
    with pytest.raises(IndexError, match="page 4 is outside"):
        one.channel.batched_write([item], {"receiver_id": "two", "remote_indexes": [4]})
    with pytest.raises(ValueError, match="1 objects here do not pair with 2"):
        one.channel.batched_write([item], {"receiver_id": "two", "remote_indexes": [1, 2]})
    with pytest.raises(ValueError, match="expected a receiver_id"):
        one.channel.batched_write([item], {"remote_indexes": [1]})
    with pytest.raises(ValueError, match="expected remote_mem_indexes"):
        one.channel.batched_write([item], {"receiver_id": "two"})
    with pytest.raises(ValueError, match="1 buffer pointers, 2 sizes"):
        create_transfer_channel("host", False, "sender", [1], [1, 2], [1], 0, None)
    with pytest.raises(ValueError, match="buffer_type is 'tpu'"):
        create_transfer_channel("host", False, "sender", [1], [1], [1], 0, None, buffer_type=["tpu"])


FLOW = """
    import sys
    from types import SimpleNamespace
    sys.path[:0] = [{folder!r}, {folder!r} + "/lmcache_ascend_standin"]
    from kvlink_lmcache import registration
    registration.register()
    import torch
    import lmcache_ascend
    import lmcache.v1.storage_backend as lmcache_backends
    from lmcache_pools import free_port
    from test_ascend import Item
    from lmcache_pd import config, metadata

    def backend(role, memory, url):
        cfg = config(role, 4, extra_config={extra!r})
        return lmcache_backends.CreateStorageBackends(cfg, metadata(), buffers=memory, url=url, role=role)["PDBackend"]

    memories = [[torch.zeros(4 * 4096, dtype=torch.uint8) for _ in range(2)] for _ in range(2)]
    urls = [f"127.0.0.1:{{free_port()}}" for _ in range(2)]
    sender, receiver = (backend(*given) for given in zip(("sender", "receiver"), memories, urls))
    print(type(sender.transfer_channel).__name__)
    if type(sender.transfer_channel).__name__ == "AscendChannel":
        data = [Item(memories[0][1], 2).fill(), Item(memories[0][0], 1).fill()]
        targets = [Item(memories[1][0], 3), Item(memories[1][1], 0)]
        assert sender.push("r", urls[1], data, receiver.allocate_and_put(targets)) == 2
        assert all(torch.equal(a.raw_data, b.raw_data) for a, b in zip(data, targets))
        back = [Item(memories[1][1], 1), Item(memories[1][1], 2)]
        receiver.pull("p", back, sender.allocate_and_put(data))
        assert all(torch.equal(a.raw_data, b.raw_data) for a, b in zip(data, back))
        print("moved")
    sender.transfer_channel.close()
    receiver.transfer_channel.close()
"""


@pytest.mark.parametrize(
    ("extra", "expected"),
    [({}, ["AscendChannel", "moved"]), ({"kvlink.lmcache.ascend": "lmcache_ascend"}, ["HcclChannel"])],
)
def test_kvlink_wins_a_name_and_one_key_gives_it_back(extra: dict[str, str], expected: list[str]) -> None:
    code = textwrap.dedent(FLOW.format(folder=str(Path(__file__).parent), extra=extra))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line for line in done.stdout.splitlines() if line.isalpha()] == expected
