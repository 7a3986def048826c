"""Every rule of rules.json has tests with its number, and the files that are said to enforce it are there."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

HERE = Path(__file__).parent
RULES: list[dict[str, object]] = json.loads((HERE / "rules.json").read_text())
NAME = re.compile(r"test_rule_(\d\d)_\w+$")


def rules_with_tests() -> dict[int, list[str]]:
    """The test functions of this folder by the rule in their name. Skipped and empty ones do not count."""
    found: dict[int, list[str]] = {}
    for path in sorted(HERE.glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef):
                continue
            match = NAME.match(node.name)
            if match is None:
                continue
            marks = " ".join(ast.unparse(mark) for mark in node.decorator_list)
            if "skip" in marks or "xfail" in marks or "slow" in marks:
                continue
            found.setdefault(int(match[1]), []).append(f"{path.name}::{node.name}")
    return found


def test_the_rules_are_numbered_1_to_33() -> None:
    assert [rule["number"] for rule in RULES] == list(range(1, 34))


def test_every_rule_has_a_test() -> None:
    tests = rules_with_tests()
    missing = [rule["number"] for rule in RULES if rule["number"] not in tests]
    assert not missing, f"rules without a test named test_rule_NN_...: {missing}"


def test_every_test_has_a_rule() -> None:
    known = {rule["number"] for rule in RULES}
    unknown = {number: names for number, names in rules_with_tests().items() if number not in known}
    assert not unknown, unknown


def test_the_files_that_enforce_a_rule_exist() -> None:
    missing = [(rule["number"], name) for rule in RULES for name in rule["enforced"] if not (HERE / str(name)).exists()]
    assert not missing, missing


def test_a_rule_without_a_test_is_noticed() -> None:
    # The check above must be able to fail: rule 34 does not exist, so nothing may claim it.
    assert 34 not in rules_with_tests()
    assert rules_with_tests()[10], "rule 10 has tests"
