"""What strangers and broken peers may send to a control listener, and what it may cost."""

import asyncio
import contextlib
import os
import socket
import struct
import time

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

import kvlink
from kvlink.control import auth, handshake, messages, wire
from kvlink.control.wire import Greeting

from .conftest import KEY, eventually, introduced, local, raw, read_to_end


def test_garbage_is_refused_without_an_answer(open_channel, works):
    channel = open_channel()
    for data in (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 10, bytes(1000), b"\xff" * 100_000, os.urandom(4096)):
        with raw(channel) as sock:
            with contextlib.suppress(ConnectionResetError, BrokenPipeError):
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)
            assert read_to_end(sock) == b""
    works(channel)
    assert channel.statistics().refused >= 4


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=400), st.booleans())
def test_fuzzing_the_listener_harms_nobody(shared_channel, data, greeted):
    channel, peer = shared_channel
    with raw(channel) as sock, contextlib.suppress(OSError):
        if greeted:
            sock.sendall(Greeting(os.urandom(16), os.urandom(32), True).encode())
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        read_to_end(sock)
    assert peer.request(b"x", timeout=10) == b"x"


@pytest.fixture
def shared_channel(open_channel):
    channel, other = open_channel(), open_channel()
    channel.on_request = lambda peer, message: message
    return channel, other.connect(channel.address, timeout=10)


@pytest.mark.parametrize("length", [1, wire.GREETING_BYTES - 1, wire.GREETING_BYTES + 10])
def test_truncated_handshakes(open_channel, works, length):
    channel = open_channel()
    data = Greeting(os.urandom(16), os.urandom(32), True).encode() + bytes(wire.PROOF_BYTES)
    with raw(channel) as sock:
        sock.sendall(data[:length])
        sock.shutdown(socket.SHUT_WR)
        answer = read_to_end(sock)
    assert len(answer) in (0, wire.GREETING_BYTES)
    works(channel)


def start_proof(sock, greeting):
    """Greets and returns the transcript with both greetings."""
    sock.sendall(greeting.encode())
    theirs = b""
    while len(theirs) < wire.GREETING_BYTES:
        theirs += sock.recv(wire.GREETING_BYTES - len(theirs))
    transcript = auth.Transcript()
    transcript.add(greeting.encode())
    transcript.add(theirs)
    return transcript, theirs


def test_a_wrong_proof_learns_nothing(open_channel, works):
    channel = open_channel()
    with raw(channel) as sock:
        start_proof(sock, Greeting(os.urandom(16), os.urandom(32), True))
        sock.sendall(os.urandom(32))
        assert read_to_end(sock) == bytes([wire.Verdict.WRONG_SECRET]) + bytes(32)
    assert isinstance(eventually(lambda: list(channel._hub.listener.refusals))[-1], kvlink.AuthenticationError)
    works(channel)


def test_a_recorded_proof_is_worthless(open_channel, works):
    channel = open_channel()
    greeting = Greeting(os.urandom(16), os.urandom(32), True)
    with raw(channel) as sock:
        transcript, _ = start_proof(sock, greeting)
        proof = auth.prove(KEY, "initiator", transcript)
        sock.sendall(proof)
        assert sock.recv(1) == bytes([wire.Verdict.WELCOME])
    with raw(channel) as sock:  # the same greeting and proof again; the listener's nonce is another
        start_proof(sock, greeting)
        sock.sendall(proof)
        assert read_to_end(sock)[0] == wire.Verdict.WRONG_SECRET
    works(channel)


def test_reflecting_the_listeners_own_bytes_proves_nothing(open_channel, works):
    """Without the secret: open two connections, and use one's answers on the other."""
    channel = open_channel()
    with raw(channel) as first, raw(channel) as second:
        _, theirs = start_proof(first, Greeting(os.urandom(16), os.urandom(32), True))
        start_proof(second, Greeting.decode(theirs))
        second.sendall(theirs[-32:])
        answer = read_to_end(second)
        assert answer[0] == wire.Verdict.WRONG_SECRET
        first.sendall(answer[1:])
        assert read_to_end(first)[0] == wire.Verdict.WRONG_SECRET
    works(channel)


def test_a_proof_for_the_other_role_is_refused(open_channel):
    channel = open_channel()
    with raw(channel) as sock:
        transcript, _ = start_proof(sock, Greeting(os.urandom(16), os.urandom(32), True))
        sock.sendall(auth.prove(KEY, "acceptor", transcript))
        assert read_to_end(sock)[0] == wire.Verdict.WRONG_SECRET


