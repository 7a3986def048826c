"""What vLLM must bring: the seed's two source patches, checked and repaired at run time."""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace

import pytest

from kvlink_lmcache.vllm import checks, repairs


class Deaf:
    """A scheduler like vLLM-Ascend's before 0.12: it adds what the connector answers, None or not."""

    def schedule(self):
        found, is_async = self.connector.get_num_new_matched_tokens(self.request, 0)
        return found + 1 if is_async else found


class Listening:
    """A scheduler that asks again."""

    def schedule(self):
        found, is_async = self.connector.get_num_new_matched_tokens(self.request, 0)
        if found is None:
            return 0
        return found + 1 if is_async else found


def test_a_scheduler_that_cannot_wait_is_refused_with_what_to_do():
    with pytest.raises(
        repairs.UnsupportedVLLM, match=r"Deaf does not ask.*ascend_scheduler_config.*vllm-ascend >= 0\.12"
    ):
        repairs.check_scheduler(Deaf)
    repairs.check_scheduler(Listening)
    repairs.check_scheduler(None)


def test_the_installed_vllms_scheduler_can_wait():
    scheduler = repairs.scheduler_class(SimpleNamespace(scheduler_config=SimpleNamespace(scheduler_cls=None)))
    assert scheduler.__name__ == "Scheduler"
    repairs.check_scheduler(scheduler)


def test_a_scheduler_named_by_text_is_found():
    config = SimpleNamespace(scheduler_config=SimpleNamespace(scheduler_cls=f"{__name__}.Deaf"))
    assert repairs.scheduler_class(config).__name__ == "Deaf"


@pytest.mark.parametrize(
    ("machine", "python", "needed"),
    [
        ("x86_64", (3, 11, 7), False),
        ("aarch64", (3, 11, 0), False),
        ("aarch64", (3, 11, 1), True),
        ("aarch64", (3, 10, 7), False),
        ("arm64", (3, 10, 8), True),
    ],
)
def test_the_yield_function_is_replaced_on_arm_only(machine, python, needed):
    assert repairs.needs_yield_repair(machine, python) is needed


def test_the_yield_function_is_rebound_where_it_was_imported(monkeypatch):
    from vllm.distributed import utils
    from vllm.distributed.device_communicators import shm_broadcast

    slept = []
    for module in (utils, shm_broadcast):
        monkeypatch.setattr(module, "sched_yield", module.sched_yield)  # put back afterwards
    monkeypatch.setattr(time, "sleep", slept.append)
    assert repairs.repair_yield() is True
    utils.sched_yield()
    shm_broadcast.sched_yield()
    assert slept == [0, 0]
    assert repairs.repair_yield() is True
    assert sys.modules["vllm.distributed.device_communicators.shm_broadcast"].sched_yield is utils.sched_yield


def engine(groups=1, extra=None):
    config = SimpleNamespace(kv_transfer_config=SimpleNamespace(kv_connector_extra_config=extra or {}))
    return config, SimpleNamespace(kv_cache_groups=[object()] * groups)


def test_several_cache_groups_are_refused():
    with pytest.raises(checks.UnsupportedFeature, match=r"2 KV-cache groups.*--disable-hybrid-kv-cache-manager"):
        checks.check_engine(*engine(groups=2))
    checks.check_engine(*engine(extra={"lmcache_rpc_port": "p"}))
    checks.check_engine(engine()[0], None)


def test_vllms_version_is_checked(monkeypatch):
    from kvlink_lmcache import versions

    said = []
    monkeypatch.setattr(versions.logger, "warning", lambda text, *given: said.append(text % given))
    versions.check_vllm("0.32.0")
    assert said == []
    versions.check_vllm("0.27.1")
    assert "vLLM 0.27.1 was not tested" in said[0]
    with pytest.raises(versions.VersionError, match=r"vLLM 0\.11\.0 is older than 0\.18: install"):
        versions.check_vllm("0.11.0")


@pytest.mark.parametrize(
    ("sizes", "mla", "message"),
    [
        ((1, 2, 1), False, "pipeline or data parallel"),
        ((1, 1, 2), False, "pipeline or data parallel"),
        ((2, 1, 1), True, "MLA and tensor parallel.*--tensor-parallel-size 1"),
        ((2, 1, 1), False, None),
        ((1, 1, 1), True, None),
    ],
)
def test_ways_to_be_parallel(sizes, mla, message):
    names = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
    parallel = SimpleNamespace(**dict(zip(names, sizes, strict=True)))
    if message is None:
        checks.check_parallel(parallel, mla=mla)
        return
    with pytest.raises(checks.UnsupportedFeature, match=message):
        checks.check_parallel(parallel, mla=mla)
