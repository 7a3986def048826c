import asyncio
import os
import struct

import pytest

from kvlink.control import auth, connection, messages
from kvlink.control.connection import CHUNK, WINDOW, Connection
from kvlink.control.wire import ProtocolError

from .conftest import connection_pair, stream_pair


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 20))


def test_messages_of_every_size_arrive_in_order():
    async def main():
        async with connection_pair() as (a, b):
            b.limit = messages.MAX_MESSAGE
            sizes = [0, 1, CHUNK - 20, CHUNK, CHUNK + 1, 5 * CHUNK, 1 << 20]

            async def receive():
                return [len((await b.receive()).body) for _ in sizes]

            for size in sizes:
                a.send(messages.Notify(os.urandom(size)))
            credits = asyncio.ensure_future(a.receive())  # somebody must read what the peer has consumed
            assert await receive() == sizes
            credits.cancel()

    run(main())


def test_a_peer_that_does_not_read_gets_no_more_than_a_window():
    async def main():
        async with connection_pair() as (a, b):
            b.limit = messages.MAX_MESSAGE
            for _ in range(64):
                a.send(messages.Notify(bytes(CHUNK - 100)))
            assert a.queued > 64 * (CHUNK - 100) - WINDOW - CHUNK
            assert a.queued < 64 * CHUNK - WINDOW // 2
            assert a.writer.transport.get_write_buffer_size() == 0 or a.queued > 0
            reader = asyncio.ensure_future(a.receive())
            for _ in range(64):
                await b.receive()
            await a.flush()
            assert a.queued == 0
            reader.cancel()

    run(main())


def test_small_messages_count_for_what_they_cost():
    async def main():
        async with connection_pair() as (a, _):
            for _ in range(1000):
                a.send(messages.Notify(b"x"))
            sent = 1000 - len(a._queue)
            assert sent == WINDOW // connection.MIN_COST

    run(main())


def test_a_message_longer_than_the_limit_ends_the_connection():
    async def main():
        async with connection_pair() as (a, b):
            b.limit = 3 * CHUNK
            a.send(messages.Notify(bytes(4 * CHUNK)))
            with pytest.raises(ProtocolError, match="more than"):
                await b.receive()

    run(main())


def frames_of(*bodies, key):
    """The bytes that a sender with that key puts on the wire."""

    async def main():
        async with stream_pair() as (a, b):
            sender = Connection(*a, key, b"r" * 32)
            for body in bodies:
                sender.send(messages.Notify(body))
            sender.end()
            return await b[0].read()

    return run(main())


async def receive_raw(data, key, count=1):
    async with stream_pair() as (a, b):
        a[1].write(data)
        a[1].write_eof()
        receiver = Connection(*b, b"r" * 32, key)
        return [await receiver.receive() for _ in range(count)]


def test_tampering_replay_reordering_reflection_and_truncation_are_noticed():
    key = os.urandom(32)
    one, two = frames_of(b"first", key=key), frames_of(b"first", b"second", key=key)
    second = two[len(one) :]
    assert [message.body for message in run(receive_raw(two, key, 2))] == [b"first", b"second"]
    for bad in (one + one, second, second + one):
        with pytest.raises(ProtocolError, match="not authentic"):
            run(receive_raw(bad, key, 2))
    with pytest.raises(ProtocolError, match="not authentic"):
        run(receive_raw(one, b"r" * 32))  # what we sent, sent back to us
    for position in range(len(one)):
        changed = bytearray(one)
        changed[position] ^= 1
        with pytest.raises((ProtocolError, asyncio.IncompleteReadError)):
            run(receive_raw(bytes(changed), key))
    for length in range(len(one)):
        with pytest.raises(asyncio.IncompleteReadError):
            run(receive_raw(one[:length], key))


@pytest.mark.parametrize(
    "header", [struct.pack("<IB", CHUNK + 1, 1), struct.pack("<IB", 2**32 - 1, 1), struct.pack("<IB", 1, 3)]
)
def test_impossible_headers_are_refused_before_anything_is_read(header):
    with pytest.raises(ProtocolError, match="a frame of kind"):
        run(receive_raw(header, os.urandom(32)))


def test_a_credit_of_the_wrong_size_or_beyond_the_window_gives_nothing():
    async def main(payload):
        key = os.urandom(32)
        async with stream_pair() as (a, b):
            header = struct.pack("<IB", len(payload), 2)
            a[1].write(header + payload + auth.FrameAuthenticator(key).tag(header, payload))
            a[1].write_eof()
            receiver = Connection(*b, b"r" * 32, key)
            with pytest.raises((ProtocolError, asyncio.IncompleteReadError)):
                await receiver.receive()
            return receiver._credit

    assert run(main(b"xyz")) == WINDOW
    assert run(main(struct.pack("<I", 2**32 - 1))) == WINDOW
