"""Which providers are installed, which of them this host can use, and which one ``auto`` takes.

A distribution offers a provider through the entry-point group ``kvlink.channels``; the value is a
:class:`ProviderSpec`. Listing reads names and versions only. Whether a host can use a provider is asked in a
short-lived child process, because a vendor's library may print, change process-wide state or crash while it looks for
its device.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from .errors import ChannelNotFoundError, ChannelUnavailableError, ConfigError, DuplicateChannelError, StateError

ENTRY_POINT_GROUP = "kvlink.channels"
PROBE_TIMEOUT = 30.0
"""Seconds that a probe may take."""

OptionValue = str | int | float | bool | None


@dataclass(frozen=True)
class Option:
    """One option that a provider takes.

    Attributes:
        name: The key under ``options``.
        type: "str", "int", "float", "bool", or "size" (bytes; "2GiB" is understood).
        default: What is passed when the user gives nothing; None leaves the choice to the provider.
        help: One line for people.
        choices: The only values allowed, or None.
    """

    name: str
    type: str = "str"
    default: OptionValue = None
    help: str = ""
    choices: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.type not in ("str", "int", "float", "bool", "size"):
            raise ConfigError(f"option {self.name!r} declares type {self.type!r}; known: str, int, float, bool, size")


@dataclass(frozen=True)
class ProviderSpec:
    """What a distribution says about its provider; the value of its entry point.

    Attributes:
        name: The value of ``transfer_channel``; equals the entry point's name.
        library: Path of the shared library, or a function that returns it (called when a channel opens).
        priority: ``auto`` takes the usable provider with the highest one. The embedded default has 10.
        options: What it accepts under ``options``.
        devices: Kinds of device it serves: "cpu", "npu".
        exclusion_group: At most one provider of a group can be open in a process; None = no restriction.
        summary: One line for ``kvlink channels``.
        docs_url: Where its documentation is.
    """

    name: str
    library: str | os.PathLike[str] | Callable[[], str | os.PathLike[str]]
    priority: int = 0
    options: tuple[Option, ...] = ()
    devices: tuple[str, ...] = ("cpu",)
    exclusion_group: str | None = None
    summary: str = ""
    docs_url: str = ""

    def library_path(self) -> str:
        """Returns the absolute path of the provider's shared library.

        Raises:
            ChannelUnavailableError: The file is not there.
        """
        library = self.library() if callable(self.library) else self.library
        path = Path(os.fspath(library)).absolute()
        if not path.is_file():
            raise ChannelUnavailableError(
                f"channel {self.name!r}: its library {path} is missing", hint="reinstall the package that offers it"
            )
        return str(path)


@dataclass(frozen=True)
class ChannelInfo:
    """An installed provider, not yet imported.

    Attributes:
        name: The value of ``transfer_channel``.
        distribution: The package that offers it.
        version: The version of that package.
    """

    name: str
    distribution: str
    version: str
    _entry_point: importlib.metadata.EntryPoint = field(repr=False, compare=False)

    @property
    def spec(self) -> ProviderSpec:
        """The provider's own description; imports its module on first use.

        Raises:
            ChannelUnavailableError: The module cannot be imported or offers something else than a ProviderSpec.
        """
        return _load_spec(self)


@dataclass(frozen=True)
class ProbeResult:
    """Whether this host can use a provider.

    Attributes:
        name: The provider.
        usable: True when it can.
        reason: Why not; empty when usable.
        output: What vendor libraries printed meanwhile.
    """

    name: str
    usable: bool
    reason: str = ""
    output: str = field(default="", repr=False, compare=False)


_lock = threading.Lock()
_specs: dict[tuple[str, str, str], ProviderSpec] = {}
_probes: dict[str, ProbeResult] = {}
_claims: dict[str, Counter[str]] = {}


def _forget_parent() -> None:
    global _lock
    _lock = threading.Lock()  # the parent may have held it at the moment of the fork
    _claims.clear()


os.register_at_fork(after_in_child=_forget_parent)


def channels() -> list[ChannelInfo]:
    """Lists the installed providers by name, without importing any.

    Returns:
        One entry per offer, sorted by name. A name that two distributions offer appears twice; using it is an error.
    """
    found = []
    for entry_point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        distribution = getattr(entry_point, "dist", None)
        found.append(
            ChannelInfo(
                name=entry_point.name,
                distribution=distribution.name if distribution is not None else entry_point.module,
                version=distribution.version if distribution is not None else "unknown",
                _entry_point=entry_point,
            )
        )
    return sorted(found, key=lambda info: (info.name, info.distribution))


def pip_name(name: str) -> str:
    """Returns the distribution that offers the channel ``name`` by kvlink's naming convention."""
    return "kvlink-" + re.sub(r"[-_.]+", "-", name).lower()


