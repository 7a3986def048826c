"""The binding against the real engine and a provider whose two ends live in this process."""

import contextlib
import gc
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from types import SimpleNamespace

import numpy as np
import pytest

from kvlink import errors
from kvlink._engine import (
    ACCEPTOR,
    GET,
    HOST,
    INITIATOR,
    PUT,
    READ,
    WRITE,
    Capability,
    EngineChannel,
    EngineProvider,
    Status,
)
from kvlink._memory import host_buffer
from kvlink._ranges import RANGE, ranges

LONG = 30.0


@pytest.fixture(scope="module")
def provider(loop_library):
    return EngineProvider.load(str(loop_library))


@contextlib.contextmanager
def opened(provider, mode="done", nbytes=4096, access=READ | WRITE, remote_access=READ | WRITE, **arguments):
    """A channel with one connected link to itself, a source and a target region."""
    channel = EngineChannel.open(provider, options={"mode": mode}, **arguments)
    try:
        source, target = np.arange(nbytes, dtype=np.uint8), np.zeros(nbytes, np.uint8)
        mem = channel.mem_open(source.ctypes.data, nbytes, HOST, -1, access)
        target_mem = channel.mem_open(target.ctypes.data, nbytes, HOST, -1, READ | WRITE)
        peer = channel.peer_open(INITIATOR, 1, b"s" * 16, b"k" * 32, "here", "there")
        peer.connect(peer.describe(), LONG)
        rmem = peer.rmem_open(channel.mem_export(target_mem), nbytes, remote_access, LONG)
        link = SimpleNamespace(
            channel=channel, peer=peer, source=source, target=target, mem=mem, target_mem=target_mem, rmem=rmem
        )
        del peer  # the test may drop it
        yield link
    finally:
        channel.close(1.0)


def whole(link):
    return ranges(link.mem, link.rmem, [[0, 0, len(link.source)]])


def test_provider(provider, loop_library):
    assert (provider.name, provider.version, provider.wire_version) == ("loop", "1.2.3", 3)
    assert provider.path_names == ("none", "memcpy")
    assert EngineProvider.load(str(loop_library)) is provider
    provider.probe()


def test_probe_says_why_not(provider, monkeypatch):
    monkeypatch.setenv("LOOP_PROVIDER_REASON", "no device here")
    with pytest.raises(errors.ChannelUnavailableError, match="no device here") as caught:
        provider.probe()
    assert (caught.value.site, caught.value.vendor_code) == ("getenv", 5)


@pytest.mark.parametrize("content", [None, b"text"])
def test_load_of_what_is_no_library(tmp_path, content):
    path = tmp_path / "x.so"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(errors.ChannelUnavailableError, match=r"x\.so"):
        EngineProvider.load(str(path))


def test_load_of_a_library_that_is_no_provider():
    from kvlink._native import library_path

    with pytest.raises(errors.ChannelUnavailableError, match="kvl_provider_init"):
        EngineProvider.load(str(library_path("engine")))


def test_attributes(provider):
    with opened(provider) as link:
        attributes = link.channel.attributes
        assert not attributes.connect_both
        assert attributes.max_links == 3
        assert Capability.PUT | Capability.COPY in attributes.capabilities
        assert Capability.STREAM not in attributes.capabilities
        assert (attributes.alignment, attributes.max_export, attributes.exclusion_group) == (1, 4096, "")


def test_bad_option(provider):
    with pytest.raises(errors.ConfigError, match="unknown option"):
        EngineChannel.open(provider, options={"mode": "sideways"})
    with pytest.raises(errors.ConfigError):
        EngineChannel.open(provider, options={"colour": "red"})


@pytest.mark.parametrize("mode", ["done", "queue"])
def test_put_and_get_move_exactly_the_ranges(provider, mode):
    with opened(provider, mode) as link:
        blocks = [[0, 100, 10], [1000, 0, 1], [4095, 4095, 1], [5, 5, 0]]
        transfer = link.peer.submit(PUT, ranges(link.mem, link.rmem, blocks))
        assert transfer.wait(LONG)
        assert transfer.done()
        expected = np.zeros_like(link.target)
        for local, remote, length in blocks:
            expected[remote : remote + length] = link.source[local : local + length]
        assert (link.target == expected).all()
        result = transfer.result()
        assert result.status == Status.OK
        assert (result.path, result.nbytes, result.ranges) == ("memcpy", 12, 3)
        assert 0 < result.duration < LONG
        assert result.error("put") is None
        link.target[:] = 7
        assert link.peer.submit(GET, whole(link)).wait(LONG)
        assert (link.source == 7).all()


