"""The YAML keys that LMCache-Ascend adds to LMCache's, and what a misspelt key gets.

LMCache keeps its keys in one dictionary, from which its configuration class was made. The keys here are added to that
dictionary and the class's constructor takes them too, so that files, environment variables (``LMCACHE_PD_PULL_MODE``)
and overrides work as for LMCache's own. Where LMCache-Ascend has added a key before, its definition stays.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from kvlink.errors import ConfigError
from kvlink_lmcache import names


def _bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    if text in ("true", "1", "yes", "on"):
        return True
    if text in ("false", "0", "no", "off", ""):
        return False
    raise ConfigError(f"{value!r} is neither true nor false")


def _ports(value: Any) -> list[int] | None:
    if value is None:
        return None
    parts = value if isinstance(value, (list, tuple)) else str(value).strip("[] ").split(",")
    return [int(part) for part in parts if str(part).strip()]


_Definition = tuple[Any, Any, Callable[[Any], Any]]
# Key, type, default, converter: names and defaults are LMCache-Ascend's.
ASCEND_KEYS: Mapping[str, _Definition] = {
    "pd_pull_mode": (bool, False, _bool),
    "pd_delay_pull": (bool, False, _bool),
    "pd_pull_done_port": (list | None, None, _ports),
    "pd_use_cpu_offload": (bool, False, _bool),
    "pd_cpu_buffer_size": (int | None, None, int),
    "pd_alloc_fail_backoff_ttl": (float, 2.0, float),
    "pd_pull_pending_ttl": (float, 360.0, float),
    "pd_pull_backpressure_reserve_pct": (float, 2.0, float),
    "p2p_use_npu": (bool, False, _bool),
    "p2p_npu_buffer_size": (int, 1 << 30, int),
    "p2p_pull_mode": (bool, False, _bool),
    "p2p_delay_pull": (bool, False, _bool),
    "p2p_pull_pending_ttl": (float, 360.0, float),
    "p2p_sync_lookup_cache_ttl": (float, 5.0, float),
    "p2p_sync_lookup_cache_max_entries": (int, 1024, int),
}


def install(module: ModuleType) -> None:
    """Adds the keys to ``lmcache.v1.config`` and checks keys of files from now on.

    Args:
        module: ``lmcache.v1.config``.
    """
    definitions: dict[str, dict[str, Any]] = module._CONFIG_DEFINITIONS
    config_class: Any = module.LMCacheEngineConfig
    added = {key: entry for key, entry in ASCEND_KEYS.items() if key not in definitions}
    if not added:
        return
    for key, (kind, default, convert) in added.items():
        definitions[key] = {"type": kind, "default": default, "env_converter": convert}
    _accept(config_class, {key: entry[1] for key, entry in added.items()})
    _check_files(config_class, lambda: known_keys(module))


def known_keys(module: ModuleType) -> list[str]:
    """Returns every key of ``lmcache.v1.config``, those with an old name too.

    Args:
        module: ``lmcache.v1.config``.
    """
    return [*module._CONFIG_DEFINITIONS, *module._CONFIG_ALIASES]


def _accept(config_class: Any, defaults: Mapping[str, Any]) -> None:
    constructor = config_class.__init__

    @functools.wraps(constructor)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        for key, default in defaults.items():
            setattr(self, key, kwargs.pop(key, default))
        constructor(self, *args, **kwargs)

    config_class.__init__ = init


def _check_files(config_class: Any, known: Callable[[], Iterable[str]]) -> None:
    from_file = config_class.from_file.__func__

    @classmethod  # type: ignore[misc]
    @functools.wraps(from_file)
    def checked(cls: Any, file_path: str) -> Any:
        check_file(file_path, known())
        return from_file(cls, file_path)

    config_class.from_file = checked


def check_file(path: str, known: Iterable[str]) -> None:
    """Refuses a file that is meant for kvlink and has an unknown key or a wrong value.

    Args:
        path: LMCache's YAML file.
        known: The keys there are.

    Raises:
        ConfigError: With the nearest key, or the value and what was expected.
    """
    import yaml

    given = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"{path} holds a {type(given).__name__}; expected keys and values")
    if is_ours(given):
        check_keys(given, known, path)
        for key in ASCEND_KEYS:
            check_value(key, given.get(key), path)


def is_ours(given: Mapping[str, Any]) -> bool:
    """Tells whether a file is meant for kvlink: it names a kvlink channel, or a kvlink key.

    Args:
        given: The file's keys and values.

    Raises:
        ConfigError: A channel that nobody offers.
    """
    extra = given.get("extra_config")
    if isinstance(extra, Mapping) and any(str(key).startswith("kvlink") for key in extra):
        return True
    near = get_close_matches("transfer_channel", [str(key) for key in given], n=1, cutoff=0.8)
    if near and near[0] != "transfer_channel":  # the very key that would have told
        return True
    channel = given.get("transfer_channel")
    return names.is_kvlink(channel)


def check_keys(given: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Refuses a key that LMCache does not know; it would be dropped with no more than a warning.

    Args:
        given: Keys and values.
        known: The keys there are.
        where: Names the source in the message.

    Raises:
        ConfigError: An unknown key, with the nearest known one.
    """
    valid = list(known)
    for key in given:
        text = str(key)
        if text in valid or text == "ec" or text.startswith("ec_"):
            continue
        near = get_close_matches(text, valid, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else "see docs/lmcache.md for all keys"
        raise ConfigError(f"unknown key {text!r} in {where}: {hint}")


def check_value(key: str, value: Any, where: str) -> None:
    """Refuses a value that a key of LMCache-Ascend cannot have; LMCache would go on with None.

    Args:
        key: One of ``ASCEND_KEYS``.
        value: What is given; None counts as not given.
        where: Names the source in the message.

    Raises:
        ConfigError: Not convertible.
    """
    if value is None:
        return
    kind, _, convert = ASCEND_KEYS[key]
    try:
        convert(value)
    except (TypeError, ValueError):
        name = getattr(kind, "__name__", str(kind))
        raise ConfigError(f"{key} is {value!r} in {where}; expected {name}") from None
