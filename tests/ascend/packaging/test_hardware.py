"""``python -m kvlink.testing.hardware`` on the simulator: the whole report, and what it makes of hangs and crashes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tests.ascend.packaging.checkout import native, process_environment, python
from tests.cann_sim.install import install

MODULE = "kvlink.testing.hardware"


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """A process on a simulated host with two devices, whose vendor logs go to a folder of the test."""
    host = install("8.5.0", "A2", "roce", 2, libs=native() / "cann_sim", out=tmp_path / "host")
    (tmp_path / "log" / "debug" / "plog").mkdir(parents=True)
    return process_environment(tmp_path, {**host, "ASCEND_PROCESS_LOG_PATH": str(tmp_path / "log")})


def report(
    tmp_path: Path, env: dict[str, str], *arguments: str, channel: str = "hccl", timeout: float = 300
) -> tuple[subprocess.CompletedProcess[str], list[dict[str, Any]], str]:
    """Runs the module; returns the process, the rows of the report and its text."""
    folder = tmp_path / "report"
    command = ["-m", MODULE, "--channel", channel, "--devices", "0,1", "--report", str(folder), *arguments]
    result = python(command, env, timeout=timeout)
    assert folder.is_dir(), result.stderr
    rows = [json.loads(line) for line in (folder / "report.jsonl").read_text().splitlines()]
    return result, rows, (folder / "report.txt").read_text()


def by_name(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in rows if row["kind"] == "result"}


def only(*names: str) -> list[str]:
    return [part for name in names for part in ("--only", name)]


def test_what_only_looks(tmp_path: Path, env: dict[str, str]) -> None:
    steps = ("host", "versions", "symbols", "probe", "open-npu-0")
    result, rows, text = report(tmp_path, {**env, "KVLINK_SECRET": "hush"}, *only(*steps))
    assert result.returncode == 0, result.stdout + text
    assert rows[0]["kind"] == "about" and rows[0]["devices"] == ["npu:0", "npu:1"]
    assert {name: row["status"] for name, row in by_name(rows).items()} == dict.fromkeys(steps, "ok")
    for wanted in (
        "Version=25.5.0",  # the driver
        "address_0=",  # hccn.conf
        "ipaddr:",  # hccn_tool
        "version=8.5.0",  # ascend_toolkit_install.info
        "Version=8.5.0-beta.1",  # a package's lagging version
        "HcclCommInitClusterInfoMemConfig",
        "aclrtSetDevice",
        "hccl: usable",
        "claims PUT, GET",
    ):
        assert wanted in text
    assert "hush" not in text, "a secret stays out of a report that is sent around"
    symbols = (tmp_path / "report" / "nm-libhcomm.so.txt").read_text()
    assert " T HcclRegisterGlobalMem" in symbols
    assert [row["ok"] for row in rows if row["kind"] == "summary"] == [len(steps)]


def test_the_kit_and_the_benchmark_between_two_devices(tmp_path: Path, env: dict[str, str]) -> None:
    result, rows, text = report(tmp_path, env, *only("conform-load", "bench"))
    assert result.returncode == 0, result.stdout + text
    found = by_name(rows)
    assert "load" in found["conform-load"]["output"] and "FAIL" not in found["conform-load"]["output"]
    figures = [line for line in found["bench"]["output"].splitlines() if "GB/s" in line]
    assert len(figures) == 8, text
    assert "connected in" in found["bench"]["output"]


def test_a_hang_costs_one_step(tmp_path: Path, env: dict[str, str]) -> None:
    env["CANN_SIM_FAULTS"] = "aclrtSetDevice=hang"
    start = time.monotonic()
    result, rows, text = report(tmp_path, env, *only("versions", "open-npu-0", "symbols"), "--limit", "open-npu-0=8")
    assert time.monotonic() - start < 60
    assert result.returncode == 1
    found = by_name(rows)
    assert {name: row["status"] for name, row in found.items()} == {
        "versions": "ok",
        "symbols": "ok",
        "open-npu-0": found["open-npu-0"]["status"],
    }
    # The provider gives up at its own deadline, or the step is ended at its limit: both are said.
    assert found["open-npu-0"]["status"] in ("hung", "failed")
    if found["open-npu-0"]["status"] == "hung":
        assert "Fatal Python error: Aborted" in found["open-npu-0"]["output"], "the stacks of the hung process"
        assert "it did not end within 8 s" in text
    else:
        assert "aclrtSetDevice" in found["open-npu-0"]["output"]


def test_a_hang_of_the_step_itself_is_ended_with_stacks(tmp_path: Path, env: dict[str, str]) -> None:
    """Even where nothing in kvlink has a deadline: the child sleeps in the vendor's library before it answers."""
    env["CANN_SIM_FAULTS"] = "HcclCommInitClusterInfoMemConfig=hang"
    _, rows, text = report(tmp_path, env, *only("bench", "versions"), "--limit", "bench=15")
    found = by_name(rows)
    assert found["versions"]["status"] == "ok"
    assert found["bench"]["status"] == "hung", text
    assert found["bench"]["seconds"] < 45
    assert "Fatal Python error: Aborted" in found["bench"]["output"]


