"""Runs cases in a process of its own: ``python -m kvlink.testing.worker SETTINGS`` takes case ids, gives results."""

from __future__ import annotations

import faulthandler
import json
import logging
import sys
import time
from typing import Any

from .._engine_types import Capability
from ..errors import ConfigError, KvlinkError
from . import resources
from .bench import Bench
from .context import Context, Warnings
from .suite import Case, CaseResult, ConformanceFailure, DeclaredSkip, Settings, all_cases, missing_names
from .wire import serve

_DUMP_BEFORE = 2.0
"""Seconds before a case's deadline at which the stacks of all threads go to standard error."""


class Worker:
    """Serves the commands "run" and "reset"."""

    def __init__(self, settings: Settings) -> None:
        self._bench = Bench(settings)
        self._cases: dict[str, Case] = {}
        self._warnings = Warnings()
        logging.getLogger("kvlink").addHandler(self._warnings)

    def run(self, command: str, arguments: dict[str, Any]) -> Any:
        """Runs one command.

        Raises:
            ConfigError: It is unknown.
        """
        if command == "run":
            return self._run(arguments["case"]).to_json()
        if command == "attributes":
            return describe(self._bench)
        if command == "reset":
            return self._bench.close()
        raise ConfigError(f"the worker has no command {command!r}")

    def _run(self, case_id: str) -> CaseResult:
        if not self._cases:
            self._cases = {case.id: case for case in all_cases()}
            self._warm_up()
        case = self._cases[case_id]
        proves = [str(flag.name) for flag in Capability if flag in case.proves]
        faulthandler.dump_traceback_later(max(1.0, case.timeout - _DUMP_BEFORE), exit=False)
        start = time.monotonic()
        try:
            reason = self._attempt(case)
            status = "passed"
        except DeclaredSkip as skip:
            status, reason, proves = "skipped", str(skip), []
        except (ConformanceFailure, KvlinkError) as error:
            status, reason, proves = "failed", f"{type(error).__name__}: {error}", []
            logging.getLogger("kvlink.testing").debug("case %s failed", case_id, exc_info=True)
        finally:
            faulthandler.cancel_dump_traceback_later()
        return CaseResult(case_id, status, reason, time.monotonic() - start, proves)

    def _warm_up(self) -> None:
        """Makes what core and provider make once a process, so that a case's leak check does not count it."""
        context = Context(self._bench)
        if self._bench.settings.apart:
            context.pair()  # a vendor's library makes some things at its first link
        else:
            context.local().open()
        context.close(failed=True)
        if self._bench.settings.stream:
            resources.call_named(self._bench.settings.stream)  # made once a process, too

    def _attempt(self, case: Case) -> str:
        missing = case.needs & ~self._bench.attributes.capabilities
        if missing:
            raise DeclaredSkip(f"the provider does not claim {missing_names(missing)}")
        self._warnings.texts.clear()
        context = Context(self._bench)
        try:
            case.function(context)
        except BaseException:
            context.close(failed=True)
            raise
        context.close(failed=False)
        if case.quiet and self._warnings.texts:
            raise ConformanceFailure(f"a warning was logged though nothing failed: {self._warnings.texts[0]}")
        return ""


def describe(bench: Bench) -> dict[str, Any]:
    """Returns what a report says about the provider."""
    from .._engine import EngineProvider
    from ..registry import find, kvlink_version

    provider = EngineProvider.load(find(bench.settings.provider).library_path())
    attributes = bench.attributes
    return {
        "kvlink": kvlink_version(),
        "provider": provider.name,
        "version": provider.version,
        "wire_version": provider.wire_version,
        "paths": list(provider.path_names),
        "capabilities": [str(flag.name) for flag in Capability if flag in attributes.capabilities],
        "connect_mode": "BOTH" if attributes.connect_both else "INITIATOR",
        "alignment": attributes.alignment,
        "memory": list(bench.kinds()),
    }


def main() -> int:
    """Serves a worker on the standard streams."""
    values = json.loads(sys.argv[1])
    for name in ("memory", "devices", "pair"):
        values[name] = tuple(values[name])
    faulthandler.enable()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(name)s %(levelname)s %(message)s")
    return serve(Worker(Settings(**values)))


if __name__ == "__main__":
    raise SystemExit(main())
