"""One guarded process tree: started with a log file, watched, and ended as a whole."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from tools.cluster import guard


class ProcessFailedError(RuntimeError):
    """A process ended before it was told to, or did not become ready; carries the end of its log."""


class Port:
    """A free TCP port of the loopback interface, kept from other processes until its own process has bound it.

    The reservation is a bound socket that never listens: the kernel gives the port to nobody who asks for any port,
    yet lets a server that sets ``SO_REUSEADDR`` (vLLM, uvicorn) bind and listen.

    Args:
        number: A port that was free a moment ago, to start a server again at its old address; 0 for any.
    """

    def __init__(self, number: int = 0) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", number))
        self.number: int = self._socket.getsockname()[1]

    def release(self) -> None:
        """Give the reservation up; idempotent."""
        self._socket.close()


class Process:
    """A command and everything it starts.

    Args:
        name: For messages and the log's name.
        command: Program and arguments.
        env: The whole environment.
        log: File that gets stdout and stderr; truncated.
        cwd: Working directory; None for this process's.
    """

    def __init__(
        self, name: str, command: Sequence[str], *, env: Mapping[str, str], log: Path, cwd: Path | None = None
    ) -> None:
        self.name = name
        self.log = log
        self.command = list(command)
        self.started = time.monotonic()
        read_end, self._control = os.pipe()  # close-on-exec: no other child holds our end open
        os.set_inheritable(read_end, True)
        try:
            with log.open("wb") as output:
                self._guard = subprocess.Popen(
                    [sys.executable, "-I", "-S", guard.__file__, str(read_end), *command],
                    env=dict(env),
                    cwd=cwd,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    pass_fds=(read_end,),
                    start_new_session=True,  # Ctrl-C reaches us, and we end the tree in order
                )
        except BaseException:
            os.close(self._control)
            raise
        finally:
            os.close(read_end)

    @property
    def returncode(self) -> int | None:
        """Exit status of the command, or None while it runs."""
        return self._guard.poll()

    def pids(self) -> list[int]:
        """Return the live processes of the tree, the command first, the guard left out."""
        return guard.descendants(self._guard.pid)

    @property
    def pid(self) -> int:
        """Pid of the command itself.

        Raises:
            ProcessFailedError: It has ended.
        """
        pids = self.pids()
        if not pids:
            raise ProcessFailedError(f"{self.name} is not running")
        return pids[0]

    def cpu_seconds(self) -> float:
        """Return the CPU time, user and system, that the live processes of the tree have used so far."""
        ticks = 0
        for pid in self.pids():
            try:
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def pause(self) -> None:
        """Stop the tree with SIGSTOP: it uses no CPU until :meth:`resume`."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a paused tree go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        for pid in self.pids():
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                pass

    def tail(self, lines: int = 25) -> str:
        """Return the last lines of the log, indented."""
        with self.log.open(encoding="utf-8", errors="replace") as log:
            return "".join(f"    {line.rstrip()}\n" for line in deque(log, lines))

    def check(self) -> None:
        """Raise when the command has ended.

        Raises:
            ProcessFailedError: With the exit status and the end of the log.
        """
        if (code := self.returncode) is not None:
            raise ProcessFailedError(f"{self.name} ended with status {code}; the end of {self.log}:\n{self.tail()}")

    def request_stop(self) -> None:
        """Begin to end the tree; returns at once. Idempotent."""
        if self._control >= 0:
            os.close(self._control)
            self._control = -1

    def stop(self) -> None:
        """End the tree and wait until nothing of it is left. Idempotent."""
        self.request_stop()
        try:
            self._guard.wait(guard.STOP_SECONDS + 5)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._guard.kill()
            self._guard.wait(10)

    def kill(self) -> None:
        """Kill the whole tree with SIGKILL, as a crash of the host would. Idempotent."""
        self._signal(signal.SIGKILL)
        self.stop()

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
