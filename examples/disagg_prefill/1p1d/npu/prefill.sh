#!/usr/bin/env bash
# Starts the prefiller on two NPUs: the seed's line but for the connector. Further arguments go to vLLM; where the installed
# vLLM takes --disable-log-requests (before 0.11), give it.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export LMCACHE_CONFIG_FILE=${LMCACHE_CONFIG_FILE:-$here/configs/lmcache-prefiller-config.yaml}
export ASCEND_RT_VISIBLE_DEVICES=${ASCEND_RT_VISIBLE_DEVICES:-4,5}
export VLLM_ENABLE_V1_MULTIPROCESSING=1
export VLLM_WORKER_MULTIPROC_METHOD=spawn
export PYTHONHASHSEED=0
exec "${PYTHON:-python}" \
    -m vllm.entrypoints.openai.api_server \
    --port "${PORT:-7100}" \
    --model "${MODEL:-/data/models/Qwen/Qwen3-8B}" \
    --enforce-eager \
    --no-enable-prefix-caching \
    --tensor-parallel-size 2 \
    --trust-remote-code \
    --block-size 128 \
    --max-model-len 32768 \
    --kv-transfer-config '{"kv_connector":"KVLinkLMCacheConnector","kv_role":"kv_producer","kv_connector_module_path":"kvlink_lmcache.vllm","kv_connector_extra_config": {"discard_partial_chunks": false, "lmcache_rpc_port": "producer1"}}' \
    "$@"
