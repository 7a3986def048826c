"""The n-th call of each function fails: a clear error, and the channel works on or is cleanly dead."""

from __future__ import annotations

import time
from collections.abc import Callable

from ... import errors
from ..._engine_types import Capability
from ..context import Context
from ..endpoint import Endpoint
from ..hook import INJECTED_CODE
from ..layouts import round_up
from ..suite import Case, add_case, case, check

_MIB = 1 << 20

# What a failing function makes fail, and whether the connection has to work afterwards.
_FUNCTIONS = (
    "engine_open",
    "engine_query",
    "mem_alloc",
    "mem_open",
    "mem_export",
    "mem_close",
    "link_open",
    "link_describe",
    "link_connect",
    "rmem_open",
    "submit",
    "poll",
    "link_check",
    "stats",
)


class _Life:
    """One ordinary life of two channels, whose every step may fail with the injected error and nothing else."""

    def __init__(self, context: Context, a_fail: str, b_fail: str) -> None:
        self.context = context
        # Asked before a channel is open: finding out opens one, of the provider itself.
        host = "allocated" in context.kinds and not context.settings.pair
        self.kind = "allocated" if host else context.kind
        self.injected: list[str] = []
        self.logs = [context.folder / "a.log", context.folder / "b.log"]
        for log in self.logs:
            log.unlink(missing_ok=True)
        self.a = context.local("a", through_hook=True)
        self.b = context.endpoint("b", two_processes=False, through_hook=True)
        self.fails = (a_fail, b_fail)

    def attempt(self, step: Callable[[], object]) -> bool:
        """Runs a step; returns whether it succeeded.

        Raises:
            ConformanceFailure: It failed for another reason, or without a cause that can be told.
        """
        try:
            step()
        except (errors.KvlinkError, OSError) as error:
            text = str(error)
            check(text.strip(), f"{type(error).__name__} has no text")
            if "injected failure" in text:
                code = getattr(error, "vendor_code", None)
                check(code in (INJECTED_CODE, 0), f"the vendor code is {code}: {text}")
                self.injected.append(text)
            else:
                check(self.injected, f"an error before anything was injected: {text}")
                self.injected.append(f"follow-up: {text}")
            return False
        return True

    def open(self, endpoint: Endpoint, index: int) -> str | None:
        options: dict[str, object] = {"hook_log": str(self.logs[index])}
        if self.fails[index]:
            options["hook_fail"] = self.fails[index]
        address: list[str] = []
        self.attempt(lambda: address.append(endpoint.open(options=options)))
        return address[0] if address else None

    def live(self) -> None:
        """Opens, registers, connects, moves bytes, closes."""
        context = self.context
        size = context.align(5000)
        nbytes = round_up(_MIB, max(1, context.attributes.memory_alignment))
        address_a, address_b = self.open(self.a, 0), self.open(self.b, 1)
        if address_a is not None and address_b is not None:
            kind = self.kind
            for endpoint, name, seed in ((self.a, "a", 1), (self.b, "b", 2)):
                if not self.attempt(lambda e=endpoint, n=name, s=seed: e.memory(n, nbytes, s, kind=kind)):  # type: ignore[misc]
                    # The name is free again, and the next attempt works.
                    endpoint.memory(name, nbytes, seed, kind=kind)
            peers: list[str] = []
            start = time.monotonic()
            for _ in range(3):
                if self.attempt(lambda: peers.append(self.a.connect(address_b, timeout=8.0))):
                    break
            check(time.monotonic() - start < 20.0, "a failing connect took its whole deadline")
            check(peers, f"no connection in three attempts: {self.injected}")
            self.work(peers[0], size, address_b)
        for endpoint, address in ((self.a, address_a), (self.b, address_b)):
            if address is not None:
                self.attempt(lambda e=endpoint: e.call("statistics"))  # type: ignore[misc]
                if address_a is not None and address_b is not None:
                    self.attempt(lambda e=endpoint: e.close_region("a" if e is self.a else "b"))  # type: ignore[misc]
                took = endpoint.close()
                check(took < 5.0, f"close took {took:.1f} s after {self.injected}")

    def work(self, peer: str, size: int, address: str) -> None:
        """Moves bytes until it works; at most a few times are spoiled by one injected failure."""
        operations = [
            name
            for name, flag in (("put", Capability.PUT), ("get", Capability.GET))
            if flag in self.context.capabilities
        ]
        for operation in operations:
            for attempt in range(4):
                if self.a.call("peers").get(peer) != "connected":
                    peer = self.a.connect(address, timeout=8.0)
                current = peer

                def step(current: str = current, operation: str = operation) -> None:
                    self.a.wait_region(current, "b", timeout=5.0)
                    self.a.transfer(operation, current, "a", "b", [(0, 0, size), (2 * size, 2 * size, size)])

                if self.attempt(step):
                    break
                check(attempt < 3, f"{operation} works no more: {self.injected}")
                if "b" not in self.a.call("regions", peer=current):
                    # An import that failed stays failed for its connection; another connection imports again.
                    self.a.call("close_peer", peer=current)
        if "put" in operations:
            self.b.verify("b", 2, [(0, 1, 0, size), (2 * size, 1, 2 * size, size)])


def _inject(context: Context, function: str) -> None:
    if function == "mem_alloc":
        context.need("allocated" in context.kinds, "the provider allocates no host memory")
    numbers = (1, 2, 3) if context.full else (1, 2)
    happened = 0
    for number in numbers:
        for side in (0, 1):
            if (function == "link_connect" and side == 1) or (function == "engine_open" and number > 1):
                continue
            rule = f"{function}:{number}"
            life = _Life(context, rule if side == 0 else "", rule if side == 1 else "")
            life.live()
            happened += any("injected failure" in text for text in life.injected)
            written = [log for log in life.logs if log.exists()]
            for log in written:
                context.check_log(log)
            context.check_nothing_left_of(life.a, life.b)
    if function not in ("link_check", "stats", "mem_close", "engine_query"):
        check(happened, f"{function} was made to fail and nobody noticed")


for _function in _FUNCTIONS:
    add_case(
        Case(
            "injected",
            f"the n-th {_function} fails",
            lambda context, function=_function: _inject(context, function),  # type: ignore[misc]
            timeout=120.0,
        )
    )


@case("injected", "the engine goes down", timeout=60)
def engine_down(context: Context) -> None:
    """Every transfer ends with an error that says so, later calls fail at once, and the channel closes."""
    pair = context.pair(through_hook=True, two_processes=True, a={"options": {"hook_fail": "poll:1:ENGINE_DOWN"}})
    pair.a.wait_region(pair.ab, "b")
    operation = "put" if Capability.PUT in context.capabilities else "get"
    size = context.align(4096)
    start = time.monotonic()
    with context.error(errors.EngineError, errors.PeerLost, operation=operation):
        pair.a.transfer(operation, pair.ab, "a", "b", [(0, 0, size)])
    with context.error(errors.EngineError, errors.PeerLost, errors.ClosedError):
        pair.a.transfer(operation, pair.ab, "a", "b", [(0, 0, size)])
    check(time.monotonic() - start < 3.0, "a dead engine was noticed late")
    took = pair.a.close()
    check(took < 4.0, f"close took {took:.1f} s")
    pair.b.wait_peers(0)
