"""What the connector says about its pulls: the JSON lines of ``kvlink.trace_file``."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Pull:
    """One rank's pull of one request's blocks.

    Attributes:
        request: The decoder engine's id of the request.
        rank: Tensor-parallel rank.
        outcome: "ok", or the phase that failed.
        path: How the bytes travelled.
        prompt_tokens: Tokens of the prompt.
        pulled_tokens: Tokens whose cache came over kvlink.
        nbytes: Bytes moved.
        blocks: Blocks moved.
        transfer_s: Seconds from submit to complete.
        total_s: Seconds of the whole pull: connect, claim, transfer, confirmation.
        raw: The whole record.
    """

    request: str
    rank: int
    outcome: str
    path: str
    prompt_tokens: int
    pulled_tokens: int
    nbytes: int
    blocks: int
    transfer_s: float
    total_s: float
    raw: dict[str, Any]


def _parse(line: str) -> Pull:
    record = json.loads(line)
    return Pull(
        request=record["request"],
        rank=record["rank"],
        outcome=record["outcome"],
        path=record.get("path") or "",
        prompt_tokens=record["prompt_tokens"],
        pulled_tokens=record["pulled_tokens"],
        nbytes=record.get("bytes") or 0,
        blocks=record["blocks"],
        transfer_s=record.get("transfer_seconds") or 0.0,
        total_s=record.get("total_seconds") or 0.0,
        raw=record,
    )


class PullTrace:
    """Reads a decoder's trace file as it grows.

    Args:
        path: The file; it need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0

    def take(self, expected: int = 0, *, timeout: float = 5.0) -> list[Pull]:
        """Return the pulls recorded since the last call.

        Args:
            expected: Wait until there are that many: the record may come a moment after the request's answer.
            timeout: Seconds to wait at most; what there is then is returned.

        Returns:
            The pulls, oldest first.
        """
        pulls: list[Pull] = []
        deadline = time.monotonic() + timeout
        while True:
            if self.path.exists():
                with self.path.open(encoding="utf-8") as file:
                    file.seek(self._offset)
                    for line in iter(file.readline, ""):
                        if not line.endswith("\n"):
                            break  # still being written
                        self._offset += len(line.encode())
                        record = json.loads(line)
                        if record.get("event") == "pull":
                            pulls.append(_parse(line))
            if len(pulls) >= expected or time.monotonic() > deadline:
                return pulls
            time.sleep(0.01)
