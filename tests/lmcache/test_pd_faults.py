"""After 200 faults of every kind no page is lost, on either side, and the next request works."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lmcache")

from lmcache_pd import Decoder, Prefiller, Proxy, metadata, until  # noqa: E402
from lmcache_pools import free_port  # noqa: E402

FAULTS = 200
MODES = {
    "push": {},
    "pull": {"pd_pull_mode": True},
    "delayed": {"pd_pull_mode": True, "pd_delay_pull": True},
}
QUICK = {
    "pd_allocation_timeout_sec": 0.1,
    "pd_pull_pending_ttl": 0.4,
    "pd_alloc_fail_backoff_ttl": 0.01,
    "extra_config": {
        "kvlink.lmcache.idle_timeout": 0.4,
        "kvlink.lmcache.transfer_timeout": 0.5,
        "kvlink.lmcache.connect_timeout": 5.0,
    },
}


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    proxy = Proxy()
    yield proxy
    proxy.close()


def sender(proxy: Proxy, mode: dict[str, bool]) -> Prefiller:
    return Prefiller(16, proxy, pd_pull_done_port=[free_port()], **mode, **QUICK)


EACH = ["push", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("pull", "delayed"))]


@pytest.mark.parametrize("mode", EACH)
def test_no_page_is_lost_after_200_faults(proxy: Proxy, mode: str) -> None:
    rng = random.Random(5)
    decoder = Decoder(8, **MODES[mode], **QUICK)
    prefiller = sender(proxy, MODES[mode])
    nobody = free_port()
    told = 0

    def heard() -> None:
        nonlocal told
        while not proxy.silent(0.0):
            proxy.hear()
            told += 1

    def never_comes(number: int) -> None:  # the decoder's request is aborted before it is scheduled
        prefiller.store(f"{number}", decoder, number, 3)

    def stops_half_way(number: int) -> None:  # the client goes away during a chunked prefill
        prefiller.store(f"{number}", decoder, number, 2, total=5, last=False)

    def is_cancelled(number: int) -> None:
        prefiller.store(f"{number}", decoder, number, 2, total=5, last=False)
        prefiller.backend.cancel_request(f"{number}")

    def is_too_large(number: int) -> None:
        prefiller.store(f"{number}", decoder, number, 9, total=50)

    def is_larger_than_the_prefiller(number: int) -> None:
        prefiller.store(f"{number}", decoder, number, 17, total=17)

    def goes_to_nobody(number: int) -> None:
        prefiller.store(f"{number}", nobody, number, 4)

    def lies_about_its_size(number: int) -> None:
        prefiller.store(f"{number}", decoder, number, 4, total=2)

    def comes_short(number: int) -> None:
        prefiller.store(f"{number}", decoder, number, 2, total=4)

    def loses_the_connection(number: int) -> None:
        prefiller.store(f"{number}", decoder, number, 3)
        for peer in list(prefiller.backend.endpoint.channel.peers().values()):
            peer.close()

    def is_taken_and_its_step_fails(number: int) -> None:
        prefiller.store(f"{number}", decoder, number, 2)
        from lmcache_pd import key

        decoder.backend.batched_get_blocking([key(number, index, decoder.meta) for index in range(2)])

    faults = [
        never_comes, stops_half_way, is_cancelled, is_too_large, is_larger_than_the_prefiller, goes_to_nobody,
        lies_about_its_size, comes_short, loses_the_connection, is_taken_and_its_step_fails,
    ]  # fmt: skip
    try:
        for number in range(FAULTS):
            rng.choice(faults)(number)
            heard()
        until(lambda: prefiller.free == 16, "the prefiller's pages are free", 60)
        until(lambda: decoder.free == 8, "the decoder's pages are free", 60)
        until(lambda: prefiller.backend.held()["handoffs"] == 0, "the prefiller has no hand-off", 30)
        held = {"free": 8, "reserved": 0, "entries": 0, "handoffs": 0, "waiting": 0}
        until(lambda: decoder.backend.held() == held, "the decoder has no hand-off", 30)
        heard()
        assert told == FAULTS  # each ended with exactly one word to the proxy
        data, _ = prefiller.store("good", decoder, 1_000_000, 6)
        answer = proxy.hear()
        assert answer["type"] == "ProxyNotif" and answer["req_id"] == "good"
        got = decoder.retrieve(1_000_000, 6)
        assert [torch.equal(a, b) for a, b in zip(got, data, strict=True)] == [True] * 6
        until(lambda: prefiller.free == 16 and decoder.free == 8, "all pages are free")
    finally:
        prefiller.close()
        decoder.close()


PREFILLER = """
    import sys
    sys.path.insert(0, {folder!r})
    from lmcache_pd import Prefiller
    from types import SimpleNamespace
    prefiller = Prefiller(64, SimpleNamespace(port={proxy}), pd_pull_done_port=[{port}], **{mode!r})
    number = 0
    print("ready", flush=True)
    while True:
        prefiller.store(f"{{number}}", {decoder}, number, 5, total=5 + (number & 1), last=not number & 1)
        number += 1
"""


@pytest.mark.parametrize("mode", EACH)
def test_prefillers_that_are_killed_leave_nothing_at_the_decoder(proxy: Proxy, mode: str) -> None:
    decoder = Decoder(64, **MODES[mode], **QUICK)
    rng = random.Random(3)
    try:
        for _ in range(2):
            limit = rng.randrange(1, 10)
            code = PREFILLER.format(
                folder=str(Path(__file__).parent),
                proxy=proxy.port,
                port=free_port(),
                mode=MODES[mode],
                decoder=decoder.port,
            )
            process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
            try:
                assert process.stdout is not None
                while "ready" not in (line := process.stdout.readline()):
                    assert line, "the prefiller did not start"
                until(lambda: decoder.backend.held()["handoffs"] > 0, "something came")
                until(lambda limit=limit: decoder.backend.held()["handoffs"] >= limit, "more came")
            finally:
                os.kill(process.pid, signal.SIGKILL)
                process.wait(20)
                process.stdout.close()
            while not proxy.silent(0.0):
                proxy.hear()
        until(lambda: decoder.free == 64, "the decoder's pages are free", 30)
        held = {"free": 64, "reserved": 0, "entries": 0, "handoffs": 0, "waiting": 0}
        until(lambda: decoder.backend.held() == held, "the decoder has no hand-off", 30)
        good = sender(proxy, MODES[mode])
        try:
            data, _ = good.store("good", decoder, 10**9, 6)
            while proxy.hear()["req_id"] != "good":
                pass
            got = decoder.retrieve(10**9, 6)
            assert [torch.equal(a, b) for a, b in zip(got, data, strict=True)] == [True] * 6
        finally:
            good.close()
    finally:
        decoder.close()


def test_a_plain_request_between_others(proxy: Proxy) -> None:
    decoder, prefiller = Decoder(8, **QUICK), sender(proxy, {})
    meta: Any = metadata()
    try:
        for number in range(20):
            item = prefiller.backend.allocate(meta.get_shapes(16), meta.get_dtypes())
            prefiller.backend.batched_submit_put_task([None], [item], transfer_spec=None)
            item.ref_count_down()
            prefiller.store(f"{number}", decoder, number, 2)
            assert proxy.hear()["type"] == "ProxyNotif"
            assert len(decoder.retrieve(number, 2)) == 2
        until(lambda: prefiller.free == 16 and decoder.free == 8, "all pages are free")
    finally:
        prefiller.close()
        decoder.close()
