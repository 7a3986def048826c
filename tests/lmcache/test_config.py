"""The YAML keys: LMCache-Ascend's are added, misspelt ones refused, and what does not fit an engine too."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from kvlink.errors import ConfigError
from kvlink_lmcache.registration import register

register()

from lmcache.v1.config import LMCacheEngineConfig  # noqa: E402

from kvlink_lmcache import context, keys, settings, sizes  # noqa: E402
from kvlink_lmcache.mover import choice  # noqa: E402
from kvlink_lmcache.vllm import checks  # noqa: E402

PREFILLER = """
local_cpu: False
enable_pd: True
transfer_channel: "host"
pd_role: "sender"
pd_peer_host: "localhost"
pd_pull_mode: False
pd_delay_pull: False
pd_pull_done_port: [7600, 7601]
pd_use_cpu_offload: False
pd_cpu_buffer_size: 21474836480
pd_proxy_host: "localhost"
pd_proxy_port: 7500
pd_buffer_size: 2415919104
pd_buffer_device: "cpu"
save_unfull_chunk: True
"""
DECODER = """
local_cpu: False
enable_pd: True
transfer_channel: "host"
pd_role: "receiver"
pd_peer_host: "localhost"
pd_peer_init_port: [7300, 7301]
pd_peer_alloc_port: [7400, 7401]
pd_pull_mode: False
pd_delay_pull: False
pd_buffer_size: 134217728
pd_buffer_device: "cpu"
save_unfull_chunk: True
"""


def load(tmp_path, text):
    path = tmp_path / "lmcache.yaml"
    path.write_text(text)
    return LMCacheEngineConfig.from_file(str(path))


def test_every_key_of_the_seeds_prefiller_arrives(tmp_path):
    config = load(tmp_path, PREFILLER)
    assert config.pd_pull_done_port == [7600, 7601]
    assert (config.pd_pull_mode, config.pd_delay_pull, config.pd_use_cpu_offload) == (False, False, False)
    assert (config.pd_cpu_buffer_size, config.pd_buffer_size) == (21474836480, 2415919104)
    assert (config.pd_proxy_host, config.pd_proxy_port) == ("localhost", 7500)
    assert (config.local_cpu, config.save_unfull_chunk, config.transfer_channel) == (False, True, "host")
    checks.check_config(config, tp_size=2, kv_role="kv_producer")


def test_every_key_of_the_seeds_decoder_arrives(tmp_path):
    config = load(tmp_path, DECODER)
    assert (config.pd_peer_init_port, config.pd_peer_alloc_port) == ([7300, 7301], [7400, 7401])
    checks.check_config(config, tp_size=2, kv_role="kv_consumer")


def test_defaults_are_lmcache_ascends():
    config = LMCacheEngineConfig.from_defaults()
    assert {key: getattr(config, key) for key in keys.ASCEND_KEYS} == {k: v[1] for k, v in keys.ASCEND_KEYS.items()}


def test_the_environment_sets_added_keys(monkeypatch):
    monkeypatch.setenv("LMCACHE_PD_PULL_MODE", "True")
    monkeypatch.setenv("LMCACHE_PD_PULL_DONE_PORT", "7600,7601")
    monkeypatch.setenv("LMCACHE_PD_PULL_PENDING_TTL", "12.5")
    config = LMCacheEngineConfig.from_env()
    assert (config.pd_pull_mode, config.pd_pull_done_port, config.pd_pull_pending_ttl) == (True, [7600, 7601], 12.5)


def test_added_keys_survive_a_copy():
    config = LMCacheEngineConfig.from_defaults(pd_delay_pull=True)
    assert LMCacheEngineConfig.from_dict(config.to_dict()).pd_delay_pull is True


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("pd_pul_mode: True", "did you mean 'pd_pull_mode'"),
        ("pd_buffer_sise: 1", "did you mean 'pd_buffer_size'"),
        ("pd_peer_init_ports: [1]", "did you mean 'pd_peer_init_port'"),
        ("save_unful_chunk: True", "did you mean 'save_unfull_chunk'"),
    ],
)
def test_a_misspelt_key_is_refused_with_the_nearest(tmp_path, line, hint):
    with pytest.raises(ConfigError, match=hint):
        load(tmp_path, DECODER + line)


def test_a_misspelt_channel_key_is_refused_too(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'transfer_channel'"):
        load(tmp_path, DECODER.replace("transfer_channel", "transfer_chanel"))


def test_a_misspelt_channel_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"'hosst' is neither"):
        load(tmp_path, DECODER.replace('"host"', '"hosst"'))


def test_the_connector_checks_the_file_too(tmp_path, monkeypatch):
    """LMCache-Ascend replaces the configuration class, and with it what was checked when the file is read."""
    path = tmp_path / "lmcache.yaml"
    path.write_text(DECODER + "pd_pul_mode: True\n")
    monkeypatch.setenv("LMCACHE_CONFIG_FILE", str(path))
    with pytest.raises(ConfigError, match=r"lmcache\.yaml: did you mean 'pd_pull_mode'"):
        checks.check_lmcache_config(SimpleNamespace())


def test_files_for_lmcache_alone_stay_lmcaches_business(tmp_path):
    config = load(tmp_path, "transfer_channel: nixl\nno_such_key: 1\nlocal_cpu: True\n")
    assert config.local_cpu is True


@pytest.mark.parametrize("line", ["pd_pull_done_port: [a]", "pd_cpu_buffer_size: much", "pd_pull_mode: maybe"])
def test_a_wrong_value_is_named(tmp_path, line):
    key, _, value = line.partition(": ")
    text = "\n".join(row for row in PREFILLER.splitlines() if not row.startswith(key))
    with pytest.raises(ConfigError, match=f"{key} is .*{value.strip('[]')}"):
        load(tmp_path, f"{text}\n{line}\n")


def pd(**changes):
    values = {
        "enable_pd": True, "transfer_channel": "host", "pd_role": "receiver", "pd_buffer_device": "cpu",
        "pd_buffer_size": 1 << 20, "pd_peer_host": "localhost", "pd_peer_init_port": [1, 2],
        "pd_peer_alloc_port": [3, 4], "pd_proxy_host": "localhost", "pd_proxy_port": 5,
    }  # fmt: skip
    return LMCacheEngineConfig.from_defaults(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "role", "message"),
    [
        (
            {"pd_peer_init_port": [1]},
            "kv_consumer",
            r"pd_peer_init_port has 1 ports \(\[1\]\); --tensor-parallel-size 2 needs 2",
        ),
        ({"pd_peer_alloc_port": None}, "kv_consumer", "pd_peer_alloc_port is missing"),
        ({"pd_peer_alloc_port": [3, 3]}, "kv_consumer", "names a port twice"),
        ({"pd_peer_host": None}, "kv_consumer", "pd_peer_host is missing"),
        ({}, "kv_producer", "pd_role is 'receiver' and kv_role 'kv_producer'"),
        ({"pd_role": "sender"}, "kv_consumer", "pd_role is 'sender' and kv_role 'kv_consumer'"),
        ({"pd_role": "sender", "pd_proxy_port": None}, "kv_producer", "pd_proxy_port is missing"),
        ({"pd_role": "sender", "pd_pull_mode": True}, "kv_producer", "pd_pull_done_port is missing"),
        ({"pd_delay_pull": True}, "kv_consumer", "pd_delay_pull is true and pd_pull_mode false"),
        ({"pd_buffer_device": "npu"}, "kv_consumer", "this machine has none that torch can use"),
        ({"pd_buffer_device": "disk"}, "kv_consumer", "expected 'npu' or 'cpu'"),
    ],
)
def test_what_does_not_fit_is_refused_at_start(changes, role, message):
    with pytest.raises(ConfigError, match=message):
        checks.check_config(pd(**changes), tp_size=2, kv_role=role)


def test_lmcaches_own_channels_are_not_checked_for_devices():
    checks.check_config(pd(transfer_channel="nixl", pd_buffer_device="npu"), tp_size=2, kv_role="kv_consumer")


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("discard_partial_chunk", "did you mean 'discard_partial_chunks'"),
        ("skip_last_n_token", "did you mean 'skip_last_n_tokens'"),
        ("kvlink.path", "write it into LMCache's YAML file"),
        ("transfer_channel", "write it into LMCache's YAML file"),
    ],
)
def test_misspelt_keys_of_the_connector_are_refused(key, hint):
    with pytest.raises(ConfigError, match=hint):
        checks.check_connector_keys({key: 1})


def test_the_connectors_own_keys_are_taken():
    checks.check_connector_keys(
        {"discard_partial_chunks": False, "lmcache_rpc_port": "p", "skip_last_n_tokens": 1, "lmcache.chunk_size": 1}
    )


def test_seed_ports_go_with_the_seeds_size():
    """The seed's decoder: 128 MiB hold 1,820 tokens' worth of bytes of Qwen3-8B at TP 2, and 2.25 GiB are needed."""
    metadata = SimpleNamespace(kv_shape=(36, 2, 256, 4, 128), kv_dtype=torch.bfloat16)
    context.engine.max_model_len = 32768
    try:
        found = sizes.capacity(pd(pd_buffer_size=134217728), metadata)
        assert (found.chunks, found.tokens) == (7, 1792)
        assert found.bytes_for(found.longest) == 2415919104
        assert found.refusal(1792) is None
        assert "needs 150994944 bytes" in found.refusal(1793)
        assert "at least 150994944" in found.refusal(1793)
    finally:
        context.engine.max_model_len = 0


def test_a_buffer_without_room_for_a_chunk_is_refused():
    metadata = SimpleNamespace(kv_shape=(36, 2, 256, 4, 128), kv_dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="smaller than one chunk of 256 tokens"):
        sizes.report(pd(pd_buffer_size=1 << 20), metadata)


@pytest.mark.parametrize(
    ("changes", "form"),
    [
        ({}, "blocks"),
        ({"local_disk": "/tmp/x"}, "tokens"),
        ({"remote_url": "redis://h:1"}, "tokens"),
        ({"extra_config": {"kvlink.lmcache.kv_form": "tokens"}}, "tokens"),
        ({"local_disk": "/tmp/x", "extra_config": {"kvlink.lmcache.kv_form": "blocks"}}, "blocks"),
    ],
)
def test_objects_that_outlive_the_engine_are_kept_token_by_token(changes, form):
    assert choice.kv_form(pd(**changes)) == form


def test_peers_compare_what_decides_the_keys_and_bytes(monkeypatch):
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    monkeypatch.setattr(context, "engine", context.Engine(layout="blocks: x", model_digest="abc"))
    metadata = SimpleNamespace(
        kv_shape=(36, 2, 256, 4, 128), kv_dtype=torch.bfloat16, model_name="m", world_size=2, worker_id=1
    )
    found = settings.identity(pd(), metadata)
    assert found["model"] == "m"
    assert found["kv_dtype"] == "bfloat16"
    assert found["chunk_size"] == 256
    assert found["tensor_parallel"] == 2
    assert found["PYTHONHASHSEED"] == "0"
    assert found["kv_layout"] == "blocks: x"
    assert found["model_config"] == "abc"
    renamed = settings.identity(pd(extra_config={"kvlink.lmcache.model_id": "n"}), metadata)
    assert renamed["model"] == "n"
