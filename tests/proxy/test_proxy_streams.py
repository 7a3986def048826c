"""Streams that break, engines that come and go, work that spreads."""

from __future__ import annotations

import time
from typing import Any

import pytest
from proxy_servers import Engines, Proxies, events_of, wait_until


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ({"break_after": 2}, "broke off its answer"),
        ({"hang_after": 2}, "sent nothing for 0.5 s"),
        ({"no_done": True}, "ended its answer without [DONE]"),
    ],
)
def test_a_stream_that_breaks_ends_with_an_error(
    engines: Engines, proxies: Proxies, how: dict[str, Any], text: str
) -> None:
    p, d = engines("prefill"), engines("decode", **how)
    proxy = proxies([p], [d], chunk_timeout=0.5)
    answer = proxy.complete(stream=True)
    assert answer.status_code == 200
    events = events_of(answer.text)
    tokens = 4 if "no_done" in how else 2
    assert [event["choices"][0]["text"] for event in events[:-1]] == [f" w{i}" for i in range(tokens)]
    error = events[-1]["error"]
    assert error["code"] == 502
    assert error["message"].startswith(f"decode: engine {d.url} ")
    assert text in error["message"]
    assert len(d.requests) == 1, "what the client saw cannot be made again"
    wait_until(
        lambda: proxy.metric("requests_total", endpoint="/v1/completions", outcome="upstream_error") == 1,
        10,
        "the count",
    )
    if "hang_after" in how:
        wait_until(lambda: d.aborted == 1, 10, "the engine to drop the request")


def test_the_openai_client_sees_a_broken_stream(engines: Engines, proxies: Proxies) -> None:
    openai = pytest.importorskip("openai")
    p, d = engines("prefill"), engines("decode", break_after=1)
    proxy = proxies([p], [d])
    with openai.OpenAI(base_url=f"{proxy.url}/v1", api_key="k", max_retries=0) as client:
        stream = client.completions.create(model="fake", prompt="a", max_tokens=4, stream=True)
        with pytest.raises(openai.APIError, match="broke off its answer"):
            list(stream)


def test_a_first_event_refusal_passes_through(engines: Engines, proxies: Proxies) -> None:
    p, d = engines("prefill"), engines("decode", status=418)
    answer = proxies([p], [d]).complete(stream=True)
    assert answer.status_code == 418
    assert answer.json()["error"]["message"] == "made to fail"


def test_work_spreads_by_size(engines: Engines, proxies: Proxies) -> None:
    ps = [engines("prefill"), engines("prefill")]
    ds = [engines("decode"), engines("decode")]
    proxy = proxies(ps, ds)
    for _ in range(6):
        assert proxy.complete(max_tokens=1).status_code == 200
    assert [len(engine.requests) for engine in (*ps, *ds)] == [3, 3, 3, 3]
    pool = proxy.service.prefillers
    first, second = pool.engines
    with first.busy(10_000):
        chosen = [pool.pick(even_down=False) for _ in range(4)]
        assert chosen == [second] * 4
        with second.busy(100), second.busy(100):
            assert pool.pick(even_down=False) is second, "two small requests are less than a large one"
    assert (first.load, second.load, first.in_flight) == (0, 0, 0)


def test_health_checks_take_an_engine_out_and_back(engines: Engines, proxies: Proxies) -> None:
    p, d, other = engines("prefill"), engines("decode"), engines("decode")
    proxy = proxies([p], [d, other])
    page = proxy.http.get("/health")
    assert (page.status_code, page.json()["status"]) == (200, "ok")
    d.behaviour.healthy = False
    wait_until(lambda: len(proxy.service.decoders.up) == 1, 10, "the health check")
    for _ in range(3):
        assert proxy.complete().status_code == 200
    assert (len(d.requests), len(other.requests)) == (0, 3)
    told = proxy.http.get("/health").json()["decode"][0]
    assert (told["state"], told["last_error"]) == ("down", "its /health answered 503")
    assert proxy.metric("engine_up", role="decode", engine=d.url) == 0
    d.behaviour.healthy = True
    wait_until(lambda: len(proxy.service.decoders.up) == 2, 10, "the health check")
    assert proxy.metric("engine_up", role="decode", engine=d.url) == 1


def test_a_slow_prefiller_costs_its_deadline_only(engines: Engines, proxies: Proxies) -> None:
    p, d = engines("prefill", delay=30.0), engines("decode")
    began = time.monotonic()
    assert proxies([p], [d], prefill_timeout=0.3).complete().status_code == 200
    assert time.monotonic() - began < 10
    wait_until(lambda: p.aborted == 1, 10, "the prefiller to drop the request")
