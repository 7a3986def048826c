import asyncio
import threading

import pytest

import kvlink
from kvlink.control.threads import ControlLoop, WorkerPool


def test_one_thread_keeps_the_order():
    pool = WorkerPool("order", 1)
    seen, done = [], threading.Event()
    for number in range(200):
        pool.submit(lambda number=number: seen.append(number))
    pool.submit(done.set)
    assert done.wait(10)
    assert seen == list(range(200))
    pool.close()
    assert pool.join(5)


def test_threads_are_bounded_started_on_demand_and_daemons():
    pool = WorkerPool("bounded", 3)
    assert pool._threads == []
    barrier, release = threading.Barrier(4), threading.Event()

    def job():
        barrier.wait(10)
        release.wait(10)

    for _ in range(6):
        pool.submit(job)
    barrier.wait(10)
    assert len(pool._threads) == 3 and all(thread.daemon for thread in pool._threads)
    barrier.abort()
    release.set()
    pool.close()
    assert pool.join(10)


def test_a_full_backlog_is_busy_and_a_closed_pool_is_closed():
    pool = WorkerPool("full", 1, backlog=2)
    entered, release = threading.Event(), threading.Event()
    pool.submit(lambda: (entered.set(), release.wait(10)))
    assert entered.wait(10)
    pool.submit(lambda: None)
    pool.submit(lambda: None)
    with pytest.raises(kvlink.BusyError):
        pool.submit(lambda: None)
    release.set()
    pool.close()
    with pytest.raises(kvlink.ClosedError):
        pool.submit(lambda: None)


def test_a_raising_job_does_not_end_its_thread(caplog):
    pool = WorkerPool("raising", 1)
    done = threading.Event()
    pool.submit(lambda: 1 / 0)
    pool.submit(done.set)
    assert done.wait(10)
    assert "ZeroDivisionError" in caplog.text
    pool.close()


def test_loop_runs_offloads_and_ends():
    loop, pool = ControlLoop("a-loop"), WorkerPool("offload", 2)

    async def work():
        return await loop.offload(pool, lambda a, b: a + b, 1, 2)

    async def fail():
        await loop.offload(pool, lambda: 1 / 0)

    assert loop.run(work, 10) == 3
    with pytest.raises(ZeroDivisionError):
        loop.run(fail, 10)
    loop.stop(5)
    loop.stop(5)
    with pytest.raises(kvlink.ClosedError):
        loop.run(work, 10)
    with pytest.raises(kvlink.ClosedError):
        loop.call(print)
    pool.close()


def test_a_timeout_of_run_cancels_the_coroutine():
    loop = ControlLoop("b-loop")
    cancelled = threading.Event()

    async def forever():
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            cancelled.set()

    with pytest.raises((TimeoutError, asyncio.TimeoutError)):
        loop.run(forever, 0.05)
    assert cancelled.wait(10)
    loop.stop(5)
