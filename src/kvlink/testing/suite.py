"""Cases, their registry, and what running one gives."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from .._engine_types import Capability
from ..errors import ConfigError

if TYPE_CHECKING:
    from .context import Context

GROUPS = ("load", "handshake", "memory", "data", "semantics", "closing", "faults", "injected", "threads", "honesty")
PROFILES = ("load", "quick", "full")

NOTHING = Capability(0)

CaseFunction = Callable[["Context"], None]


class ConformanceFailure(AssertionError):
    """The provider, or the core under it, does not do what the contract says."""


class DeclaredSkip(Exception):
    """A case does not apply, for a reason that the provider declares."""


def check(condition: object, message: str) -> None:
    """Fails the case with ``message`` unless ``condition`` is true.

    Raises:
        ConformanceFailure: It is not.
    """
    if not condition:
        raise ConformanceFailure(message)


@dataclass(frozen=True)
class Case:
    """One conformance test.

    Attributes:
        group: One of :data:`GROUPS`.
        name: Unique in its group.
        function: Takes a context; raises when the provider fails.
        needs: Capabilities without which the case does not apply.
        proves: Capabilities that a pass proves.
        profile: The smallest profile that runs it.
        timeout: Seconds after which it counts as hung.
        quiet: Nothing fails in it, so a logged warning is a failure.
    """

    group: str
    name: str
    function: CaseFunction
    needs: Capability = NOTHING
    proves: Capability = NOTHING
    profile: str = "quick"
    timeout: float = 60.0
    quiet: bool = False

    @property
    def id(self) -> str:
        """Group and name in one word."""
        return f"{self.group}.{self.name}"


@dataclass(frozen=True)
class CaseResult:
    """How a case ended.

    Attributes:
        id: The case.
        status: "passed", "failed" or "skipped".
        reason: Why, when it did not pass.
        seconds: How long it took.
        proves: Names of the capabilities that it proved.
    """

    id: str
    status: str
    reason: str = ""
    seconds: float = 0.0
    proves: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Settings:
    """What is tested.

    Attributes:
        provider: Name of the channel.
        options: Its options.
        device: "cpu", "npu:0".
        profile: One of :data:`PROFILES`.
        through_hook: Run everything through the hook, not only the cases that need it.
        hook_options: Options for the hook when ``through_hook``.
        memory: Kinds of memory that must be served: "plain", "allocated", "device". Others are tested where served.
        stream: "module:function" that returns the handle of a device stream, for providers that claim STREAM.
        pair: Kinds of memory of the two sides, wherever a case takes any: the first endpoint of a case gets the first.
        plain_alignment: Of the address of plain memory, where the provider refuses other memory at registration.
        devices: Where two ends of a link need a device each and a process each: this process uses the first, every
            other process the next. Overrides ``device``.
    """

    provider: str
    options: Mapping[str, object] = field(default_factory=dict)
    device: str = "cpu"
    profile: str = "quick"
    through_hook: bool = False
    hook_options: Mapping[str, object] = field(default_factory=dict)
    memory: tuple[str, ...] = ()
    stream: str = ""
    devices: tuple[str, ...] = ()
    pair: tuple[str, ...] = ()
    plain_alignment: int = 1

    def __post_init__(self) -> None:
        if self.pair and (len(self.pair) != 2 or not set(self.pair) <= {"plain", "allocated", "device"}):
            raise ConfigError(f"pair is {list(self.pair)}; expected two of plain, allocated, device")
        if self.devices:
            if len(set(self.devices)) < 2:
                raise ConfigError(f"devices are {list(self.devices)}; expected at least two different ones")
            object.__setattr__(self, "device", self.devices[0])
        if self.profile not in PROFILES:
            raise ConfigError(f"profile is {self.profile!r}; expected one of {', '.join(PROFILES)}")

    @property
    def full(self) -> bool:
        """Whether the long versions of cases run."""
        return self.profile == "full"

    @property
    def apart(self) -> bool:
        """Whether the two ends of a link are always two processes with a device each."""
        return bool(self.devices)

    def device_of(self, process: int) -> str:
        """Returns the device of a process: 0 is the one that runs the cases, 1 the first child of a case."""
        if not self.devices:
            return self.device
        return self.devices[0] if process == 0 else self.devices[1 + (process - 1) % (len(self.devices) - 1)]

    def to_json(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        values = asdict(self)
        values["options"] = dict(self.options)
        values["hook_options"] = dict(self.hook_options)
        return values


def missing_names(capabilities: Capability) -> str:
    """Returns the names of capabilities for people."""
    return ", ".join(str(flag.name) for flag in Capability if flag in capabilities)


_cases: dict[str, Case] = {}


def case(
    group: str,
    name: str,
    *,
    needs: Capability = NOTHING,
    proves: Capability | None = None,
    profile: str = "quick",
    timeout: float = 60.0,
    quiet: bool = False,
) -> Callable[[CaseFunction], CaseFunction]:
    """Registers a function as a case. ``proves`` defaults to ``needs``."""

    def register(function: CaseFunction) -> CaseFunction:
        add_case(Case(group, name, function, needs, needs if proves is None else proves, profile, timeout, quiet))
        return function

    return register


def add_case(new: Case) -> None:
    """Registers a case.

    Raises:
        ValueError: Its group is unknown or its name taken.
    """
    if new.group not in GROUPS or new.id in _cases:
        raise ValueError(f"case {new.id!r}: unknown group or taken name")
    _cases[new.id] = new


def all_cases() -> list[Case]:
    """Returns every case, by group and then in the order of their files."""
    for group in GROUPS:
        importlib.import_module(f"{__package__}.groups.{group}")
    return sorted(_cases.values(), key=lambda item: GROUPS.index(item.group))


def select_cases(settings: Settings, groups: Iterable[str] | None = None, match: str = "") -> list[Case]:
    """Returns the cases of a profile.

    Args:
        settings: Names the profile.
        groups: Only these; None = all.
        match: Only cases whose id contains this.

    Raises:
        ConfigError: A group is unknown.
    """
    wanted = set(GROUPS if groups is None else groups)
    if unknown := wanted - set(GROUPS):
        raise ConfigError(f"unknown group {sorted(unknown)[0]!r}; the groups are {', '.join(GROUPS)}")
    level = PROFILES.index(settings.profile)
    return [
        item
        for item in all_cases()
        if item.group in wanted and PROFILES.index(item.profile) <= level and match in item.id
    ]
