"""Configuration of a channel: from YAML, a mapping or the environment, checked before anything is opened.

Three forms are read::

    transfer_channel: host            # kvlink's own form
    listen: tcp://10.0.0.5:0
    secret_file: /run/secrets/kvlink
    options: {path: tcp, streams: 4}  # the provider's

    transfer_channel: host            # a LMCache file: kvlink's keys stand in extra_config, the rest is LMCache's
    extra_config: {kvlink.listen: tcp://10.0.0.5:0, kvlink.path: tcp}

    KVLINK_LISTEN=tcp://10.0.0.5:0    # the environment; KVLINK_OPTION_PATH=tcp for the provider's
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ._convert import to_bool, to_number, to_size
from .errors import ConfigError
from .registry import Option, ProviderSpec

_log = logging.getLogger("kvlink.config")

ENVIRONMENT_PREFIX = "KVLINK_"
OPTION_PREFIX = "KVLINK_OPTION_"
# Variables with the prefix that are not this module's: those of the loader, and namespaces of the tools around.
_FOREIGN = (
    "KVLINK_NATIVE_DIR",
    "KVLINK_VLLM_",
    "KVLINK_LMCACHE_",
    "KVLINK_PROXY_",
    "KVLINK_BENCH_",
    "KVLINK_HOOK_",
    "KVLINK_TEST_",
)


@dataclass(frozen=True)
class ChannelConfig:
    """Everything that :func:`kvlink.open` takes.

    Attributes:
        transfer_channel: A provider's name, or "auto".
        listen: "tcp://HOST:PORT" of the control listener; port 0 takes a free one.
        advertise: The address peers are told, or None for the one bound.
        device: "cpu", "npu:0".
        secret: What both sides must prove to know, or None. Never shown by repr.
        identity: Keys and values that a peer which names them too must share.
        options: The provider's options, not checked yet (:func:`validate_options`).
        insecure: Allow a listener beyond loopback without a secret.
        peer_timeout: Seconds of silence of a peer's host after which the peer counts as lost.
        transfer_timeout: Deadline in seconds of a transfer whose caller gives none.
        request_timeout: Seconds that a request waits for its answer when its caller says nothing.
        handshake_timeout: Seconds that an accepted connection has for its whole handshake.
        max_handshakes: Handshakes under way at once; more are told to try again.
        max_peers: Peers at once; 0 = as many as the provider takes.
    """

    transfer_channel: str = "auto"
    listen: str = "tcp://127.0.0.1:0"
    advertise: str | None = None
    device: str = "cpu"
    secret: bytes | None = field(default=None, repr=False)
    identity: Mapping[str, str | int] = field(default_factory=dict)
    options: Mapping[str, object] = field(default_factory=dict)
    insecure: bool = False
    peer_timeout: float = 3.0
    transfer_timeout: float = 60.0
    request_timeout: float = 30.0
    handshake_timeout: float = 30.0
    max_handshakes: int = 64
    max_peers: int = 0

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            object.__setattr__(self, item.name, _CHECKS[item.name](item.name, value))

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, object], *, environ: Mapping[str, str] | None = None) -> ChannelConfig:
        """Reads kvlink's own form, or LMCache's (recognised by its key ``extra_config``).

        Args:
            mapping: Keys as in this class, ``secret_file``, and ``options``; a prefix ``kvlink.`` is allowed. With
                ``extra_config`` only ``transfer_channel`` and the keys ``kvlink.*`` in there are read; those that are
                not kvlink's own become provider options.
            environ: Where ``KVLINK_SECRET`` and ``KVLINK_SECRET_FILE`` are looked for when the mapping names no
                secret; None takes this process's environment.

        Raises:
            ConfigError: An unknown key (names the nearest valid one), a wrong value, or an unreadable secret file.
        """
        if not isinstance(mapping, Mapping):
            raise ConfigError(f"the configuration is a {type(mapping).__name__}; expected a mapping of keys to values")
        values = _from_lmcache(mapping) if "extra_config" in mapping else _from_own(mapping)
        return cls._build(values, os.environ if environ is None else environ)

    @classmethod
    def from_yaml(cls, source: str | os.PathLike[str], *, environ: Mapping[str, str] | None = None) -> ChannelConfig:
        """Reads a YAML file.

        Args:
            source: Its path.
            environ: As for :meth:`from_mapping`.

        Raises:
            ConfigError: No such file, no YAML, or whatever :meth:`from_mapping` refuses.
        """
        import yaml

        path = Path(source)
        try:
            document = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the configuration {path}: {error}") from error
        except yaml.YAMLError as error:
            where = getattr(error, "problem_mark", None)
            # Not the parser's own text: it quotes the line, and that line may hold the secret.
            place = f" at line {where.line + 1}, column {where.column + 1}" if where is not None else ""
            raise ConfigError(f"{path} is not valid YAML{place}") from None
        if document is None:
            document = {}
        try:
            return cls.from_mapping(document, environ=environ)
        except ConfigError as error:
            error.message = f"{path}: {error.message}"
            raise

    @classmethod
    def from_env(
        cls, environ: Mapping[str, str] | None = None, *, base: Mapping[str, object] | None = None
    ) -> ChannelConfig:
        """Reads the environment: ``KVLINK_LISTEN``, ..., ``KVLINK_IDENTITY`` (JSON), ``KVLINK_OPTION_<NAME>``.

        Args:
            environ: None takes this process's environment.
            base: Values that the environment overrides, in kvlink's own form.

        Raises:
            ConfigError: An unknown variable ``KVLINK_*`` (names the nearest valid one) or a wrong value.
        """
        environ = os.environ if environ is None else environ
        values = _from_own(base) if base is not None else {}
        options = dict(_mapping("options", values.get("options", {})))
        known = {ENVIRONMENT_PREFIX + key.upper(): key for key in _KEYS}
        for variable in sorted(environ):
            if not variable.startswith(ENVIRONMENT_PREFIX) or variable.startswith(_FOREIGN):
                continue
            text = environ[variable]
            if variable.startswith(OPTION_PREFIX):
                options[variable[len(OPTION_PREFIX) :].lower()] = text
                continue
            key = known.get(variable)
            if key is None:
                raise ConfigError(
                    f"unknown environment variable {variable}", hint=_nearest(variable, [*known, OPTION_PREFIX + "..."])
                )
            if key in ("secret", "secret_file"):
                values.pop("secret", None)  # the base's; _build reads the environment's
                values.pop("secret_file", None)
                continue
            if key == "options":
                options.update(_json_mapping(variable, text))
            else:
                values[key] = _json_mapping(variable, text) if key == "identity" else text
        values["options"] = options
        return cls._build(values, environ)

    @classmethod
    def _build(cls, values: dict[str, object], environ: Mapping[str, str]) -> ChannelConfig:
        secret_file = values.pop("secret_file", None)
        values["secret"] = resolve_secret(values.get("secret"), secret_file, environ=environ)
        return cls(**values)  # type: ignore[arg-type]


# ---- checks, one per field -------------------------------------------------------------------------------------------
def _text(key: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{key} is {value!r}; expected a text")
    return value


def _optional_text(key: str, value: object) -> str | None:
    return None if value is None else _text(key, value)


def _seconds(key: str, value: object) -> float:
    seconds = to_number(key, value)
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"{key} is {value!r}; expected seconds, more than 0")
    return seconds


def _count(key: str, value: object) -> int:
    number = to_number(key, value)
    if number != int(number) or number < 0:
        raise ConfigError(f"{key} is {value!r}; expected a whole number, 0 or more")
    return int(number)


def _mapping(key: str, value: object) -> Mapping[str, object]:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise ConfigError(f"{key} is a {type(value).__name__}; expected a mapping with text keys")
    return dict(value)


def _identity(key: str, value: object) -> Mapping[str, str | int]:
    identity: dict[str, str | int] = {}
    for name, item in _mapping(key, value).items():
        if isinstance(item, bool) or not isinstance(item, (str, int)):
            raise ConfigError(f"{key}[{name!r}] is {item!r}; expected a text or an integer")
        identity[name] = item
    return identity


def _secret(key: str, value: object) -> bytes | None:
    if value is None:
        return None
    secret = value.encode() if isinstance(value, str) else value
    # The value itself never appears in a message.
    if not isinstance(secret, bytes):
        raise ConfigError(f"{key} is a {type(value).__name__}; expected text or bytes")
    if not secret:
        raise ConfigError(f"{key} is empty", hint="for instance: openssl rand -hex 32")
    return secret


_CHECKS: Mapping[str, Callable[[str, Any], object]] = {
    "transfer_channel": _text,
    "listen": _text,
    "advertise": _optional_text,
    "device": _text,
    "secret": _secret,
    "identity": _identity,
    "options": _mapping,
    "insecure": to_bool,
    "peer_timeout": _seconds,
    "transfer_timeout": _seconds,
    "request_timeout": _seconds,
    "handshake_timeout": _seconds,
    "max_handshakes": _count,
    "max_peers": _count,
}
_KEYS = (*_CHECKS, "secret_file")
_PREFIX = "kvlink."


# ---- forms -----------------------------------------------------------------------------------------------------------
def _nearest(name: str, valid: Iterable[str]) -> str:
    """The hint of an unknown name."""
    valid = list(valid)
    near = get_close_matches(name, valid, n=1)
    return f"did you mean {near[0]!r}?" if near else f"valid: {', '.join(sorted(valid)) or 'none'}"


def _from_own(mapping: Mapping[str, object]) -> dict[str, object]:
    values: dict[str, object] = {}
    for name, value in mapping.items():
        if not isinstance(name, str):
            raise ConfigError(f"key {name!r} is a {type(name).__name__}; expected text")
        key = name.removeprefix(_PREFIX)
        if key not in _KEYS:
            raise ConfigError(f"unknown key {name!r}", hint=_nearest(key, _KEYS) + "; a provider's stand under options")
        if key in values:
            raise ConfigError(f"{key!r} is given twice: once with the prefix 'kvlink.' and once without")
        values[key] = value
    return values


def _from_lmcache(mapping: Mapping[str, object]) -> dict[str, object]:
    """LMCache's file belongs to LMCache: only its two keys that name kvlink are read."""
    values: dict[str, object] = {}
    if mapping.get("transfer_channel") is not None:
        values["transfer_channel"] = mapping["transfer_channel"]
    options: dict[str, object] = {}
    for name, value in _mapping("extra_config", mapping["extra_config"]).items():
        if not name.startswith(_PREFIX):
            if name.startswith("kvlink"):
                raise ConfigError(f"unknown key {name!r} in extra_config", hint="kvlink's keys begin with 'kvlink.'")
            continue
        key = name.removeprefix(_PREFIX)
        if key == "options":
            options.update(_mapping(name, value))
        elif key in _KEYS:
            values[key] = value
        else:
            options[key] = value
    values["options"] = options
    return values


