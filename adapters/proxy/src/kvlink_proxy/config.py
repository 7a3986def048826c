"""The proxy's settings, and how the example's host and port lists become engine URLs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Receiver:
    """Where a decoder's LMCache takes KV in.

    Attributes:
        host: Its host, as prefillers reach it.
        init_ports: ``pd_peer_init_port`` of its LMCache configuration, one a tensor-parallel rank.
        alloc_ports: ``pd_peer_alloc_port``, one a rank.
    """

    host: str
    init_ports: tuple[int, ...]
    alloc_ports: tuple[int, ...]


@dataclass(frozen=True)
class ProxyConfig:
    """Everything the proxy needs to know. Times are seconds.

    Attributes:
        prefillers: Base URLs of the prefill engines.
        decoders: Base URLs of the decode engines.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        on_prefill_failure: "recompute" sends the whole request to a decoder when no prefiller could do its part,
            "fail" answers with an error.
        connect_timeout: To open a connection to an engine.
        prefill_timeout: From sending a prompt to a prefiller until its whole answer.
        first_byte_timeout: From sending a streamed request to a decoder until the first bytes of its answer.
        chunk_timeout: Between two pieces of a decoder's stream.
        answer_timeout: From sending a request that is not streamed to a decoder until its whole answer.
        client_timeout: For a client to send its body, and to take a piece of an answer.
        lease_seconds: How long after a prefiller's answer its hand-off may be offered to another decoder.
        health_interval: Between two health checks of an engine that is up; one that is not is asked every second.
        health_timeout: For an engine to answer a health check.
        cooldown: How long an engine that failed a request is chosen last.
        max_attempts: Engines tried for one hop of one request.
        max_concurrent: Requests in work at once; above it the answer is 503.
        max_body_bytes: Largest request body.
        drain_seconds: How long running requests may go on after SIGTERM.
        flow: "native" for KVLinkConnector, whose answer carries the hand-off; "lmcache" for LMCache, whose prefillers
            push to a decoder that the proxy chose.
        first_token: lmcache: who makes the first token. "decoder", or "prefiller", sooner but for plain requests only.
        kv_ready_timeout: lmcache: from a prefiller's answer until its KV is at the decoder.
        receivers: lmcache: where each decoder takes KV in, in the order of ``decoders``.
        proxy_host: lmcache: address on which the prefillers' messages arrive.
        proxy_port: lmcache: port for them; 0 takes a free one.
    """

    prefillers: tuple[str, ...]
    decoders: tuple[str, ...]
    host: str = "localhost"
    port: int = 8000
    on_prefill_failure: Literal["recompute", "fail"] = "recompute"
    connect_timeout: float = 5.0
    prefill_timeout: float = 300.0
    first_byte_timeout: float = 300.0
    chunk_timeout: float = 120.0
    answer_timeout: float = 1800.0
    client_timeout: float = 60.0
    lease_seconds: float = 8.0
    health_interval: float = 5.0
    health_timeout: float = 5.0
    cooldown: float = 5.0
    max_attempts: int = 3
    max_concurrent: int = 256
    max_body_bytes: int = 32 << 20
    drain_seconds: float = 30.0
    flow: Literal["native", "lmcache"] = "native"
    first_token: Literal["decoder", "prefiller"] = "decoder"
    kv_ready_timeout: float = 30.0
    receivers: tuple[Receiver, ...] = ()
    proxy_host: str = "localhost"
    proxy_port: int = 8500

    def __post_init__(self) -> None:
        if not self.prefillers or not self.decoders:
            raise ValueError("at least one prefiller and one decoder are needed")
        for url in (*self.prefillers, *self.decoders):
            check_url(url)
        for role, urls in (("prefiller", self.prefillers), ("decoder", self.decoders)):
            if len(set(urls)) != len(urls):
                raise ValueError(f"a {role} is named twice: {', '.join(urls)}")
        for name in ("port", "proxy_port"):
            if not 0 <= getattr(self, name) <= 65535:
                raise ValueError(f"{name} {getattr(self, name)} is not between 0 and 65535")
        if self.flow == "lmcache" and len(self.receivers) != len(self.decoders):
            raise ValueError(f"{len(self.decoders)} decoders, but where {len(self.receivers)} take KV in")
        if self.on_prefill_failure not in ("recompute", "fail"):
            raise ValueError(f"on_prefill_failure is recompute or fail, not {self.on_prefill_failure!r}")
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in ("port", "proxy_port", "lease_seconds", "cooldown", "drain_seconds") else None
            if isinstance(value, int | float) and (value < 0 or (value == 0 and least is None)):
                raise ValueError(f"{field.name} must be greater than 0, not {value}")


def receivers(
    decoders: Sequence[str], init: Sequence[Sequence[int]], alloc: Sequence[Sequence[int]], *, counted: bool
) -> tuple[Receiver, ...]:
    """Say where each decoder takes KV in, by the rules of LMCache's example proxy.

    Args:
        decoders: URLs of the decoders.
        init: ``--decoder-init-port``: one list for all decoders or one for each; a list has one port for every
            tensor-parallel rank.
        alloc: ``--decoder-alloc-port``, in the same way.
        counted: The decoders came of one host and one port with ``--num-decoders``: where one list is given, the ports
            of each decoder are one higher than those of the one before. Otherwise all decoders have the same.

    Returns:
        One receiver a decoder.

    Raises:
        ValueError: The lists do not fit together, or two decoders on one host would have a port in common.
    """
    for name, lists in (("init", init), ("alloc", alloc)):
        if len(lists) not in (1, len(decoders)):
            raise ValueError(
                f"--decoder-{name}-port is given {len(lists)} times for {len(decoders)} decoders; give it once for all "
                "or once for each"
            )
    found: list[Receiver] = []
    owners: dict[tuple[str, int], str] = {}
    for number, url in enumerate(decoders):
        host = urlsplit(url).hostname or ""
        ports = [_ports_of(lists, number, counted) for lists in (init, alloc)]
        if len(ports[0]) != len(ports[1]):
            raise ValueError(
                f"--decoder-init-port names {len(ports[0])} ports and --decoder-alloc-port {len(ports[1])}; "
                "each needs one for every tensor-parallel rank of a decoder"
            )
        for port in (*ports[0], *ports[1]):
            if port > 65535:
                raise ValueError(f"decoder {url} would take KV in at port {port}, which does not exist")
            owner = owners.setdefault((host, port), url)
            if owner != url:
                raise ValueError(
                    f"decoders {owner} and {url} would both take KV in at {host}:{port}; with several decoders on one "
                    "host give --decoder-init-port and --decoder-alloc-port once for each decoder, in order"
                )
        found.append(Receiver(host, *ports))
    return tuple(found)


def _ports_of(lists: Sequence[Sequence[int]], number: int, counted: bool) -> tuple[int, ...]:
    if len(lists) > 1:
        return tuple(lists[number])
    return tuple(port + (number if counted else 0) for port in lists[0])


def check_url(url: str) -> None:
    """Refuse what is not the base URL of an engine.

    Args:
        url: The URL to look at.

    Raises:
        ValueError: It is not of the form http://host:port or https://host:port.
    """
    parts = urlsplit(url)
    _ = parts.port  # raises ValueError for a port that is no number below 65536
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError(f"{url!r} is not the address of an engine; it looks like http://host:port")


def engine_url(text: str) -> str:
    """Make a base URL of what a person writes: "host:port" or a URL.

    Args:
        text: The address.

    Returns:
        The URL without a slash, or "/v1", at its end.

    Raises:
        ValueError: It is not an address.
    """
    url = text.strip()
    if "://" not in url:
        url = f"http://{url}"
    url = url.rstrip("/").removesuffix("/v1").rstrip("/")
    check_url(url)
    return url


def pair(hosts: Sequence[str], ports: Sequence[int], count: int) -> tuple[str, ...]:
    """Pair hosts with ports as LMCache's example proxy does, and make URLs of them.

    One host and one port with a count give consecutive ports on that host. One host is repeated for several ports, one
    port for several hosts; otherwise the lists are paired in order. The count only matters in the first case.

    Args:
        hosts: Host names or addresses.
        ports: Ports.
        count: The number of engines, from ``--num-prefillers`` or ``--num-decoders``.

    Returns:
        One URL an engine.

    Raises:
        ValueError: Two lists of different length.
    """
    if len(hosts) == 1 and len(ports) == 1:
        pairs = [(hosts[0], ports[0] + i) for i in range(max(count, 1))]
    elif len(hosts) == 1:
        pairs = [(hosts[0], port) for port in ports]
    elif len(ports) == 1:
        pairs = [(host, ports[0]) for host in hosts]
    elif len(hosts) == len(ports):
        pairs = list(zip(hosts, ports, strict=True))
    else:
        raise ValueError(f"{len(hosts)} hosts and {len(ports)} ports do not pair; give one, or as many of each")
    return tuple(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}" for host, port in pairs)
