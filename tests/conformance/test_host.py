"""The host provider under the conformance kit, on each of its paths."""

from __future__ import annotations

import os
from typing import ClassVar

import pytest

from kvlink.testing.pytest_suite import ProviderSuite

PROFILE = os.environ.get("KVLINK_TEST_PROFILE", "quick")


class TestTcp(ProviderSuite):
    provider = "host"
    options: ClassVar = {"path": "tcp"}
    memory = ("plain", "allocated")
    profile = PROFILE


class TestCma(ProviderSuite):
    provider = "host"
    options: ClassVar = {"path": "cma"}
    memory = ("plain", "allocated")
    profile = PROFILE


class TestShm(ProviderSuite):
    """Peers' memory has to be shared, so plain memory is served on the own side only."""

    provider = "host"
    options: ClassVar = {"path": "shm"}
    memory = ("allocated",)
    profile = PROFILE


class TestAuto(ProviderSuite):
    """The fastest way between the two regions, chosen by the provider."""

    provider = "host"
    memory = ("plain", "allocated")
    profile = PROFILE
    groups = ("data", "closing")


class TestBothMode(ProviderSuite):
    """Through the hook in connect mode BOTH, where each side's connect waits for the other's."""

    provider = "host"
    options: ClassVar = {"path": "tcp"}
    through_hook = True
    hook_options: ClassVar = {"hook_mode": "both"}
    profile = PROFILE
    groups = ("handshake", "memory", "semantics", "closing", "faults", "threads")


class TestScarce(ProviderSuite):
    """Through the hook as a provider with tight limits, a short queue and few capabilities."""

    provider = "host"
    options: ClassVar = {"path": "tcp"}
    through_hook = True
    hook_options: ClassVar = {
        "hook_mask": "ACCEPTOR_SUBMIT,CANCEL,LINK_CHECK,STATISTICS,ALLOCATE,INTERRUPT",
        "hook_alignment": 16,
        "hook_max_ranges": 7,
        "hook_max_range_bytes": 65_536,
        "hook_depth": 2,
        "hook_max_connects": 1,
    }
    profile = PROFILE
    groups = ("handshake", "memory", "data", "semantics", "closing", "faults", "threads")


class TestSlow(ProviderSuite):
    """Through the hook with completions that come late, so that everything overlaps."""

    provider = "host"
    options: ClassVar = {"path": "cma"}
    through_hook = True
    hook_options: ClassVar = {"hook_delay_ms": 3, "hook_connect_ms": 20}
    profile = PROFILE
    groups = ("semantics", "closing", "threads")


@pytest.mark.parametrize("path", ["shm", "cma", "tcp"])
def test_the_way_taken_is_the_one_asked_for(path: str) -> None:
    import kvlink

    with kvlink.open("host", options={"path": path}) as one, kvlink.open("host", options={"path": path}) as two:
        local = one.allocate(4096, name="local")
        two.allocate(4096, name="remote")
        peer = one.connect(two.address)
        transfer = peer.put(kvlink.ranges(local, peer.wait_region("remote"), [(0, 0, 4096)]))
        assert transfer.wait(10)
        assert transfer.result().path == path
