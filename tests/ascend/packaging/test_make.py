"""``make aarch64`` on a machine that lacks the cross-compiler or the emulator."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.ascend.packaging.compiling import ROOT, environment, run

NEEDED = {"aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu", "qemu-aarch64": "qemu-user"}


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder with everything that is on the PATH but what `make aarch64` may have to install, apt-get and id."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for entry in os.environ["PATH"].split(os.pathsep):
        for program in Path(entry).iterdir() if Path(entry).is_dir() else ():
            left_out = program.name.startswith(("aarch64-", "qemu-")) or program.name in ("apt-get", "id")
            if not left_out and not (folder / program.name).exists():
                (folder / program.name).symlink_to(program)
    return folder


def script(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def make(tools: Path, *arguments: str) -> tuple[int, str]:
    # A folder of its own for what make writes; the Makefile is the tree's.
    command = ["make", "-C", str(ROOT), "aarch64", *arguments]
    result = run(command, env=environment({"PATH": str(tools)}))
    return result.returncode, result.stdout


@pytest.mark.parametrize(
    ("missing", "why"),
    [
        ("aarch64-linux-gnu-g++", "not root"),
        ("aarch64-linux-gnu-g++", "forbidden"),
        ("qemu-aarch64", "not root"),
        ("qemu-aarch64", "no apt-get"),
    ],
)
def test_a_missing_program_fails_with_the_line_to_type(tools: Path, missing: str, why: str) -> None:
    called = tools.parent / "called"
    script(tools / "id", "echo 1000" if why == "not root" else "echo 0")
    if why != "no apt-get":
        script(tools / "apt-get", f"touch {called}")
    for program in set(NEEDED) - {missing}:
        script(tools / program, "exit 1")
    status, output = make(tools, *(["NO_APT=1"] if why == "forbidden" else []))
    assert status != 0
    assert f"{missing} is missing; type: apt-get install {NEEDED[missing]}" in output
    assert not called.exists(), "apt-get was not asked"


def test_root_gets_it_installed(tools: Path) -> None:
    calls = tools.parent / "calls"
    script(tools / "id", "echo 0")
    # Installs the compiler, and says no to the emulator: what comes after both would be the real build.
    compiler = tools / "aarch64-linux-gnu-g++"
    script(
        tools / "apt-get",
        f'echo "$@" >> {calls}\ncase "$*" in *g++-aarch64*) printf "#!/bin/sh\\n" > {compiler}; chmod +x {compiler};;'
        '\n *qemu-user*) echo "E: no such package" >&2; exit 100;; esac',
    )
    status, output = make(tools)
    assert status != 0
    lines = calls.read_text().splitlines()
    assert [line for line in lines if "install" in line and line.endswith("g++-aarch64-linux-gnu")]
    assert "E: no such package" in output
    assert "qemu-aarch64 is missing; type: apt-get install qemu-user" in output
    assert "aarch64-linux-gnu-g++ is missing" not in output