def find_info(name: str) -> ChannelInfo:
    """Looks up an installed provider by name, without importing it.

    Args:
        name: The value of ``transfer_channel``.

    Raises:
        ChannelNotFoundError: Not installed; lists the installed ones and the pip name to install.
        DuplicateChannelError: Two distributions offer it; names both.
    """
    installed = channels()
    matches = [info for info in installed if info.name == name]
    if len(matches) > 1:
        offers = " and ".join(f"{info.distribution} {info.version}" for info in matches)
        raise DuplicateChannelError(
            f"channel {name!r} is offered by {offers}",
            hint=f"uninstall one of them: pip uninstall {matches[-1].distribution}",
        )
    if matches:
        return matches[0]
    names = sorted({info.name for info in installed})
    near = get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"pip install {pip_name(name)}"
    raise ChannelNotFoundError(
        f"channel {name!r} is not installed; installed: {', '.join(names) or 'none'}"
        + (f"; to install it: pip install {pip_name(name)}" if near else ""),
        hint=hint,
    )


def find(name: str) -> ProviderSpec:
    """Loads the description of an installed provider.

    Args:
        name: The value of ``transfer_channel``.

    Raises:
        ChannelNotFoundError: Not installed; lists the installed ones and the pip name to install.
        DuplicateChannelError: Two distributions offer it; names both.
        ChannelUnavailableError: Its Python module cannot be imported.
    """
    return find_info(name).spec


def _load_spec(info: ChannelInfo) -> ProviderSpec:
    key = (info.name, info.distribution, info._entry_point.value)
    spec = _specs.get(key)
    if spec is not None:
        return spec
    try:
        loaded = info._entry_point.load()
    except Exception as error:
        raise ChannelUnavailableError(
            f"channel {info.name!r} of {info.distribution} {info.version} cannot be imported: "
            f"{type(error).__name__}: {error}",
            hint=f"reinstall {info.distribution}",
        ) from error
    if not isinstance(loaded, ProviderSpec) or loaded.name != info.name:
        offered = f"a ProviderSpec named {loaded.name!r}" if isinstance(loaded, ProviderSpec) else repr(type(loaded))
        raise ChannelUnavailableError(
            f"channel {info.name!r} of {info.distribution} {info.version} is {offered}; "
            f"its entry point {info._entry_point.value!r} must be a kvlink.registry.ProviderSpec of that name"
        )
    return _specs.setdefault(key, loaded)


def device_kind(device: str) -> str:
    """Returns the kind of a device: "npu" for "npu:0"."""
    return device.partition(":")[0]


def device_for(name: str, memory: str, index: int) -> str:
    """Says which device a channel opens on to move memory: a provider of NPUs also moves the host memory of its host.

    Args:
        name: ``transfer_channel``; "auto" picks a provider for the memory itself.
        memory: Where the memory is: "cpu", "npu:0".
        index: This process's device among those that it sees.

    Returns:
        ``memory`` where the provider serves it, else the provider's first kind of device with the index.

    Raises:
        ChannelNotFoundError: No such provider is installed.
        DuplicateChannelError: More than one is.
    """
    if name == "auto":
        return memory
    served = find(name).devices
    return memory if memory.partition(":")[0] in served else f"{served[0]}:{index}"


def select(name: str, device: str = "cpu") -> ProviderSpec:
    """Finds the provider to open.

    Args:
        name: A provider's name, or "auto": of the providers that serve the device and whose probe says that this host
            can use them, the one with the highest priority (then the first by name).
        device: "cpu", "npu:0".

    Raises:
        ChannelNotFoundError: No such provider is installed.
        DuplicateChannelError: Two distributions offer the name.
        ConfigError: The named provider does not serve that kind of device.
        ChannelUnavailableError: "auto" found none that is usable; gives the reason of each.
    """
    kind = device_kind(device)
    if name != "auto":
        spec = find(name)
        if kind not in spec.devices:
            raise ConfigError(f"channel {name!r} serves {', '.join(spec.devices)}; the device is {device!r}")
        return spec
    reasons = []
    candidates = []
    for channel in sorted({info.name for info in channels()}):
        try:
            spec = find(channel)
        except (DuplicateChannelError, ChannelUnavailableError) as error:
            reasons.append(f"{channel}: {error}")
            continue
        if kind in spec.devices:
            candidates.append(spec)
        else:
            reasons.append(f"{channel}: serves {', '.join(spec.devices)}")
    for spec in sorted(candidates, key=lambda spec: -spec.priority):
        result = probe(spec.name)
        if result.usable:
            return spec
        reasons.append(f"{spec.name}: {result.reason}")
    raise ChannelUnavailableError(
        f"no installed channel can serve device {device!r}: {'; '.join(reasons) or 'none is installed'}",
        hint="run `kvlink channels` and `kvlink probe NAME`",
    )


