"""Prefiller, decoder and proxy of the LMCache flow, started by the example's own scripts and configurations."""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tools.cluster import SERVED_NAME, Cluster, Engine, EngineSpec, Port, Proxy, Server

EXAMPLE = Path(__file__).parents[2] / "examples" / "disagg_prefill" / "1p1d"
MODES = ("push", "pull", "delayed")
_TRANSFER = re.compile(r"\b(put|get) tcp://\S+: (\d+) bytes in (\d+) ranges by (\w+), ([\d.]+) ms")


@dataclass(frozen=True)
class Moved:
    """One transfer, from the adapter's log.

    Attributes:
        operation: "put" or "get".
        nbytes: Bytes.
        ranges: Ranges.
        path: The way that they took.
        seconds: From submit to completion.
    """

    operation: str
    nbytes: int
    ranges: int
    path: str
    seconds: float


class LogTail:
    """What a server logs from now on."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._offset = log.stat().st_size if log.exists() else 0

    def moved(self) -> list[Moved]:
        """Return the transfers logged since the last call."""
        with self._log.open("rb") as log:
            log.seek(self._offset)
            text = log.read()
        whole = text.rfind(b"\n") + 1
        self._offset += whole
        found = _TRANSFER.findall(text[:whole].decode("utf-8", "replace"))
        return [Moved(op, int(size), int(ranges), path, float(ms) / 1e3) for op, size, ranges, path, ms in found]


def free_ports(count: int) -> list[int]:
    """Return ports that nothing listens on now; LMCache's own sockets do not share a reserved one."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [item.getsockname()[1] for item in sockets]
    for item in sockets:
        item.close()
    return ports


@dataclass(frozen=True)
class ScriptSpec(EngineSpec):
    """An engine that one of the example's scripts starts.

    Attributes:
        script: The script.
        config: The LMCache configuration.
    """

    script: Path = Path()
    config: Path = Path()

    def command(self, port: int) -> list[str]:
        """Return the command line that serves on a port of the loopback interface."""
        more = ["--host", "127.0.0.1", "--served-model-name", SERVED_NAME, *self.args]
        return ["env", f"PORT={port}", "bash", str(self.script), *more]

    def environment(self) -> dict[str, str]:
        """Return the whole environment of the engine."""
        own = {"MODEL": str(self.model), "TP": str(self.tensor_parallel), "PYTHON": sys.executable}
        return {**super().environment(), **own, "LMCACHE_CONFIG_FILE": str(self.config), **self.env}


@dataclass(frozen=True)
class LMCacheSetup:
    """What the flow is made of.

    Attributes:
        model: Folder of the model.
        cores: ``VLLM_CPU_OMP_THREADS_BIND`` of prefiller and decoder.
        tensor_parallel: Ranks of each.
        mode: "push", "pull" or "delayed".
        channel: ``transfer_channel``.
        options: ``extra_config`` of both sides: ``kvlink.*``.
        keys: More keys of both configurations.
        env: More environment variables of the engines.
        own_env: More of the prefiller alone, and of the decoder.
        proxy_args: More arguments of the proxy.
        verbose: Log every transfer.
    """

    model: Path
    cores: tuple[str, str] = ("0", "0")
    tensor_parallel: int = 1
    mode: str = "push"
    channel: str = "host"
    options: Mapping[str, Any] = field(default_factory=dict)
    keys: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    own_env: tuple[Mapping[str, str], Mapping[str, str]] = ({}, {})
    proxy_args: Sequence[str] = ()
    verbose: bool = True


@dataclass(frozen=True)
class LMCacheFlow:
    """The three of them, started.

    Attributes:
        prefill: The prefiller.
        decode: The decoder.
        proxy: The proxy.
    """

    prefill: Engine
    decode: Engine
    proxy: Proxy


class ScriptProxy(Proxy):
    """The proxy as the example's script starts it."""

    def __init__(self, cluster: Cluster, environment: Mapping[str, str], args: Sequence[str], *, name: str) -> None:
        port = Port()
        command = ["env", f"PORT={port.number}", "bash", str(EXAMPLE / "proxy.sh"), *args]
        env = {**os.environ, "PYTHON": sys.executable, "PYTHONUNBUFFERED": "1", **environment}
        Server.__init__(self, name, command, port, env=env, log=cluster.log_dir / f"{name}.log")


def start_lmcache(cluster: Cluster, setup: LMCacheSetup) -> LMCacheFlow:
    """Start prefiller, decoder and proxy; returns at once.

    Args:
        cluster: Where they live.
        setup: What to start.

    Returns:
        The servers, not ready yet.
    """
    ranks = setup.tensor_parallel
    ports = free_ports(3 * ranks + 1)
    init, alloc, done = ports[:ranks], ports[ranks : 2 * ranks], ports[2 * ranks : 3 * ranks]
    pull = {"pd_pull_mode": setup.mode != "push", "pd_delay_pull": setup.mode == "delayed"}
    changed: dict[str, dict[str, Any]] = {
        "prefiller": {"pd_pull_done_port": done, "pd_proxy_port": ports[-1]},
        "decoder": {"pd_peer_init_port": init, "pd_peer_alloc_port": alloc},
    }
    configs: dict[str, Path] = {}
    for role, own in changed.items():
        values = yaml.safe_load((EXAMPLE / "cpu" / "configs" / f"lmcache-{role}-config.yaml").read_text())
        values |= {"transfer_channel": setup.channel, **pull, **own, **setup.keys}
        if setup.options:
            values["extra_config"] = dict(setup.options)
        configs[role] = cluster.log_dir / f"lmcache-{role}-config.yaml"
        configs[role].write_text(yaml.safe_dump(values))
    env = {"VLLM_LOGGING_LEVEL": "DEBUG", **setup.env} if setup.verbose else dict(setup.env)

    def engine(name: str, role: str, number: int) -> Engine:
        script = EXAMPLE / "cpu" / f"{name}.sh"
        common = {"cores": setup.cores[number], "tensor_parallel": ranks, "env": {**env, **setup.own_env[number]}}
        return cluster.engine(ScriptSpec(name, setup.model, script=script, config=configs[role], **common))

    prefill = engine("prefill", "prefiller", 0)
    decode = engine("decode", "decoder", 1)
    environment = {
        "PREFILL_PORT": str(prefill.port),
        "DECODE_PORT": str(decode.port),
        "INIT_PORTS": ",".join(map(str, init)),
        "ALLOC_PORTS": ",".join(map(str, alloc)),
        "NOTIFY_PORT": str(ports[-1]),
    }
    proxy = ScriptProxy(cluster, environment, setup.proxy_args, name="proxy")
    cluster.servers.append(proxy)
    return LMCacheFlow(prefill, decode, proxy)


def computed(decode: Server) -> int:
    """Return how many prompt tokens a decoder computed itself, by vLLM's own count."""
    return int(decode.metric("vllm:prompt_tokens_by_source_total", source="local_compute"))