def test_a_listener_that_does_not_hold_the_secret_is_not_believed(open_channel):
    """An impostor that relays the initiator's proof back, or makes one up."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        import threading

        def serve():
            sock, _ = server.accept()
            with sock:
                sock.sendall(Greeting(os.urandom(16), os.urandom(32), True).encode())
                data = b""
                while len(data) < wire.GREETING_BYTES + wire.PROOF_BYTES:
                    data += sock.recv(4096)
                sock.sendall(bytes([wire.Verdict.WELCOME]) + data[-wire.PROOF_BYTES :])
                read_to_end(sock)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(kvlink.AuthenticationError, match="does not hold our secret"):
            open_channel().connect(f"tcp://127.0.0.1:{server.getsockname()[1]}", timeout=10)
        thread.join(10)


def test_another_wire_version_is_named_on_both_sides(open_channel, monkeypatch):
    channel = open_channel()
    with raw(channel) as sock:
        sock.sendall(Greeting(os.urandom(16), os.urandom(32), True, version=99).encode())
        answer = read_to_end(sock)
    assert Greeting.decode(answer).version == wire.WIRE_VERSION
    error = eventually(lambda: list(channel._hub.listener.refusals))[-1]
    assert isinstance(error, kvlink.VersionMismatch) and "99" in str(error) and str(wire.WIRE_VERSION) in str(error)

    original = Greeting.encode
    monkeypatch.setattr(Greeting, "encode", lambda self: original(Greeting(self.channel_id, self.nonce, True, 98)))
    with pytest.raises(kvlink.VersionMismatch):
        open_channel().connect(channel.address, timeout=10)


def test_a_stranger_who_says_nothing_is_dropped_in_time(open_channel, works):
    config = kvlink.ChannelConfig(transfer_channel="host", handshake_timeout=0.3, secret=b"s")
    channel = kvlink.open_from_config(config)
    try:
        with raw(channel) as silent, raw(channel) as slow:
            started = time.monotonic()
            greeting = Greeting(os.urandom(16), os.urandom(32), True).encode()
            with contextlib.suppress(OSError):
                for position in range(len(greeting)):  # one byte at a time: the whole handshake has one deadline
                    slow.sendall(greeting[position : position + 1])
                    slow.settimeout(0.05)
                    with contextlib.suppress(TimeoutError):
                        if not slow.recv(1):
                            break
            silent.settimeout(10)
            assert read_to_end(silent) == b""
            assert time.monotonic() - started < 5
        assert isinstance(eventually(lambda: list(channel._hub.listener.refusals))[-1], kvlink.ConnectTimeout)
    finally:
        channel.close()


def test_strangers_are_bounded_and_leave_room_again(open_channel, works):
    config = kvlink.ChannelConfig(transfer_channel="host", max_handshakes=4, secret=b"a secret of the unit tests")
    channel = kvlink.open_from_config(config)
    try:
        strangers = [raw(channel) for _ in range(4)]
        eventually(lambda: channel._hub.listener._greeting == 4)
        with raw(channel) as fifth:
            assert read_to_end(fifth) == b""
        for stranger in strangers:
            stranger.close()
        works(channel)
    finally:
        channel.close()


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 20))


def offer(**changes):
    fields = {"session": os.urandom(16), "timeout_ms": 5000, "link": b"", "regions": [], "dead": []}
    fields.update(changes)
    return messages.Offer(**fields)


@pytest.mark.parametrize(
    "message",
    [messages.Notify(b"x"), messages.Ready(), messages.Request(1, 1000, b""), messages.Done(), messages.Go(1)],
)
def test_an_authenticated_peer_out_of_turn_is_dropped(open_channel, works, message):
    channel = open_channel()

    async def main():
        async with introduced(channel) as intro:
            intro.connection.send(message)
            with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
                await intro.connection.receive()

    run(main())
    assert not channel.peers()
    works(channel)


def test_an_authenticated_peer_with_a_nonsense_link_blob_harms_nobody(open_channel, works):
    channel = open_channel()
    channel.register(np.zeros(4096, np.uint8), name="r")

    async def main():
        async with introduced(channel) as intro:
            intro.connection.send(offer(link=os.urandom(50)))
            with contextlib.suppress(asyncio.IncompleteReadError, OSError):
                answer = await intro.connection.receive()
                if isinstance(answer, messages.Answer):
                    intro.connection.send(messages.Ready())
                    await intro.connection.receive()
                    intro.connection.send(messages.Go(1000))
                    intro.connection.send(messages.Fail("changed my mind"))
                    await intro.connection.receive()

    run(main())
    eventually(lambda: not channel._hub.accepting)
    assert not channel.peers()
    works(channel)


def test_an_initiator_that_stops_half_way_frees_its_place(open_channel, works):
    channel = open_channel()
    who = local(channel)

    async def main():
        async with introduced(channel, who) as intro:
            intro.connection.send(offer(timeout_ms=60_000))
            assert isinstance(await intro.connection.receive(), messages.Answer)
            assert list(channel._hub.accepting) == [who.channel_id]
            async with introduced(channel, who) as second:
                second.connection.send(offer())
                assert isinstance(await second.connection.receive(), messages.Busy)

    run(main())
    eventually(lambda: not channel._hub.accepting)
    works(channel)


def test_an_offer_has_a_deadline(open_channel, works):
    channel = open_channel()

    async def main():
        async with introduced(channel) as intro:
            intro.connection.send(offer(timeout_ms=200))
            assert isinstance(await intro.connection.receive(), messages.Answer)
            with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
                await intro.connection.receive()

    run(main())
    eventually(lambda: not channel._hub.accepting)
    works(channel)


def test_a_forged_frame_ends_only_its_own_connection(shared_channel):
    channel, peer = shared_channel

    async def main():
        async with introduced(channel) as intro:
            writer = intro.connection.writer
            writer.write(struct.pack("<IB", 3, 1) + b"abc" + bytes(16))
            with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
                await intro.connection.receive()

    run(main())
    assert peer.request(b"x", timeout=10) == b"x"


def test_a_hello_that_is_too_long_is_refused(open_channel, works):
    channel = open_channel()
    who = local(channel, identity={f"k{number}": "v" * 4000 for number in range(40)})

    async def main():
        async with introduced(channel, who):
            pass

    with pytest.raises((kvlink.ConnectError, OSError)):
        run(main())
    works(channel)


def test_the_identity_is_not_told_to_a_stranger(open_channel):
    channel = open_channel(identity={"model": "a-private-name"})
    with raw(channel) as sock:
        start_proof(sock, Greeting(os.urandom(16), os.urandom(32), True))
        sock.sendall(os.urandom(32))
        assert b"private" not in read_to_end(sock)


def test_introduce_alone_is_harmless(open_channel, works):
    channel = open_channel()

    async def main():
        async with introduced(channel) as intro:
            assert isinstance(intro, handshake.Introduced)
            intro.connection.send(messages.Bye("never mind"))

    run(main())
    works(channel)


def test_a_peer_that_asks_and_never_reads_is_dropped(open_channel, works, monkeypatch):
    from kvlink.control import session

    monkeypatch.setattr(session, "MAX_QUEUED_BYTES", 2 << 20)
    channel = open_channel()
    channel.on_request = lambda peer, message: bytes(1 << 20)

    async def main():
        async with introduced(channel) as intro:
            await link(channel, intro)
            for number in range(8):
                intro.connection.send(messages.Request(number, 10_000, b""))
            await asyncio.to_thread(eventually, lambda: not channel.peers(), 15)

    asyncio.run(asyncio.wait_for(main(), 30))
    works(channel)


async def link(channel, intro):
    """Brings a link up by hand, with a real engine's link blob and no data connection."""
    from kvlink import _engine

    hub = channel._hub
    spare = _engine.EngineChannel.open(hub.engine.provider, options={}, device="cpu")
    try:
        session = os.urandom(16)
        peer = spare.peer_open(0, 1, session, intro.keys.link_key(session), "by hand", hub.local.channel_id.hex())
        intro.connection.send(offer(session=session, link=peer.describe()))
        answer = await intro.connection.receive()
        assert isinstance(answer, messages.Answer), answer
        intro.connection.send(messages.Ready())
        assert isinstance(await intro.connection.receive(), messages.Ready)
        intro.connection.send(messages.Go(5000))
        await asyncio.to_thread(peer.connect, answer.link, 5.0)
        intro.connection.send(messages.Done())
        assert isinstance(await intro.connection.receive(), messages.Done)
    finally:
        spare.close(0.5)


