"""Manners: no step blocked, no CPU when idle, no affinity changed."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path

import pytest
from tests.vllm.harness import Request, decode, prefill, settle, warned
from vllm.v1.request import RequestStatus


def test_a_silent_address_blocks_no_step_and_no_other_request(engines, caplog):
    """Something accepts the connection and never speaks: the connect runs in the background, with a deadline."""
    listener = socket.create_server(("127.0.0.1", 0))
    d = engines("kv_consumer", blocks=64, **{"kvlink.connect_timeout": 1.0})
    p = engines("kv_producer")
    tokens = list(range(20))
    silent = dict(prefill(p, "p1", tokens), kvlink_addresses=[f"tcp://127.0.0.1:{listener.getsockname()[1]}"])
    good = prefill(p, "p2", tokens)
    slowest = 0.0
    try:
        stuck, fine = decode(d, "d1", tokens, silent), decode(d, "d2", tokens, good)
        deadline = time.monotonic() + 20
        while stuck.first_token is None or fine.first_token is None:
            assert time.monotonic() < deadline
            begin = time.monotonic()
            d.step()
            slowest = max(slowest, time.monotonic() - begin)
            if fine.first_token is not None and stuck.first_token is None:
                assert stuck.status == RequestStatus.WAITING_FOR_REMOTE_KVS
            time.sleep(0.001)
        # At once, from the memory of the failed connect.
        begin = time.monotonic()
        again = decode(d, "d3", tokens, silent)
        d.run()
        assert time.monotonic() - begin < 0.8
    finally:
        listener.close()
    assert slowest < 0.8
    assert (stuck.computed_here, fine.computed_here, again.computed_here) == (20, 1, 20)
    assert len(warned(caplog, "phase connect")) == 2


def test_idle_uses_no_cpu(engines):
    p, d = engines("kv_producer"), engines("kv_consumer")
    decode(d, "d1", list(range(20)), prefill(p, "p1", list(range(20))))
    settle(p, d)
    begin = time.process_time()
    time.sleep(2.0)
    # Both engines of this process together, connected, with nothing to do.
    assert time.process_time() - begin < 0.02


def test_affinity_is_left_alone_unless_told_otherwise(engines):
    before = os.sched_getaffinity(0)
    core = max(before)
    p = engines("kv_producer")
    d = engines("kv_consumer", **{"kvlink.cpu_affinity": str(core)})
    decode(d, "d1", list(range(20)), prefill(p, "p1", list(range(20))))
    settle(p, d)
    assert os.sched_getaffinity(0) == before
    bound = [os.sched_getaffinity(t.native_id) for t in threading.enumerate() if t.name.startswith("kvlink-pull")]
    assert bound == [{core}]
    # The channel's own threads inherit it; the prefiller's keep what this process has.
    tasks = [os.sched_getaffinity(int(task.name)) for task in Path("/proc/self/task").iterdir()]
    assert sum(cores == {core} for cores in tasks) >= 3
    assert sum(cores == before for cores in tasks) >= 3


def test_listening_beyond_loopback_needs_a_secret(engines):
    from kvlink.errors import KvlinkError

    with pytest.raises(KvlinkError, match="secret"):
        engines("kv_producer", **{"kvlink.listen": "tcp://0.0.0.0:0"})
    engines("kv_producer", **{"kvlink.listen": "tcp://0.0.0.0:0", "kvlink.secret": "s"})


def timed(engine):
    begin = time.monotonic()
    engine.step()
    return time.monotonic() - begin


def test_empty_steps_sleep_only_while_something_is_open_and_wake_at_its_end(engines):
    wait = 1.0
    p = engines("kv_producer", **{"kvlink.idle_wait": wait})
    d = engines("kv_consumer", blocks=64, **{"kvlink.idle_wait": wait, "kvlink.handoff_wait": 20.0})
    assert timed(d) < wait / 2  # nothing open
    answer = prefill(p, "p1", list(range(20)))
    assert timed(p) > wait * 0.9  # a lease is held
    unknown = dict(answer, kvlink_handoff="3" * 32)
    stuck = decode(d, "d1", list(range(20)), unknown)
    d.step()
    assert timed(d) > wait * 0.9  # a pull waits
    d.add(Request("plain", [1, 2, 3]))
    assert timed(d) < wait / 2  # a step with work never sleeps
    threading.Timer(0.1, d.workers[0]._runner._pulls.cancel, (["d1"],)).start()
    assert timed(d) < wait / 2  # it wakes when the pull ends
    decode(d, "d2", list(range(20)), answer)
    settle(p, d)
    assert stuck.computed_here == 20
