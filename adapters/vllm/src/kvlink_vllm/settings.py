"""What ``kv_connector_extra_config`` may say: ``transfer_channel`` and keys that begin with ``kvlink.``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit


class SettingsError(ValueError):
    """An unknown key or a wrong value in ``kv_connector_extra_config``."""


@dataclass(frozen=True)
class Settings:
    """The connector's settings; each field is the key ``kvlink.<field>`` unless it says otherwise.

    Attributes:
        transfer_channel: The provider (key ``transfer_channel``).
        device: Device that the channel opens on, such as "npu:0"; None takes the cache's, or this rank's device of the
            provider where it does not serve the cache's.
        listen: Where each worker listens; with a fixed port, rank r takes port + r.
        advertise: Address that peers use instead, if it differs from ``listen``.
        secret: The shared secret.
        secret_file: File that holds it. Without either, KVLINK_SECRET and KVLINK_SECRET_FILE count.
        insecure: Listen beyond loopback without a secret.
        lease: Seconds that the prefiller holds blocks after a claim or a renewal.
        contact: Seconds that it holds them until a decoder's first word.
        handoff_wait: Seconds that a decoder waits for a hand-off which the prefiller does not know yet.
        connect_timeout: Seconds for a connect, which runs in the background.
        request_timeout: Seconds for a question to the prefiller's worker.
        pull_timeout: Seconds for a whole pull, the connect included.
        peer_timeout: Seconds after which a silent peer counts as lost.
        retry_after: Seconds during which a prefiller that could not be reached is not tried again.
        pulls: Pulls that one worker runs at once; more wait.
        idle_wait: Seconds that a worker sleeps at most in a step that computes nothing while a pull or a lease is open.
        on_load_failure: "recompute" or "fail".
        cpu_affinity: Cores for the connector's own threads, such as "3" or "2-3,7"; None leaves them alone.
        model_id: Stands for the model's name in the compatibility check, if the two sides use different paths.
        verify: Compare checksums of source and destination blocks after each pull (host memory; slow).
        trace_file: File that gets one JSON line a pull.
        options: Options of the provider: every other ``kvlink.<name>``.
    """

    transfer_channel: str = "auto"
    device: str | None = None
    listen: str = "tcp://127.0.0.1:0"
    advertise: str | None = None
    secret: str | None = field(default=None, repr=False)
    secret_file: str | None = None
    insecure: bool = False
    lease: float = 30.0
    contact: float = 10.0
    handoff_wait: float = 10.0
    connect_timeout: float = 5.0
    request_timeout: float = 15.0
    pull_timeout: float = 60.0
    peer_timeout: float = 3.0
    retry_after: float = 1.0
    pulls: int = 4
    idle_wait: float = 0.005
    on_load_failure: str = "recompute"
    cpu_affinity: str | None = None
    model_id: str | None = None
    verify: bool = False
    trace_file: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_extra_config(cls, extra: Mapping[str, Any]) -> Settings:
        """Reads ``kv_connector_extra_config``.

        Args:
            extra: The mapping as vLLM holds it.

        Returns:
            The settings.

        Raises:
            SettingsError: A key that neither the connector nor the provider knows (with the nearest one), or a value
                of a wrong type or range.
        """
        own = {f.name for f in fields(cls)} - {"transfer_channel", "options"}
        channel = extra.get("transfer_channel", cls.transfer_channel)
        if not isinstance(channel, str) or not channel:
            raise SettingsError(f"transfer_channel is {channel!r}, not a provider's name such as 'host'")
        offered = _provider_options(channel)
        values: dict[str, Any] = {"transfer_channel": channel}
        options: dict[str, Any] = {}
        for key, value in extra.items():
            if key == "transfer_channel":
                continue
            name = key.removeprefix("kvlink.")
            foreign = name not in own and name not in (offered or ())
            if offered is None:  # `auto`: the provider checks its options, but what looks like ours is a slip
                foreign = foreign and bool(get_close_matches(name, own, n=1, cutoff=0.8))
            if name == key or foreign:
                known = ["transfer_channel", *sorted(f"kvlink.{n}" for n in own | set(offered or ()))]
                near = get_close_matches(key, known, n=1, cutoff=0.5) or get_close_matches(f"kvlink.{key}", known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(known)}"
                raise SettingsError(f"unknown key {key!r} in kv_connector_extra_config{hint}")
            if name in own:
                values[name] = _convert(key, value, getattr(cls, name, None), name)
            else:
                options[name] = value
        settings = cls(**values, options=options)
        settings._check()
        return settings

    def _check(self) -> None:
        seconds = (
            "lease",
            "contact",
            "handoff_wait",
            "connect_timeout",
            "request_timeout",
            "pull_timeout",
            "peer_timeout",
        )
        for name in seconds:  # written so that NaN fails too
            if not 0 < getattr(self, name) < 86_400:
                raise SettingsError(f"kvlink.{name} is {getattr(self, name)!r}; expected seconds between 0 and 86400")
        if not 0 <= self.retry_after < 86_400:
            raise SettingsError(f"kvlink.retry_after is {self.retry_after!r}; expected seconds from 0 to 86400")
        if not 0 <= self.idle_wait <= 1:
            raise SettingsError(f"kvlink.idle_wait is {self.idle_wait!r}; expected seconds between 0 and 1")
        if not 1 <= self.pulls <= 64:
            raise SettingsError(f"kvlink.pulls is {self.pulls}; expected 1 to 64")
        if self.on_load_failure not in ("recompute", "fail"):
            raise SettingsError(f"kvlink.on_load_failure is {self.on_load_failure!r}; expected 'recompute' or 'fail'")
        if self.secret is not None and self.secret_file is not None:
            raise SettingsError("kvlink.secret and kvlink.secret_file are both set; set one")
        parse_cores(self.cpu_affinity)
        try:
            port = urlsplit(self.listen).port
        except ValueError as error:
            raise SettingsError(f"kvlink.listen {self.listen!r}: {error}") from None
        if not self.listen.startswith("tcp://") or port is None:
            raise SettingsError(f"kvlink.listen is {self.listen!r}; expected tcp://host:port (port 0: any)")

    def shared_secret(self) -> bytes | None:
        """Returns the secret from the settings, a file or the environment, or None.

        Raises:
            SettingsError: The file cannot be read or is empty.
        """
        if self.secret is not None:
            return self.secret.encode()
        path = self.secret_file
        if path is None:
            if os.environ.get("KVLINK_SECRET"):
                return os.environ["KVLINK_SECRET"].encode()
            path = os.environ.get("KVLINK_SECRET_FILE") or None
        if path is None:
            return None
        try:
            secret = Path(path).read_bytes().strip()
        except OSError as error:
            raise SettingsError(f"the secret file {path} cannot be read: {error}") from None
        if not secret:
            raise SettingsError(f"the secret file {path} is empty")
        return secret

    def listen_for(self, rank: int) -> str:
        """Returns the listen address of a rank: a fixed port counts up with the rank."""
        return _shift_port(self.listen, rank)

    def advertise_for(self, rank: int) -> str | None:
        """Returns the advertised address of a rank, or None."""
        return None if self.advertise is None else _shift_port(self.advertise, rank)


def _shift_port(address: str, rank: int) -> str:
    parts = urlsplit(address)
    if not parts.port or not rank:
        return address
    head, _, _ = address.rpartition(":")
    return f"{head}:{parts.port + rank}"


def parse_cores(text: str | None) -> frozenset[int] | None:
    """Reads a core list such as "2-3,7".

    Args:
        text: The list, or None.

    Returns:
        The cores, or None.

    Raises:
        SettingsError: Not such a list.
    """
    if text is None:
        return None
    cores: set[int] = set()
    try:
        for part in str(text).split(","):
            first, _, last = part.partition("-")
            cores.update(range(int(first), int(last or first) + 1))
    except ValueError:
        cores.clear()
    if not cores:
        raise SettingsError(f"kvlink.cpu_affinity is {text!r}; expected cores such as '3' or '2-3,7'")
    return frozenset(cores)


def _provider_options(channel: str) -> set[str] | None:
    """Returns the option names of a provider, or None where ``auto`` leaves open which one it will be."""
    if channel == "auto":
        return None
    from kvlink import registry

    return {option.name for option in registry.find(channel).options}


def _convert(key: str, value: Any, default: Any, name: str) -> Any:
    kinds = {"insecure": bool, "verify": bool, "pulls": int}
    kind = kinds.get(name, float if isinstance(default, float) else str)
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if name == "cpu_affinity" and isinstance(value, int):
        return str(value)
    if isinstance(value, bool) is (kind is bool) and isinstance(value, kind):
        return value
    raise SettingsError(f"{key} is {value!r}; expected {kind.__name__}")
