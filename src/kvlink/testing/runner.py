"""Runs cases in worker processes and survives what they do to them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any

from .._engine_types import Capability
from .suite import Case, CaseResult, ConformanceFailure, Settings, missing_names
from .wire import AgentCrashed, ChildProcess

_MARGIN = 15.0
"""Seconds that a worker gets beyond a case's own deadline to close what the case left."""

CLAIMS_CASE = "honesty.every claimed capability has a passing case"


class Runner:
    """One worker at a time; a crashed or hung one is replaced and its case has failed."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._worker: ChildProcess | None = None

    def _child(self) -> ChildProcess:
        if self._worker is None or not self._worker.alive:
            self._drop()
            self._worker = ChildProcess("kvlink.testing.worker", json.dumps(self.settings.to_json()))
        return self._worker

    def _drop(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker = None

    def run(self, case: Case) -> CaseResult:
        """Runs one case.

        Returns:
            Its result; a crash or a hang is a failure.
        """
        start = time.monotonic()
        child = self._child()
        try:
            values = child.start("run", {"case": case.id}).result(case.timeout + _MARGIN)
            return CaseResult(**values)
        except FutureTimeout:
            reason = f"did not end within {case.timeout + _MARGIN:g} s: {child.error_output()}"
        except (AgentCrashed, ConformanceFailure) as error:
            reason = str(error)
        self._drop()
        return CaseResult(case.id, "failed", reason, time.monotonic() - start)

    def attributes(self) -> dict[str, Any]:
        """Returns what the provider says about itself.

        Raises:
            KvlinkError: It cannot be opened.
            ConformanceFailure: It serves no memory, or not what the settings demand.
        """
        return dict(self._child().start("attributes", {}).result(120))

    def close(self) -> None:
        """Ends the worker."""
        if self._worker is not None:
            self._worker.stop()
            self._worker = None

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_claims(claimed: Iterable[str], results: Iterable[CaseResult]) -> CaseResult:
    """Holds what a provider claims against what its passing cases proved."""
    proved = {name for result in results if result.status == "passed" for name in result.proves}
    missing = sorted(set(claimed) - proved)
    if missing:
        return CaseResult(CLAIMS_CASE, "failed", f"claimed, but no case that passed proves it: {', '.join(missing)}")
    return CaseResult(CLAIMS_CASE, "passed")


def provable(cases: Iterable[Case]) -> set[str]:
    """Returns the names of the capabilities that these cases could prove."""
    return {str(flag.name) for case in cases for flag in Capability if flag in case.proves}


def run_all(
    settings: Settings, cases: list[Case], on_result: Callable[[CaseResult], object]
) -> tuple[dict[str, Any], list[CaseResult]]:
    """Runs cases one after the other.

    Args:
        settings: What is tested.
        cases: Which cases.
        on_result: Called after each.

    Returns:
        What the provider says about itself, and the results; with all groups selected also whether every claim is
        proved.
    """
    results: list[CaseResult] = []
    with Runner(settings) as runner:
        about = runner.attributes()
        for case in cases:
            results.append(runner.run(case))
            on_result(results[-1])
    if set(about["capabilities"]) <= provable(cases):
        results.append(check_claims(about["capabilities"], results))
        on_result(results[-1])
    return about, results


__all__ = ["CLAIMS_CASE", "Runner", "check_claims", "missing_names", "provable", "run_all"]
