"""BaseTransferChannel on kvlink: what PDBackend, PDBackendAsync and P2PBackend ask of a channel."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lmcache")

from lmcache_pools import Pool, free_port  # noqa: E402

from kvlink_lmcache.channel import KVLinkChannel, create_transfer_channel  # noqa: E402


@pytest.fixture
def pair() -> Iterator[tuple[Pool, Pool]]:
    """A sender and a receiver that listens, each with eight pages."""
    receiver = Pool(8, peer_init_url=f"127.0.0.1:{free_port()}", role="receiver")
    sender = Pool(8, peer_init_url=None, role="sender")
    yield sender, receiver
    sender.close()
    receiver.close()


def connect(sender: Pool, receiver: Pool, **extra: Any) -> Any:
    return sender.channel.lazy_init_peer_connection("me", "you", receiver.url, **extra)


def test_write_moves_pages_to_the_pages_that_the_receiver_named(pair: tuple[Pool, Pool]) -> None:
    sender, receiver = pair
    connect(sender, receiver)
    objects = sender.filled(3)
    assert sender.channel.batched_write(objects, {"receiver_id": "you", "remote_indexes": [5, 0, 7]}) == 3
    for item, page in zip(objects, [5, 0, 7], strict=True):
        assert torch.equal(receiver.page(page), item.raw_data)
    assert not receiver.page(1).any()


def test_only_the_tokens_of_a_partial_chunk_move(pair: tuple[Pool, Pool]) -> None:
    sender, receiver = pair
    connect(sender, receiver)
    receiver.page(2).fill_(9)
    (tail,) = sender.filled(1, tokens=3)
    sender.channel.batched_write([tail], {"receiver_id": "you", "remote_indexes": [2]})
    size = tail.raw_data.nbytes
    assert torch.equal(receiver.page(2)[:size], tail.raw_data[:size])
    assert bool((receiver.page(2)[size:] == 9).all())


def test_read_by_the_side_that_was_connected_to(pair: tuple[Pool, Pool]) -> None:
    sender, receiver = pair
    connect(sender, receiver)
    held = sender.filled(2)
    assert receiver.channel.remote_xfer_handler_exists("me")
    targets = receiver.filled(2)
    spec = {"sender_id": "me", "remote_indexes": sender.channel.get_local_mem_indices(held)}
    assert receiver.channel.batched_read(targets, spec) == 2
    assert all(torch.equal(a.raw_data, b.raw_data) for a, b in zip(held, targets, strict=True))


def test_async_forms(pair: tuple[Pool, Pool]) -> None:
    sender, receiver = pair

    async def go() -> None:
        channel = sender.channel
        await channel.async_lazy_init_peer_connection("me", "you", receiver.url)
        objects = sender.filled(2)
        spec = {"receiver_id": "you", "remote_indexes": [1, 3]}
        assert await channel.async_batched_write(objects, spec) == 2
        back = sender.filled(2)
        assert await channel.async_batched_read(back, {"sender_id": "you", "remote_indexes": [1, 3]}) == 2
        assert all(torch.equal(a.raw_data, b.raw_data) for a, b in zip(objects, back, strict=True))

    asyncio.run(asyncio.wait_for(go(), 20))


def test_connecting_again_is_harmless_and_side_messages_are_answered(pair: tuple[Pool, Pool]) -> None:
    from lmcache.v1.transfer_channel.transfer_utils import P2PInitSideMsg, P2PInitSideRetMsg

    sender, receiver = pair
    assert connect(sender, receiver) is None
    receiver.channel.peer_lookup_url = "10.0.0.1:77"
    answer = connect(sender, receiver, init_side_msg=P2PInitSideMsg())
    assert isinstance(answer, P2PInitSideRetMsg) and answer.peer_lookup_url == "10.0.0.1:77"
    assert connect(sender, receiver) is None
    assert len(sender.channel.endpoint.channel.peers()) == 1


def test_failures_raise_and_name_what_is_wrong(pair: tuple[Pool, Pool]) -> None:
    sender, receiver = pair
    objects = sender.filled(1)
    assert not sender.channel.remote_xfer_handler_exists("you")
    with pytest.raises(Exception, match="no connection with 'you'"):
        sender.channel.batched_write(objects, {"receiver_id": "you", "remote_indexes": [0]})
    connect(sender, receiver)
    with pytest.raises(Exception, match="remote_indexes"):
        sender.channel.batched_write(objects, {"receiver_id": "you"})
    with pytest.raises(Exception, match="1 pages here do not pair with 2"):
        sender.channel.batched_write(objects, {"receiver_id": "you", "remote_indexes": [0, 1]})
    with pytest.raises(Exception, match="range 0"):
        sender.channel.batched_write(objects, {"receiver_id": "you", "remote_indexes": [99]})
    with pytest.raises(Exception, match="expected MemoryObj"):
        sender.channel.batched_write([b"bytes"], {"receiver_id": "you", "remote_indexes": [0]})
    for call in ("batched_send", "batched_recv"):
        with pytest.raises(NotImplementedError):
            getattr(sender.channel, call)(objects)
    assert sender.channel.batched_write([], {"receiver_id": "you", "remote_indexes": []}) == 0


def test_pages_of_another_size_are_refused_at_first_contact(pair: tuple[Pool, Pool]) -> None:
    _, receiver = pair
    other = Pool(8, peer_init_url=None, role="sender", heads=4)
    try:
        with pytest.raises(Exception, match=rf"{receiver.page_bytes}.*{other.page_bytes}"):
            connect(other, receiver)
    finally:
        other.close()


def test_nobody_listens(pair: tuple[Pool, Pool]) -> None:
    sender, _ = pair
    with pytest.raises(ConnectionError):
        sender.channel.lazy_init_peer_connection("me", "you", f"127.0.0.1:{free_port()}")


def test_a_lost_receiver_is_dialled_again_by_the_next_write() -> None:
    url = f"127.0.0.1:{free_port()}"
    sender = Pool(4, peer_init_url=None, role="sender")
    first = Pool(4, peer_init_url=url, role="receiver")
    try:
        sender.channel.lazy_init_peer_connection("me", "you", url)
        first.close()
        second = Pool(4, peer_init_url=url, role="receiver")
        try:
            objects = sender.filled(1)
            sender.channel.batched_write(objects, {"receiver_id": "you", "remote_indexes": [3]})
            assert torch.equal(second.page(3), objects[0].raw_data)
        finally:
            second.close()
    finally:
        sender.close()


def test_a_killed_receiver_fails_the_write_soon() -> None:
    url = f"127.0.0.1:{free_port()}"
    folder = str(Path(__file__).parent)
    code = f"""
        import sys, threading
        sys.path.insert(0, {folder!r})
        from lmcache_pools import Pool
        pool = Pool(4, peer_init_url={url!r}, role="receiver")
        print("ready", flush=True)
        sys.stdin.read()
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    sender = Pool(4, peer_init_url=None, role="sender")
    try:
        assert process.stdout is not None
        while "ready" not in (line := process.stdout.readline()):
            assert line, "the receiver did not start"
        sender.channel.lazy_init_peer_connection("me", "you", url)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(20)
        with pytest.raises(ConnectionError):
            sender.channel.batched_write(sender.filled(1), {"receiver_id": "you", "remote_indexes": [0]})
        assert not sender.channel.remote_xfer_handler_exists("you")
    finally:
        process.kill()
        process.wait(20)
        assert process.stdin is not None and process.stdout is not None
        process.stdin.close()
        process.stdout.close()
        sender.close()


