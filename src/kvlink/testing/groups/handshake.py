"""Connecting: both roles, both connect modes, refusals, deadlines, and many at once."""

from __future__ import annotations

import socket
import time

from ... import errors
from ..._engine_types import Capability
from .. import resources
from ..context import Context
from ..endpoint import Endpoint, RemoteEndpoint
from ..suite import NOTHING, case, check
from ..wire import ChildProcess

_SECRET = "a secret that both sides know"


@case("handshake", "initiator and acceptor in one process", timeout=30, quiet=True)
def one_process(context: Context) -> None:
    """Connects each way and moves bytes."""
    pair = context.pair()
    context.round_trip(pair)
    check(pair.ab and pair.ba and pair.ab != pair.ba, "both sides know the other by the same id")


@case("handshake", "the child connects to us", timeout=30, quiet=True)
def child_connects(context: Context) -> None:
    """The initiator runs in another process than in all other cases."""
    here, there = context.local("here"), context.remote("there")
    address = here.open()
    there.open()
    here.memory("b", 1 << 16, 2, kind=context.kind)
    there.memory("a", 1 << 16, 1, kind=context.kind)
    context.round_trip(context.join(there, here, address))


@case("handshake", "regions are known when connect returns", timeout=30, quiet=True)
def regions_known(context: Context) -> None:
    """Both sides have imported each other's regions, by name and size."""
    a, b = context.local("a"), context.remote("b")
    a.open()
    address = b.open()
    for index in range(3):
        b.memory(f"b{index}", context.align(1000 + index), index, kind=context.kind)
    answer = a.call("connect", address=address)
    check(answer["regions"] == ["b0", "b1", "b2"], f"connect returned with the regions {answer['regions']}")
    for index in range(3):
        nbytes = a.wait_region(answer["peer"], f"b{index}")
        check(nbytes == context.align(1000 + index), f"region b{index} has {nbytes} bytes at the peer")


@case("handshake", "connect, close and connect again, twenty times", timeout=60, quiet=True)
def reconnect(context: Context) -> None:
    """Nothing piles up and nothing old is left."""
    pair = context.pair(two_processes=True)
    address = pair.b.call("address")
    for _ in range(20):
        pair.a.call("close_peer", peer=pair.ab)
        pair.b.wait_peers(0)
        pair = context.join(pair.a, pair.b, address)
    context.round_trip(pair)


@case("handshake", "both sides connect to each other at once", timeout=60, quiet=True)
def simultaneous(context: Context) -> None:
    """It ends with one connection that works both ways."""
    for _ in range(10 if context.full else 4):
        a, b = context.local("a"), context.remote("b")
        address_a, address_b = a.open(), b.open()
        a.memory("a", 1 << 16, 1, kind=context.kind)
        b.memory("b", 1 << 16, 2, kind=context.kind)
        first = a.start("connect", address=address_b)
        second = b.start("connect", address=address_a)
        first.result(20), second.result(20)
        (ab,), (ba,) = a.wait_peers(1), b.wait_peers(1)
        if Capability.ACCEPTOR_SUBMIT in context.capabilities:  # else only one of them may, and which is not known
            for endpoint, peer, own, theirs in ((a, ab, "a", "b"), (b, ba, "b", "a")):
                endpoint.wait_region(peer, theirs)
                operation = "put" if Capability.PUT in context.capabilities else "get"
                endpoint.transfer(operation, peer, own, theirs, [(0, 0, context.align(64))])
        a.close()
        b.close()


@case("handshake", "a ring of three connects at once", timeout=60)
def ring(context: Context) -> None:
    """No circle of waiters: each connects to the next while it is connected to."""
    ends = [context.local("one"), context.remote("two"), context.remote("three")]
    addresses = [end.open() for end in ends]
    pending = [end.start("connect", address=addresses[(index + 1) % 3], timeout=20.0) for index, end in enumerate(ends)]
    for future in pending:
        future.result(25)
    for end in ends:
        end.wait_peers(2)


@case("handshake", "many connect to one at once", timeout=60)
def storm(context: Context) -> None:
    """An acceptor that is busy makes the others wait, not fail."""
    target = context.remote("target")
    address = target.open()
    target.memory("b", 1 << 16, 2, kind=context.kind)
    caller = context.local("caller")
    count = 16 if context.full else 8
    if context.attributes.max_links:
        count = min(count, context.attributes.max_links)
    for index in range(count):
        caller.open(channel=f"c{index}")
    pending = [caller.start("connect", address=address, timeout=20.0, channel=f"c{index}") for index in range(count)]
    for future in pending:
        future.result(25)
    target.wait_peers(count)


