import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import kvlink

SECRET = "a secret of the chaos tests"


def eventually(condition, timeout=10.0):
    """Waits until ``condition()`` is true and returns its value."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.005)
    return value


class Agent:
    """Drives an ``agent.py`` process."""

    def __init__(self, prefix=(), **arguments):
        command = [*prefix, sys.executable, str(Path(__file__).with_name("agent.py"))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._buffer = b""
        arguments.setdefault("secret", SECRET)
        arguments.setdefault("nbytes", 1 << 20)
        arguments.setdefault("options", {})
        self.address = self.call("open", **arguments)

    def send(self, name, **arguments):
        self.process.stdin.write(json.dumps({"do": name, **arguments}).encode() + b"\n")
        self.process.stdin.flush()

    def answer(self, timeout=60.0):
        deadline = time.monotonic() + timeout
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self.process.stdout], [], [], max(deadline - time.monotonic(), 0))
            assert ready, "the agent does not answer"
            part = os.read(self.process.stdout.fileno(), 65536)
            assert part, f"the agent ended: {self.process.wait(5)}"
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer = json.loads(line)
        assert "error" not in answer, answer
        return answer["ok"]

    def call(self, name, timeout=60.0, **arguments):
        self.send(name, **arguments)
        return self.answer(timeout)

    def kill(self):
        self.process.kill()
        self.process.wait(10)

    def stop(self):
        os.kill(self.process.pid, signal.SIGSTOP)

    def resume(self):
        os.kill(self.process.pid, signal.SIGCONT)

    def end(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture
def start_agent():
    agents = []

    def start(*arguments, **keywords):
        agents.append(Agent(*arguments, **keywords))
        return agents[-1]

    yield start
    for agent in agents:
        agent.end()


@pytest.fixture
def open_channel():
    opened = []

    def open_one(**arguments):
        arguments.setdefault("secret", SECRET)
        opened.append(kvlink.open("host", **arguments))
        return opened[-1]

    yield open_one
    for channel in reversed(opened):
        channel.close()
