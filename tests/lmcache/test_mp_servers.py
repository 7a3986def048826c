"""Multiprocess mode: two ``lmcache server``s share KV peer to peer through kvlink.

LMCache's own ``lmcache bench server`` stands for the engines: it stores KV of numbered prompts at one server and asks
the other for the same prompts.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lmcache_pools import free_port

pytest.importorskip("lmcache.v1.distributed.transfer_channel.factory")
pytestmark = pytest.mark.slow
CHUNK, TOKENS, PROMPTS = 256, 1024, 2
# K and V, blocks, tokens of a block, heads, head size, and the layers.
SHAPE, TOKEN_BYTES = "(2,256,16,8,128):float16:4", 2 * 8 * 128 * 2 * 4
ENVIRONMENT = {**os.environ, "PYTHONHASHSEED": "0", "LMCACHE_LOG_LEVEL": "DEBUG", "LMCACHE_DISABLE_BANNER": "1"}
LMCACHE = str(Path(sys.executable).parent / "lmcache")


class Process:
    """A server of LMCache, with its output in a file."""

    def __init__(self, name: str, folder: Path, *arguments: str) -> None:
        self.log = folder / f"{name}.log"
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                [LMCACHE, *arguments], stdout=output, stderr=subprocess.STDOUT, env=ENVIRONMENT
            )

    def text(self) -> str:
        """Returns what it has said; fails when it has ended."""
        text = self.log.read_text(errors="replace")
        assert self._process.poll() is None, text[-3000:]
        return text

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(20)


class Server(Process):
    """An ``lmcache server`` whose transfer engine is kvlink."""

    def __init__(self, name: str, folder: Path, coordinator: str, engine: str) -> None:
        self.port, self.http, self.p2p = free_port(), free_port(), free_port()
        super().__init__(
            name, folder, "server", "--l1-size-gb", "1", "--eviction-policy", "LRU", "--host", "127.0.0.1",
            "--port", str(self.port), "--http-port", str(self.http), "--chunk-size", str(CHUNK), "--disable-metrics",
            "--supported-transfer-mode", "auto", "--coordinator-url", coordinator,
            "--coordinator-advertise-ip", "127.0.0.1", "--coordinator-heartbeat-interval", "1",
            "--p2p-advertise-url", f"127.0.0.1:{self.p2p}", "--p2p-transfer-engine", engine,
        )  # fmt: skip

    def use(self) -> str:
        """Looks the prompts up, loads what is there and stores the rest; returns LMCache's report."""
        done = subprocess.run(
            [LMCACHE, "bench", "server", "--rpc-url", f"tcp://127.0.0.1:{self.port}", "--mode", "cpu",
             "--url", f"http://127.0.0.1:{self.http}", "--num-tokens", str(TOKENS), "--start", "0",
             "--end", str(PROMPTS), "--interval", "0.1", "--kvcache-shape-spec", SHAPE, "--num-blocks", "256"],
            capture_output=True, text=True, env=ENVIRONMENT, timeout=180, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout


def eventually(condition: Callable[[], bool], what: str, seconds: float = 180.0) -> None:
    """Waits until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.2)


def page(url: str) -> Any:
    """Returns the JSON of a page, or None while there is none."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return json.load(answer)
    except OSError:
        return None


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[tuple[Server, Server]]:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    arguments = ("coordinator", "--host", "127.0.0.1", "--port", str(port), "--disable-metrics")
    running = [Process("coordinator", tmp_path, *arguments)]
    try:
        eventually(lambda: page(f"{url}/instances") is not None, "the coordinator answers")
        pair = Server("one", tmp_path, url, "kvlink"), Server("two", tmp_path, url, "host")
        running += pair
        for server in pair:
            eventually(lambda server=server: "Added P2P adapter 0 for peer" in server.text(), "it knows its peer")
        yield pair
    finally:
        for process in reversed(running):
            process.stop()


def hits(server: Server) -> list[tuple[int, int]]:
    """Returns hits in the server's own memory and at its peer, a pair a lookup."""
    found = re.findall(r"completed: \d+ hit cells \((\d+) from L1, (\d+) from L2\)", server.text())
    return [(int(own), int(peer)) for own, peer in found]


def test_the_second_server_reads_what_the_first_has(servers: tuple[Server, Server]) -> None:
    first, second = servers
    for server in servers:
        assert f"channel host for LMCache's server at 127.0.0.1:{server.p2p}" in server.text()
    chunks = TOKENS // CHUNK
    first.use()
    before = len(hits(second))
    second.use()
    eventually(lambda: len(hits(second)) >= before + PROMPTS, "the second server has looked up every prompt")
    assert all(pair == (0, chunks) for pair in hits(second)[before:]), hits(second)
    reads = re.findall(r"get tcp://\S+: (\d+) bytes in \d+ ranges by (\w+)", second.text())
    assert len(reads) >= PROMPTS
    assert {(int(nbytes), path) for nbytes, path in reads} == {(TOKENS * TOKEN_BYTES, "cma")}
