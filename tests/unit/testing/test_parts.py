"""The kit's own parts: patterns, layouts, reports, the runner's way with crashes, the command line."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from kvlink.errors import ConfigError, IdentityMismatch, PeerLost
from kvlink.testing import cli, layouts, patterns, report, wire
from kvlink.testing.hook import read_log
from kvlink.testing.runner import check_claims, provable
from kvlink.testing.suite import GROUPS, CaseResult, ConformanceFailure, Settings, all_cases, select_cases


def test_a_pattern_is_the_same_from_every_offset() -> None:
    whole = patterns.pattern(3, 0, 1000)
    for offset, length in ((0, 1), (1, 7), (8, 8), (13, 500), (999, 1), (5, 0)):
        np.testing.assert_array_equal(patterns.pattern(3, offset, length), whole[offset : offset + length])


def test_patterns_of_different_seeds_and_offsets_differ() -> None:
    assert np.mean(patterns.pattern(1, 0, 4096) == patterns.pattern(2, 0, 4096)) < 0.02
    assert np.mean(patterns.pattern(1, 0, 4096) == patterns.pattern(1, 1, 4096)) < 0.02
    assert np.mean(patterns.pattern(1, 0, 4096) == patterns.pattern(1, 8, 4096)) < 0.02


def test_expected_applies_patches_in_order() -> None:
    content = patterns.expected(1, 100, [(10, 2, 0, 50), (20, 3, 5, 10)])
    np.testing.assert_array_equal(content[20:30], patterns.pattern(3, 5, 10))
    np.testing.assert_array_equal(content[10:20], patterns.pattern(2, 0, 10))
    np.testing.assert_array_equal(content[60:], patterns.pattern(1, 60, 40))


def test_first_difference_says_where() -> None:
    want = patterns.pattern(1, 0, 64)
    got = want.copy()
    assert patterns.first_difference(got, want) is None
    got[17] ^= 1
    assert "1 of 64 bytes differ, the first at offset 17" in str(patterns.first_difference(got, want))


@pytest.mark.parametrize("alignment", [1, 16, 512])
@pytest.mark.parametrize(
    "make",
    [
        lambda unit: layouts.scattered(1, 100, alignment=unit, shift=(1, 2)),
        lambda unit: layouts.scattered(4097, 33, alignment=unit, seed=5),
        lambda unit: layouts.contiguous(100, 20, alignment=unit),
        lambda unit: layouts.mixed(60, alignment=unit, seed=2),
    ],
)
def test_layouts_are_aligned_inside_and_free_of_overlap(make: object, alignment: int) -> None:
    layout = make(alignment)  # type: ignore[operator]
    for column in (0, 1):
        spans = sorted((block[column], block[column] + block[2]) for block in layout.blocks)
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
        assert spans[0][0] >= 0 and spans[-1][1] <= layout.nbytes
    assert all(value % alignment == 0 for block in layout.blocks for value in block)


def test_scattered_blocks_never_coalesce() -> None:
    blocks = layouts.scattered(64, 200, seed=3).blocks
    joined = [(one, two) for one, two in itertools.pairwise(blocks) if one[0] + 64 == two[0] and one[1] + 64 == two[1]]
    assert not joined


def test_errors_keep_class_text_and_attributes_across_processes() -> None:
    error = PeerLost("gone", operation="put", peer="p", site="recv", vendor_code=104, hint="connect again")
    again = wire.decode_error(json.loads(json.dumps(wire.encode_error(error))))
    assert type(again) is PeerLost
    assert str(again) == str(error)
    assert (again.operation, again.site, again.vendor_code) == ("put", "recv", 104)
    mismatch = wire.decode_error(wire.encode_error(IdentityMismatch("model", "a", "b")))
    assert type(mismatch) is IdentityMismatch
    assert "'model'" in str(mismatch)
    assert type(wire.decode_error(wire.encode_error(ConformanceFailure("bad")))) is ConformanceFailure
    crash = wire.decode_error(wire.encode_error(KeyError("x")))
    assert type(crash) is wire.AgentCrashed
    assert "KeyError" in str(crash)


def test_a_crashed_agent_is_reported_with_its_last_words() -> None:
    child = wire.ChildProcess("kvlink.testing.agent")
    try:
        assert child.start("pid", {}).result(60) == child.pid
        pending = child.start("hold_gil", {"seconds": 30.0})
        os.kill(child.pid, signal.SIGKILL)
        with pytest.raises(wire.AgentCrashed, match="SIGKILL"):
            pending.result(20)
        with pytest.raises(wire.AgentCrashed):
            child.start("pid", {}).result(20)
    finally:
        child.kill()


def test_every_group_has_cases_and_names_are_unique() -> None:
    cases = all_cases()
    assert {case.group for case in cases} == set(GROUPS)
    assert len({case.id for case in cases}) == len(cases)
    assert all(case.timeout <= 300 for case in cases)


def test_profiles_nest() -> None:
    chosen = {
        profile: {case.id for case in select_cases(Settings("host", profile=profile))}
        for profile in ("load", "quick", "full")
    }
    assert chosen["load"] < chosen["quick"] < chosen["full"]
    assert {case_id.partition(".")[0] for case_id in chosen["load"]} == {"load"}
    with pytest.raises(ConfigError):
        Settings("host", profile="quikc")
    with pytest.raises(ConfigError, match="unknown group"):
        select_cases(Settings("host"), ["dada"])


def test_claims_are_held_against_what_passed() -> None:
    results = [CaseResult("a.b", "passed", proves=["PUT"]), CaseResult("a.c", "failed", proves=["GET"])]
    assert check_claims(["PUT"], results).status == "passed"
    verdict = check_claims(["PUT", "GET"], results)
    assert verdict.status == "failed"
    assert "GET" in verdict.reason
    everything = {"PUT", "GET", "ACCEPTOR_SUBMIT", "LATE_MEMORY", "ALLOCATE", "COPY", "CANCEL"}
    assert everything | {"INTERRUPT", "LINK_CHECK", "STREAM", "STATISTICS", "BUSY_POLL"} == provable(all_cases())


RESULTS = [
    CaseResult("load.one", "passed", seconds=0.5, proves=["PUT"]),
    CaseResult("data.two", "failed", "it\x00 broke\nbadly", 1.0),
    CaseResult("data.three", "skipped", "not claimed"),
]


def test_reports_count_and_give_reasons(tmp_path: Path) -> None:
    text = report.table(RESULTS)
    assert "total              1       1        1" in text
    assert "data.three: not claimed" in text
    document = report.to_json(Settings("host", options={"path": "tcp"}), {"provider": "host"}, RESULTS)
    assert document["counts"] == {"passed": 1, "failed": 1, "skipped": 1}
    assert json.loads(json.dumps(document))["settings"]["options"] == {"path": "tcp"}
    report.write_junit(tmp_path / "junit.xml", "host", RESULTS)
    suite = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("3", "1", "1")
    assert suite.find("testcase/failure") is not None


def test_the_hook_log_is_read(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("CALL 1 2 mem_open 3 OK\nCALL 2 2 submit 3 AGAIN\nVIOLATION core submit of no ranges\n")
    log = read_log(path)
    assert log.count("mem_open") == 1
    assert log.count("submit", "AGAIN") == 1
    assert log.violations == ["core submit of no ranges"]


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return parser.parse_args(arguments)


def test_the_command_lists_cases(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(parse("host", "--list", "--group", "load")) == 0
    assert "load.exports one symbol" in capsys.readouterr().out


def test_the_command_runs_a_case_and_writes_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {"--json": tmp_path / "out.json", "--junit": tmp_path / "out.xml"}
    arguments = [str(part) for pair in files.items() for part in pair]
    assert cli.run(parse("host", "--group", "load", "--case", "exports one symbol", *arguments)) == 0
    document = json.loads(files["--json"].read_text())
    assert document["about"]["provider"] == "host"
    assert document["counts"]["passed"] == 1
    assert files["--junit"].exists()
    assert "ok   load.exports one symbol" in capsys.readouterr().out


def test_wrong_input_gets_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(parse("host", "--option", "no equals sign", "--list")) == 2
    assert cli.run(parse("no_such_channel", "--group", "load", "--case", "one symbol")) == 2
    assert "no_such_channel" in capsys.readouterr().err
