#!/usr/bin/env bash
# Starts the proxy: the seed's line but for the program. INIT_PORTS and ALLOC_PORTS are the decoder's pd_peer_init_port and
# pd_peer_alloc_port: one a tensor-parallel rank (for one rank: INIT_PORTS=7300 ALLOC_PORTS=7400).
set -euo pipefail
exec "${PYTHON:-python}" -m kvlink_proxy.cli \
  --host localhost \
  --port "${PORT:-9100}" \
  --prefiller-host localhost \
  --prefiller-port "${PREFILL_PORT:-7100}" \
  --num-prefillers 1 \
  --decoder-host localhost \
  --decoder-port "${DECODE_PORT:-7200}" \
  --decoder-init-port "${INIT_PORTS:-7300,7301}" \
  --decoder-alloc-port "${ALLOC_PORTS:-7400,7401}" \
  --proxy-host localhost \
  --proxy-port "${NOTIFY_PORT:-7500}" \
  --num-decoders 1 \
  "$@"
