"""A child process that owns a simulated NPU and makes vendor calls on its main thread, one request at a time."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from multiprocessing.connection import Client as Connect
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

_WAIT = 40.0


class Agent:
    """Calls the methods of a client class in a process of its own.

    `agent.method(...)` calls and waits; `agent.begin("method", ...)` and `agent.end()` let two agents be in a
    collective call at once.
    """

    def __init__(self, env: dict[str, str], client: str = "hccl_client:Client") -> None:
        """Starts the process.

        Args:
            env: Added to this process's environment.
            client: module:class to serve, the module in this package.
        """
        key = os.urandom(16)
        with Listener(None, "AF_UNIX", authkey=key) as listener:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cann_sim.hccl_agent", str(listener.address), client],
                env={**os.environ, **env, "PYTHONPATH": str(Path(__file__).resolve().parents[1])},
                stdin=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            assert self.process.stdin is not None
            self.process.stdin.write(key.hex() + "\n")
            self.process.stdin.flush()
            self._connection: Connection = listener.accept()

    def begin(self, method: str, *args: Any, **kwargs: Any) -> None:
        """Starts a call."""
        self._connection.send((method, args, kwargs))

    def end(self, timeout: float = _WAIT) -> Any:
        """Waits for the call's result; raises what the call raised, EOFError when the process died."""
        if not self._connection.poll(timeout):
            raise TimeoutError("the agent did not answer")
        ok, value = self._connection.recv()
        if not ok:
            raise AssertionError(value)
        return value

    def __getattr__(self, method: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.begin(method, *args, **kwargs)
            return self.end()

        return call

    def kill(self) -> None:
        """Ends the process at once."""
        self.process.kill()
        self.process.wait(20)

    def died(self, timeout: float = _WAIT) -> str:
        """Waits for the process to end by itself and returns what it printed to stderr."""
        return self.process.communicate(timeout=timeout)[1]

    def close(self) -> None:
        """Ends the process."""
        self._connection.close()
        if self.process.poll() is None:
            try:
                self.process.communicate(timeout=10)
            except subprocess.TimeoutExpired:
                self.kill()
        for pipe in (self.process.stdin, self.process.stderr):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> Agent:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def main(address: str, client: str) -> None:
    """Serves requests until the parent closes the connection."""
    key = bytes.fromhex(sys.stdin.readline())
    module, name = client.split(":")
    with Connect(address, authkey=key) as connection:
        served = getattr(importlib.import_module(f"cann_sim.{module}"), name)()
        while True:
            try:
                method, args, kwargs = connection.recv()
            except EOFError:
                break
            try:
                connection.send((True, getattr(served, method)(*args, **kwargs)))
            except Exception as error:
                connection.send((False, f"{type(error).__name__}: {error}"))
    sys.stdout.flush()
    os._exit(0)  # vendor processes end without unloading: threads of the libraries may still be there


if __name__ == "__main__":
    main(*sys.argv[1:])
