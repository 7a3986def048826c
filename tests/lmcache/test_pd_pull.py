"""Pull and delayed pull: a prefiller offers, its decoder reads, at once or when the engine wants the chunks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lmcache")

from lmcache_pd import CHUNK_BYTES, Decoder, Prefiller, Proxy, until  # noqa: E402
from lmcache_pools import free_port  # noqa: E402

EAGER = {"pd_pull_mode": True}
DELAYED = {"pd_pull_mode": True, "pd_delay_pull": True}


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    proxy = Proxy()
    yield proxy
    proxy.close()


def pair(proxy: Proxy, mode: dict[str, bool], room: int = 16, **changes: object) -> tuple[Prefiller, Decoder]:
    decoder = Decoder(room, **mode, **changes)
    return Prefiller(16, proxy, pd_pull_done_port=[free_port()], **mode, **changes), decoder


@pytest.fixture(params=[EAGER, DELAYED], ids=["eager", "delayed"])
def world(proxy: Proxy, request: pytest.FixtureRequest) -> Iterator[tuple[Prefiller, Decoder, Proxy]]:
    prefiller, decoder = pair(proxy, request.param)
    yield prefiller, decoder, proxy
    prefiller.close()
    decoder.close()


def check_idle(prefiller: Prefiller, decoder: Decoder, room: int = 16) -> None:
    until(lambda: prefiller.free == 16 and decoder.free == room, "all pages are free")
    until(lambda: prefiller.backend.held()["handoffs"] == 0, "the prefiller has no hand-off")
    until(lambda: decoder.backend.held()["handoffs"] == 0, "the decoder has no hand-off")
    assert decoder.backend.held()["reserved"] == 0


def test_a_request_arrives_whole_and_leaves_nothing(world: tuple[Prefiller, Decoder, Proxy]) -> None:
    prefiller, decoder, proxy = world
    data, _ = prefiller.store("r1", decoder, 7, 5, tail=3)
    assert proxy.hear() == {"type": "ProxyNotif", "req_id": "r1", "rank": 0, "world_size": 1}
    assert decoder.lookup(7, 6) == 5
    got = decoder.retrieve(7, 5)
    assert [torch.equal(a, b) for a, b in zip(got, data, strict=True)] == [True] * 5
    assert decoder.lookup(7, 5) == 0
    assert proxy.silent()
    check_idle(prefiller, decoder)


def test_a_prefill_in_parts(world: tuple[Prefiller, Decoder, Proxy]) -> None:
    prefiller, decoder, proxy = world
    first, _ = prefiller.store("r", decoder, 3, 2, total=5, last=False)
    assert proxy.silent()
    second, _ = prefiller.store("r", decoder, 3, 3, first=2, total=5, tail=1)
    assert proxy.hear()["req_id"] == "r"
    got = decoder.retrieve(3, 5)
    assert all(torch.equal(a, b) for a, b in zip(got, first + second, strict=True))
    check_idle(prefiller, decoder)


def test_where_the_chunks_wait(proxy: Proxy) -> None:
    for mode, at_decoder in ((EAGER, 5), (DELAYED, 0)):
        prefiller, decoder = pair(proxy, mode)
        try:
            prefiller.store("r", decoder, 7, 5)
            proxy.hear()
            assert 16 - decoder.free == at_decoder
            until(lambda held=5 - at_decoder, side=prefiller: 16 - side.free == held, "the prefiller holds the rest")
        finally:
            prefiller.close()
            decoder.close()


def test_the_prefiller_listens_on_its_done_port(proxy: Proxy) -> None:
    port = free_port()
    prefiller = Prefiller(4, proxy, pd_pull_done_port=[port], **EAGER)
    try:
        assert prefiller.backend.endpoint.channel.address.endswith(f":{port}")
    finally:
        prefiller.close()


def test_staging_in_host_memory_has_its_own_size(proxy: Proxy) -> None:
    prefiller = Prefiller(
        4, proxy, pd_pull_done_port=[free_port()], pd_buffer_device="npu", pd_use_cpu_offload=True,
        pd_cpu_buffer_size=9 * CHUNK_BYTES, **EAGER,
    )  # fmt: skip
    try:
        assert prefiller.backend.buffer.total == 9 and prefiller.backend.options.device == "cpu"
    finally:
        prefiller.close()


def test_a_read_waits_for_room(proxy: Proxy) -> None:
    prefiller, decoder = pair(proxy, EAGER, room=8)
    try:
        prefiller.store("one", decoder, 1, 6)
        assert proxy.hear()["req_id"] == "one"
        prefiller.store("two", decoder, 2, 6)
        until(lambda: decoder.backend.held()["waiting"] == 1, "the second waits")
        assert proxy.silent()
        assert len(decoder.retrieve(1, 6)) == 6
        assert proxy.hear()["req_id"] == "two" and len(decoder.retrieve(2, 6)) == 6
        check_idle(prefiller, decoder, 8)
    finally:
        prefiller.close()
        decoder.close()


def test_a_read_that_gets_no_room_in_time_is_told(proxy: Proxy) -> None:
    prefiller, decoder = pair(proxy, EAGER, room=8, pd_allocation_timeout_sec=0.3)
    try:
        prefiller.store("one", decoder, 1, 6)
        assert proxy.hear()["req_id"] == "one"
        prefiller.store("two", decoder, 2, 6)
        heard = proxy.hear()
        assert heard["type"] == "KVLinkFailureNotif" and "no room for 6 chunks within 0.3 s" in heard["reason"]
        until(lambda: prefiller.free == 16, "the prefiller's pages are free")
        assert len(decoder.retrieve(1, 6)) == 6
        check_idle(prefiller, decoder, 8)
    finally:
        prefiller.close()
        decoder.close()


def test_what_can_never_fit_is_told_at_once(proxy: Proxy) -> None:
    prefiller, decoder = pair(proxy, EAGER, room=4)
    try:
        prefiller.store("big", decoder, 1, 6)
        heard = proxy.hear()
        assert heard["never"] and "6 chunks" in heard["reason"] and str(4 * CHUNK_BYTES) in heard["reason"]
        check_idle(prefiller, decoder, 4)
    finally:
        prefiller.close()
        decoder.close()


def test_chunks_nobody_reads_are_freed_and_a_late_read_gets_nothing(proxy: Proxy) -> None:
    prefiller, decoder = pair(proxy, DELAYED, pd_pull_pending_ttl=1.0)
    decoder.backend._receiver.ledger._pending_ttl = 300.0  # a decoder whose clock is behind
    try:
        prefiller.store("r", decoder, 1, 6)
        assert proxy.hear()["type"] == "ProxyNotif"
        until(lambda: prefiller.free == 16, "the prefiller's pages are free")
        assert decoder.lookup(1, 6) == 6
        assert decoder.retrieve(1, 6) == []
        check_idle(prefiller, decoder)
    finally:
        prefiller.close()
        decoder.close()


def test_the_decoder_forgets_offers_nobody_wanted(proxy: Proxy) -> None:
    prefiller, decoder = pair(proxy, DELAYED, pd_pull_pending_ttl=0.3)
    try:
        prefiller.store("r", decoder, 1, 6)
        proxy.hear()
        until(lambda: decoder.lookup(1, 6) == 0, "the offer is forgotten")
        check_idle(prefiller, decoder)
    finally:
        prefiller.close()
        decoder.close()


def test_a_prefiller_that_ends_takes_its_offers_along(proxy: Proxy) -> None:
    prefiller, decoder = pair(proxy, DELAYED)
    try:
        prefiller.store("r", decoder, 1, 6)
        proxy.hear()
        prefiller.close()
        until(lambda: decoder.lookup(1, 6) == 0, "the offer is gone")
        assert decoder.retrieve(1, 6) == [] and decoder.free == 16
    finally:
        decoder.close()


def test_a_decoder_that_ends_frees_the_prefiller(proxy: Proxy) -> None:
    prefiller, decoder = pair(proxy, DELAYED)
    try:
        prefiller.store("r", decoder, 1, 6)
        proxy.hear()
        decoder.close()
        until(lambda: prefiller.free == 16 and prefiller.backend.held()["handoffs"] == 0, "the prefiller is free")
    finally:
        prefiller.close()


def test_a_prefiller_with_little_room_left_offers_nothing_more(proxy: Proxy) -> None:
    prefiller, decoder = pair(proxy, DELAYED, pd_pull_backpressure_reserve_pct=50.0)
    try:
        prefiller.store("one", decoder, 1, 10)
        assert proxy.hear()["type"] == "ProxyNotif"
        prefiller.store("two", decoder, 2, 2)
        assert proxy.hear()["type"] == "KVLinkFailureNotif"
        assert len(decoder.retrieve(1, 10)) == 10
        check_idle(prefiller, decoder)
        prefiller.store("three", decoder, 3, 2)
        assert proxy.hear()["req_id"] == "three"
    finally:
        prefiller.close()
        decoder.close()


def test_a_delayed_read_larger_than_the_buffer_goes_in_windows(proxy: Proxy) -> None:
    for room in (1, 2, 5):
        prefiller, decoder = pair(proxy, DELAYED, room=room)
        try:
            data, _ = prefiller.store("r", decoder, 1, 13, tail=5)
            assert proxy.hear()["type"] == "ProxyNotif"
            assert decoder.lookup(1, 13) == 13
            got = decoder.retrieve(1, 13)
            assert [torch.equal(a, b) for a, b in zip(got, data, strict=True)] == [True] * 13
            check_idle(prefiller, decoder, room)
        finally:
            prefiller.close()
            decoder.close()


def test_chunks_lost_between_windows_end_the_load_and_nothing_else(proxy: Proxy) -> None:
    from lmcache_pd import key

    from kvlink_lmcache import pd

    prefiller, decoder = pair(proxy, DELAYED, room=4)
    keys = [key(1, index, decoder.meta) for index in range(12)]

    def retrieve(tokens: list[int]) -> object:
        items = decoder.backend.batched_get_blocking(keys)
        assert items[0].raw_tensor.numel() == CHUNK_BYTES
        prefiller.close()
        return [item.raw_tensor for item in items]

    try:
        prefiller.store("r", decoder, 1, 12)
        proxy.hear()
        mask = pd.load(retrieve, [1, 2, 3], (), {})
        assert mask.tolist() == [False] * 3
        until(lambda: decoder.free == 4, "the decoder's pages are free")
        assert decoder.lookup(1, 12) == 0
    finally:
        prefiller.close()
        decoder.close()
