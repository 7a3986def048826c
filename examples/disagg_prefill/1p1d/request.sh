#!/usr/bin/env bash
# Sends the seed's request to the proxy.
set -euo pipefail
curl --fail-with-body --silent --show-error -X POST "http://localhost:${PORT:-9100}/v1/completions" \
  -H "Content-Type: application/json" \
  -d "{
    \"model\": \"${MODEL:-build/demo/model}\",
    \"prompt\": \"$(printf 'Explain the significance of KV cache in language models in English.%.0s' {1..100})\",
    \"max_tokens\": 100
  }"
