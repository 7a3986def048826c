"""Runs a small client in a process of its own against an installed simulator, and reads what the simulator logged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
RUN = (
    "import importlib, json, sys; getattr(importlib.import_module(sys.argv[1]), sys.argv[2])(*json.loads(sys.argv[3]))"
)


@dataclass
class Outcome:
    """How a client ended.

    Attributes:
        code: Its exit status; minus the signal when a signal ended it.
        output: stdout.
        errors: stderr.
        events: The simulator's event log.
    """

    code: int
    output: str
    errors: str
    events: list[dict[str, Any]] = field(default_factory=list)

    def succeeded(self) -> Outcome:
        """Asserts that the client ran to its end and no rule was violated."""
        assert self.code == 0, f"exit {self.code}\n{self.output}\n{self.errors}"
        assert not self.of("violation"), self.errors
        return self

    def refused(self, rule: int, code: int) -> Outcome:
        """Asserts that a call was refused with this code by this rule (the client itself checks what it got)."""
        self.succeeded()
        found = [(event["rule"], event["code"]) for event in self.of("refused")]
        assert (rule, code) in found, f"no refusal {code} by rule {rule}, only {found}\n{self.errors}"
        return self

    def violated(self, rule: int) -> Outcome:
        """Asserts that the simulator stopped the client for violating this rule."""
        assert f"cann_sim: rule {rule:02d} violated" in self.errors, f"exit {self.code}\n{self.output}\n{self.errors}"
        assert self.code != 0, "the client went on after a violation"
        return self

    def of(self, event: str) -> list[dict[str, Any]]:
        """The events of one kind, oldest first."""
        return [entry for entry in self.events if entry["event"] == event]

    def calls(self, function: str | None = None) -> list[dict[str, Any]]:
        """The vendor calls, or those of one function."""
        return [entry for entry in self.of("call") if function in (None, entry["fn"])]

    def result(self) -> Any:
        """The JSON value that the client printed last."""
        return json.loads(self.output.strip().splitlines()[-1])


class Client:
    """A client that runs: for tests with several processes. Use as a context manager."""

    def __init__(
        self,
        client: Callable[..., None],
        *arguments: object,
        host: Mapping[str, str],
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="cann_sim_")
        self.log = Path(self._folder.name) / "events"
        environment = {**os.environ, **host, "CANN_SIM_LOG": str(self.log), **(env or {})}
        environment["PYTHONPATH"] = f"{TESTS}:{TESTS.parent}"
        environment.pop("KVLINK_SECRET", None)
        self.process = subprocess.Popen(
            [sys.executable, "-c", RUN, client.__module__, client.__qualname__, json.dumps(arguments)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()
        self._folder.cleanup()

    def line(self) -> str:
        """The next line that the client prints (it should flush); empty at its end."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def say(self, text: str = "") -> None:
        """Sends the client a line."""
        assert self.process.stdin is not None
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()

    def finish(self, timeout: float = 60.0) -> Outcome:
        """Waits for the end of the client.

        Raises:
            subprocess.TimeoutExpired: It did not end in time.
        """
        output, errors = self.process.communicate(timeout=timeout)
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return Outcome(self.process.returncode, output, errors, [json.loads(line) for line in lines])


def run_client(
    client: Callable[..., None],
    *arguments: object,
    host: Mapping[str, str],
    env: Mapping[str, str] | None = None,
    timeout: float = 60.0,
) -> Outcome:
    """Runs `client(*arguments)`, a function at the top of a module, in a new process.

    Args:
        client: The function.
        arguments: JSON values for it.
        host: Environment from ``install``.
        env: More environment, CANN_SIM_* for example.
        timeout: Seconds after which the client counts as hung.

    Returns:
        How it ended.
    """
    with Client(client, *arguments, host=host, env=env) as running:
        return running.finish(timeout)
