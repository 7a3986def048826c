"""The conformance kit as a pytest base class: one test a case. See :mod:`kvlink.testing`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import pytest

from .runner import Runner, check_claims
from .suite import Case, CaseResult, Settings, select_cases


class ProviderSuite:
    """Derive from it, name the provider, and pytest runs every case against it.

    Attributes:
        provider: Name of the channel.
        options: Its options.
        device: "cpu", "npu:0".
        profile: "load", "quick" or "full".
        through_hook: Run everything through the hook provider.
        hook_options: Options of the hook.
        memory: Kinds of memory that must be served: "plain", "allocated", "device".
        stream: "module:function" that returns a device stream's handle, for providers that claim STREAM.
        groups: Only these groups; None = all.
    """

    provider: ClassVar[str] = ""
    options: ClassVar[Mapping[str, object]] = {}
    device: ClassVar[str] = "cpu"
    profile: ClassVar[str] = "quick"
    through_hook: ClassVar[bool] = False
    hook_options: ClassVar[Mapping[str, object]] = {}
    memory: ClassVar[tuple[str, ...]] = ()
    stream: ClassVar[str] = ""
    groups: ClassVar[tuple[str, ...] | None] = None
    _results: ClassVar[list[CaseResult]]

    @classmethod
    def settings(cls) -> Settings:
        """Returns what is tested."""
        return Settings(
            provider=cls.provider,
            options=cls.options,
            device=cls.device,
            profile=cls.profile,
            through_hook=cls.through_hook,
            hook_options=cls.hook_options,
            memory=cls.memory,
            stream=cls.stream,
        )

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Makes a test of every case."""
        if "conformance_case" in metafunc.fixturenames:
            cases = select_cases(self.settings(), self.groups) if self.provider else []
            metafunc.parametrize("conformance_case", cases, ids=[case.id.replace(" ", "_") for case in cases])

    @pytest.fixture(scope="class")
    def conformance_runner(self, request: pytest.FixtureRequest) -> Iterator[Runner]:
        """One worker process for the class."""
        request.cls._results = []
        with Runner(request.cls.settings()) as runner:
            yield runner

    def test_case(self, conformance_case: Case, conformance_runner: Runner) -> None:
        """Runs one case; skips only what the provider declares."""
        result = conformance_runner.run(conformance_case)
        type(self)._results.append(result)
        if result.status == "skipped":
            pytest.skip(result.reason)
        assert result.status == "passed", result.reason

    def test_every_claim_is_proved(self, conformance_runner: Runner) -> None:
        """Every claimed capability has a case that passed."""
        ran: Any = {result.id for result in type(self)._results}
        missing = {case.id for case in select_cases(self.settings())} - ran
        if missing:
            pytest.skip(f"{len(missing)} cases of this profile did not run")
        result = check_claims(conformance_runner.attributes()["capabilities"], type(self)._results)
        assert result.status == "passed", result.reason
