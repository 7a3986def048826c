"""The command as a process: signals, ports, and engines that are killed."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from proxy_servers import Engines, Proxies, events_of, wait_until


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a process; it is killed after the test if it still runs."""
    with ExitStack() as stack:

        def run(*argv: str) -> subprocess.Popen[str]:
            process = subprocess.Popen([sys.executable, *argv], stderr=subprocess.PIPE, text=True)

            def end() -> None:
                if process.poll() is None:
                    process.kill()
                process.wait(20)
                assert process.stderr is not None
                process.stderr.close()

            stack.callback(end)
            return process

        yield run


class RunningProxy:
    """The command on a free port, its log read in the background."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.log: list[str] = []
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()
        wait_until(lambda: self.port or process.poll() is not None, 30, "the proxy's start")

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.log.extend(self.process.stderr)

    @property
    def port(self) -> int | None:
        found = [re.search(r"listening on http://127\.0\.0\.1:(\d+)", line) for line in list(self.log)]
        return next((int(match[1]) for match in found if match), None)

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        status = self.process.wait(20)
        self.thread.join(10)
        return status


def proxy_of(start: Callable[..., Any], p: Any, d: Any, *flags: str) -> RunningProxy:
    engines = ["--prefiller", getattr(p, "url", p), "--decoder", getattr(d, "url", d)]
    argv = ["-m", "kvlink_proxy.cli", "--host", "127.0.0.1", "--port", "0", "--health-interval", "0.2"]
    running = RunningProxy(start(*argv, *engines, *flags))
    assert running.port, "".join(running.log)
    return running


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_ends_with_zero(engines: Engines, start: Callable[..., Any], number: int) -> None:
    p, d = engines("prefill"), engines("decode", token_delay=0.05)
    proxy = proxy_of(start, p, d)
    results: list[httpx.Response] = []

    def ask() -> None:
        url = f"http://127.0.0.1:{proxy.port}/v1/completions"
        results.append(httpx.post(url, json={"prompt": "a", "max_tokens": 30, "stream": True}, trust_env=False))

    thread = threading.Thread(target=ask)
    thread.start()
    wait_until(lambda: d.requests, 10, "the decoder's request")
    assert proxy.end(number) == 0
    thread.join(20)
    assert events_of(results[0].text)[-1] == "[DONE]", "a running request was not cut"
    assert any("draining, 1 requests in work" in line for line in proxy.log)
    assert not any("Traceback" in line for line in proxy.log), "".join(proxy.log)


def test_the_drain_is_bounded(engines: Engines, start: Callable[..., Any]) -> None:
    p, d = engines("prefill"), engines("decode", hang_after=1)
    proxy = proxy_of(start, p, d, "--drain-seconds", "1")
    connection = socket.create_connection(("127.0.0.1", proxy.port or 0), timeout=20)
    body = b'{"prompt": "a", "stream": true}'
    with connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: p\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        assert b" 200 " in connection.recv(4096)
        assert proxy.end(signal.SIGTERM) == 0
    wait_until(lambda: d.aborted == 1, 10, "the decoder to drop the request")


def test_a_port_in_use(start: Callable[..., Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        process = start("-m", "kvlink_proxy.cli", "--host", "127.0.0.1", "--port", port)
        _, log = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "address already in use" in log


def test_a_decoder_killed_in_mid_stream(
    engines: Engines, proxies: Proxies, start: Callable[..., Any], free_port: int
) -> None:
    p, other = engines("prefill"), engines("decode")
    url = f"http://127.0.0.1:{free_port}"
    fake = str(Path(__file__).with_name("proxy_fake_engine.py"))
    victim = start(fake, "--port", str(free_port), "--token-delay", "0.05")
    proxy = proxies([p], [url, other], checked=False)
    wait_until(lambda: len(proxy.service.decoders.up) == 2, 30, "both decoders")
    with proxy.http.stream(
        "POST", "/v1/completions", json={"prompt": "a", "max_tokens": 999, "stream": True}
    ) as answer:
        pieces = answer.iter_text()
        text = next(pieces)
        assert other.requests == []
        os.kill(victim.pid, signal.SIGKILL)
        text += "".join(pieces)
    last = events_of(text)[-1]
    assert last["error"]["message"].startswith(f"decode: engine {url} broke off its answer")
    wait_until(lambda: len(proxy.service.decoders.up) == 1, 10, "the proxy to notice")
    for _ in range(3):
        assert proxy.complete().status_code == 200
    assert len(other.requests) == 3


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_an_engine_killed_before_it_answers(
    engines: Engines, proxies: Proxies, start: Callable[..., Any], free_port: int, role: str
) -> None:
    url = f"http://127.0.0.1:{free_port}"
    fake = str(Path(__file__).with_name("proxy_fake_engine.py"))
    victim = start(fake, "--port", str(free_port), "--role", role, "--delay", "60")
    p, d = engines("prefill"), engines("decode")
    sides = ([url], [d]) if role == "prefill" else ([p], [url, d])
    proxy = proxies(*sides, checked=False)
    pool = proxy.service.prefillers if role == "prefill" else proxy.service.decoders
    wait_until(lambda: len(pool.up) == len(pool.engines), 30, "the engine to be up")
    results: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: results.append(proxy.complete()))
    thread.start()
    wait_until(lambda: pool.engines[0].in_flight == 1, 10, "the request to be with the victim")
    os.kill(victim.pid, signal.SIGKILL)
    thread.join(20)
    assert results[0].status_code == 200
    if role == "prefill":
        assert results[0].headers["x-kvlink-route"] == "recompute"
    else:
        assert results[0].headers["x-kvlink-route"] == "split", "the hand-off goes to the next decoder"
        assert d.requests[0]["kv_transfer_params"]["do_remote_prefill"] is True
