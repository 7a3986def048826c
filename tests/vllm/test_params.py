"""kv_transfer_params are untrusted: everything malformed, forged or not allowed is refused, and says why."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from kvlink_vllm import params
from kvlink_vllm.params import HandOff, ParamsError, offer, parse

SECRET = b"correct horse battery staple"


def good(secret=None, **changes):
    values = offer(HandOff(params.new_handoff_id(), "engine-1", ("tcp://127.0.0.1:4000",), 17), secret)
    values = json.loads(json.dumps(values))  # as it comes back over HTTP
    values.update(changes)
    return values


def test_round_trip_without_secret():
    values = good()
    parsed = parse(values, tp_size=1, secret=None)
    assert parsed.id == values["kvlink_handoff"]
    assert parsed.addresses == ("tcp://127.0.0.1:4000",)
    assert parsed.tokens == 17


def test_round_trip_with_secret_allows_any_host():
    values = offer(HandOff(params.new_handoff_id(), "e", ("tcp://10.1.2.3:1", "tcp://[fe80::1]:2"), 1), SECRET)
    assert parse(json.loads(json.dumps(values)), tp_size=2, secret=SECRET).addresses[1] == "tcp://[fe80::1]:2"


def test_ids_are_unguessable_and_distinct():
    ids = {params.new_handoff_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert all(len(one) == 32 for one in ids)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"kvlink_version": None}, "kvlink_version"),
        ({"kvlink_version": 99}, "99"),
        ({"kvlink_version": True}, "kvlink_version"),
        ({"kvlink_version": "1"}, "kvlink_version"),
        ({"kvlink_handoff": None}, "hand-off id"),
        ({"kvlink_handoff": "x" * 32}, "hand-off id"),
        ({"kvlink_handoff": "a" * 32 + "\n"}, "hand-off id"),
        ({"kvlink_handoff": "a" * 1_000_000}, "hand-off id"),
        ({"kvlink_handoff": ["a" * 32]}, "hand-off id"),
        ({"remote_engine_id": 7}, "remote_engine_id"),
        ({"remote_engine_id": "e\x1b[2J"}, "remote_engine_id"),
        ({"remote_engine_id": "e" * 257}, "remote_engine_id"),
        ({"remote_num_tokens": -1}, "remote_num_tokens"),
        ({"remote_num_tokens": True}, "remote_num_tokens"),
        ({"remote_num_tokens": 1 << 40}, "remote_num_tokens"),
        ({"remote_num_tokens": 1.5}, "remote_num_tokens"),
        ({"kvlink_addresses": "tcp://127.0.0.1:1"}, "list of addresses"),
        ({"kvlink_addresses": []}, "list of addresses"),
        ({"kvlink_addresses": {"a": 1}}, "list of addresses"),
        ({"kvlink_addresses": ["tcp://127.0.0.1:1"] * 5000}, "list of addresses"),
        ({"kvlink_addresses": [7]}, "not an address"),
        ({"kvlink_addresses": ["tcp://" + "a" * 1000 + ":1"]}, "not an address"),
        ({"kvlink_addresses": ["unix:///run/x"]}, "tcp://host:port"),
        ({"kvlink_addresses": ["tcp://127.0.0.1"]}, "tcp://host:port"),
        ({"kvlink_addresses": ["tcp://127.0.0.1:99999"]}, "tcp://host:port"),
        ({"kvlink_addresses": ["tcp://127.0.0.1:1/x"]}, "tcp://host:port"),
        ({"kvlink_addresses": ["tcp://user@127.0.0.1:1"]}, "tcp://host:port"),
        ({"kvlink_addresses": ["tcp://[::1:1"]}, "tcp://host:port"),
        ({"kvlink_addresses": ["tcp://169.254.169.254:80"]}, "not loopback"),
        ({"kvlink_addresses": ["tcp://127.0.0.1.evil.example:80"]}, "not loopback"),
        ({"tp_size": 2}, "tp_size"),
        ({"tp_size": "1"}, "tp_size"),
        ({"kvlink_addresses": ["tcp://127.0.0.1:1", "tcp://127.0.0.1:2"], "tp_size": 2}, "must be equal"),
    ],
)
def test_refused(changes, text):
    with pytest.raises(ParamsError, match=text):
        parse(good(**changes), tp_size=1, secret=None)


@pytest.mark.parametrize(
    "changes",
    [
        {"kvlink_seal": None},
        {"kvlink_seal": 7},
        {"kvlink_seal": "0" * 64},
        {"kvlink_addresses": ["tcp://127.0.0.1:4001"]},
        {"kvlink_handoff": "0" * 32},
        {"remote_num_tokens": 18},
        {"remote_engine_id": "other"},
    ],
)
def test_the_seal_covers_every_field(changes):
    with pytest.raises(ParamsError, match="seal"):
        parse(good(SECRET, **changes), tp_size=1, secret=SECRET)


def test_another_secret_is_refused():
    with pytest.raises(ParamsError, match="another secret"):
        parse(good(b"other"), tp_size=1, secret=SECRET)


@pytest.mark.parametrize("value", [None, 7, "x", [], {"do_remote_prefill": False}, {"do_remote_decode": "true"}])
def test_what_asks_for_nothing(value):
    assert not params.wants_pull(value)
    assert not params.wants_prefill(value)


def request(**changes):
    values = {"prompt_token_ids": [1, 2, 3], "lora_request": None, "cache_salt": None, "mm_features": []}
    return SimpleNamespace(**{**values, **changes})


def test_digest_separates_what_changes_the_cache():
    base = params.prompt_digest(request())
    assert base == params.prompt_digest(request())
    others = [
        request(prompt_token_ids=[1, 2, 4]),
        request(prompt_token_ids=[1, 2]),
        request(lora_request=SimpleNamespace(lora_name="a")),
        request(cache_salt="s"),
        request(mm_features=[SimpleNamespace(identifier="i", mm_position=SimpleNamespace(offset=1))]),
    ]
    digests = {params.prompt_digest(other) for other in others}
    assert len(digests) == len(others)
    assert base not in digests


def test_embeddings_have_no_digest():
    assert params.prompt_digest(request(prompt_embeds=object())) is None
    assert params.prompt_digest(request(prompt_token_ids=None)) is None
