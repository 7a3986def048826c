"""The kit fails providers that break the contract: each breach is made by the hook and has to be noticed."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from kvlink.testing.agent import Agent
from kvlink.testing.runner import Runner
from kvlink.testing.suite import CaseResult, Settings, all_cases

PUT = "data.put by the initiator in one process of plain memory"
GET = "data.get by the initiator in two processes of plain memory"


def run(case_id: str, *, options: Mapping[str, object] | None = None, **hook_options: object) -> CaseResult:
    (case,) = [case for case in all_cases() if case.id == case_id]
    settings = Settings(
        provider="host",
        options={"path": "tcp", **(options or {})},
        through_hook=bool(hook_options),
        hook_options=hook_options,
    )
    with Runner(settings) as runner:
        return runner.run(case)


@pytest.mark.parametrize("case_id", [PUT, GET])
def test_an_honest_provider_passes(case_id: str) -> None:
    assert run(case_id, hook_delay_ms=1).status == "passed"


@pytest.mark.parametrize("case_id", [PUT, GET])
@pytest.mark.parametrize("lie", ["drop", "shift", "early"])
def test_wrong_bytes_are_noticed(case_id: str, lie: str) -> None:
    result = run(case_id, hook_lie=lie)
    assert result.status == "failed"
    assert "bytes differ" in result.reason, result.reason


def test_a_put_that_is_complete_before_it_is_visible_is_noticed() -> None:
    result = run("semantics.a completed put is visible to whoever is told", hook_lie="early")
    assert result.status == "failed"
    assert "not visible" in result.reason


def test_a_second_completion_is_noticed() -> None:
    result = run("closing.the core keeps the contract under mixed work", hook_lie="twice")
    assert result.status == "failed"
    assert "not in flight" in result.reason


def test_bytes_that_move_after_a_region_was_closed_are_noticed() -> None:
    memory = np.zeros(4096, dtype=np.uint8)
    closed = threading.Event()

    class Region:
        def close(self, *, timeout: float) -> None:
            closed.set()  # returns while a writer goes on

    class Storage:
        region = Region()
        nbytes = len(memory)

        def read(self, offset: int, length: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
            return memory[offset : offset + length].copy()

    def write() -> None:
        closed.wait(10)
        for value in range(200):
            memory[:64] = value
            time.sleep(0.002)

    agent = Agent()
    agent._storage["b"] = Storage()  # type: ignore[assignment]
    writer = threading.Thread(target=write)
    writer.start()
    found = agent.run("watch_close", {"name": "b", "timeout": 1.0, "quiet": 0.2})
    writer.join()
    assert found["changed"] == 64


def test_a_failing_call_is_noticed_in_any_case() -> None:
    result = run(PUT, hook_fail="submit:3")
    assert result.status == "failed"
    assert "injected failure" in result.reason


def test_a_claim_that_the_provider_cannot_keep_is_noticed() -> None:
    result = run("honesty.STATISTICS counts", hook_fail="stats:1+")
    assert result.status == "failed"


def test_a_skip_needs_a_declared_reason() -> None:
    result = run("honesty.STATISTICS counts", hook_mask="STATISTICS")
    assert result.status == "skipped"
    assert "does not claim STATISTICS" in result.reason


def test_memory_that_must_be_served_is_demanded() -> None:
    (case,) = [case for case in all_cases() if case.id == PUT]
    settings = Settings(provider="host", options={"path": "shm"}, memory=("plain",))
    with Runner(settings) as runner:
        result = runner.run(case)
    assert result.status == "failed"
    assert "plain memory must be served" in result.reason