def test_a_crash_costs_one_step(tmp_path: Path, env: dict[str, str]) -> None:
    env["CANN_SIM_FAULTS"] = "aclrtCreateStream=crash;aclrtMalloc=crash"
    result, rows, text = report(tmp_path, env, *only("host", "bench", "conform-load"))
    assert result.returncode == 1
    found = by_name(rows)
    assert found["host"]["status"] == "ok"
    assert found["bench"]["status"] in ("crashed", "failed"), text
    assert "SIGKILL" in text
    assert found["conform-load"]["status"] == "failed"
    assert "ended by SIGKILL" in found["conform-load"]["output"]


def test_an_unusable_provider_ends_the_steps_that_need_it(tmp_path: Path, env: dict[str, str]) -> None:
    env["CANN_SIM_FAULTS"] = "aclInit=crash"
    result, rows, text = report(tmp_path, env)
    assert result.returncode == 1
    states = {name: row["status"] for name, row in by_name(rows).items()}
    assert states["symbols"] == "ok" and states["probe"] == "failed"
    assert {states[name] for name in ("open-npu-0", "open-npu-1", "conform-load", "conform-quick", "bench")} == {
        "skipped"
    }
    assert "SIGKILL" in text


def test_the_vendors_logs_of_a_step_are_in_the_report(tmp_path: Path, env: dict[str, str]) -> None:
    plog = tmp_path / "log" / "debug" / "plog" / "plog-1_20260101.log"
    plog.write_text("[ERROR] before the test\n")
    # What the vendor's library would write while a step runs, written by a module that the step imports.
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('KVLINK_REPORT_FOLDER'):\n"
        f"    open({str(plog)!r}, 'a').write('[ERROR] HCCL: ranktable is wrong\\n')\n"
    )
    env["PYTHONPATH"] = f"{site}:{env['PYTHONPATH']}"
    _, rows, text = report(tmp_path, env, *only("versions"))
    logs = by_name(rows)["versions"]["vendor_logs"]
    assert logs == {"debug/plog/plog-1_20260101.log": "[ERROR] HCCL: ranktable is wrong\n"}
    assert "ranktable is wrong" in text and "before the test" not in text


def test_the_report_is_on_disk_while_a_step_runs(tmp_path: Path, env: dict[str, str]) -> None:
    env["CANN_SIM_FAULTS"] = "aclInit=hang"
    folder = tmp_path / "report"
    command = ["-m", MODULE, "--channel", "hccl", "--devices", "0,1", "--report", str(folder)]
    command += [*only("host", "open-npu-0"), "--limit", "open-npu-0=60"]
    with subprocess.Popen([sys.executable, *command], env=env, stdout=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 60
            path = folder / "report.txt"
            while "2/2 open-npu-0 starts" not in (path.read_text() if path.is_file() else ""):
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.05)
            text = path.read_text()
            assert "1/2 host: ok" in text and "Version=25.5.0" in text
        finally:
            process.terminate()
            process.wait(30)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--channel", "hcll", "--devices", "0,1"], "did you mean 'hccl'"),
        (["--channel", "hccl", "--devices", "0"], "at least two different devices"),
        (["--channel", "hccl", "--devices", "0,gpu"], "expected 0 or npu:0"),
        (["--channel", "hccl", "--devices", "0,1", "--only", "benhc"], "there is no step 'benhc'"),
        (["--channel", "hccl", "--devices", "0,1", "--limit", "bench=soon"], "expected seconds"),
        (["--channel", "hccl", "--devices", "0,1", "--option", "link"], "is not KEY=VALUE"),
    ],
)
def test_wrong_input(tmp_path: Path, env: dict[str, str], arguments: list[str], message: str) -> None:
    result = python(["-m", MODULE, *arguments, "--report", str(tmp_path / "report")], env)
    assert result.returncode == 2
    assert message in result.stderr
