"""How a test talks to an agent in another process: one JSON object a line, both ways, with deadlines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from typing import IO, Any

from .. import errors
from .suite import ConformanceFailure

_START_SECONDS = 90.0
_LAST_SECONDS = 20
"""Seconds that an agent without a parent may take to close what it holds."""


class AgentCrashed(ConformanceFailure):
    """The agent's process ended, or a command failed with something else than a kvlink error."""


def encode_error(error: BaseException) -> dict[str, Any]:
    """Makes plain values of an exception."""
    if isinstance(error, errors.KvlinkError):
        return {
            "type": type(error).__name__,
            "message": error.message,
            "operation": error.operation,
            "peer": error.peer,
            "site": error.site,
            "vendor_code": error.vendor_code,
            "hint": error.hint,
        }
    if isinstance(error, ConformanceFailure):
        return {"failure": str(error)}
    return {"crash": "".join(traceback.format_exception(error))}


def decode_error(values: Mapping[str, Any]) -> BaseException:
    """Makes the exception again: same class, same text, same attributes."""
    if "failure" in values:
        return ConformanceFailure(values["failure"])
    if "crash" in values:
        return AgentCrashed(f"in the agent:\n{values['crash']}")
    kind = getattr(errors, values["type"], errors.KvlinkError)
    error: errors.KvlinkError = kind.__new__(kind)
    fields = {name: values[name] for name in ("operation", "peer", "site", "vendor_code", "hint")}
    errors.KvlinkError.__init__(error, values["message"], **fields)
    return error


def serve(agent: Any) -> int:
    """Serves an agent on standard input and output until input ends. Each command has a thread of its own."""
    # The pipe is ours alone: what a vendor's library prints goes to standard error.
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    lock = threading.Lock()

    def run(message: Mapping[str, Any]) -> None:
        try:
            answer = {"id": message["id"], "value": agent.run(message["command"], message["arguments"])}
            text = json.dumps(answer)
        except BaseException as error:  # everything goes back to the test
            text = json.dumps({"id": message["id"], "error": encode_error(error)})
        with lock:
            output.write(text + "\n")
            output.flush()

    with lock:
        output.write('{"ready": true}\n')
        output.flush()
    for line in sys.stdin:
        threading.Thread(target=run, args=(json.loads(line),), daemon=True).start()
    signal.alarm(_LAST_SECONDS)  # a provider that hangs in close must not leave this process behind
    agent.run("reset", {})
    return 0


class ChildProcess:
    """A Python module in a child process that speaks this protocol."""

    def __init__(self, module: str, *arguments: str, environ: Mapping[str, str] | None = None) -> None:
        environment = {**os.environ, **(environ or {})}
        environment["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry)
        environment["PYTHONSAFEPATH"] = "1"
        self._errors: IO[bytes] = tempfile.TemporaryFile(prefix="kvlink-agent-")  # noqa: SIM115 - lives as long as we
        self._process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            text=True,
        )
        self.pid = self._process.pid
        self._lock = threading.Lock()
        self._next = 0
        self._pending: dict[int, Future[Any]] = {}
        self._ready: Future[None] = Future()
        self._gone = False
        self._reader = threading.Thread(target=self._read, name="kvlink-test-agent", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            message = json.loads(line)
            if "ready" in message:
                self._ready.set_result(None)
                continue
            with self._lock:
                future = self._pending.pop(message["id"], None)
            if future is None:
                continue
            if "error" in message:
                future.set_exception(decode_error(message["error"]))
            else:
                future.set_result(message["value"])
        with self._lock:
            self._gone = True
            pending, self._pending = list(self._pending.values()), {}
        if not self._ready.done():
            self._ready.set_exception(AgentCrashed(f"the agent did not start: {self.error_output()}"))
        for future in pending:
            future.set_exception(AgentCrashed(self._obituary()))

    def _obituary(self) -> str:
        code = self._process.wait(10)
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        return f"the agent process {self.pid} ended {how}: {self.error_output()}"

    def error_output(self, limit: int = 3000) -> str:
        """Returns the end of what the process wrote to its standard error."""
        data = os.pread(self._errors.fileno(), 1 << 20, 0)
        return data.decode("utf-8", "replace").strip()[-limit:] or "it printed nothing"

    def start(self, command: str, arguments: Mapping[str, Any]) -> Future[Any]:
        """Sends a command and returns its pending result."""
        try:
            self._ready.result(_START_SECONDS)
        except FutureTimeout:
            raise AgentCrashed(f"the agent did not start within {_START_SECONDS:g} s: {self.error_output()}") from None
        future: Future[Any] = Future()
        with self._lock:
            if self._gone:
                raise AgentCrashed(self._obituary())
            self._next += 1
            number = self._next
            self._pending[number] = future
        assert self._process.stdin is not None
        text = json.dumps({"id": number, "command": command, "arguments": dict(arguments)}) + "\n"
        try:
            with self._lock:
                self._process.stdin.write(text)
                self._process.stdin.flush()
        except OSError as error:
            raise AgentCrashed(self._obituary()) from error
        return future

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def signal(self, number: int) -> None:
        """Sends a signal to the process."""
        self._process.send_signal(number)

    def wait(self, timeout: float) -> int:
        """Waits for the end of the process; returns its exit code."""
        return self._process.wait(timeout)

    def kill(self) -> None:
        """Kills the process and waits for its end. Again is harmless."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait(30)
        self._reader.join(30)
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except OSError:
                    pass  # unsent input of a dead process
        self._errors.close()

    def stop(self, timeout: float = 10.0) -> int:
        """Ends the process the orderly way; kills it when it does not go.

        Returns:
            Its exit code.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            code = self._process.wait(timeout)
        except (OSError, subprocess.TimeoutExpired):
            code = -signal.SIGKILL
        self.kill()
        return code


def fresh_folder() -> tempfile.TemporaryDirectory[str]:
    """Returns a folder that goes away with its object; its path is short enough for a Unix socket."""
    base = "/dev/shm" if Path("/dev/shm").is_dir() and os.access("/dev/shm", os.W_OK) else None
    return tempfile.TemporaryDirectory(prefix="kvl-", dir=base, ignore_cleanup_errors=True)