def test_the_array_may_go_at_once(provider):
    with opened(provider, "queue") as link:
        array = whole(link)
        transfer = link.peer.submit(PUT, array)
        array["length"] = 0
        del array
        assert transfer.wait(LONG)
        assert (link.target == link.source).all()


def test_no_ranges_complete_at_once(provider):
    with opened(provider, "hang") as link:
        transfer = link.peer.submit(PUT, np.empty(0, RANGE))
        assert transfer.done()
        assert transfer.result().nbytes == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda link: [(link.mem, link.rmem, 0, 0, 1)],
        lambda link: np.zeros((1, 3), np.int64),
        lambda link: np.zeros(1, RANGE.descr[:4]),
        lambda link: whole(link).reshape(1, 1),
        lambda link: np.concatenate([whole(link)] * 4)[::2],
        lambda link: whole(link).tobytes(),
        lambda link: None,
    ],
)
def test_what_is_no_array_of_ranges_is_refused(provider, make):
    with opened(provider) as link:
        with pytest.raises(errors.RangeError, match="expected"):
            link.peer.submit(PUT, make(link))
        assert not link.target.any()


@pytest.mark.parametrize(
    "block",
    [(0, 0, 4097), (1, 0, 4096), (0, 1, 4096), (2**64 - 1, 0, 2), (0, 2**64 - 1, 2), (4097, 0, 0), (0, 0, 2**64 - 1)],
)
def test_ranges_outside_name_the_first_bad_one(provider, block):
    with opened(provider) as link:
        bad = np.array([(link.mem, link.rmem, 0, 0, 1), (link.mem, link.rmem, *block)], RANGE)
        with pytest.raises(errors.RangeError, match="1") as caught:
            link.peer.submit(PUT, bad)
        assert caught.value.operation == "put"
        assert caught.value.peer == "there"
        assert not link.target.any()


@pytest.mark.parametrize(("mem", "rmem"), [(0, None), (None, 0), (None, 2**32 - 1), (12345, None)])
def test_unknown_handles(provider, mem, rmem):
    with opened(provider) as link, pytest.raises(errors.RangeError):
        array = whole(link)
        array["mem"] = link.mem if mem is None else mem
        array["rmem"] = link.rmem if rmem is None else rmem
        link.peer.submit(PUT, array)


def test_access_that_was_not_published(provider):
    with opened(provider, remote_access=READ) as link:
        with pytest.raises(errors.RangeError):
            link.peer.submit(PUT, whole(link))
        assert link.peer.submit(GET, whole(link)).wait(LONG)


def test_a_get_into_memory_that_this_process_may_not_write(provider):
    with opened(provider) as link:
        frozen = bytes(64)
        address = np.frombuffer(frozen, np.uint8).ctypes.data
        mem = link.channel.mem_open(address, 64, HOST, -1, READ, writable=False)
        array = np.concatenate([whole(link), ranges(mem, link.rmem, [[0, 0, 64]])])
        assert link.peer.submit(PUT, array).wait(LONG)
        with pytest.raises(errors.RangeError, match=r"range 1.*read-only"):
            link.peer.submit(GET, array)
        assert frozen == bytes(64)
        link.channel.mem_close(mem, LONG)
        assert link.peer.submit(GET, whole(link)).wait(LONG)


def test_stream_without_the_capability(provider):
    with opened(provider) as link, pytest.raises(errors.UnsupportedError, match="stream"):
        link.peer.submit(PUT, whole(link), stream=1)


def test_a_failed_transfer_carries_the_vendors_words(provider):
    with opened(provider, "fail") as link:
        transfer = link.peer.submit(PUT, whole(link))
        assert transfer.wait(LONG)
        error = transfer.result().error("put", "there")
        assert type(error) is errors.TransferError
        assert (error.site, error.vendor_code) == ("loop_copy", -77)
        assert "told to fail" in str(error)


def test_deadline(provider):
    with opened(provider, "hang") as link:
        transfer = link.peer.submit(GET, whole(link), timeout=0.05)
        assert transfer.result().status == Status.AGAIN
        assert transfer.wait(LONG)
        assert isinstance(transfer.result().error("get"), errors.TransferTimeout)


def test_default_deadline(provider):
    with opened(provider, "hang", default_timeout=0.05) as link:
        transfer = link.peer.submit(GET, whole(link))
        assert transfer.wait(LONG)
        assert isinstance(transfer.result().error("get"), errors.TransferTimeout)


def test_cancel(provider):
    with opened(provider, "hang") as link:
        transfer = link.peer.submit(GET, whole(link))
        assert not transfer.done()
        assert not transfer.wait(0.3)  # more than one slice
        assert not transfer.wait(0)
        transfer.cancel()
        assert transfer.wait(LONG)
        assert type(transfer.result().error("get")) is errors.TransferCancelled


