"""Prefiller and decoder that do not fit together are told so at first contact, with both values."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tests.lmcache.lmcache_pools import Pool, free_port

from kvlink.errors import ConnectError
from kvlink_lmcache import context
from kvlink_lmcache.registration import register

register()

from lmcache.v1.config import LMCacheEngineConfig  # noqa: E402

METADATA = {
    "model_name": "models/a",
    "kv_dtype": torch.float32,
    "kv_shape": (2, 2, 16, 2, 8),
    "world_size": 1,
    "worker_id": 0,
}
ENGINE = context.Engine(layout="blocks: 256 bytes a token, blocks of 8 #1", model_digest="d1")


@pytest.fixture
def side(monkeypatch):
    """Opens the channel of one side: LMCache's metadata, configuration and engine may differ by something."""
    opened = []
    monkeypatch.setattr(context, "engine", context.Engine())
    monkeypatch.setattr(context, "_current", None)

    def open_side(role, *, seed="0", chunk_size=16, engine=None, extra=None, **metadata):
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        monkeypatch.setattr(context, "engine", replace(ENGINE, **(engine or {})))
        config = LMCacheEngineConfig.from_defaults(chunk_size=chunk_size, extra_config=extra or {})
        context.enter(config, SimpleNamespace(**{**METADATA, **metadata}))
        url = f"127.0.0.1:{free_port()}" if role == "receiver" else None
        opened.append(Pool(2, peer_init_url=url, role=role))
        return opened[-1]

    yield open_side
    for pool in opened:
        pool.close()


def meet(sender, receiver):
    sender.channel.lazy_init_peer_connection(local_id="p", peer_id="d", peer_init_url=receiver.url)


@pytest.mark.parametrize(
    ("other", "values"),
    [
        ({"model_name": "models/b"}, ("model", "models/a", "models/b")),
        ({"kv_dtype": torch.bfloat16}, ("kv_dtype", "float32", "bfloat16")),
        ({"chunk_size": 32}, ("chunk_size", "16", "32")),
        ({"world_size": 2}, ("tensor_parallel", "1", "2")),
        ({"worker_id": 1, "world_size": 1}, ("tensor_parallel_rank", "0", "1")),
        ({"seed": "7"}, ("PYTHONHASHSEED", "0", "7")),
        ({"engine": {"model_digest": "d2"}}, ("model_config", "d1", "d2")),
        (
            {"engine": {"layout": "blocks: 256 bytes a token, blocks of 4 #2"}},
            ("kv_layout", "blocks of 8", "blocks of 4"),
        ),
    ],
)
def test_a_difference_is_named_with_both_values(side, other, values):
    receiver = side("receiver")
    sender = side("sender", **other)
    with pytest.raises(ConnectError) as failure:
        meet(sender, receiver)
    for value in values:
        assert value in str(failure.value)


def test_equal_sides_meet(side):
    receiver = side("receiver")
    meet(side("sender"), receiver)


def test_two_paths_of_one_model_may_have_one_name(side):
    receiver = side("receiver", extra={"kvlink.lmcache.model_id": "a"})
    meet(side("sender", model_name="models/other", extra={"kvlink.lmcache.model_id": "a"}), receiver)