def test_a_cancelled_write_returns_after_its_end(pair: tuple[Pool, Pool]) -> None:
    sender, receiver = pair
    connect(sender, receiver)
    objects = sender.filled(4)

    async def go() -> None:
        spec = {"receiver_id": "you", "remote_indexes": [0, 1, 2, 3]}
        task = asyncio.create_task(sender.channel.async_batched_write(objects, spec))
        await asyncio.sleep(0)
        task.cancel()
        (ended,) = await asyncio.gather(task, return_exceptions=True)
        assert ended == 4 or isinstance(ended, asyncio.CancelledError)
        assert sender.channel.endpoint.channel.statistics().in_flight == 0

    asyncio.run(asyncio.wait_for(go(), 20))


def test_many_threads_write_at_once(pair: tuple[Pool, Pool]) -> None:
    sender, receiver = pair
    connect(sender, receiver)
    objects = sender.filled(8)
    errors: list[BaseException] = []

    def write(page: int) -> None:
        try:
            for _ in range(20):
                sender.channel.batched_write([objects[page]], {"receiver_id": "you", "remote_indexes": [page]})
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(page,)) for page in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not errors
    assert all(torch.equal(receiver.page(page), objects[page].raw_data) for page in range(8))


def test_an_unknown_channel_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(Exception, match="host"):
        create_transfer_channel(
            "hots",
            async_mode=False,
            role="sender",
            buffer_ptr=1,
            buffer_size=1,
            align_bytes=1,
            tp_rank=0,
            peer_init_url=None,
        )
    assert issubclass(KVLinkChannel, object)