def test_wait_in_one_thread_cancel_in_another(provider):
    with opened(provider, "hang") as link:
        transfer = link.peer.submit(GET, whole(link))
        threading.Timer(0.1, transfer.cancel).start()
        assert transfer.wait(None)


def test_event_descriptor_reports_each_end_once(provider):
    with opened(provider, "queue") as link:
        channel = link.channel
        transfers = [link.peer.submit(PUT, whole(link), notify=True) for _ in range(600)]
        late = link.peer.submit(PUT, whole(link))
        finished = []
        while len(finished) < len(transfers):
            assert select.select([channel.event_fd], [], [], LONG)[0]
            finished += channel.drain()
        assert sorted(finished) == sorted(transfer.id for transfer in transfers)
        assert channel.drain() == []
        assert not select.select([channel.event_fd], [], [], 0)[0]
        assert late.wait(LONG)
        late.notify()
        assert select.select([channel.event_fd], [], [], LONG)[0]
        assert channel.drain() == [late.id]


def test_region_closed_under_a_transfer(provider):
    with opened(provider, "hang") as link:
        transfer = link.peer.submit(PUT, whole(link))
        link.channel.mem_close(link.mem, LONG)
        assert transfer.wait(LONG)
        assert isinstance(transfer.result().error("put"), errors.RegionRevoked)
        with pytest.raises(errors.RangeError):
            link.peer.submit(PUT, whole(link))
        with pytest.raises(errors.KvlinkError):
            link.channel.mem_close(link.mem, LONG)


def test_remote_region_closed_under_a_transfer(provider):
    with opened(provider, "hang") as link:
        transfer = link.peer.submit(PUT, whole(link))
        link.peer.rmem_close(link.rmem, LONG)
        assert transfer.wait(LONG)
        assert isinstance(transfer.result().error("put"), errors.RegionRevoked)


def test_peer_closed_under_a_transfer(provider):
    with opened(provider, "hang") as link:
        transfer = link.peer.submit(PUT, whole(link))
        link.peer.close(Status.LINK_DOWN, "the other process died", 1.0)
        assert transfer.wait(LONG)
        error = transfer.result().error("put", "there")
        assert isinstance(error, errors.PeerLost)
        assert "the other process died" in str(error)
        for call in (lambda: link.peer.submit(PUT, whole(link)), link.peer.check, link.peer.describe):
            with pytest.raises(errors.ClosedError):
                call()
        link.peer.close()


def test_channel_closed_under_a_transfer(provider):
    with opened(provider, "hang") as link:
        transfer = link.peer.submit(PUT, whole(link))
        link.channel.close(0.5)
        link.channel.close(0.5)
        assert transfer.wait(LONG)
        assert transfer.result().error("put") is not None
        for call in (
            link.channel.statistics,
            link.channel.provider_statistics,
            lambda: link.channel.mem_alloc(HOST, 1),
            lambda: link.channel.peer_open(INITIATOR, 2, b"s" * 16, b"k" * 32, "a", "b"),
        ):
            with pytest.raises(errors.ClosedError):
                call()
        with pytest.raises(errors.KvlinkError):
            link.peer.submit(PUT, whole(link))


def test_objects_dropped_in_any_order(provider):
    with opened(provider, "hang") as link:
        transfer = link.peer.submit(PUT, whole(link), timeout=0.2)
        gone = weakref.ref(link.peer)
        link.peer = None
        gc.collect()
        assert gone() is None
        assert transfer.wait(LONG)
        assert transfer.result().error("put") is not None
    channel = EngineChannel.open(provider, options={})
    del channel  # closes itself


def test_connect_errors(provider):
    channel = EngineChannel.open(provider, options={})
    try:
        ours = channel.peer_open(INITIATOR, 1, b"s" * 16, b"k" * 32, "here", "there")
        theirs = channel.peer_open(ACCEPTOR, 2, b"s" * 16, b"x" * 32, "there", "here")
        with pytest.raises(errors.StateError):
            ours.submit(PUT, np.zeros(1, RANGE))
        with pytest.raises(errors.StateError):
            theirs.connect(ours.describe(), LONG)
        with pytest.raises(errors.AuthenticationError, match="keys differ"):
            ours.connect(theirs.describe(), LONG)
        ours.close()
        ours = channel.peer_open(INITIATOR, 3, b"s" * 16, b"k" * 32, "here", "there")
        with pytest.raises(errors.ConnectError, match="not a loop's") as caught:
            ours.connect(b"garbage", LONG)
        assert (caught.value.site, caught.value.vendor_code, caught.value.peer) == ("connect", 111, "there")
        with pytest.raises(errors.LinkError):
            theirs.rmem_open(b"garbage", 10, READ, LONG)
    finally:
        channel.close(1.0)


