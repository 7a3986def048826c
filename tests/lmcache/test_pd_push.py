"""Push: a prefiller writes into its decoder's PD buffer and tells the proxy."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lmcache")

from lmcache_pd import CHUNK_BYTES, Decoder, Prefiller, Proxy, config, metadata, until  # noqa: E402
from lmcache_pools import free_port  # noqa: E402


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    proxy = Proxy()
    yield proxy
    proxy.close()


@pytest.fixture(params=["async", "sync"])
def world(proxy: Proxy, request: pytest.FixtureRequest) -> Iterator[tuple[Prefiller, Decoder, Proxy]]:
    decoder = Decoder(16, pd_backend_mode=request.param)
    prefiller = Prefiller(16, proxy, pd_backend_mode=request.param)
    yield prefiller, decoder, proxy
    prefiller.close()
    decoder.close()


def check_idle(prefiller: Prefiller, decoder: Decoder) -> None:
    until(lambda: prefiller.free == 16 and decoder.free == 16, "all pages are free")
    until(lambda: prefiller.backend.held()["handoffs"] == 0, "the prefiller has no hand-off")
    assert decoder.backend.held() == {"free": 16, "reserved": 0, "entries": 0, "handoffs": 0, "waiting": 0}


def test_a_request_arrives_whole_and_leaves_nothing(world: tuple[Prefiller, Decoder, Proxy]) -> None:
    prefiller, decoder, proxy = world
    data, moved = prefiller.store("r1", decoder, 7, 5, tail=3)
    assert moved.result(20) == 5
    assert proxy.hear() == {"type": "ProxyNotif", "req_id": "r1", "rank": 0, "world_size": 1}
    assert decoder.lookup(7, 6) == 5
    assert [torch.equal(a, b) for a, b in zip(decoder.retrieve(7, 5), data, strict=True)] == [True] * 5
    assert decoder.lookup(7, 5) == 0
    check_idle(prefiller, decoder)


def test_the_buffer_is_shared_memory_and_a_transfer_is_one_line(
    world: tuple[Prefiller, Decoder, Proxy], caplog: pytest.LogCaptureFixture
) -> None:
    prefiller, decoder, _ = world
    logger = logging.getLogger("kvlink_lmcache")
    logger.addHandler(caplog.handler)
    logger.setLevel(logging.DEBUG)
    try:
        prefiller.store("r1", decoder, 7, 5)[1].result(20)
    finally:
        logger.removeHandler(caplog.handler)
        logger.setLevel(logging.NOTSET)
    (line,) = {record.getMessage() for record in caplog.records if record.getMessage().startswith("put ")}
    assert f"{5 * CHUNK_BYTES} bytes in 1 ranges by shm" in line


def test_a_prefill_in_parts_is_told_once_at_its_end(world: tuple[Prefiller, Decoder, Proxy]) -> None:
    prefiller, decoder, proxy = world
    first, moved = prefiller.store("r", decoder, 3, 2, total=5, last=False)
    moved.result(20)
    assert decoder.backend.held()["reserved"] == 3
    assert proxy.silent()
    second, moved = prefiller.store("r", decoder, 3, 3, first=2, total=5, tail=1)
    moved.result(20)
    assert proxy.hear()["req_id"] == "r"
    got = decoder.retrieve(3, 5)
    assert all(torch.equal(a, b) for a, b in zip(got, first + second, strict=True))
    check_idle(prefiller, decoder)


def test_parts_that_overlap_in_flight(world: tuple[Prefiller, Decoder, Proxy]) -> None:
    prefiller, decoder, proxy = world
    stored = []
    for index in range(6):
        data, _ = prefiller.store("r", decoder, 3, 2, first=2 * index, total=12, last=index == 5)
        stored += data
    assert proxy.hear()["type"] == "ProxyNotif"
    assert proxy.silent()
    assert all(torch.equal(a, b) for a, b in zip(decoder.retrieve(3, 12), stored, strict=True))
    check_idle(prefiller, decoder)


def test_chunks_sent_again_are_not_written_again(world: tuple[Prefiller, Decoder, Proxy]) -> None:
    prefiller, decoder, proxy = world
    first, moved = prefiller.store("r", decoder, 3, 3, total=4, last=False)
    moved.result(20)
    again, moved = prefiller.store("r", decoder, 3, 4, total=4)
    moved.result(20)
    assert proxy.hear()["type"] == "ProxyNotif"
    got = decoder.retrieve(3, 4)
    assert all(torch.equal(a, b) for a, b in zip(got, [*first, again[3]], strict=True))
    check_idle(prefiller, decoder)


def test_two_requests_with_one_prompt_do_not_hurt_each_other(world: tuple[Prefiller, Decoder, Proxy]) -> None:
    prefiller, decoder, proxy = world
    one, _ = prefiller.store("one", decoder, 3, 4)
    two, _ = prefiller.store("two", decoder, 3, 4)
    assert {proxy.hear()["req_id"], proxy.hear()["req_id"]} == {"one", "two"}
    first, second = decoder.retrieve(3, 4), decoder.retrieve(3, 4)
    assert len(first) == len(second) == 4
    assert all(any(torch.equal(a, b) for b in (one[i], two[i])) for i, a in enumerate(first))
    check_idle(prefiller, decoder)


def test_leading_chunks_that_the_engine_had_itself_go_with_the_last(world: tuple[Prefiller, Decoder, Proxy]) -> None:
    prefiller, decoder, proxy = world
    data, _ = prefiller.store("r", decoder, 3, 6)
    proxy.hear()
    got = decoder.retrieve(3, 6, skip=4)
    assert len(got) == 2 and torch.equal(got[0], data[4])
    check_idle(prefiller, decoder)


def test_a_request_without_decoder_is_a_normal_request(world: tuple[Prefiller, Decoder, Proxy]) -> None:
    prefiller, decoder, proxy = world
    item = prefiller.backend.allocate(prefiller.meta.get_shapes(16), prefiller.meta.get_dtypes())
    assert prefiller.backend.batched_submit_put_task([object()], [item], transfer_spec=None) is None
    item.ref_count_down()
    assert proxy.silent()
    check_idle(prefiller, decoder)


def test_what_can_never_fit_fails_at_once_with_the_numbers(world: tuple[Prefiller, Decoder, Proxy]) -> None:
    prefiller, decoder, proxy = world
    started = time.monotonic()
    prefiller.store("big", decoder, 1, 10, total=40, last=False)
    heard = proxy.hear()
    assert heard["type"] == "KVLinkFailureNotif" and heard["never"] and heard["req_id"] == "big"
    assert "40 chunks" in heard["reason"] and str(40 * CHUNK_BYTES) in heard["reason"]
    assert str(16 * CHUNK_BYTES) in heard["reason"]
    assert time.monotonic() - started < 5
    prefiller.store("big", decoder, 1, 10, first=10, total=40)
    assert proxy.silent()
    check_idle(prefiller, decoder)


def test_a_step_larger_than_the_prefillers_buffer_fails_at_once(world: tuple[Prefiller, Decoder, Proxy]) -> None:
    prefiller, decoder, proxy = world
    started = time.monotonic()
    prefiller.store("big", decoder, 1, 17, total=17)
    heard = proxy.hear()
    assert heard["type"] == "KVLinkFailureNotif" and "prefiller's PD buffer of 16 chunks" in heard["reason"]
    assert time.monotonic() - started < 5
    check_idle(prefiller, decoder)
    prefiller.store("ok", decoder, 2, 4)
    assert proxy.hear() == {"type": "ProxyNotif", "req_id": "ok", "rank": 0, "world_size": 1}


def test_a_request_waits_for_room_and_then_goes(proxy: Proxy) -> None:
    decoder, prefiller = Decoder(8), Prefiller(16, proxy)
    try:
        prefiller.store("one", decoder, 1, 6)
        assert proxy.hear()["req_id"] == "one"
        _, moved = prefiller.store("two", decoder, 2, 6)
        until(lambda: decoder.backend.held()["waiting"] == 1, "the second waits")
        assert proxy.silent()
        assert len(decoder.retrieve(1, 6)) == 6
        assert moved.result(20) == 6 and proxy.hear()["req_id"] == "two"
        assert len(decoder.retrieve(2, 6)) == 6
        assert decoder.free == 8
    finally:
        prefiller.close()
        decoder.close()


def test_waiting_for_room_has_a_deadline(proxy: Proxy) -> None:
    decoder = Decoder(8, pd_allocation_timeout_sec=0.3)
    prefiller = Prefiller(16, proxy, pd_allocation_timeout_sec=0.3)
    try:
        prefiller.store("one", decoder, 1, 6)
        assert proxy.hear()["req_id"] == "one"
        prefiller.store("two", decoder, 2, 6)
        heard = proxy.hear()
        assert (
            heard["req_id"] == "two" and "no room for 6 chunks within 0.3 s" in heard["reason"] and not heard["never"]
        )
        until(lambda: decoder.backend.held()["waiting"] == 0, "nobody waits")
        assert prefiller.free == 16 and len(decoder.retrieve(1, 6)) == 6
    finally:
        prefiller.close()
        decoder.close()


def test_an_unreachable_decoder_does_not_hold_the_step_and_is_told(proxy: Proxy) -> None:
    prefiller = Prefiller(4, proxy)
    try:
        started = time.monotonic()
        prefiller.store("r", free_port(), 1, 3)
        assert time.monotonic() - started < 1.0
        heard = proxy.hear()
        assert heard["type"] == "KVLinkFailureNotif" and "cannot be reached" in heard["reason"]
        until(lambda: prefiller.free == 4, "pages are free")
    finally:
        prefiller.close()


def test_chunks_nobody_takes_go_after_their_time(proxy: Proxy) -> None:
    decoder = Decoder(8, pd_pull_pending_ttl=0.3, extra_config={"kvlink.lmcache.idle_timeout": 0.3})
    prefiller = Prefiller(8, proxy)
    try:
        prefiller.store("r", decoder, 1, 6)
        proxy.hear()
        until(lambda: decoder.free == 8, "the decoder's pages are free")
        assert decoder.lookup(1, 6) == 0 and decoder.backend.held()["handoffs"] == 0
    finally:
        prefiller.close()
        decoder.close()


def test_a_prefill_that_does_not_go_on_is_given_up_on_both_sides(proxy: Proxy) -> None:
    decoder = Decoder(8)
    prefiller = Prefiller(8, proxy, extra_config={"kvlink.lmcache.idle_timeout": 0.3})
    try:
        prefiller.store("r", decoder, 1, 3, total=6, last=False)
        assert "3 chunks came, and no more" in proxy.hear()["reason"]
        until(lambda: decoder.free == 8 and prefiller.free == 8, "pages are free")
        assert decoder.backend.held()["reserved"] == 0 and prefiller.backend.held()["handoffs"] == 0
    finally:
        prefiller.close()
        decoder.close()


def test_tensor_parallel_ranks_use_their_own_ports(proxy: Proxy) -> None:
    ports = [free_port(), free_port()]
    decoders = [Decoder(8, meta=metadata(rank, 2), pd_peer_init_port=ports) for rank in range(2)]
    prefillers = [Prefiller(8, proxy, meta=metadata(rank, 2)) for rank in range(2)]
    try:
        for rank, prefiller in enumerate(prefillers):
            spec = prefiller.spec("r", ports[rank], 2, True)
            assert spec.receiver_init_port == [ports[rank]] * 2
            prefiller.store("r", ports[rank], 1, 2)
        heard = [proxy.hear(), proxy.hear()]
        assert sorted(item["rank"] for item in heard) == [0, 1] and {item["world_size"] for item in heard} == {2}
        assert [len(decoder.retrieve(1, 2)) for decoder in decoders] == [2, 2]
    finally:
        for side in [*prefillers, *decoders]:
            side.close()


@pytest.mark.parametrize("name", ["pd_peer_init_port", "pd_peer_alloc_port"])
def test_a_port_list_shorter_than_the_ranks_is_refused(name: str) -> None:
    with pytest.raises(Exception, match=rf"{name} has 1 ports \(7300\), but there are 2"):
        Decoder(4, meta=metadata(1, 2), **{name: [7300]})


def test_a_decoder_with_too_few_ports_fails_the_request(proxy: Proxy) -> None:
    prefiller = Prefiller(4, proxy, meta=metadata(0, 2))
    try:
        spec = prefiller.spec("r", 7300, 1, True)
        spec.receiver_init_port = [7300]
        item = prefiller.backend.allocate(prefiller.meta.get_shapes(16), prefiller.meta.get_dtypes())
        from lmcache_pd import key

        (moved,) = prefiller.backend.batched_submit_put_task([key(1, 0, prefiller.meta)], [item], transfer_spec=spec)
        item.ref_count_down()
        with pytest.raises(Exception, match="has 1 ports"):
            moved.result(20)
        assert proxy.hear()["type"] == "KVLinkFailureNotif" and prefiller.free == 4
    finally:
        prefiller.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_name": "other"}, "'model'.*'(tiny|other)'.*'(tiny|other)'"),
        ({"kv_dtype": torch.bfloat16}, "'kv_dtype'.*(float32|bfloat16).*(float32|bfloat16)"),
        ({"world_size": 2}, "'tensor_parallel'.*[12].*[12]"),
    ],
)
def test_engines_that_do_not_fit_are_refused_at_first_contact(
    proxy: Proxy, changes: dict[str, object], message: str
) -> None:
    decoder = Decoder(8)
    meta = metadata()
    for name, value in changes.items():
        setattr(meta, name, value)
    prefiller = Prefiller(8, proxy, meta=meta)
    try:
        _, moved = prefiller.store("r", decoder, 1, 2)
        with pytest.raises(Exception, match=message):
            moved.result(20)
        assert proxy.hear()["type"] == "KVLinkFailureNotif"
        until(lambda: prefiller.free == prefiller.backend.buffer.total, "pages are free")
    finally:
        prefiller.close()
        decoder.close()


def test_modes_must_agree(proxy: Proxy) -> None:
    decoder = Decoder(8, pd_pull_mode=True)
    prefiller = Prefiller(8, proxy)
    try:
        _, moved = prefiller.store("r", decoder, 1, 2)
        with pytest.raises(Exception, match=r"'pd_mode' differs.*'push'.*'pull'|'pd_mode' differs.*'pull'.*'push'"):
            moved.result(20)
    finally:
        prefiller.close()
        decoder.close()


def test_two_prefillers_are_no_pair(proxy: Proxy) -> None:
    port = free_port()
    one = Prefiller(4, proxy, extra_config={"kvlink.listen": f"tcp://127.0.0.1:{port}"})
    two = Prefiller(4, proxy)
    try:
        _, moved = two.store("r", port, 1, 2)
        with pytest.raises(Exception, match="pd_role here is 'sender' and the peer's is 'sender'"):
            moved.result(20)
    finally:
        two.close()
        one.close()


@pytest.mark.parametrize(
    ("role", "changes", "message"),
    [
        ("both", {}, None),
        ("sander", {}, "pd_role is 'sander'"),
        ("sender", {"pd_buffer_size": None}, "pd_buffer_size is None"),
        ("sender", {"pd_proxy_host": None}, "pd_proxy_host is None"),
        ("sender", {"pd_delay_pull": True}, "pd_delay_pull needs pd_pull_mode"),
        ("sender", {"pd_pull_mode": True}, "pd_pull_done_port is None"),
        ("receiver", {"pd_peer_host": None}, "pd_peer_host is missing"),
        ("sender", {"pd_buffer_device": None}, "pd_buffer_device is missing"),
        ("sender", {"pd_proxy_port": 1, "pd_buffer_size": 10}, "does not hold one chunk"),
        ("sender", {"extra_config": {"kvlink.lmcache.idle_timout": 1}}, "did you mean kvlink.lmcache.idle_timeout"),
        ("sender", {"extra_config": {"kvlink.lmcache.connect_timeout": "soon"}}, "connect_timeout is 'soon'"),
        ("sender", {"extra_config": {"kvlink.lmcache.pd_backend": "lmcache"}}, None),
    ],
)
def test_what_is_refused_at_start(role: str, changes: dict[str, object], message: str | None) -> None:
    from kvlink_lmcache.pd import create_pd_backend

    given = config(role, 4, **changes)
    if message is None:
        assert create_pd_backend(given, metadata()) is None
        return
    with pytest.raises(Exception, match=message):
        create_pd_backend(given, metadata())


def test_an_id_that_is_used_again_is_another_request(world: tuple[Prefiller, Decoder, Proxy]) -> None:
    prefiller, decoder, proxy = world
    stored = []
    for prompt in (1, 2):
        stored.append(prefiller.store("1", decoder, prompt, 3)[0])
        assert proxy.hear()["type"] == "ProxyNotif"
    for prompt, data in zip((1, 2), stored, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(decoder.retrieve(prompt, 3), data, strict=True))
    check_idle(prefiller, decoder)


@pytest.mark.parametrize("path", ["tcp", "cma"])
def test_the_other_paths_of_the_host_provider(proxy: Proxy, path: str) -> None:
    forced = {"extra_config": {"kvlink.path": path}}
    decoder, prefiller = Decoder(8, **forced), Prefiller(8, proxy, **forced)
    try:
        data, _ = prefiller.store("r", decoder, 1, 6, tail=5)
        assert proxy.hear()["type"] == "ProxyNotif"
        assert all(torch.equal(a, b) for a, b in zip(decoder.retrieve(1, 6), data, strict=True))
        assert prefiller.free == decoder.free == 8
    finally:
        prefiller.close()
        decoder.close()
