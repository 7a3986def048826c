#!/usr/bin/env bash
# Starts the decoder on a CPU. Further arguments go to vLLM. Environment:
#   MODEL   folder of the model          PORT  of the HTTP server, 7200
#   TP      tensor-parallel ranks, 1     VLLM_CPU_OMP_THREADS_BIND  cores, one group a rank, "1"
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export LMCACHE_CONFIG_FILE=${LMCACHE_CONFIG_FILE:-$here/configs/lmcache-decoder-config.yaml}
export VLLM_ENABLE_V1_MULTIPROCESSING=1
export VLLM_WORKER_MULTIPROC_METHOD=spawn
export PYTHONHASHSEED=0
export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1}
export VLLM_CPU_OMP_THREADS_BIND=${VLLM_CPU_OMP_THREADS_BIND:-1}
exec "${PYTHON:-python}" \
    -m vllm.entrypoints.openai.api_server \
    --port "${PORT:-7200}" \
    --model "${MODEL:-build/demo/model}" \
    --dtype float32 \
    --enforce-eager \
    --no-enable-prefix-caching \
    --tensor-parallel-size "${TP:-1}" \
    --trust-remote-code \
    --block-size 128 \
    --max-model-len 8192 \
    --kv-transfer-config '{"kv_connector":"KVLinkLMCacheConnector","kv_role":"kv_consumer","kv_connector_module_path":"kvlink_lmcache.vllm","kv_connector_extra_config": {"discard_partial_chunks": false, "lmcache_rpc_port": "consumer1", "skip_last_n_tokens": 1}}' \
    "$@"