def _json_mapping(variable: str, text: str) -> Mapping[str, object]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{variable} is not valid JSON: {error}") from None
    return _mapping(variable, value)


# ---- the secret ------------------------------------------------------------------------------------------------------
def resolve_secret(
    secret: object = None, secret_file: object = None, *, environ: Mapping[str, str] | None = None
) -> bytes | None:
    """Finds the secret: what is given, else the file, else ``KVLINK_SECRET``, else ``KVLINK_SECRET_FILE``.

    Args:
        secret: Text or bytes, or None.
        secret_file: Path of a file that holds it, or None.
        environ: None takes this process's environment.

    Returns:
        The secret, or None when none is named anywhere.

    Raises:
        ConfigError: Two are given, it is empty, or the file cannot be read or can be written by others.
    """
    if secret is not None and secret_file is not None:
        raise ConfigError("both secret and secret_file are given; give one")
    if secret is not None:
        return _secret("secret", secret)
    if secret_file is not None:
        return read_secret_file(secret_file)
    environ = os.environ if environ is None else environ
    if "KVLINK_SECRET" in environ and "KVLINK_SECRET_FILE" in environ:
        raise ConfigError("both KVLINK_SECRET and KVLINK_SECRET_FILE are set; set one")
    if "KVLINK_SECRET" in environ:
        return _secret("KVLINK_SECRET", environ["KVLINK_SECRET"])
    if "KVLINK_SECRET_FILE" in environ:
        return read_secret_file(environ["KVLINK_SECRET_FILE"])
    return None


