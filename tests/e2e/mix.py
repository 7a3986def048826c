"""Requests of many kinds at once, with clients that leave at every state."""

from __future__ import annotations

import http.client
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tools.cluster import Server

from e2e.faulty import LONG, PROMPTS, Pair
from e2e.talk import Exchange, body_of, eventually

# Methods of Mix, and how many of each there are in fifty requests.
KINDS = {
    "split": 12,
    "plain": 4,
    "leave_early": 8,
    "leave_late": 6,
    "leave_decoder": 6,
    "never_fetch": 4,
    "fetch_twice": 4,
    "fetch_for_another": 3,
    "forge": 3,
}


class Refused(Exception):
    """A server answered with an error of its own."""


class Mix:
    """A run of many requests.

    Attributes:
        done: Requests that ended as their kind should, by kind.
        failed: Requests that ended with an error: allowed only while an engine is down.
        wrong: What must never be.
    """

    def __init__(self, pair: Pair, seed: int) -> None:
        self.pair = pair
        self.done: Counter[str] = Counter()
        self.failed: list[str] = []
        self.wrong: list[str] = []
        self._seed = seed
        self._lock = threading.Lock()

    def run(self, kinds: list[str], *, after: int = 0, then: Callable[[], None] = lambda: None) -> None:
        """Sends one request a kind, eight at a time.

        Args:
            kinds: Names of methods.
            after: That many have ended...
            then: ...when this is called.
        """
        with ThreadPoolExecutor(8) as pool:
            futures = [pool.submit(self._one, kind, number) for number, kind in enumerate(kinds)]
            if after:
                eventually(f"{after} requests", lambda: sum(future.done() for future in futures) >= after, 240)
                then()
            for future in futures:
                future.result()

    def _one(self, kind: str, number: int) -> None:
        dice = random.Random(f"{self._seed}/{number}")
        try:
            problem = getattr(self, kind)(dice, dice.choice(PROMPTS))
        except (OSError, http.client.HTTPException, Refused) as error:
            with self._lock:
                self.failed.append(f"{kind}: {error!r}")
            return
        except Exception as error:
            problem = repr(error)
        with self._lock:
            if problem:
                self.wrong.append(f"{kind}: {problem}")
            else:
                self.done[kind] += 1

    def _ask(self, server: Server, tokens: list[int], **extra: Any) -> str | None:
        answer = Exchange(server, body_of(tokens, **extra)).read()
        if answer.status >= 500 or not answer.complete:
            raise Refused(f"{server.name}: {answer.status} {answer.raw[-200:]}")
        if answer.status != 200 or not self.pair.right(answer, tokens):
            return f"{len(tokens)} tokens at {server.name}: {answer.status} {answer.raw[:300]}"
        return None

    def _hand_off(self, tokens: list[int]) -> dict[str, Any]:
        marks = {"do_remote_decode": True, "do_remote_prefill": False}
        answer = Exchange(self.pair.prefill, body_of(tokens, max_tokens=1, kv_transfer_params=marks)).read()
        if answer.params is None:
            raise Refused(f"no hand-off: {answer.status} {answer.raw[-200:]}")
        return answer.params

    def split(self, dice: random.Random, tokens: list[int]) -> str | None:
        return self._ask(self.pair.proxy, tokens, stream=dice.random() < 0.5)

    def plain(self, dice: random.Random, tokens: list[int]) -> str | None:
        return self._ask(dice.choice((self.pair.prefill, self.pair.decode)), tokens)

    def leave_early(self, dice: random.Random, tokens: list[int]) -> None:
        """The client leaves before the first token: the prefiller computes, or the decoder waits or pulls."""
        with Exchange(self.pair.proxy, body_of(tokens, stream=True, max_tokens=LONG)):
            time.sleep(dice.uniform(0, 1.0))

    def leave_late(self, dice: random.Random, tokens: list[int]) -> None:
        """The client leaves in the middle of its stream."""
        with Exchange(self.pair.proxy, body_of(tokens, stream=True, max_tokens=LONG)) as exchange:
            events = exchange.events()
            for _ in range(dice.randrange(1, 8)):
                next(events, None)

    def leave_decoder(self, dice: random.Random, tokens: list[int]) -> None:
        """The client leaves the decoder while it queues or pulls."""
        with Exchange(self.pair.decode, body_of(tokens, stream=True, kv_transfer_params=self._hand_off(tokens))):
            time.sleep(dice.uniform(0, 0.1))

    def never_fetch(self, dice: random.Random, tokens: list[int]) -> None:
        self._hand_off(tokens)

    def fetch_twice(self, dice: random.Random, tokens: list[int]) -> str | None:
        params = self._hand_off(tokens)
        first = self._ask(self.pair.decode, tokens, kv_transfer_params=params)
        return first or self._ask(self.pair.decode, tokens, kv_transfer_params=params)

    def fetch_for_another(self, dice: random.Random, tokens: list[int]) -> str | None:
        params = self._hand_off(tokens)
        return self._ask(self.pair.decode, dice.choice(PROMPTS), kv_transfer_params=params)

    def forge(self, dice: random.Random, tokens: list[int]) -> str | None:
        change: dict[str, Any] = {"kvlink_handoff": dice.randbytes(16).hex()}
        if dice.random() < 0.5:
            change["kvlink_addresses"] = ["tcp://127.0.0.1:9"]
        return self._ask(self.pair.decode, tokens, kv_transfer_params={**self._hand_off(tokens), **change})
