"""vLLM engines and the proxy: how they are started and when they are ready."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.cluster import client
from tools.cluster.client import Completion
from tools.cluster.process import Port, Process

SERVED_NAME = "kvlink-small"


def kvlink_config(role: str, *, path: str = "auto", **extra: object) -> dict[str, Any]:
    """Return a ``--kv-transfer-config`` for the kvlink connector over the host provider.

    Args:
        role: "kv_producer", "kv_consumer" or "kv_both".
        path: "auto", "shm", "cma" or "tcp".
        **extra: More keys of ``kv_connector_extra_config``; ``_`` after a leading ``kvlink`` becomes a dot, so that
            ``kvlink_lease_s=5`` is the key ``kvlink.lease_s``.

    Returns:
        The configuration as a mapping.
    """
    options: dict[str, object] = {"transfer_channel": "host", "kvlink.path": path}
    for key, value in extra.items():
        options[key.replace("kvlink_", "kvlink.", 1) if key.startswith("kvlink_") else key] = value
    return {
        "kv_connector": "KVLinkConnector",
        "kv_connector_module_path": "kvlink_vllm",
        "kv_role": role,
        "kv_connector_extra_config": options,
    }


@dataclass(frozen=True)
class EngineSpec:
    """How to start one engine.

    Attributes:
        name: For messages and the log's name; unique in a cluster.
        model: Folder of the model.
        cores: ``VLLM_CPU_OMP_THREADS_BIND``: one group of cores a rank, groups separated by "|" ("0", "0-3|4-7").
        tensor_parallel: Ranks.
        dtype: "float32" or "bfloat16".
        kv_cache_gib: Size of the KV cache of each rank, GiB.
        max_model_len: Longest request, tokens.
        max_batched_tokens: Most tokens in one step: prompts above it are prefilled in chunks.
        prefix_caching: Keep the blocks of finished requests for prompts that begin the same.
        transfer: The ``--kv-transfer-config``; None for a plain engine.
        args: More arguments of the server.
        env: More environment variables.
    """

    name: str
    model: Path
    cores: str = "0"
    tensor_parallel: int = 1
    dtype: str = "float32"
    kv_cache_gib: int = 1
    max_model_len: int = 8192
    max_batched_tokens: int = 2048
    prefix_caching: bool = False
    transfer: Mapping[str, Any] | None = None
    args: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)

    def command(self, port: int) -> list[str]:
        """Return the command line that serves on a port of the loopback interface."""
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--host", "127.0.0.1", "--port", str(port)]
        command += ["--model", str(self.model), "--served-model-name", SERVED_NAME, "--dtype", self.dtype]
        command += ["--enforce-eager", "--max-model-len", str(self.max_model_len)]
        command += ["--max-num-batched-tokens", str(self.max_batched_tokens)]
        command += ["--tensor-parallel-size", str(self.tensor_parallel)]
        command += ["--enable-prefix-caching" if self.prefix_caching else "--no-enable-prefix-caching"]
        if self.transfer is not None:
            command += ["--kv-transfer-config", json.dumps(self.transfer)]
        return [*command, *self.args]

    def environment(self) -> dict[str, str]:
        """Return the whole environment of the engine."""
        return {
            **os.environ,
            "PYTHONHASHSEED": "0",
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
            "VLLM_CPU_KVCACHE_SPACE": str(self.kv_cache_gib),
            "VLLM_CPU_OMP_THREADS_BIND": self.cores,
            **self.env,
        }


class Server(Process):
    """A process that serves HTTP on a port of its own.

    Attributes:
        port: Its port.
        url: Its base URL.
    """

    def __init__(self, name: str, command: Sequence[str], port: Port, *, env: Mapping[str, str], log: Path) -> None:
        self._port = port
        self.port = port.number
        self.url = f"http://127.0.0.1:{port.number}"
        try:
            super().__init__(name, command, env=env, log=log)
        except BaseException:
            port.release()
            raise

    def ready(self) -> bool:
        """Return whether it answers ``/health`` with 200 now."""
        try:
            status, _ = client.get(f"{self.url}/health")
        except OSError:
            return False
        if status == 200:
            self._port.release()
        return status == 200

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of a Prometheus metric's samples that carry the given labels; 0 when there are none.

        Args:
            name: Of the sample, as in "vllm:prompt_tokens_total".
            **labels: Labels that a sample must have.

        Raises:
            OSError: The server cannot be reached.
        """
        _, text = client.get(f"{self.url}/metrics", timeout=30)
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        total = 0.0
        for line in text.splitlines():
            sample, _, value = line.rpartition(" ")
            if sample.partition("{")[0] == name and all(label in sample for label in wanted):
                total += float(value)
        return total

    def complete(self, prompt: str | list[int], **extra: Any) -> Completion:
        """Ask for a greedy completion; see :func:`tools.cluster.client.complete`."""
        return client.complete(self.url, prompt, model=SERVED_NAME, **extra)

    def stop(self) -> None:
        """End the tree, wait until nothing of it is left, and free its port. Idempotent."""
        super().stop()
        self._port.release()


class Engine(Server):
    """A vLLM engine."""

    def __init__(self, spec: EngineSpec, log_dir: Path, port: Port | None = None) -> None:
        self.spec = spec
        port = port or Port()
        log = log_dir / f"{spec.name}.log"
        super().__init__(spec.name, spec.command(port.number), port, env=spec.environment(), log=log)


class Proxy(Server):
    """The kvlink proxy in front of prefillers and decoders."""

    def __init__(
        self,
        name: str,
        prefills: Sequence[Server],
        decodes: Sequence[Server],
        log_dir: Path,
        args: Sequence[str] = (),
    ) -> None:
        port = Port()
        command = [sys.executable, "-m", "kvlink_proxy.cli", "--host", "127.0.0.1", "--port", str(port.number)]
        for role, servers in (("prefiller", prefills), ("decoder", decodes)):
            command += [f"--{role}", ",".join(server.url for server in servers)]
        log = log_dir / f"{name}.log"
        env = {**os.environ, "PYTHONUNBUFFERED": "1"}
        super().__init__(name, [*command, *args], port, env=env, log=log)

    def ready(self) -> bool:
        """Return whether it answers, and knows its prefillers and decoders to be up: it splits requests now."""
        if not super().ready():
            return False
        try:
            _, page = client.get(f"{self.url}/health")
        except OSError:
            return False
        return bool(json.loads(page)["status"] == "ok")
