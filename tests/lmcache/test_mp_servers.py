"""Multiprocess mode: two ``lmcache server``s share KV through kvlink, each with a vLLM engine."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lmcache_pools import free_port
from tools.cluster import EngineSpec

from e2e.prompts import prompt
from e2e.stage import Stage, cores
from e2e.talk import ask, eventually

pytest.importorskip("lmcache.v1.distributed.transfer_channel.factory")
pytestmark = [pytest.mark.engine, pytest.mark.slow]
CHUNK = 256
TOKENS = 2000


class Process:
    """A server of LMCache, with its output in a file."""

    def __init__(self, name: str, folder: Path, *arguments: str) -> None:
        self.log = folder / f"{name}.log"
        lmcache = Path(sys.executable).parent / "lmcache"
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                [str(lmcache), *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONHASHSEED": "0", "KVLINK_OPTION_PATH": "auto", "LMCACHE_LOG_LEVEL": "DEBUG"},
            )

    def text(self) -> str:
        """Returns what it has said; fails when it has ended."""
        assert self._process.poll() is None, self.log.read_text(errors="replace")[-3000:]
        return self.log.read_text(errors="replace")

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(20)


def get(url: str) -> Any:
    """Returns the JSON of a page, or None while there is none."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return json.load(answer)
    except OSError:
        return None


def knows_a_peer(server: Process) -> bool:
    """Returns whether a server has met the other one."""
    return "Added P2P adapter 0 for peer" in server.text()


class World(Stage):
    """A coordinator, two servers, two engines."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.processes: list[Process] = []

    def start(self, model: Path, engine: str) -> None:
        coordinator = free_port()
        url = f"http://127.0.0.1:{coordinator}"
        self.processes.append(
            Process(
                "coordinator",
                self.folder,
                "coordinator",
                "--host",
                "127.0.0.1",
                "--port",
                str(coordinator),
                "--disable-metrics",
            )
        )
        eventually("the coordinator answers", lambda: get(f"{url}/instances") is not None, 120)
        self.servers = [self._server(name, url, engine) for name in ("one", "two")]
        specs = []
        for core, (name, _, port) in zip(cores(), self.servers, strict=True):
            extra = {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": port}
            transfer = {"kv_connector": "LMCacheMPConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
            specs.append(
                EngineSpec(f"engine-{name}", model, cores=core, transfer=transfer, env={"PYTHONHASHSEED": "0"})
            )
        self.engines = [self.start_engine(spec) for spec in specs]
        self.ready()

    def _server(self, name: str, coordinator: str, engine: str) -> tuple[str, Process, int]:
        port, http, p2p = free_port(), free_port(), free_port()
        process = Process(
            name, self.folder, "server", "--l1-size-gb", "1", "--eviction-policy", "LRU", "--host", "127.0.0.1",
            "--port", str(port), "--http-port", str(http), "--chunk-size", str(CHUNK), "--disable-metrics",
            "--supported-transfer-mode", "auto", "--coordinator-url", coordinator,
            "--coordinator-advertise-ip", "127.0.0.1", "--coordinator-heartbeat-interval", "1",
            "--p2p-advertise-url", f"127.0.0.1:{p2p}", "--p2p-transfer-engine", engine,
        )  # fmt: skip
        self.processes.append(process)
        return name, process, port

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)
        for process in reversed(self.processes):
            process.stop()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    root = Path(__file__).parents[2]
    model = root / "build" / "e2e" / "model-float32"
    subprocess.run([sys.executable, "-m", "tools.make_model", str(model)], cwd=root, check=True, timeout=300)
    with World(tmp_path) as world:
        world.start(model, "kvlink")
        yield world


def test_the_second_server_reads_what_the_first_has(world: World) -> None:
    (_, first, _), (_, second, _) = world.servers
    for server in (first, second):
        eventually("it knows the other", functools.partial(knows_a_peer, server), 60)
        assert re.search(r"channel host for LMCache's server at", server.text())
    tokens = prompt(TOKENS, 1)
    want = ask(world.engines[0], tokens, max_tokens=8).ids
    time.sleep(5)  # there is no signal for the end of the store; a lookup that comes too early is a miss
    got = ask(world.engines[1], tokens, max_tokens=8).ids
    assert got == want
    reads = re.findall(r"get tcp://\S+: (\d+) bytes in \d+ ranges by (shm|cma|tcp)", second.text())
    layer_bytes = TOKENS // CHUNK * CHUNK
    assert sum(int(nbytes) for nbytes, _ in reads) > 0, second.text()[-3000:]
    assert sum(int(nbytes) for nbytes, _ in reads) % layer_bytes == 0
    hits = [int(n) for n in re.findall(r"(\d+) hit|hit[^0-9]{1,20}(\d+)", second.text())[0] if n]
    assert hits