@case("handshake", "a wrong secret, and none", timeout=40)
def secrets(context: Context) -> None:
    """Refused with a clear error; the listener serves the next that knows it."""
    b = context.remote("b")
    address = b.open(secret=_SECRET)
    a = context.local("a")
    for wrong in ("another secret", None):
        a.open(secret=wrong)
        with context.error(errors.AuthenticationError, operation="connect"):
            a.connect(address)
        a.close()
    a.open(secret=_SECRET)
    a.memory("a", 1 << 16, 1, kind=context.kind)
    b.memory("b", 1 << 16, 2, kind=context.kind)
    context.round_trip(context.join(a, b, address))


@case("handshake", "identities that differ", timeout=40)
def identities(context: Context) -> None:
    """Refused naming the key and both values; a key that one side does not name does not matter."""
    a, b = context.local("a"), context.remote("b")
    a.open(identity={"model": "m1", "only_a": 1})
    address = b.open(identity={"model": "m2", "only_b": 2})
    with context.error(errors.IdentityMismatch, operation="connect") as caught:
        a.connect(address)
    text = str(caught.error)
    check(all(word in text for word in ("model", "m1", "m2")), f"key and values are not named: {text}")
    a.close()
    a.open(identity={"model": "m2", "only_a": 1})
    answer = a.call("connect", address=address)
    check(answer["identity"].get("only_b") == 2, f"the peer's identity is {answer['identity']}")


@case("handshake", "on_peer refuses", timeout=40)
def refusal(context: Context) -> None:
    """The reason reaches the other side, and the next attempt may succeed."""
    a, b = context.local("a"), context.remote("b")
    a.open()
    address = b.open()
    b.call("refuse", reason="not today")
    with context.error(errors.ConnectRefused, operation="connect") as caught:
        a.connect(address)
    check("not today" in str(caught.error), f"the reason is lost: {caught.error}")
    b.call("refuse", reason="")
    context.join(a, b, address)


@case("handshake", "another provider answers", timeout=40)
def other_provider(context: Context) -> None:
    """Provider names differ: refused, naming both."""
    a, b = context.local("a"), context.remote("b", through_hook=True)
    options = dict(context.settings.options)
    a.call("open", provider=context.settings.provider, options=options, device=context.settings.device)
    address = b.open()
    with context.error(errors.VersionMismatch, operation="connect") as caught:
        a.connect(address)
    check("hook" in str(caught.error), f"the providers are not named: {caught.error}")


@case("handshake", "a provider of another wire version answers", timeout=40)
def other_wire_version(context: Context) -> None:
    """Same name, but its blobs and data protocol differ: refused, naming both versions."""
    child = ChildProcess("kvlink.testing.agent", environ={"KVLINK_HOOK_WIRE_VERSION": "987654"})
    context.adopt(child)
    a = context.local("a", through_hook=True)
    b = RemoteEndpoint("b", a.open_defaults, child)
    b.call("install_hook", inner=context.settings.provider)
    a.open()
    address = b.open()
    for one, other in ((a, address), (b, a.call("address"))):
        with context.error(errors.VersionMismatch, operation="connect") as caught:
            one.connect(other)
        check("987654" in str(caught.error), f"the versions are not named: {caught.error}")
    b.close()


@case("handshake", "nobody listens, and nobody answers", timeout=40)
def nobody(context: Context) -> None:
    """A closed port is an error at once, a silent listener one at the deadline."""
    a = context.local("a")
    a.open()
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        start = time.monotonic()
        with context.error(errors.ConnectError, operation="connect"):
            a.connect(f"tcp://127.0.0.1:{port}", timeout=1.5)
        silent.listen(1)
        start = time.monotonic()
        with context.error(errors.ConnectTimeout, operation="connect"):
            a.connect(f"tcp://127.0.0.1:{port}", timeout=1.0)
        took = time.monotonic() - start
        check(0.9 <= took < 4.0, f"a connect with a deadline of 1 s took {took:.2f} s")


def _open_both(
    context: Context, a_options: dict[str, object], b_options: dict[str, object]
) -> tuple[Endpoint, Endpoint, str]:
    """Opens two endpoints in connect mode BOTH; the hook makes the provider strict about it."""
    a, b = context.local("a", through_hook=True), context.remote("b", through_hook=True)
    a.open(options={"hook_mode": "both", **a_options})
    address = b.open(options={"hook_mode": "both", **b_options})
    a.memory("a", 1 << 16, 1, kind=context.kind)
    b.memory("b", 1 << 16, 2, kind=context.kind)
    return a, b, address


