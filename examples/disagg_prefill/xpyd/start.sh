#!/usr/bin/env bash
# Two prefillers, two decoders and the proxy on this machine. Logs: build/xpyd.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
single=$here/../1p1d
work=${WORK:-build/xpyd}
python=${PYTHON:-python}
mkdir -p "$work"
pids=()
trap 'kill "${pids[@]}" 2>/dev/null; wait' EXIT

# configuration(role, number, key=value...): the 1p1d file with ports of its own.
configuration() {
  "$python" - "$single/cpu/configs/lmcache-$1-config.yaml" "$work/$1-$2.yaml" "${@:3}" <<'PYTHON'
import sys, yaml
values = yaml.safe_load(open(sys.argv[1]))
values.update((key, yaml.safe_load(value)) for key, value in (item.split("=", 1) for item in sys.argv[3:]))
yaml.safe_dump(values, open(sys.argv[2], "w"))
PYTHON
}

for i in 0 1; do
  configuration prefiller $i "pd_pull_done_port=[$((7600 + 10 * i))]" "pd_proxy_port=${NOTIFY_PORT:-7500}"
  LMCACHE_CONFIG_FILE=$work/prefiller-$i.yaml PORT=$((7100 + i)) \
    "$single/cpu/prefill.sh" "$@" > "$work/prefill-$i.log" 2>&1 &
  pids+=($!)
  configuration decoder $i "pd_peer_init_port=[$((7300 + 10 * i))]" "pd_peer_alloc_port=[$((7400 + 10 * i))]"
  LMCACHE_CONFIG_FILE=$work/decoder-$i.yaml PORT=$((7200 + i)) \
    "$single/cpu/decode.sh" "$@" > "$work/decode-$i.log" 2>&1 &
  pids+=($!)
done
"$python" -m kvlink_proxy.cli --host localhost --port "${PORT:-9100}" \
  --prefiller-host localhost --prefiller-port 7100 --num-prefillers 2 \
  --decoder-host localhost --decoder-port 7200 --num-decoders 2 \
  --decoder-init-port 7300 --decoder-init-port 7310 --decoder-alloc-port 7400 --decoder-alloc-port 7410 \
  --proxy-host localhost --proxy-port "${NOTIFY_PORT:-7500}" &
pids+=($!)
wait -n
