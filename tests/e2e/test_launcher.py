"""The launcher that everything else here stands on: nothing that it starts may survive."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tools.cluster import Cluster, Process, ProcessFailedError, Server
from tools.cluster.process import Port

# A process with a child in a session of its own and a grandchild; all ignore polite signals when told so.
TREE = """
import os, signal, sys, time
if sys.argv[1] == "stubborn":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(600)
    time.sleep(600)
print("started", flush=True)
time.sleep(600)
"""
LAUNCHER = """
import os, sys, time
from pathlib import Path
from tools.cluster import Process
process = Process("tree", [sys.executable, "-c", sys.argv[1], "polite"], env=os.environ, log=Path(sys.argv[2]))
while len(process.pids()) < 3:
    time.sleep(0.01)
print(*process.pids(), flush=True)
time.sleep(600)
"""


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def alive(pids: list[int]) -> list[int]:
    """The processes that still run; a zombie that nobody collects counts as gone."""
    found = []
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state not in "ZX":
            found.append(pid)
    return found


def start_tree(log: Path, kind: str) -> tuple[Process, list[int]]:
    process = Process("tree", [sys.executable, "-c", TREE, kind], env=os.environ, log=log)
    assert wait_until(lambda: len(process.pids()) == 3)
    return process, process.pids()


@pytest.mark.parametrize("kind", ["polite", "stubborn"])
def test_stop_ends_the_whole_tree(tmp_path, kind):
    process, pids = start_tree(tmp_path / "log", kind)
    process.stop()
    assert alive(pids) == []
    assert process.returncode not in (None, 0)
    process.stop()


def test_kill_ends_the_whole_tree(tmp_path):
    process, pids = start_tree(tmp_path / "log", "stubborn")
    process.kill()
    assert alive(pids) == []


def test_nothing_survives_a_launcher_that_is_killed(tmp_path):
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, TREE, str(tmp_path / "log")], stdout=subprocess.PIPE, text=True
    )
    assert launcher.stdout is not None
    pids = [int(pid) for pid in launcher.stdout.readline().split()]
    assert len(alive(pids)) == 3
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    launcher.stdout.close()
    assert wait_until(lambda: alive(pids) == [])


def test_pause_and_resume_reach_the_whole_tree(tmp_path):
    process, pids = start_tree(tmp_path / "log", "polite")

    def states() -> set[str]:
        return {Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in pids}

    with process:
        process.pause()
        assert wait_until(lambda: states() == {"T"})
        process.resume()
        assert wait_until(lambda: states() == {"S"})
        process.pause()
    assert alive(pids) == []


def test_an_early_end_is_told_with_the_log(tmp_path):
    log = tmp_path / "log"
    with Process("broken", [sys.executable, "-c", "print('why'); raise SystemExit(3)"], env=os.environ, log=log) as it:
        assert wait_until(lambda: it.returncode is not None)
        with pytest.raises(ProcessFailedError, match=r"broken ended with status 3(.|\n)*why"):
            it.check()


def test_wait_ready_gives_up_with_the_log_and_leaves_nothing(tmp_path):
    with Cluster(tmp_path) as cluster:
        command = [sys.executable, "-c", TREE, "polite"]
        server = Server("deaf", command, Port(), env=os.environ, log=tmp_path / "deaf.log")
        cluster.servers.append(server)
        assert wait_until(lambda: len(server.pids()) == 3)
        pids = server.pids()
        with pytest.raises(ProcessFailedError, match=r"deaf was not ready(.|\n)*started"):
            cluster.wait_ready(timeout=0.5)
    assert alive(pids) == []


def test_a_reserved_port_can_be_served_and_is_given_to_nobody_else(tmp_path):
    command = [sys.executable, "-c", SERVE]
    ports = [Port() for _ in range(20)]
    assert len({port.number for port in ports}) == 20
    port = ports[0]
    with Server("health", [*command, str(port.number)], port, env=os.environ, log=tmp_path / "log") as server:
        assert wait_until(server.ready), server.tail()
    for other in ports:
        other.release()


SERVE = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
