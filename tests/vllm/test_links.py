"""Links: one connect at a time for an address, failures remembered briefly, the table bounded."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from kvlink_vllm import links as module
from kvlink_vllm import wire
from kvlink_vllm.layout import CacheLayout, LayoutError, Plane
from kvlink_vllm.links import Links
from kvlink_vllm.settings import Settings

LAYOUT = CacheLayout((), (Plane("l/0/0", 0, 0, 64, 64, (16,), "float32"),), 4)


class Peer:
    def __init__(self, planes):
        self.state = "connected"
        self.closed = False
        self._reply = wire.encode(wire.LayoutReply(planes, 9, "words", 7.5))

    def request(self, message, timeout):
        assert isinstance(wire.decode_request(message), wire.Layout)
        return self._reply

    def wait_region(self, name, timeout):
        return SimpleNamespace(handle={"kv.0": 3, "words": 5}[name])

    def close(self):
        self.closed = True


class Channel:
    """Hands out peers, or raises, when the test lets it."""

    def __init__(self):
        self.gate = threading.Event()
        self.gate.set()
        self.calls = 0
        self.error: Exception | None = None
        self.peers: list[Peer] = []
        self.planes = [wire.WirePlane("l/0/0", "kv.0", 128, 64, 64)]

    def connect(self, address, timeout):
        self.calls += 1
        assert self.gate.wait(10)
        if self.error is not None:
            raise self.error
        self.peers.append(Peer(self.planes))
        return self.peers[-1]


@pytest.fixture
def channel():
    return Channel()


@pytest.fixture
def links(channel):
    with ThreadPoolExecutor(4) as executor:
        yield Links(channel, LAYOUT, Settings(retry_after=0.2), executor)


def test_one_connect_serves_all_who_ask(links, channel):
    channel.gate.clear()
    futures = [links.get("a") for _ in range(5)]
    assert links.connected("a") is None
    channel.gate.set()
    link = futures[0].result(10)
    assert all(future.result(10) is link for future in futures)
    assert channel.calls == 1
    assert (link.handles, link.leases, link.blocks, link.lease) == ({"kv.0": 3, "words": 5}, 5, 9, 7.5)
    assert links.connected("a") is link


def test_a_failure_stands_for_a_while_then_is_tried_again(links, channel, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    channel.error = ConnectionError("no route")
    with pytest.raises(ConnectionError, match="no route"):
        links.get("a").result(10)
    clock[0] += 0.1
    with pytest.raises(ConnectionError):
        links.get("a").result(10)
    assert channel.calls == 1
    clock[0] += 0.2
    channel.error = None
    assert links.get("a").result(10).peer is channel.peers[0]
    assert channel.calls == 2


def test_no_thread_for_a_connect_is_a_failed_connect(channel):
    """Without this its future would never end, nor a request that waits for it."""
    executor = ThreadPoolExecutor(1)
    executor.shutdown()
    links = Links(channel, LAYOUT, Settings(retry_after=60.0), executor)
    for _ in range(2):
        with pytest.raises(RuntimeError):
            links.get("a").result(1)
    assert channel.calls == 0


def test_a_lost_peer_is_connected_anew(links, channel):
    first = links.get("a").result(10)
    first.peer.state = "lost"
    assert links.connected("a") is None
    second = links.get("a").result(10)
    assert second is not first
    assert links.connected("a") is second


def test_a_peer_with_another_layout_is_closed(links, channel):
    channel.planes = [wire.WirePlane("l/0/0", "kv.0", 0, 128, 128)]
    with pytest.raises(LayoutError, match="128 bytes"):
        links.get("a").result(10)
    assert channel.peers[0].closed


def test_the_table_forgets_what_is_over(links, channel, monkeypatch):
    monkeypatch.setattr(module, "_MAX_ENTRIES", 3)
    kept = links.get("kept").result(10)
    channel.error = ConnectionError("no")
    for number in range(20):
        with pytest.raises(ConnectionError):
            links.get(f"x{number}").result(10)
    assert len(links._entries) <= 4
    assert links.connected("kept") is kept
