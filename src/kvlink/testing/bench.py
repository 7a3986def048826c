"""What the cases of one run share."""

from __future__ import annotations

from functools import cached_property

from .. import errors
from .._engine import EngineChannel, EngineProvider
from .._engine_types import Attributes, Capability
from ..config import validate_options
from ..registry import find
from . import hook
from .endpoint import Endpoint, LocalEndpoint, RemoteEndpoint
from .suite import Settings, check
from .wire import ChildProcess

_AGENT = "kvlink.testing.agent"


class Bench:
    """What the cases of a run share: warm child processes, and what was found out about the provider."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._idle: dict[str, list[ChildProcess]] = {}  # by device: a vendor's library may serve one a process
        self._kinds: tuple[str, ...] | None = None

    @cached_property
    def attributes(self) -> Attributes:
        """What an open engine of the provider declares."""
        return read_attributes(self.settings)

    def kinds(self) -> tuple[str, ...]:
        """Returns the kinds of memory that the provider serves: "plain", "allocated", "device".

        Raises:
            ConformanceFailure: A kind that the settings demand is missing.
        """
        if self._kinds is None:
            found = declared_kinds(self.attributes)
            refusal = plain_refusal(self) if "plain" in found else None
            if refusal is not None:
                found.remove("plain")
            check(found, f"the provider serves no kind of memory; plain memory: {refusal}")
            for kind in self.settings.memory:
                check(kind in found, f"{kind} memory must be served, but only {found} is; plain memory: {refusal}")
            self._kinds = tuple(found)
        return self._kinds

    @property
    def idle_count(self) -> int:
        """Children that wait for work."""
        return sum(map(len, self._idle.values()))

    def take(self, device: str) -> ChildProcess:
        """Returns a child with nothing open, which has used no other device."""
        idle = self._idle.setdefault(device, [])
        child = idle.pop() if idle else ChildProcess(_AGENT)
        if not idle:
            idle.append(ChildProcess(_AGENT))  # starts while the case works, for the next one
        return child

    def give(self, child: ChildProcess, device: str) -> None:
        """Takes a child back after its agent was reset."""
        self._idle[device].append(child)

    def close(self) -> None:
        """Ends all."""
        for idle in self._idle.values():
            for child in idle:
                child.stop()
        self._idle.clear()


def channel_of(settings: Settings) -> tuple[str, dict[str, object]]:
    """Returns the name of the channel to open and its options: the provider's, or the hook's over it."""
    options: dict[str, object] = dict(settings.options)
    if not settings.through_hook:
        return settings.provider, options
    options.update(settings.hook_options)
    return hook.install(settings.provider), options


def read_attributes(settings: Settings) -> Attributes:
    """Opens an engine of the provider just to read what it declares."""
    name, options = channel_of(settings)
    spec = find(name)
    provider = EngineProvider.load(spec.library_path())
    channel = EngineChannel.open(provider, options=validate_options(spec, options), device=settings.device)
    attributes = channel.attributes
    channel.close()
    return attributes


def declared_kinds(attributes: Attributes) -> list[str]:
    """Returns the kinds of memory that the attributes name."""
    kinds = ["plain"] if attributes.memory_kinds & 1 else []
    if Capability.ALLOCATE in attributes.capabilities:
        if attributes.memory_kinds & 1:
            kinds.append("allocated")
        if attributes.memory_kinds & 2:
            check(Capability.COPY in attributes.capabilities, "device memory without COPY cannot be tested")
            kinds.append("device")
    return kinds


def plain_refusal(bench: Bench) -> str | None:
    """Returns the text with which the provider answers UNSUPPORTED to a peer's plain memory, or None when it serves it.

    A path that moves shared memory only (an option of the provider may ask for it) says so in this way.
    """
    unit = max(1, bench.attributes.memory_alignment, bench.settings.plain_alignment)
    name, options = channel_of(bench.settings)
    defaults = {"provider": name, "options": options, "device": bench.settings.device}
    one = LocalEndpoint("a", defaults)
    two: Endpoint = LocalEndpoint("b", defaults)
    child = None
    if bench.settings.apart:
        device = bench.settings.device_of(1)
        child = bench.take(device)
        two = RemoteEndpoint("b", {**defaults, "device": device}, child)
        if name == "hook":
            two.call("install_hook", inner=bench.settings.provider)
    try:
        one.open()
        address = two.open()
        two.memory("plain", max(4096, unit), 1, alignment=unit)
        one.wait_region(one.connect(address), "plain")
    except errors.UnsupportedError as error:
        return str(error)
    finally:
        one.dispose()
        if child is not None:
            two.call("reset")
            bench.give(child, device)
        else:
            assert isinstance(two, LocalEndpoint)
            two.dispose()
    return None