@case("handshake", "mode BOTH: both sides are inside connect together", timeout=40)
def both_mode(context: Context) -> None:
    """Each side's link_connect returns only when the other's is inside too, so a core that calls one side fails."""
    logs = [context.folder / "a.log", context.folder / "b.log"]
    a, b, address = _open_both(context, {"hook_log": str(logs[0])}, {"hook_log": str(logs[1])})
    pair = context.join(a, b, address)
    context.round_trip(pair)
    context.close_pair(pair)
    for path in logs:
        log = context.check_log(path)
        check(log.count("link_connect") == 1, f"link_connect succeeded {log.count('link_connect')} times on one side")


@case("handshake", "mode BOTH: one side comes late", timeout=40)
def both_late(context: Context) -> None:
    """Whoever is first waits for the other."""
    for late in (0, 1):
        options: list[dict[str, object]] = [{}, {}]
        options[late]["hook_connect_ms"] = 800
        a, b, address = _open_both(context, *options)
        start = time.monotonic()
        pair = context.join(a, b, address, timeout=15)
        check(time.monotonic() - start > 0.7, "the side that was first did not wait")
        context.round_trip(pair)
        context.close_pair(pair)


@case("handshake", "mode BOTH: one side never comes", timeout=60)
def both_never(context: Context) -> None:
    """Both fail within the deadline, with nothing left, and a later attempt succeeds."""
    for missing in ("a", "b"):
        options: dict[str, dict[str, object]] = {"a": {}, "b": {}}
        options[missing]["hook_connect_ms"] = 3600_000
        a, b, address = _open_both(context, options["a"], options["b"])
        start = time.monotonic()
        with context.error(errors.ConnectError, operation="connect"):
            a.connect(address, timeout=1.2)
        took = time.monotonic() - start
        check(took < 5.0, f"a connect with a deadline of 1.2 s took {took:.1f} s")
        b.wait_peers(0)
        a.close()
        b.close()
    a, b, address = _open_both(context, {}, {})
    context.round_trip(context.join(a, b, address))


@case("handshake", "mode BOTH: one side's connect fails", needs=Capability.INTERRUPT, proves=NOTHING, timeout=60)
def both_fails(context: Context) -> None:
    """The other side does not wait for its deadline, and learns why."""
    for failing in ("a", "b"):
        options: dict[str, dict[str, object]] = {"a": {}, "b": {}}
        options[failing]["hook_fail"] = "link_connect:1:REMOTE"
        a, b, address = _open_both(context, options["a"], options["b"])
        start = time.monotonic()
        with context.error(errors.ConnectError, operation="connect") as caught:
            a.connect(address, timeout=20.0)
        check("injected failure" in str(caught.error), f"the cause is lost: {caught.error}")
        took = time.monotonic() - start
        check(took < 10.0, f"the other side waited {took:.1f} s for a side that had failed")
        context.round_trip(context.join(a, b, address))
        a.close()
        b.close()


@case("handshake", "mode BOTH: both sides connect to each other at once", timeout=90)
def both_simultaneous(context: Context) -> None:
    """Two sessions cross; one link is left."""
    for _ in range(5 if context.full else 2):
        a, b, address_b = _open_both(context, {}, {})
        address_a = str(a.call("address"))
        first = a.start("connect", address=address_b, timeout=20.0)
        second = b.start("connect", address=address_a, timeout=20.0)
        first.result(25), second.result(25)
        a.wait_peers(1), b.wait_peers(1)
        a.close()
        b.close()


@case("handshake", "closing the channel ends a connect", needs=Capability.INTERRUPT, proves=NOTHING, timeout=40)
def close_in_connect(context: Context) -> None:
    """Ctrl-C in connect: close() does not wait for the connect's deadline."""
    a, b, address = _open_both(context, {}, {"hook_connect_ms": 3600_000})
    pending = a.start("connect", address=address, timeout=30.0)
    resources.until(
        lambda: list(context.folder.glob("kvlink-hook-*")), bool, 10.0, lambda _: "the initiator is not in link_connect"
    )
    took = a.close()
    check(took < 5.0, f"close took {took:.1f} s while a connect was under way")
    with context.error(errors.ClosedError, errors.ConnectError):
        pending.result(10)
    took = b.close()
    check(took < 5.0, f"the acceptor's close took {took:.1f} s while it was inside link_connect")
