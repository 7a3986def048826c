import asyncio
import os
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from kvlink._pool import BufferPool, Lease, _ThreadWaiter
from kvlink.errors import ClosedError, ConfigError, ForkedError, LeaseError, PoolTimeout, PoolTooSmall

LONG = 30.0  # a wait that must end for another reason


def make_pool(pages=8, page_bytes=16, rest=0):
    return BufferPool(SimpleNamespace(nbytes=pages * page_bytes + rest), page_bytes)


def until(condition):
    """Waits for a condition that another thread brings about."""
    deadline = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < deadline, "the condition never came"
        time.sleep(0.001)


class Call(threading.Thread):
    """An allocate in a thread of its own, queued when the constructor returns."""

    def __init__(self, pool, size, timeout=LONG):
        super().__init__(daemon=True)
        self.pool, self.size, self.timeout = pool, size, timeout
        self.lease = self.error = None
        before = pool.statistics().waiters
        self.start()
        until(lambda: pool.statistics().waiters > before or not self.is_alive())

    def run(self):
        try:
            self.lease = self.pool.allocate(self.size, timeout=self.timeout)
        except Exception as error:
            self.error = error

    def end(self):
        self.join(LONG)
        assert not self.is_alive()
        return self


def test_pages_and_offsets():
    pool = make_pool(pages=4, page_bytes=100, rest=99)
    assert pool.capacity == 4
    with pool.allocate(3) as lease:
        assert lease.pages.dtype == np.int64
        assert lease.pages.tolist() == [0, 1, 2]
        assert lease.offsets.tolist() == [0, 100, 200]
        assert len(lease) == 3
        with pytest.raises(ValueError, match="read-only"):
            lease.pages[0] = 7
    assert lease.released
    assert pool.statistics().pages_free == 4


def test_released_pages_come_out_again_in_rising_order():
    pool = make_pool(8)
    first, second = pool.allocate(4), pool.allocate(4)
    first.release()
    with pool.allocate(4) as again:
        assert again.pages.tolist() == [0, 1, 2, 3]
        second.release()
        with pool.allocate(2) as part:
            assert part.pages.tolist() == [4, 5]


def test_statistics():
    pool = make_pool(8)
    kept, other = pool.allocate(2), pool.allocate(5)
    other.release()
    with pytest.raises(PoolTimeout):
        pool.allocate(7)
    stats = pool.statistics()
    assert (stats.pages_total, stats.pages_free, stats.pages_leased, stats.page_bytes) == (8, 6, 2, 16)
    assert (stats.high_water, stats.allocations, stats.timeouts, stats.waiters) == (7, 2, 1, 0)
    with pytest.raises(AttributeError):
        stats.pages_total = 3
    kept.release()


def test_what_can_never_fit_fails_at_once_even_with_a_deadline():
    started = time.monotonic()
    with pytest.raises(PoolTooSmall) as caught:
        make_pool(8).allocate(9, timeout=LONG)
    assert time.monotonic() - started < LONG / 2
    assert (caught.value.requested, caught.value.capacity) == (9, 8)
    assert "9" in str(caught.value)


def test_no_wait_and_a_deadline():
    pool = make_pool(4)
    with pool.allocate(3):
        with pytest.raises(PoolTimeout, match="at once: 1 of 4") as caught:
            pool.allocate(2)
        assert isinstance(caught.value, TimeoutError)
        started = time.monotonic()
        with pytest.raises(PoolTimeout, match=r"within 0\.05 s"):
            pool.allocate(2, timeout=0.05)
        assert time.monotonic() - started >= 0.05
        assert pool.statistics().waiters == 0
    pool.allocate(4).release()


def test_nothing_is_a_lease_too():
    pool = make_pool(1)
    with pool.allocate(1), pool.allocate(0) as empty:
        assert empty.pages.tolist() == []


@pytest.mark.parametrize("n", [-1, 1.5, "2", None, True])
def test_a_wrong_number_of_pages(n):
    with pytest.raises(ConfigError, match="expected a number of pages"):
        make_pool().allocate(n)


