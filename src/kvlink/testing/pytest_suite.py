"""The conformance kit as a pytest base class: one test a case. See :mod:`kvlink.testing`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
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
        devices: Of this process and of the others, for providers that connect two devices.
        pair: Kinds of memory of the two sides of a link wherever a case takes any.
        plain_alignment: Of the address of plain memory, where the provider refuses other memory.
        refusals: Cases (patterns of ids, "?" and "*") that this setting has to refuse, and what the refusal says
            (regular expressions): the case counts as skipped when it fails with that text, and fails when it passes.
        skips: Regular expressions of the reasons with which a case may skip; None = any declared reason.
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
    devices: ClassVar[tuple[str, ...]] = ()
    pair: ClassVar[tuple[str, ...]] = ()
    plain_alignment: ClassVar[int] = 1
    refusals: ClassVar[Mapping[str, str]] = {}
    skips: ClassVar[tuple[str, ...] | None] = None
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
            devices=cls.devices,
            pair=cls.pair,
            plain_alignment=cls.plain_alignment,
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
        refusal = next((text for name, text in self.refusals.items() if fnmatch(conformance_case.id, name)), None)
        if result.status == "skipped":
            known = self.skips is None or any(re.search(text, result.reason) for text in self.skips)
            assert known, f"an unexpected skip: {result.reason}"
            pytest.skip(result.reason)
        if refusal is not None:
            assert result.status == "failed", f"it passed, and a refusal was declared: {refusal}"
            assert re.search(refusal, result.reason), f"refused, but not as declared ({refusal}): {result.reason}"
            pytest.skip(f"refused, as declared: {result.reason}")
        assert result.status == "passed", result.reason

    def test_every_claim_is_proved(self, conformance_runner: Runner) -> None:
        """Every claimed capability has a case that passed."""
        ran: Any = {result.id for result in type(self)._results}
        missing = {case.id for case in select_cases(self.settings())} - ran
        if missing:
            pytest.skip(f"{len(missing)} cases of this profile did not run")
        result = check_claims(conformance_runner.attributes()["capabilities"], type(self)._results)
        assert result.status == "passed", result.reason
