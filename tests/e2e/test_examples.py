"""The example's files: scripts that parse, lines that say what the seed says, configurations that LMCache takes."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2] / "examples" / "disagg_prefill"
SCRIPTS = sorted(ROOT.rglob("*.sh"))
# The seed's two files, without comments.
SEED = {
    "prefiller": {
        "local_cpu": False,
        "enable_pd": True,
        "transfer_channel": "hcomm_onesided",
        "pd_role": "sender",
        "pd_peer_host": "localhost",
        "pd_pull_mode": False,
        "pd_delay_pull": False,
        "pd_pull_done_port": [7600, 7601],
        "pd_use_cpu_offload": False,
        "pd_cpu_buffer_size": 21474836480,
        "pd_proxy_host": "localhost",
        "pd_proxy_port": 7500,
        "pd_buffer_size": 2415919104,
        "pd_buffer_device": "npu",
        "save_unfull_chunk": True,
    },
    "decoder": {
        "local_cpu": False,
        "enable_pd": True,
        "transfer_channel": "hcomm_onesided",
        "pd_role": "receiver",
        "pd_peer_host": "localhost",
        "pd_peer_init_port": [7300, 7301],
        "pd_peer_alloc_port": [7400, 7401],
        "pd_pull_mode": False,
        "pd_delay_pull": False,
        "pd_buffer_size": 134217728,
        "pd_buffer_device": "npu",
    },
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_parse(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=30)
    assert script.stat().st_mode & 0o111, "not executable"


@pytest.mark.parametrize("role", SEED)
def test_the_npu_files_are_the_seeds(role: str) -> None:
    ours = yaml.safe_load((ROOT / "1p1d" / "npu" / "configs" / f"lmcache-{role}-config.yaml").read_text())
    expected = dict(SEED[role])
    if role == "decoder":
        expected["pd_buffer_size"] = 2415919104  # the seed's holds 1,820 tokens of its own model; the file says so
    assert ours == expected


@pytest.mark.parametrize("role", SEED)
def test_the_cpu_files_differ_in_values_only(role: str) -> None:
    ours = yaml.safe_load((ROOT / "1p1d" / "cpu" / "configs" / f"lmcache-{role}-config.yaml").read_text())
    assert ours.keys() == SEED[role].keys()
    changed = {key for key in ours if ours[key] != SEED[role][key]}
    assert changed <= {"transfer_channel", "pd_buffer_size", "pd_buffer_device", "pd_cpu_buffer_size"}


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_the_launch_lines_are_the_seeds(role: str) -> None:
    text = (ROOT / "1p1d" / "npu" / f"{role}.sh").read_text()
    line = shlex.split(re.search(r"exec (.*)", text.replace("\\\n", " "))[1])
    for flag, value in (
        ("--tensor-parallel-size", "2"),
        ("--block-size", "128"),
        ("--max-model-len", "32768"),
    ):
        assert line[line.index(flag) + 1] == value
    for flag in ("--enforce-eager", "--no-enable-prefix-caching", "--trust-remote-code"):
        assert flag in line
    transfer = json.loads(line[line.index("--kv-transfer-config") + 1])
    extra = transfer.pop("kv_connector_extra_config")
    assert transfer == {
        "kv_connector": "KVLinkLMCacheConnector",
        "kv_connector_module_path": "kvlink_lmcache.vllm",
        "kv_role": "kv_producer" if role == "prefill" else "kv_consumer",
    }
    expected = {"discard_partial_chunks": False, "lmcache_rpc_port": "producer1" if role == "prefill" else "consumer1"}
    assert extra == expected | ({"skip_last_n_tokens": 1} if role == "decode" else {})
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING=1", "VLLM_WORKER_MULTIPROC_METHOD=spawn", "PYTHONHASHSEED=0"):
        assert f"export {name}" in text
