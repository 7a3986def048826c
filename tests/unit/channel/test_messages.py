import asyncio
import threading
import time

import pytest

import kvlink


def test_request_and_reply(pair):
    pair.b.on_request = lambda peer, message: peer.address.encode() + b"|" + message
    assert pair.peer_b.request(b"x", timeout=10) == pair.a.address.encode() + b"|x"
    assert asyncio.run(pair.peer_b.request_async(b"y", timeout=10)).endswith(b"|y")


def test_requests_go_both_ways_and_nest(pair):
    pair.a.on_request = lambda peer, message: message[::-1]
    pair.b.on_request = lambda peer, message: b"<" + peer.request(message, timeout=10) + b">"
    assert pair.peer_b.request(b"abc", timeout=10) == b"<cba>"


@pytest.mark.parametrize("size", [0, 1, 16 << 10, (16 << 10) + 1, 1 << 20])
def test_sizes_up_to_one_mebibyte(pair, size):
    pair.b.on_request = lambda peer, message: message
    message = bytes(range(256)) * (size // 256) + b"z" * (size % 256)
    assert pair.peer_b.request(message, timeout=20) == message


def test_too_long_messages_are_refused_here(pair):
    with pytest.raises(kvlink.ConfigError, match="1048577"):
        pair.peer_b.request(bytes((1 << 20) + 1), timeout=1)
    with pytest.raises(kvlink.ConfigError, match="65537"):
        pair.peer_b.notify(bytes((1 << 16) + 1))
    with pytest.raises(kvlink.ConfigError, match="65537"):
        pair.peer_b.put(pair.ranges(), notify=bytes((1 << 16) + 1))
    with pytest.raises(kvlink.ConfigError, match="str"):
        pair.peer_b.notify("text")


def test_an_exception_of_the_handler_reaches_the_caller(pair):
    def fail(peer, message):
        raise LookupError("no such block")

    pair.b.on_request = fail
    with pytest.raises(kvlink.RequestError, match="LookupError: no such block"):
        pair.peer_b.request(b"x", timeout=10)
    pair.b.on_request = lambda peer, message: "text"
    with pytest.raises(kvlink.RequestError, match="instead of bytes"):
        pair.peer_b.request(b"x", timeout=10)
    pair.b.on_request = None
    with pytest.raises(kvlink.RequestError, match="no on_request"):
        pair.peer_b.request(b"x", timeout=10)


def test_a_slow_handler_times_out_and_delays_neither_others_nor_notifications(pair, recorder):
    release = threading.Event()
    entered = threading.Event()

    def handler(peer, message):
        if message == b"slow":
            entered.set()
            release.wait(20)
        return message

    pair.b.on_request, pair.b.on_notify = handler, recorder
    try:
        with pytest.raises(kvlink.RequestTimeout):
            pair.peer_b.request(b"slow", timeout=0.2)
        assert entered.wait(5)
        assert pair.peer_b.request(b"fast", timeout=10) == b"fast"
        pair.peer_b.notify(b"n")
        recorder.wait(1)
    finally:
        release.set()
    assert pair.peer_b.request(b"again", timeout=10) == b"again"


def test_many_requests_at_once_are_answered_or_told_that_the_peer_is_busy(pair):
    pair.b.on_request = lambda peer, message: message
    results = []

    def ask(number):
        for step in range(20):
            body = b"%d/%d" % (number, step)
            results.append(pair.peer_b.request(body, timeout=30) == body)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == [True] * 160


def test_notifications_arrive_in_order(pair, recorder):
    pair.b.on_notify = recorder
    for number in range(500):
        pair.peer_b.notify(b"%d" % number)
    recorder.wait(500)
    assert recorder.messages == [b"%d" % number for number in range(500)]
    assert recorder.calls[0][0] is pair.peer_a


def test_a_put_is_visible_when_its_notification_arrives(pair):
    seen = []
    arrived = threading.Event()

    def on_notify(peer, message):
        offset = int(message)
        seen.append(bytes(pair.memory_b[offset : offset + 64]) == bytes(pair.memory_a[offset : offset + 64]))
        if len(seen) == 100:
            arrived.set()

    pair.b.on_notify = on_notify
    for number in range(100):
        offset = number * 64
        pair.peer_b.put(pair.ranges([(offset, offset, 64)]), notify=b"%d" % offset)
    assert arrived.wait(20)
    assert all(seen)


@pytest.mark.parametrize("fixture", ["pair", "tcp_pair"])
def test_notify_comes_after_the_puts_that_completed_before(fixture, request, recorder):
    pair = request.getfixturevalue(fixture)
    pair.b.on_notify = recorder
    for number in range(100):
        assert pair.peer_b.put(pair.ranges(), notify=b"put %d" % number).wait(10)
        pair.peer_b.notify(b"own %d" % number)
    recorder.wait(200)
    assert recorder.messages == [b"%s %d" % (kind, number) for number in range(100) for kind in (b"put", b"own")]


def test_a_request_comes_after_the_puts_that_completed_before(pair, recorder):
    pair.b.on_notify = recorder
    pair.b.on_request = lambda peer, message: b"%d" % len(recorder.wait(1))
    assert pair.peer_b.put(pair.ranges(), notify=b"put").wait(10)
    assert pair.peer_b.request(b"how many", timeout=10) == b"1"


def test_a_failed_put_sends_no_notification(tcp_pair, recorder):
    pair = tcp_pair
    pair.b.on_notify = recorder
    with pytest.raises(kvlink.RangeError):
        pair.peer_b.put(pair.ranges([(0, 1 << 20, 1)]), notify=b"never")
    transfer = pair.peer_b.put(pair.ranges([(0, 0, 1 << 20)] * 64), notify=b"cancelled")
    transfer.cancel()
    try:
        transfer.wait(10)
        expected = [b"cancelled", b"end"]  # it was quicker than the cancel
    except kvlink.TransferCancelled:
        expected = [b"end"]
    pair.peer_b.notify(b"end")
    recorder.wait(len(expected))
    assert recorder.messages == expected


def test_a_raising_on_notify_harms_nobody(pair, recorder):
    def on_notify(peer, message):
        recorder(peer, message)
        raise ValueError("on purpose")

    pair.b.on_notify = on_notify
    pair.peer_b.notify(b"1")
    pair.peer_b.notify(b"2")
    recorder.wait(2)
    pair.b.on_request = lambda peer, message: message
    assert pair.peer_b.request(b"still here", timeout=10) == b"still here"


def test_notifications_without_a_handler_are_counted(pair):
    pair.peer_b.notify(b"lost")
    pair.b.on_request = lambda peer, message: b""
    pair.peer_b.request(b"", timeout=10)
    assert pair.b.statistics().dropped_notifications == 1


def test_a_slow_on_notify_pushes_back_instead_of_filling_memory(pair, monkeypatch):
    from kvlink.control import session

    monkeypatch.setattr(session, "MAX_UNDELIVERED_BYTES", 64 << 10)
    release = threading.Event()
    count = []

    def on_notify(peer, message):
        release.wait(20)
        count.append(len(message))

    pair.b.on_notify = on_notify
    for _ in range(200):
        pair.peer_b.notify(bytes(4096))
    deadline = time.monotonic() + 10
    while pair.peer_b._session.queued_bytes < 100 * 4096 and time.monotonic() < deadline:
        time.sleep(0.005)  # until the sender holds what the reader does not take
    assert pair.peer_b._session.queued_bytes > 100 * 4096
    release.set()
    while len(count) < 200 and time.monotonic() < deadline + 10:
        time.sleep(0.005)
    assert count == [4096] * 200


def test_request_from_a_callback_thread_works(pair):
    answers = []
    done = threading.Event()
    pair.a.on_request = lambda peer, message: b"pong"

    def on_notify(peer, message):
        answers.append(peer.request(b"ping", timeout=10))
        done.set()

    pair.b.on_notify = on_notify
    pair.peer_b.notify(b"go")
    assert done.wait(10)
    assert answers == [b"pong"]
