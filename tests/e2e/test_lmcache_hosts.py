"""Two hosts: addresses instead of localhost and one secret, as the example's note says. Needs root.

Each host is a network namespace. The prefiller and the proxy are on one, the decoder on the other.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from tools.cluster import SERVED_NAME, Process
from tools.cluster.lmcache import EXAMPLE

from e2e.prompts import prompt
from e2e.stage import cores

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]
ROOT = Path(__file__).parents[2]
HOSTS = ("10.231.8.1", "10.231.8.2")
LENGTHS = (20, 257, 2049)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=20)


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Two namespaces with a cable between them."""
    names = tuple(f"kvl-{secrets.token_hex(3)}-{end}" for end in "12")
    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("link", "add", "net", "netns", names[0], "type", "veth", "peer", "name", "net", "netns", names[1])
        for name, address in zip(names, HOSTS, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "net")
            ip("-n", name, "link", "set", "net", "up")
        yield names[0], names[1]
    finally:
        for name in names:
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "del", name)


def _configuration(role: str, folder: Path, **changed: object) -> Path:
    values = yaml.safe_load((EXAMPLE / "cpu" / "configs" / f"lmcache-{role}-config.yaml").read_text())
    path = folder / f"{role}.yaml"
    path.write_text(yaml.safe_dump({**values, **changed}))
    return path


def test_two_hosts_with_a_secret(hosts: tuple[str, str], tmp_path: Path, model: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text(secrets.token_hex(32))
    secret.chmod(0o600)
    first, second = cores()
    base = {
        **os.environ,
        "KVLINK_SECRET_FILE": str(secret),
        "PYTHON": sys.executable,
        "MODEL": str(model),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    prefiller = _configuration("prefiller", tmp_path, pd_peer_host=HOSTS[0], pd_proxy_host=HOSTS[0])
    decoder = _configuration("decoder", tmp_path, pd_peer_host=HOSTS[1])
    more = ["--served-model-name", SERVED_NAME, "--max-num-batched-tokens", "2048"]
    plain = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--port", "7000", "--model", str(model)),
        *("--dtype", "float32", "--enforce-eager", "--no-enable-prefix-caching", "--block-size", "128"),
        *("--max-model-len", "8192", *more),
    ]
    proxy = [sys.executable, "-m", "kvlink_proxy.cli", "--host", HOSTS[0], "--port", "9100"]
    proxy += ["--prefiller-host", HOSTS[0], "--prefiller-port", "7100", "--decoder-host", HOSTS[1]]
    proxy += ["--decoder-port", "7200", "--decoder-init-port", "7300", "--decoder-alloc-port", "7400"]
    proxy += ["--proxy-host", HOSTS[0], "--proxy-port", "7500", "--kv-ready-timeout", "120"]
    engine = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": first}
    commands = (
        ("reference", hosts[0], plain, engine),
        ("prefill", hosts[0], ["bash", str(EXAMPLE / "cpu" / "prefill.sh"), "--host", HOSTS[0], *more],
         {**engine, "LMCACHE_CONFIG_FILE": str(prefiller)}),
        ("decode", hosts[1], ["bash", str(EXAMPLE / "cpu" / "decode.sh"), "--host", HOSTS[1], *more],
         {**engine, "VLLM_CPU_OMP_THREADS_BIND": second, "LMCACHE_CONFIG_FILE": str(decoder)}),
        ("proxy", hosts[0], proxy, {}),
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        for name, host, command, own in commands:
            inside = ["ip", "netns", "exec", host, *command]
            log = tmp_path / f"{name}.log"
            stack.enter_context(Process(name, inside, env={**base, **own}, log=log, cwd=ROOT))
        client = [sys.executable, str(Path(__file__).with_name("host_client.py"))]
        urls = ["http://127.0.0.1:7000", f"http://{HOSTS[0]}:9100"]
        wanted = {"urls": urls, "model": SERVED_NAME, "prompts": [prompt(length) for length in LENGTHS], "ready": 600}
        done = subprocess.run(
            ["ip", "netns", "exec", hosts[0], *client],
            input=json.dumps(wanted),
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        logs = "\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in tmp_path.glob("*.log"))
        assert done.returncode == 0, f"{done.stderr}\n{logs}"
    single, split = json.loads(done.stdout)
    assert [answer["text"] for answer in split] == [answer["text"] for answer in single]
    assert {answer["route"] for answer in split} == {"split"}