def test_too_many_links(provider):
    with opened(provider) as link:
        kept = [link.channel.peer_open(INITIATOR, n, b"s" * 16, b"k" * 32, "a", "b") for n in (2, 3)]
        with pytest.raises(errors.BusyError, match="3 links"):
            link.channel.peer_open(INITIATOR, 4, b"s" * 16, b"k" * 32, "a", "b")
        assert len(kept) == 2


def test_session_sizes_are_checked(provider):
    with opened(provider) as link, pytest.raises(ValueError, match="16 bytes"):
        link.channel.peer_open(INITIATOR, 2, b"short", b"k" * 32, "a", "b")


def test_memory_of_the_provider(provider):
    with opened(provider) as link:
        address = link.channel.mem_alloc(HOST, 8192)
        assert address % 4096 == 0
        memory = host_buffer(address, 8192)
        assert not any(memory)
        mem = link.channel.mem_open(address, 8192, HOST, -1, READ)
        link.channel.mem_copy(mem, 100, b"hello", to_region=True)
        assert bytes(memory[99:106]) == b"\0hello\0"
        back = bytearray(5)
        link.channel.mem_copy(mem, 100, back, to_region=False)
        assert back == b"hello"
        with pytest.raises(errors.ConfigError):
            link.channel.mem_copy(mem, 8190, back, to_region=False)
        with pytest.raises(BufferError):
            link.channel.mem_copy(mem, 0, b"read-only", to_region=False)
        link.channel.mem_close(mem, LONG)
        memory.release()
        link.channel.mem_free(address)
        with pytest.raises(errors.KvlinkError, match="posix_memalign"):
            link.channel.mem_alloc(HOST, 1 << 50)


def test_statistics(provider):
    with opened(provider) as link:
        link.peer.submit(PUT, ranges(link.mem, link.rmem, [[0, 0, 8], [8, 8, 8], [32, 32, 8]])).wait(LONG)
        stats = link.channel.statistics()
        assert (stats.peers, stats.in_flight, stats.submitted, stats.succeeded) == (1, 0, 1, 1)
        assert (stats.put_bytes, stats.get_bytes, stats.ranges_in, stats.ranges_out) == (24, 0, 3, 2)
        assert link.channel.provider_statistics() == {"submits": 1}


def test_a_child_may_not_use_its_parents_handles(provider):
    with opened(provider, "hang") as link:
        transfer = link.peer.submit(PUT, whole(link))
        calls = [
            lambda: link.peer.submit(PUT, whole(link)),
            link.peer.check,
            link.peer.describe,
            link.channel.statistics,
            link.channel.drain,
            lambda: link.channel.mem_close(link.mem, 1.0),
            transfer.done,
            transfer.wait,
            transfer.result,
            transfer.cancel,
            lambda: transfer.id,
        ]
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                refused = 0
                for call in calls:
                    try:
                        call()
                    except errors.ForkedError:
                        refused += 1
                link.peer.close()
                link.channel.close()
                if refused == len(calls):
                    code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert not transfer.done()  # the child's close did nothing here
        transfer.cancel()
        assert transfer.wait(LONG)


def test_ctrl_c_interrupts_a_wait(loop_library):
    code = f"""
import sys, numpy as np
from kvlink._engine import *
from kvlink._ranges import ranges
channel = EngineChannel.open(EngineProvider.load({str(loop_library)!r}), options={{"mode": "hang"}})
memory = np.zeros(64, np.uint8)
mem = channel.mem_open(memory.ctypes.data, 64, HOST, -1, READ | WRITE)
peer = channel.peer_open(INITIATOR, 1, b"s" * 16, b"k" * 32, "here", "there")
peer.connect(peer.describe(), 5.0)
rmem = peer.rmem_open(channel.mem_export(mem), 64, READ | WRITE, 5.0)
transfer = peer.submit(PUT, ranges(mem, rmem, [[0, 0, 64]]))
try:
    print("ready", flush=True)
    transfer.wait()
except KeyboardInterrupt:
    channel.close(1.0)
    sys.exit(42)
"""
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout.readline() == "ready\n"
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 42
        assert time.monotonic() - started < 10


def test_many_threads(provider):
    with opened(provider, "queue", nbytes=1 << 16) as link:
        failures = []

        def work(index):
            start = index * 4096
            array = ranges(link.mem, link.rmem, [[start, start, 4096]])
            for _ in range(200):
                transfer = link.peer.submit(PUT, array)
                if not transfer.wait(LONG) or transfer.result().status != Status.OK:
                    failures.append(index)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive()
        assert not failures
        assert link.channel.statistics().succeeded == 1600
