"""What is not supported is refused at start, by name, with what to change."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from tests.vllm.harness import cache_config, vllm_config
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

from kvlink_vllm.connector import KVLinkConnector
from kvlink_vllm.guards import UnsupportedFeature, check


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"parallel_config__data_parallel_size": 2}, "data parallel.*give the proxy all"),
        ({"parallel_config__pipeline_parallel_size": 2}, "pipeline parallel.*--tensor-parallel-size"),
        ({"parallel_config__decode_context_parallel_size": 2}, "decode context parallel"),
        ({"parallel_config__prefill_context_parallel_size": 2}, "prefill context parallel"),
        ({"speculative_config": object()}, "speculative decoding.*--speculative-config"),
        ({"model_config__use_mla": True, "parallel_config__tensor_parallel_size": 2}, "MLA with tensor parallel"),
        ({"model_config__is_encoder_decoder": True}, "encoder-decoder"),
        ({"cache_config__calculate_kv_scales": True}, "calculate-kv-scales"),
    ],
)
def test_refused_in_both_halves(change, text):
    for role in KVConnectorRole:
        with pytest.raises(UnsupportedFeature, match=text):
            KVLinkConnector(vllm_config("kv_both", {}, **change), role, cache_config(8))


def test_several_cache_groups_are_refused():
    with pytest.raises(UnsupportedFeature, match=r"2 KV-cache groups.*--disable-hybrid-kv-cache-manager"):
        check(vllm_config("kv_both", {}), cache_config(8, groups=2))


def test_state_space_layers_are_refused():
    class MambaSpec:
        block_size = 4

    groups = SimpleNamespace(num_blocks=8, kv_cache_groups=[SimpleNamespace(kv_cache_spec=MambaSpec())])
    with pytest.raises(UnsupportedFeature, match="MambaSpec"):
        check(vllm_config("kv_both", {}), groups)


def test_mla_alone_and_tensor_parallel_alone_pass():
    check(vllm_config("kv_both", {}, model_config__use_mla=True), cache_config(8))
    check(vllm_config("kv_both", {}, parallel_config__tensor_parallel_size=4), cache_config(8))
    check(vllm_config("kv_both", {}), None)


def test_inside_multi_connector_is_refused():
    """With vLLM's own class: its child is built from inside that module."""
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector

    child = {
        "kv_connector": "KVLinkConnector",
        "kv_connector_module_path": "kvlink_vllm",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"transfer_channel": "host"},
    }
    config = vllm_config("kv_both", {})
    config.kv_transfer_config = KVTransferConfig(
        kv_connector="MultiConnector", kv_role="kv_both", kv_connector_extra_config={"connectors": [child]}
    )
    config.scheduler_config.disable_hybrid_kv_cache_manager = True
    with pytest.raises(UnsupportedFeature, match="MultiConnector"):
        MultiConnector(config, KVConnectorRole.SCHEDULER, cache_config(8))


def test_unknown_keys_stop_the_start():
    with pytest.raises(ValueError, match=r"did you mean 'kvlink\.lease'"):
        KVLinkConnector(vllm_config("kv_both", {"kvlink.leas": 3}), KVConnectorRole.SCHEDULER, cache_config(8))
