"""Results for people, for JSON and for JUnit."""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from .suite import GROUPS, CaseResult, Settings


def line(result: CaseResult) -> str:
    """Returns one line about one case."""
    mark = {"passed": "ok  ", "failed": "FAIL", "skipped": "skip"}[result.status]
    text = f"{mark} {result.id} ({result.seconds:.1f} s)"
    if result.reason:
        text += "\n     " + result.reason.strip().replace("\n", "\n     ")
    return text


def table(results: Iterable[CaseResult]) -> str:
    """Returns counts by group, and the reasons of skips and failures."""
    results = list(results)
    counts: dict[str, Counter[str]] = {}
    for result in results:
        counts.setdefault(result.id.partition(".")[0], Counter())[result.status] += 1
    rows = [f"{'group':<12} {'passed':>7} {'failed':>7} {'skipped':>8}"]
    for group in (*GROUPS, "total"):
        count = sum(counts.values(), Counter()) if group == "total" else counts.get(group)
        if count is not None:
            rows.append(f"{group:<12} {count['passed']:>7} {count['failed']:>7} {count['skipped']:>8}")
    for status, title in (("skipped", "Skipped, as the provider declares:"), ("failed", "Failed:")):
        found = [result for result in results if result.status == status]
        if found:
            rows += ["", title, *(f"  {result.id}: {result.reason.strip().splitlines()[0]}" for result in found)]
    return "\n".join(rows)


def to_json(settings: Settings, about: dict[str, Any], results: Iterable[CaseResult]) -> dict[str, Any]:
    """Returns everything as plain values: versions, host, settings, counts and each case."""
    results = list(results)
    counts = Counter(result.status for result in results)
    return {
        "kit": "kvlink.testing",
        "about": about,
        "host": {"kernel": platform.release(), "machine": platform.machine(), "python": platform.python_version()},
        "settings": settings.to_json(),
        "counts": {name: counts[name] for name in ("passed", "failed", "skipped")},
        "cases": [result.to_json() for result in results],
    }


def write_junit(path: str | os.PathLike[str], provider: str, results: Iterable[CaseResult]) -> None:
    """Writes results in JUnit's XML."""
    results = list(results)
    counts = Counter(result.status for result in results)
    suite = ElementTree.Element(
        "testsuite",
        name=f"kvlink conform {provider}",
        tests=str(len(results)),
        failures=str(counts["failed"]),
        skipped=str(counts["skipped"]),
        time=f"{sum(result.seconds for result in results):.3f}",
    )
    for result in results:
        group, _, name = result.id.partition(".")
        item = ElementTree.SubElement(suite, "testcase", classname=group, name=name, time=f"{result.seconds:.3f}")
        if result.status == "failed":
            ElementTree.SubElement(item, "failure", message=_plain(result.reason)).text = _plain(result.reason)
        elif result.status == "skipped":
            ElementTree.SubElement(item, "skipped", message=_plain(result.reason))
    ElementTree.ElementTree(suite).write(Path(path), encoding="utf-8", xml_declaration=True)


def _plain(text: str) -> str:
    """Drops the control characters that XML cannot hold."""
    return "".join(character for character in text if character >= " " or character in "\n\t")
