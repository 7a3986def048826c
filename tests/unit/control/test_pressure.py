"""What strangers, stopped peers and peers that never read may cost the others, and what a close may not forget."""

import asyncio
import contextlib
import gc
import os
import socket
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest

import kvlink
from kvlink import _engine
from kvlink.control import handshake, listener, messages, session

from .conftest import eventually, introduced, local, raw
from .test_abuse import link


class Array(np.ndarray):
    """An array that can be referred to weakly."""


def zeros(nbytes):
    return np.zeros(nbytes, np.uint8).view(Array)


def test_idle_strangers_do_not_keep_others_out(works, monkeypatch):
    monkeypatch.setattr(listener, "PATIENCE", 0.3)
    config = kvlink.ChannelConfig(transfer_channel="host", max_handshakes=4, secret=b"a secret of the unit tests")
    channel = kvlink.open_from_config(config)
    with contextlib.ExitStack() as stack:
        stack.callback(channel.close)
        strangers = [stack.enter_context(raw(channel)) for _ in range(4)]
        eventually(lambda: channel._hub.listener._greeting == 4)
        works(channel)
        assert all(stranger.fileno() >= 0 for stranger in strangers)
        eventually(lambda: len(channel._hub.listener._strangers) == channel._hub.listener._greeting)


@pytest.mark.parametrize(
    "message", [messages.RegionClose(12345, 100), messages.Request(1, 10_000, b"")], ids=["close", "request"]
)
def test_a_peer_that_makes_us_answer_and_never_reads_is_dropped(open_channel, works, monkeypatch, message):
    monkeypatch.setattr(session, "MAX_QUEUED_BYTES", 64 << 10)
    channel = open_channel()

    async def main():
        async with introduced(channel) as intro:
            await link(channel, intro)
            await asyncio.to_thread(eventually, channel.peers)
            # The answers' window closes, for nobody reads; ours is kept open by hand.
            for _ in range(2000):
                intro.connection._credit = 1 << 20
                intro.connection.send(message)
            await asyncio.to_thread(eventually, lambda: not channel.peers(), 15)

    asyncio.run(asyncio.wait_for(main(), 30))
    works(channel)


def test_imports_that_hang_leave_threads_to_other_peers(open_channel, monkeypatch):
    """A peer that is stopped before it passed its shared memory: each import waits for its deadline."""
    channel, stopped, other = open_channel(), open_channel(), open_channel()
    channel.connect(stopped.address, timeout=10)
    go_on, calls = threading.Event(), []

    def hang(self, *arguments):
        calls.append(arguments)
        go_on.wait(30)
        raise kvlink.ConnectTimeout("the peer did not pass its shared memory in time")

    monkeypatch.setattr(_engine.EnginePeer, "rmem_open", hang)
    try:
        for number in range(2 * channel._hub.limits.workers):
            stopped.register(np.zeros(64, np.uint8), name=f"r{number}")
        eventually(lambda: len(calls) >= 1)
        assert channel.connect(other.address, timeout=10).state == "connected"
        assert len(calls) == 1
    finally:
        go_on.set()


def test_an_on_peer_that_hangs_holds_no_place(open_channel):
    channel, other = open_channel(), open_channel()
    go_on = threading.Event()
    channel.on_peer = lambda identity: go_on.wait(30)
    try:
        # Both deadlines end at the same moment: the initiator may see its own pass, or the acceptor hang up.
        with pytest.raises(kvlink.ConnectError):
            other.connect(channel.address, timeout=0.5)
        eventually(lambda: channel._hub.listener._introduced == 0)
        assert isinstance(channel._hub.listener.refusals[-1], kvlink.ConnectTimeout)
    finally:
        go_on.set()


def test_data_connections_keep_the_peer_timeout(open_channel):
    before = set(Path("/proc/self/fd").iterdir())
    a = open_channel(options={"path": "tcp"}, peer_timeout=7.5)
    b = open_channel(options={"path": "tcp"}, peer_timeout=7.5)
    a.connect(b.address, timeout=10)

    def user_timeouts():
        found = []
        for name in set(Path("/proc/self/fd").iterdir()) - before:
            with contextlib.suppress(OSError):
                if not name.readlink().name.startswith("socket:"):
                    continue
                with socket.socket(fileno=os.dup(int(name.name))) as sock:
                    if sock.family == socket.AF_INET and sock.getpeername():
                        found.append(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT))
        return found

    # The control connection and two streams, both ends; an accepted socket is tuned a moment after its accept.
    eventually(lambda: len(user_timeouts()) >= 6 and set(user_timeouts()) == {7500})


def test_memory_is_kept_when_the_engine_cannot_be_closed(open_channel, monkeypatch):
    """A provider call that hangs may go on to write into what was registered."""
    channel = open_channel()
    memory = zeros(4096)
    reference = weakref.ref(memory)
    channel.register(memory, name="r")
    del memory
    close = _engine.EngineChannel.close

    def hang(self, grace=1.0):
        close(self, grace)
        raise kvlink.EngineError("closing the channel took too long; it hangs in link_close")

    with monkeypatch.context() as patch:
        patch.setattr(_engine.EngineChannel, "close", hang)
        with pytest.raises(kvlink.EngineError):
            channel.close()
    gc.collect()
    assert reference() is not None


def test_memory_is_kept_when_a_peer_may_use_a_link_that_it_has_not_confirmed(open_channel):
    """The connect has told the peer that our side is up; the channel closes before the peer's word."""
    channel, model = open_channel(), open_channel()
    memory = zeros(4096)
    reference = weakref.ref(memory)
    channel.register(memory, name="r")
    del memory
    spare = _engine.EngineChannel.open(channel._hub.engine.provider, options={}, device="cpu")
    told, errors = threading.Event(), []

    async def accept(reader, writer):
        intro = await handshake.introduce(reader, writer, local(model), "by hand", initiator=False)
        offer = await intro.connection.receive()
        key = intro.keys.link_key(offer.session)
        peer = spare.peer_open(1, 1, offer.session, key, "by hand", intro.peer_id.hex())
        intro.connection.send(messages.Answer(peer.describe(), []))
        for reply in (messages.Ready(), None):
            await intro.connection.receive()
            if reply is not None:
                intro.connection.send(reply)
        assert isinstance(await intro.connection.receive(), messages.Done)
        told.set()
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            await intro.connection.receive()  # says nothing more
        writer.close()

    async def main():
        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        address = "tcp://{}:{}".format(*server.sockets[0].getsockname()[:2])

        def connect():
            try:
                channel.connect(address, timeout=20)
            except kvlink.KvlinkError as error:
                errors.append(error)

        thread = threading.Thread(target=connect)
        thread.start()
        assert await asyncio.to_thread(told.wait, 10)
        await asyncio.to_thread(channel.close, grace=0.3)
        await asyncio.to_thread(thread.join, 10)
        server.close()

    try:
        asyncio.run(asyncio.wait_for(main(), 30))
    finally:
        spare.close(0.5)
    assert errors
    gc.collect()
    assert reference() is not None