@pytest.mark.parametrize("timeout", [-1, float("nan")])
def test_a_wrong_timeout(timeout):
    with pytest.raises(ConfigError, match="timeout"):
        make_pool().allocate(1, timeout=timeout)


@pytest.mark.parametrize("page_bytes", [0, -1, 1.5, True, "4"])
def test_a_wrong_page(page_bytes):
    with pytest.raises(ConfigError, match="page_bytes"):
        BufferPool(SimpleNamespace(nbytes=100), page_bytes)


def test_a_region_smaller_than_a_page():
    with pytest.raises(PoolTooSmall, match="not one page"):
        BufferPool(SimpleNamespace(nbytes=15), 16)


def test_double_release_and_use_after_release():
    pool = make_pool(4)
    lease = pool.allocate(2)
    lease.release()
    with pytest.raises(LeaseError, match="released before"):
        lease.release()
    for use in (lambda: lease.pages, lambda: lease.offsets):
        with pytest.raises(LeaseError, match="released before"):
            use()
    assert pool.statistics().pages_free == 4


def test_a_lease_released_by_two_threads_counts_once():
    for _ in range(200):
        pool = make_pool(4)
        lease = pool.allocate(3)
        barrier = threading.Barrier(2)
        errors = []

        def release(lease=lease, barrier=barrier, errors=errors):
            barrier.wait()
            try:
                lease.release()
            except LeaseError as error:
                errors.append(error)

        threads = [threading.Thread(target=release) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(errors) == 1
        assert pool.statistics().pages_free == 4


def test_a_dropped_lease_warns_and_keeps_its_pages():
    pool = make_pool(4)
    with pytest.warns(ResourceWarning, match="3 pages"):
        pool.allocate(3)
    assert pool.statistics().pages_free == 1


def test_waiters_are_served_in_order_and_small_ones_do_not_overtake():
    pool = make_pool(4)
    held = [pool.allocate(1) for _ in range(4)]
    large, small = Call(pool, 3), Call(pool, 1)
    held.pop().release()
    with pytest.raises(PoolTimeout, match="2 calls wait"):
        pool.allocate(1)
    assert large.is_alive()
    assert small.is_alive()
    held.pop().release()
    held.pop().release()
    assert large.end().lease is not None
    assert small.is_alive()
    held.pop().release()
    small.end().lease.release()
    large.lease.release()
    assert pool.statistics().pages_free == 4


def test_those_behind_go_on_when_the_first_gives_up():
    pool = make_pool(4)
    held = pool.allocate(3)
    large = Call(pool, 4, timeout=0.1)
    small = Call(pool, 1)
    assert isinstance(large.end().error, PoolTimeout)
    small.end().lease.release()
    held.release()


def test_close_wakes_those_who_wait():
    pool = make_pool(2)
    held = pool.allocate(2)
    calls = [Call(pool, 1), Call(pool, 2, timeout=None)]
    pool.close()
    pool.close()
    for call in calls:
        assert isinstance(call.end().error, ClosedError)
    with pytest.raises(ClosedError):
        pool.allocate(1)
    held.release()
    assert pool.statistics().pages_free == 2


def test_context_manager_closes():
    with make_pool() as pool:
        pass
    with pytest.raises(ClosedError):
        pool.allocate(1)


def test_many_threads_never_share_a_page():
    pool = make_pool(16)
    owner = [0] * 16
    clashes = []

    def work(seed):
        random = np.random.default_rng(seed)
        for _ in range(300):
            with pool.allocate(int(random.integers(1, 9)), timeout=LONG) as lease:
                for page in lease.pages:
                    owner[page] += 1
                    if owner[page] != 1:
                        clashes.append(page)
                for page in lease.pages:
                    owner[page] -= 1

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not clashes
    stats = pool.statistics()
    assert (stats.pages_free, stats.waiters, stats.allocations) == (16, 0, 1800)


# ---- asyncio ----
def test_async_waits_without_blocking_the_loop():
    async def run():
        pool = make_pool(4)
        held = await pool.allocate_async(4)
        waiting = asyncio.create_task(pool.allocate_async(2, timeout=LONG))
        await asyncio.sleep(0)
        assert pool.statistics().waiters == 1
        thread = threading.Thread(target=held.release)  # released from another thread
        thread.start()
        lease = await waiting
        thread.join()
        lease.release()
        assert pool.statistics().pages_free == 4

    asyncio.run(run())


def test_async_deadline_close_and_too_small():
    async def run():
        pool = make_pool(2)
        held = pool.allocate(2)
        with pytest.raises(PoolTooSmall):
            await pool.allocate_async(3, timeout=LONG)
        with pytest.raises(PoolTimeout):
            await pool.allocate_async(1)
        with pytest.raises(PoolTimeout):
            await pool.allocate_async(1, timeout=0.02)
        waiting = asyncio.create_task(pool.allocate_async(1, timeout=None))
        await asyncio.sleep(0)
        pool.close()
        with pytest.raises(ClosedError):
            await waiting
        held.release()

    asyncio.run(run())


@pytest.mark.parametrize("grant_first", [False, True])
def test_a_cancelled_task_leaves_nothing_behind(grant_first):
    async def run():
        pool = make_pool(2)
        held = pool.allocate(2)
        waiting = asyncio.create_task(pool.allocate_async(2, timeout=LONG))
        await asyncio.sleep(0)
        if grant_first:
            held.release()  # the lease is granted, but the task has not run yet
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        if not grant_first:
            held.release()
        stats = pool.statistics()
        assert (stats.pages_free, stats.waiters) == (2, 0)

    asyncio.run(run())


def test_pages_granted_to_a_closed_loop_come_back():
    pool = make_pool(2)
    held = pool.allocate(2)
    loop = asyncio.new_event_loop()
    task = loop.create_task(pool.allocate_async(1, timeout=None))
    loop.run_until_complete(asyncio.sleep(0))
    assert pool.statistics().waiters == 1
    loop.close()
    held.release()
    assert pool.statistics().pages_free == 2
    task._log_destroy_pending = False  # it can never finish: its loop is closed on purpose


# ---- fork ----
def test_a_child_may_not_use_the_parents_pool():
    pool = make_pool(2)
    lease = pool.allocate(1)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            refused = 0
            for call in (lambda: pool.allocate(1), lease.release, pool.statistics):
                try:
                    call()
                except ForkedError:
                    refused += 1
            pool.close()
            if refused == 3:
                make_pool(2).allocate(1)  # one of its own works
                code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    lease.release()


# ---- against a plain model ----
class PoolMachine(RuleBasedStateMachine):
    """The pool against sets of pages. Waits do not occur here; the tests above have them."""

    leases = Bundle("leases")

    def __init__(self):
        super().__init__()
        self.total = 7
        self.pool = make_pool(self.total)
        self.held = {}
        self.high_water = self.allocations = self.timeouts = 0

    @property
    def leased(self):
        return sum(map(len, self.held.values()))

    @rule(target=leases, n=st.integers(0, 9))
    def allocate(self, n):
        if n > self.total:
            with pytest.raises(PoolTooSmall):
                self.pool.allocate(n)
            return None
        if n > self.total - self.leased:
            with pytest.raises(PoolTimeout):
                self.pool.allocate(n)
            self.timeouts += 1
            return None
        lease = self.pool.allocate(n)
        self.held[lease] = set(lease.pages.tolist())
        assert len(self.held[lease]) == n
        self.allocations += 1
        self.high_water = max(self.high_water, self.leased)
        return lease

    @rule(lease=leases)
    def look(self, lease):
        if lease is None:
            return
        if lease in self.held:
            assert set(lease.pages.tolist()) == self.held[lease]
            assert (lease.offsets == lease.pages * 16).all()
        else:
            with pytest.raises(LeaseError):
                lease.pages  # noqa: B018

    @rule(lease=leases)
    def release(self, lease):
        if lease is None:
            return
        if lease in self.held:
            lease.release()
            del self.held[lease]
        else:
            with pytest.raises(LeaseError):
                lease.release()

    @rule(lease=consumes(leases))
    def leave(self, lease):
        if lease in self.held:
            with lease:
                pass
            del self.held[lease]

    @invariant()
    def books_agree(self):
        pages = [page for held in self.held.values() for page in held]
        assert len(pages) == len(set(pages))
        assert set(pages) <= set(range(self.total))
        stats = self.pool.statistics()
        assert (stats.pages_leased, stats.pages_free) == (self.leased, self.total - self.leased)
        assert (stats.high_water, stats.allocations, stats.timeouts) == (
            self.high_water,
            self.allocations,
            self.timeouts,
        )

    def teardown(self):
        for lease in self.held:
            lease.release()
        assert self.pool.statistics().pages_free == self.total


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


class QueueMachine(RuleBasedStateMachine):
    """Waiters without threads: what `allocate` does between its steps, in any order, against a plain queue."""

    waiters = Bundle("waiters")

    def __init__(self):
        super().__init__()
        self.total = 6
        self.pages = make_pool(self.total)._pages
        self.free = self.total
        self.queue = []  # waiters in order
        self.granted = []  # waiters whose lease nobody took yet
        self.held = []

    def serve(self):
        """The model's rule: the first in the queue, as long as it fits."""
        while self.queue and self.queue[0].size <= self.free:
            waiter = self.queue.pop(0)
            self.free -= waiter.size
            self.granted.append(waiter)

    @rule(target=waiters, n=st.integers(0, 6))
    def call(self, n):
        started = self.pages.start(n, LONG, _ThreadWaiter)
        if self.queue or n > self.free:
            assert isinstance(started, _ThreadWaiter)
            self.queue.append(started)
            return started
        assert isinstance(started, Lease)
        self.free -= n
        self.held.append(started)
        return None

    @rule(waiter=consumes(waiters))
    def deadline_passes_or_wakes(self, waiter):
        if waiter is None:
            return
        if waiter in self.granted:
            lease = self.pages.give_up(waiter, LONG)
            self.granted.remove(waiter)
            self.held.append(lease)
            return
        with pytest.raises(PoolTimeout):
            self.pages.give_up(waiter, LONG)
        self.queue.remove(waiter)
        self.serve()

    @rule(waiter=consumes(waiters))
    def caller_goes_away(self, waiter):
        if waiter is None:
            return
        self.pages.abandon(waiter)
        if waiter in self.granted:
            self.granted.remove(waiter)
            self.free += waiter.size
        else:
            self.queue.remove(waiter)
        self.serve()

    @rule(index=st.integers(0, 5))
    def release(self, index):
        if not self.held:
            return
        lease = self.held.pop(index % len(self.held))
        self.free += len(lease)
        lease.release()
        self.serve()

    @invariant()
    def books_agree(self):
        stats = self.pages.statistics()
        assert (stats.pages_free, stats.waiters) == (self.free, len(self.queue))
        for waiter in self.granted:
            assert waiter.event.is_set()
            assert len(waiter.lease) == waiter.size
        for waiter in self.queue:
            assert not waiter.event.is_set()
        pages = [page for lease in [*self.held, *(w.lease for w in self.granted)] for page in lease.pages]
        assert len(pages) == len(set(pages)) == self.total - self.free

    def teardown(self):
        self.pages.close()
        for waiter in self.queue:
            assert isinstance(waiter.error, ClosedError)
            assert waiter.event.is_set()
        for lease in [*self.held, *(waiter.lease for waiter in self.granted)]:
            lease.release()
        assert self.pages.statistics().pages_free == self.total


TestQueueMachine = QueueMachine.TestCase
TestQueueMachine.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