def read_secret_file(path: object) -> bytes:
    """Reads a secret from a file; white space at its end does not count.

    A file that its group or others can write is refused: whoever writes it chooses the secret. One that others can
    read is only warned about, because container platforms mount secrets that way by default.

    Args:
        path: Its path.

    Raises:
        ConfigError: It cannot be read, is empty, longer than 64 KiB, or can be written by others.
    """
    if not isinstance(path, (str, os.PathLike)) or not path:
        raise ConfigError(f"secret_file is {path!r}; expected a path")
    try:
        with Path(path).open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read(65537)
    except OSError as error:
        raise ConfigError(f"cannot read the secret file {path}: {error.strerror or error}") from error
    if stat.S_ISREG(mode) and mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(f"others can write the secret file {path} (mode {mode & 0o777:o})", hint=f"chmod 600 {path}")
    if stat.S_ISREG(mode) and mode & stat.S_IROTH:
        _log.warning("every user of this machine can read the secret file %s: chmod 600 %s", path, path)
    if len(text) > 65536:
        raise ConfigError(f"the secret file {path} is longer than 64 KiB")
    secret = text.rstrip()
    if not secret:
        raise ConfigError(f"the secret file {path} is empty", hint=f"for instance: openssl rand -hex 32 > {path}")
    return secret


