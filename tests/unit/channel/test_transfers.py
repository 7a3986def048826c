import asyncio
import gc
import threading

import numpy as np
import pytest

import kvlink


@pytest.mark.parametrize("fixture", ["pair", "tcp_pair"])
def test_put_and_get(fixture, request):
    pair = request.getfixturevalue(fixture)
    blocks = [(0, 8192, 4096), (65536, 0, 100), (7, 500_001, 33)]
    transfer = pair.peer_b.put(pair.ranges(blocks))
    assert transfer.wait(10) is True and transfer.done()
    for local, remote, length in blocks:
        assert bytes(pair.memory_b[remote : remote + length]) == bytes(pair.memory_a[local : local + length])
    result = transfer.result()
    assert result.nbytes == 4096 + 100 + 33 and result.ranges == 3 and result.duration_s > 0
    assert result.path in ("cma", "tcp")
    pair.memory_b[:4096] = 7
    assert pair.peer_b.get(pair.ranges([(0, 0, 4096)])).wait(10)
    assert (pair.memory_a[:4096] == 7).all()


def test_the_acceptor_transfers_too(pair):
    ranges = kvlink.ranges(pair.region_b, pair.peer_a.regions["a"], [(0, 0, 1 << 20)])
    assert pair.peer_a.get(ranges).wait(10)
    assert (pair.memory_a == pair.memory_b).all()


def test_bad_ranges_are_refused_and_move_nothing(pair):
    size = 1 << 20
    for blocks in ([(0, size, 1)], [(size, 0, 1)], [(0, 1, size)], [(0, 0, size + 1)]):
        with pytest.raises(kvlink.RangeError):
            pair.peer_b.put(pair.ranges(blocks))
    wrong = pair.ranges()
    wrong["remote_offset"] = 2**64 - 10
    with pytest.raises(kvlink.RangeError):
        pair.peer_b.put(wrong)
    for bad in (np.zeros(3), [1, 2], np.zeros((2, 2), dtype=kvlink.RANGE)):
        with pytest.raises(kvlink.RangeError):
            pair.peer_b.get(bad)
    assert not pair.memory_b.any()
    assert pair.peer_b.put(pair.ranges()).wait(10)


def test_access_is_checked_here(open_channel):
    a, b = open_channel(), open_channel()
    local = a.register(np.zeros(64, np.uint8), name="x")
    b.register(np.zeros(64, np.uint8), name="r", access="r")
    b.register(np.zeros(64, np.uint8), name="w", access="w")
    peer = a.connect(b.address, timeout=10)
    assert peer.put(kvlink.ranges(local, peer.regions["w"], [(0, 0, 64)])).wait(10)
    assert peer.get(kvlink.ranges(local, peer.regions["r"], [(0, 0, 64)])).wait(10)
    with pytest.raises(kvlink.KvlinkError):
        peer.put(kvlink.ranges(local, peer.regions["r"], [(0, 0, 64)]))
    with pytest.raises(kvlink.KvlinkError):
        peer.get(kvlink.ranges(local, peer.regions["w"], [(0, 0, 64)]))


def test_empty_transfers_complete(pair):
    assert pair.peer_b.put(np.empty(0, dtype=kvlink.RANGE)).wait(5)
    assert pair.peer_b.put(pair.ranges([(0, 0, 0)])).wait(5)


@pytest.mark.parametrize("fixture", ["pair", "tcp_pair"])
def test_await_from_asyncio(fixture, request):
    pair = request.getfixturevalue(fixture)

    async def many():
        transfers = [pair.peer_b.put(pair.ranges([(0, 0, 1 << 20)])) for _ in range(20)]

        async def wait(transfer):
            return await transfer

        return await asyncio.gather(*(wait(transfer) for transfer in transfers for _ in range(3)))

    results = asyncio.run(many())
    assert [result.nbytes for result in results] == [1 << 20] * 60


def test_await_from_two_loops_and_wait_from_threads_at_once(tcp_pair):
    transfer = tcp_pair.peer_b.put(tcp_pair.ranges([(0, 0, 1 << 20)] * 32))
    results = []

    async def wait_async():
        return await transfer

    def in_loop():
        results.append(asyncio.run(wait_async()).nbytes)

    def in_thread():
        results.append(transfer.wait(20) and transfer.result().nbytes)

    threads = [threading.Thread(target=target) for target in (in_loop, in_loop, in_thread, in_thread)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert results == [32 << 20] * 4


def test_cancelling_the_await_does_not_cancel_the_transfer(tcp_pair):
    async def main():
        transfer = tcp_pair.peer_b.put(tcp_pair.ranges([(0, 0, 1 << 20)] * 64))

        async def wait():
            await transfer

        task = asyncio.ensure_future(wait())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return await transfer

    assert asyncio.run(main()).nbytes == 64 << 20


def test_done_callbacks_run_once_each_on_the_callback_thread(pair, recorder):
    transfer = pair.peer_b.put(pair.ranges())
    names = []
    transfer.add_done_callback(lambda done: (names.append(threading.current_thread().name), recorder(done)))
    transfer.add_done_callback(recorder)
    recorder.wait(2)
    transfer.add_done_callback(recorder)
    recorder.wait(3)
    assert recorder.messages == [transfer] * 3
    assert names[0].startswith("kvlink-") and "callback" in names[0]


def test_a_dropped_transfer_goes_on(tcp_pair, recorder):
    tcp_pair.b.on_notify = recorder
    tcp_pair.peer_b.put(tcp_pair.ranges([(0, 0, 1 << 20)]), notify=b"done")
    gc.collect()
    recorder.wait(1)
    assert (tcp_pair.memory_a == tcp_pair.memory_b).all()


def test_result_of_a_running_transfer_is_a_state_error(tcp_pair):
    transfer = tcp_pair.peer_b.put(tcp_pair.ranges([(0, 0, 1 << 20)] * 64))
    if not transfer.done():
        with pytest.raises(kvlink.StateError, match="still runs"):
            transfer.result()
    assert transfer.wait(20)


def test_wait_with_a_timeout_says_false_and_leaves_it_running(tcp_pair):
    transfer = tcp_pair.peer_b.put(tcp_pair.ranges([(0, 0, 1 << 20)] * 256))
    transfer.wait(0.0)
    assert transfer.wait(30) is True


def test_cancel(tcp_pair):
    transfer = tcp_pair.peer_b.put(tcp_pair.ranges([(0, 0, 1 << 20)] * 512))
    transfer.cancel()
    try:
        assert transfer.wait(10)
    except kvlink.TransferCancelled as error:
        assert "cancel" in str(error)
    assert tcp_pair.peer_b.put(tcp_pair.ranges()).wait(10), "the peer still works"


def test_a_deadline_ends_a_transfer_with_its_own_error(tcp_pair):
    transfer = tcp_pair.peer_b.put(tcp_pair.ranges([(0, 0, 1 << 20)] * 2048), timeout=0.001)
    with pytest.raises(kvlink.TransferTimeout):
        transfer.wait(20)


def test_transfers_from_many_threads(pair):
    errors = []

    def work(number):
        try:
            offset = number * 4096
            for _ in range(50):
                assert pair.peer_b.put(pair.ranges([(offset, offset, 4096)])).wait(20)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    assert (pair.memory_b[: 8 * 4096] == pair.memory_a[: 8 * 4096]).all()
    assert pair.a.statistics().succeeded == 400
