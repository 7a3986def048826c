"""What the seed's two source patches of vLLM repair, done at run time.

``docker/vllm-sched.diff`` makes a scheduler ask a connector again that answers None. vLLM's own schedulers do that in
all versions supported here; only vLLM-Ascend's (up to 0.11, with ``ascend_scheduler_config``) does not, and is refused:
its loop cannot be repaired from outside. ``docker/vllm-utils.diff`` replaces ``os.sched_yield`` by ``time.sleep(0)`` on
Arm in the loops that wait for shared memory; that is a function that can be rebound.
"""

from __future__ import annotations

import inspect
import platform
import sys
import time
from typing import Any

from kvlink_lmcache import versions
from kvlink_lmcache.log import get_logger

logger = get_logger()

_YIELD_USERS = ("vllm.distributed.device_communicators.shm_broadcast",)


class UnsupportedVLLM(RuntimeError):
    """A scheduler that cannot work with LMCache, and what to install or switch off."""


def install(vllm_config: Any) -> None:
    """Checks the scheduler and rebinds the yield function where it is needed.

    Args:
        vllm_config: vLLM's configuration.

    Raises:
        VersionError: vLLM is too old.
        UnsupportedVLLM: The scheduler in use does not ask again when a connector answers None.
    """
    import vllm

    versions.check_vllm(str(vllm.__version__).partition("+")[0])
    check_scheduler(scheduler_class(vllm_config))
    if needs_yield_repair(platform.machine(), sys.version_info[:3]):
        repair_yield()


def scheduler_class(vllm_config: Any) -> Any:
    """Returns the scheduler class that vLLM will use, or None where that cannot be told.

    Args:
        vllm_config: vLLM's configuration.
    """
    config = getattr(vllm_config, "scheduler_config", None)
    chosen = getattr(config, "scheduler_cls", None)
    if isinstance(chosen, type):
        return chosen
    if isinstance(chosen, str):
        from vllm.utils.import_utils import resolve_obj_by_qualname

        return resolve_obj_by_qualname(chosen)
    try:
        from vllm.v1.core.sched.scheduler import Scheduler
    except ImportError:
        return None
    return Scheduler


def check_scheduler(scheduler: Any) -> None:
    """Refuses a scheduler that does not know the answer None.

    Args:
        scheduler: The class, or None: nothing is checked.

    Raises:
        UnsupportedVLLM: It calls ``get_num_new_matched_tokens`` and never compares the answer with None.
    """
    method = getattr(scheduler, "schedule", None)
    if method is None:
        return
    try:
        source = inspect.getsource(method)
    except (OSError, TypeError):
        return
    if "get_num_new_matched_tokens" in source and "is None" not in source.split("get_num_new_matched_tokens", 1)[1]:
        raise UnsupportedVLLM(
            f"{scheduler.__module__}.{scheduler.__qualname__} does not ask a KV connector again that answers "
            "None, which LMCache does while it looks a prompt up (docker/vllm-sched.diff repairs that in the source): "
            "remove ascend_scheduler_config from --additional-config, or install vllm-ascend >= 0.12"
        )


def needs_yield_repair(machine: str, python: tuple[int, ...]) -> bool:
    """Tells whether ``os.sched_yield`` is in use where it starves other threads: on Arm, with a Python that has it.

    Args:
        machine: ``platform.machine()``.
        python: Version of Python, three numbers.
    """
    has_yield = python >= (3, 11, 1) or (3, 10, 8) <= python < (3, 11, 0)
    return machine.lower() in ("aarch64", "arm64") and has_yield


def repair_yield() -> bool:
    """Rebinds vLLM's yield function to ``time.sleep(0)``, also where it was imported by name.

    Returns:
        Whether there was one to rebind.
    """
    from vllm.distributed import utils

    original = getattr(utils, "sched_yield", None)
    if original is None:
        return False
    if original is not _sleep_zero:
        utils.sched_yield = _sleep_zero
        for name in _YIELD_USERS:
            user = sys.modules.get(name)
            if getattr(user, "sched_yield", None) is original:
                user.sched_yield = _sleep_zero  # type: ignore[union-attr]
        logger.info("waits for shared memory use time.sleep(0) instead of os.sched_yield on this Arm machine")
    return True


def _sleep_zero() -> None:
    time.sleep(0)
