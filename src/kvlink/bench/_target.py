"""The passive process of a measurement: ``python -m kvlink.bench._target PLAN_JSON``.

It publishes one region and obeys one-line JSON commands on its standard input, each answered by one line on its
standard output; the end of its input ends it. While kvlink is measured it only waits for the next command.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from typing import Any

import kvlink

from ..errors import KvlinkError
from . import _limits
from ._limits import REMOTE
from ._memory import REGION, make_buffer
from ._plan import Plan


class Target:
    """Obeys the commands of one measurement.

    Args:
        plan: What is measured.
        channel: Where the region is published.
    """

    def __init__(self, plan: Plan, channel: kvlink.Channel) -> None:
        self._plan = plan
        self._buffer = make_buffer(channel, plan.path, plan.buffer_bytes, REGION)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._socket: socket.socket | None = None
        self._hello = {
            "address": channel.address,
            "pid": os.getpid(),
            "memory": self._buffer.memory.address,
            "port": self._listener.getsockname()[1],
        }

    def hello(self) -> dict[str, Any]:
        """Returns what the other process must know."""
        return self._hello

    def obey(self, command: dict[str, Any]) -> dict[str, Any]:
        """Carries out one command.

        Args:
            command: Its name under "do", and its arguments.

        Returns:
            The answer.

        Raises:
            KeyError: No such command.
            KvlinkError: It failed.
        """
        memory = self._buffer.memory
        match command["do"]:
            case "fill":
                _limits.fill(memory, command["seed"])
                return {}
            case "clear":
                _limits.clear(memory)
                return {}
            case "check":
                blocks = self._plan.block_list(command["list"])
                wrong = _limits.wrong_blocks(memory, blocks, command["seed"], REMOTE)
                return {"wrong": wrong, "clean": _limits.clear_and_check(memory, blocks, REMOTE)}
            case "stream":
                seconds = _limits.stream(
                    self._connection().fileno(), memory, command["bytes"], command["chunk"], send=command["send"]
                )
                return {"seconds": seconds}
            case "exchange":
                _limits.exchange_server(self._connection().fileno(), memory, command["count"])
                return {}
            case other:
                raise KeyError(f"no command {other!r}")

    def _connection(self) -> socket.socket:
        if self._socket is None:
            self._listener.settimeout(30)
            self._socket, _ = self._listener.accept()
            self._socket.settimeout(None)  # the limits want a blocking socket
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self._socket


def main() -> int:
    """Serves one measurement.

    Returns:
        The exit status.
    """
    plan = Plan(**json.loads(sys.argv[1]))
    try:
        _limits.allow_process_vm()
        with kvlink.open("host", options={"path": plan.path}) as channel:
            target = Target(plan, channel)
            print(json.dumps(target.hello()), flush=True)
            for line in sys.stdin:
                print(json.dumps(target.obey(json.loads(line))), flush=True)
    except KvlinkError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