# ---- the provider's options ------------------------------------------------------------------------------------------
def validate_options(spec: ProviderSpec, options: Mapping[str, object]) -> dict[str, str]:
    """Checks a provider's options against what it declares and turns them into the text that crosses the C boundary.

    Args:
        spec: The provider's description.
        options: Values as a user writes them: numbers, booleans or text, sizes as "2GiB".

    Returns:
        Text by name: those given and those with a default. Booleans become "1" and "0", sizes bytes.

    Raises:
        ConfigError: An unknown name (names the nearest valid one) or a value of the wrong kind.
    """
    declared = {option.name: option for option in spec.options}
    for name in options:
        if name not in declared:
            valid = [*declared, *(key for key in _KEYS if get_close_matches(name, [key]))]
            raise ConfigError(f"channel {spec.name!r} has no option {name!r}", hint=_nearest(name, valid))
    texts = {}
    for name, option in declared.items():
        value = options.get(name)
        if value is None:
            value = option.default
        if value is not None:
            texts[name] = _option_text(spec, option, value)
    return texts


def _option_text(spec: ProviderSpec, option: Option, value: object) -> str:
    key = f"option {option.name!r} of channel {spec.name!r}"
    if option.type == "bool":
        return "1" if to_bool(key, value) else "0"
    if option.type == "size":
        text = str(to_size(key, value))
    elif option.type == "int":
        number = to_number(key, value)
        if number != int(number):
            raise ConfigError(f"{key} is {value!r}; expected a whole number")
        text = str(int(number))
    elif option.type == "float":
        text = repr(float(to_number(key, value)))
    elif isinstance(value, (bool, bytes)) or not isinstance(value, (str, int, float, os.PathLike)):
        raise ConfigError(f"{key} is {value!r}; expected a text")
    else:
        text = os.fspath(value) if isinstance(value, os.PathLike) else str(value)
    if "\0" in text:
        raise ConfigError(f"{key} contains a NUL character")
    if option.choices is not None and text not in option.choices:
        near = get_close_matches(text, option.choices, n=1)
        raise ConfigError(
            f"{key} is {text!r}; expected one of {', '.join(option.choices)}",
            hint=f"did you mean {near[0]!r}?" if near else None,
        )
    return text
