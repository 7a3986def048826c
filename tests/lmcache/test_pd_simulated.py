"""Push, pull and delayed pull over the Ascend providers on the simulator, the PD buffers in host memory."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lmcache")

sys.path.insert(0, str(Path(__file__).parents[2]))
from lmcache_pd import Proxy  # noqa: E402
from lmcache_pools import free_port  # noqa: E402
from tests.ascend.hccl.simulated import Cell, host_environment, native, provider_paths  # noqa: E402

pytestmark = pytest.mark.skipif(not (native() / "cann_sim").is_dir(), reason="the simulator was not built")
FLAVOUR = {"hccl": "8.3", "hcomm_onesided": "8.5.0", "hixl": "8.5.0"}
MODES = {
    "push": {},
    "pull": {"pd_pull_mode": True},
    "delayed": {"pd_pull_mode": True, "pd_delay_pull": True},
}
QUICK = [("hcomm_onesided", "push")]
ALL = [(provider, mode) for provider in FLAVOUR for mode in MODES]
CASES = [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in ALL]

DECODER = """
    import sys
    from lmcache_pd import Decoder
    decoder = Decoder(8, port={port}, transfer_channel={provider!r}, **{mode!r})
    print("ready", flush=True)
    for line in sys.stdin:
        got = decoder.retrieve(int(line), 5)
        print(*[int(data.long().sum()) for data in got], flush=True)
        print("free", decoder.free, flush=True)
    decoder.close()
"""
PREFILLER = """
    import sys
    from types import SimpleNamespace
    from lmcache_pd import Prefiller
    from lmcache_pools import free_port
    prefiller = Prefiller(
        8, SimpleNamespace(port={proxy}), transfer_channel={provider!r}, pd_pull_done_port=[free_port()], **{mode!r}
    )
    print("ready", flush=True)
    for line in sys.stdin:
        data, _ = prefiller.store(line.strip(), {port}, int(line), 5, tail=3)
        print(*[int(item.long().sum()) for item in data], flush=True)
    prefiller.close()
"""


class Side:
    """A process with one backend; its lines go in, its answers come out."""

    def __init__(self, code: str, environment: dict[str, str], device: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**environment, "ASCEND_RT_VISIBLE_DEVICES": device},
        )  # fmt: skip
        self.line("ready")

    def say(self, text: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{text}\n")
        self._process.stdin.flush()

    def line(self, start: str = "") -> str:
        """Returns the next line of the answers; fails when the process has ended."""
        assert self._process.stdout is not None
        while line := self._process.stdout.readline():
            text = line.strip()
            if text.startswith(start) if start else text.replace(" ", "").isdigit():
                return text
        raise AssertionError(f"the process ended with {self._process.wait(20)}")

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        finally:
            self._process.kill()
            self._process.wait(20)
            self._process.stdout.close()


@pytest.mark.parametrize(("provider", "mode"), CASES)
def test_chunks_arrive(provider: str, mode: str, tmp_path: Path) -> None:
    paths = [*provider_paths(tmp_path / "metadata"), str(Path(__file__).parent), str(Path(__file__).parents[2])]
    environment = {**os.environ, **host_environment(Cell(provider, FLAVOUR[provider]), tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join([*paths, environment.get("PYTHONPATH", "")])
    proxy, port = Proxy(), free_port()
    names = {"provider": provider, "mode": MODES[mode], "port": port, "proxy": proxy.port}
    sides: list[Side] = []
    try:
        decoder = Side(DECODER.format(**names), environment, "4")
        sides.append(decoder)
        prefiller = Side(PREFILLER.format(**names), environment, "5")
        sides.append(prefiller)
        for prompt in range(1, 4):
            prefiller.say(f"{prompt}")
            sent = prefiller.line()
            heard = proxy.hear(60)
            assert heard["type"] == "ProxyNotif", heard
            decoder.say(f"{prompt}")
            assert decoder.line() == sent and len(sent.split()) == 5
            assert decoder.line("free") == "free 8"
    finally:
        for side in reversed(sides):
            side.close()
        proxy.close()