@pytest.mark.parametrize(
    "message",
    [messages.Offer(bytes(16), 1, b"", [], []), messages.Done(), messages.Ready(), messages.Busy(1, "x")],
)
def test_setup_messages_on_an_open_link_end_it(open_channel, works, message):
    channel = open_channel()

    async def main():
        async with introduced(channel) as intro:
            await link(channel, intro)
            eventually(channel.peers)
            intro.connection.send(message)
            await asyncio.to_thread(eventually, lambda: not channel.peers())

    run(main())
    works(channel)


def test_odd_but_harmless_messages_on_an_open_link(open_channel, works):
    """Answers to questions never asked, closings of regions never named, a region whose blob is noise."""
    channel = open_channel()

    async def main():
        async with introduced(channel) as intro:
            await link(channel, intro)
            eventually(channel.peers)
            peer = next(iter(channel.peers().values()))
            intro.connection.send(messages.Reply(77, b"x"))
            intro.connection.send(messages.RequestFailed(78, "x"))
            intro.connection.send(messages.RegionClosed(12345))
            intro.connection.send(messages.RegionClose(12345, 100))
            assert await intro.connection.receive() == messages.RegionClosed(12345)
            info = messages.RegionInfo(5, "noise", 4096, 3, "cpu", os.urandom(60))
            intro.connection.send(messages.RegionAdd(info))
            with pytest.raises(kvlink.KvlinkError):
                await asyncio.to_thread(peer.wait_region, "noise", 10)
            assert peer.state == "connected" and not peer.regions

    run(main())
    works(channel)


def test_authenticated_connections_without_a_link_are_bounded(open_channel, works):
    channel = open_channel()
    hub = channel._hub
    object.__setattr__(hub.limits, "max_introduced", 2)

    async def main():
        async with introduced(channel), introduced(channel):
            await asyncio.to_thread(eventually, lambda: hub.listener._introduced == 2)
            async with introduced(channel) as third:
                with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
                    await third.connection.receive()

    run(main())
    eventually(lambda: hub.listener._introduced == 0)
    works(channel)
