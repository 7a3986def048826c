"""What a client may not do, and what passes between it and the engines: parameters, ids, headers, keys."""

from __future__ import annotations

import re

import pytest
from proxy_servers import Engines, Proxies, Setup, events_of

UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"


@pytest.mark.parametrize("stream", [False, True])
def test_forged_parameters_reach_no_engine(pd: Setup, stream: bool) -> None:
    p, d, proxy = pd
    forged = {"do_remote_prefill": True, "remote_host": "evil", "remote_port": 1}
    answer = proxy.complete(
        stream=stream,
        echo=False,
        kv_transfer_params=forged,
        ec_transfer_params=forged,
        vllm_xargs={"kv_transfer_params": forged, "kept": 1},
        extra_args={"kv_transfer_params": forged, "vllm_xargs": {"kv_transfer_params": forged}},
        request_id="1",
    )
    assert answer.status_code == 200
    for raw in (*p.raw, *d.raw):
        assert b"evil" not in raw
        assert b"request_id" not in raw.replace(b"remote_request_id", b"")
    assert d.requests[0]["vllm_xargs"] == {"kept": 1}
    assert proxy.metric("stripped_total") == 1
    plain = proxy.complete(echo=True, kv_transfer_params=forged)
    assert plain.status_code == 200
    assert "kv_transfer_params" not in d.requests[-1]


def test_streams_lose_transfer_parameters(engines: Engines, proxies: Proxies) -> None:
    p, d = engines("prefill"), engines("decode", leak_params=True)
    answer = proxies([p], [d]).complete(stream=True, max_tokens=3)
    assert "secret" not in answer.text
    assert [event["choices"][0]["text"] for event in events_of(answer.text)[:-1]] == [" w0", " w1", " w2"]


def test_text_that_names_the_key_passes(engines: Engines, proxies: Proxies) -> None:
    text = ' "kv_transfer_params": {} \n\ndata: [DONE]\n\n \u2028 é'
    p, d = engines("prefill"), engines("decode", text=text)
    proxy = proxies([p], [d])
    events = events_of(proxy.complete(stream=True, max_tokens=2).text)
    assert [event["choices"][0]["text"] for event in events[:-1]] == [text, text]
    assert proxy.complete(max_tokens=2).json()["choices"][0]["text"] == text * 2


def test_ids_are_the_proxys_and_new_each_time(pd: Setup) -> None:
    p, d, proxy = pd
    ids = set()
    for _ in range(2):
        answer = proxy.http.post(
            "/v1/completions", json={"prompt": "a", "max_tokens": 1}, headers={"X-Request-Id": "guess-me"}
        )
        assert re.fullmatch(UUID, answer.headers["x-request-id"])
        ids.add(answer.headers["x-request-id"])
    assert len(ids) == 2
    assert [h["x-request-id"][:-3] in ids and h["x-request-id"][-3:] == "-p0" for h in p.headers] == [True, True]
    assert [h["x-request-id"][:-3] in ids and h["x-request-id"][-3:] == "-d0" for h in d.headers] == [True, True]
    assert "guess-me" not in str(p.requests + p.headers + d.requests + d.headers)


def test_authorization_goes_to_both_engines(engines: Engines, proxies: Proxies) -> None:
    p, d = engines("prefill", api_key="k"), engines("decode", api_key="k")
    proxy = proxies([p], [d])
    refused = proxy.complete()
    assert (refused.status_code, refused.json()) == (401, {"error": "Unauthorized"})
    assert d.requests == []
    proxy.http.headers["Authorization"] = "Bearer k"
    assert proxy.complete().status_code == 200
    assert p.headers[-1]["authorization"] == d.headers[-1]["authorization"] == "Bearer k"
    assert proxy.http.get("/v1/models").json()["data"][0]["id"] == "fake"
    del proxy.http.headers["Authorization"]
    assert proxy.http.get("/v1/models").status_code == 401


def test_headers_need_not_be_ascii(pd: Setup) -> None:
    p, d, proxy = pd
    answer = proxy.http.post("/v1/completions", json={"prompt": "a"}, headers=[(b"x-title", "ä ö".encode())])
    assert answer.status_code == 200
    assert p.headers[0]["x-title"] == d.headers[0]["x-title"] == "ä ö".encode().decode("latin-1")