def probe(name: str, *, timeout: float = PROBE_TIMEOUT, refresh: bool = False) -> ProbeResult:
    """Asks in a child process whether this host can use a provider. The answer is kept for the life of this process.

    Args:
        name: A provider's name.
        timeout: Seconds after which the child is killed and the provider counts as unusable.
        refresh: Ask again even when an answer is known.

    Raises:
        ChannelNotFoundError: No such provider is installed.
        DuplicateChannelError: Two distributions offer the name.
    """
    find_info(name)
    if not refresh and (known := _probes.get(name)) is not None:
        return known
    result = _run_probe(name, timeout)
    _probes[name] = result
    return result


def _tail(text: str, limit: int = 2000) -> str:
    text = text.strip()
    return text if len(text) <= limit else "..." + text[-limit:]


def _run_probe(name: str, timeout: float) -> ProbeResult:
    environment = dict(os.environ)
    # The child must find what this process found, and must not pick up a module from the current folder.
    environment["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry)
    environment["PYTHONSAFEPATH"] = "1"
    command = [sys.executable or "python3", "-m", "kvlink._probe", name]
    try:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        return ProbeResult(name, False, f"cannot start the probe process {command[0]}: {error}")
    with child:
        try:
            answer, output = child.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            _kill_session(child)
            output = _last_words(child)
            return ProbeResult(name, False, f"its probe did not answer within {timeout:g} s", _tail(output))
        except BaseException:
            _kill_session(child)
            raise
    return _read_answer(name, child.returncode, answer, _tail(output))


def _kill_session(child: subprocess.Popen[str]) -> None:
    """Kills the child and what it started: a grandchild would keep the pipes open."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _last_words(child: subprocess.Popen[str]) -> str:
    """What a killed child printed. A grandchild in a session of its own may keep the pipe open: it is not awaited."""
    try:
        return child.communicate(timeout=5)[1]
    except subprocess.TimeoutExpired as error:
        kept = error.stderr or b""
        return kept.decode(errors="replace") if isinstance(kept, bytes) else kept


def _read_answer(name: str, code: int, answer: str, output: str) -> ProbeResult:
    try:
        parsed = json.loads(answer)
        usable, reason = parsed["usable"], parsed["reason"]
        if isinstance(usable, bool) and isinstance(reason, str):
            return ProbeResult(name, usable, reason, output)
    except (ValueError, TypeError, KeyError):
        pass
    if code < 0:
        how = f"was killed by signal {signal.Signals(-code).name}"
    else:
        how = f"ended with exit code {code} and no answer"
    last = output.splitlines()[-1] if output else "it printed nothing"
    return ProbeResult(name, False, f"its probe {how}: {last}", output)


class ExclusionClaim:
    """The right to use a provider of an exclusion group in this process, until :meth:`release`."""

    __slots__ = ("_pid", "_released", "group", "name")

    def __init__(self, group: str | None, name: str) -> None:
        self.group = group
        self.name = name
        self._released = False
        self._pid = os.getpid()

    def release(self) -> None:
        """Gives the right back. Again is harmless."""
        with _lock:
            if self._released or self._pid != os.getpid():
                return
            self._released = True
            holders = _claims.get(self.group) if self.group else None
            if holders is not None and self.group:
                holders[self.name] -= 1
                if holders[self.name] <= 0:
                    del _claims[self.group]


def claim(group: str | None, name: str) -> ExclusionClaim:
    """Claims an exclusion group for a provider. Channels of the same provider share a claim.

    Args:
        group: The provider's exclusion group; None or "" claims nothing.
        name: The provider.

    Returns:
        What to release when the channel is closed.

    Raises:
        StateError: Another provider of the group is open in this process; names it.
    """
    if group:
        with _lock:
            holders = _claims.setdefault(group, Counter())
            other = next((holder for holder in holders if holder != name), None)
            if other is not None:
                raise StateError(
                    f"channel {name!r} cannot be opened while {other!r} is open in this process: "
                    f"both use the process-wide state {group!r}",
                    operation="open",
                    hint=f"close the {other!r} channels first, or use another process",
                )
            holders[name] += 1
    return ExclusionClaim(group, name)


@functools.cache
def kvlink_version() -> str:
    """Returns the version of the installed core, or "unknown" in a bare source tree."""
    try:
        return importlib.metadata.version("kvlink")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
