"""KVLINK_BACKENDS and the detection of CANN: what is built for which toolkit, and what is said."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.ascend.packaging.compiling import ROOT, configure, environment, flat, run

ALL = ["hccl", "hcomm_onesided", "hixl"]


@dataclass
class Answer:
    """What the selection said."""

    status: int
    text: str
    built: list[str] = field(default_factory=list)


@pytest.fixture
def select(tmp_path: Path):
    """Runs the selection by itself: cmake's script mode needs no compiler, so a case takes milliseconds."""
    script = tmp_path / "select.cmake"
    script.write_text(
        f'cmake_minimum_required(VERSION 3.20)\ninclude("{ROOT}/cmake/KvlinkBackends.cmake")\n'
        'kvlink_choose_backends(chosen)\nmessage(STATUS "chosen:${chosen}")\n'
    )

    def call(backends: str = "auto", cann: str | None = None, defaults: str = "", **variables: str) -> Answer:
        settings = [f"-DKVLINK_BACKENDS={backends}", f"-DKVLINK_CANN_DEFAULT_ROOTS={defaults}"]
        settings += ["-DCMAKE_SYSTEM_PROCESSOR=aarch64", "-DCMAKE_HOST_SYSTEM_PROCESSOR=x86_64"]
        if cann is not None:
            settings.append(f"-DKVLINK_CANN={cann}")
        env: Mapping[str, str] = environment({"HOME": str(tmp_path / "home"), **variables})
        result = run(["cmake", *settings, "-P", str(script)], env=env)
        match = re.search(r"chosen:(.*)", result.stdout)
        built = match[1].split(";") if match and match[1] else []
        return Answer(result.returncode, flat(result.stdout), built)

    return call


def old_toolkit(root: Path, version: str = "8.3.RC1", arch: str = "aarch64") -> Path:
    """A toolkit before 8.5: ascend-toolkit/<version>, set_env.sh above it, internal numbers in the packages' files."""
    toolkit = root / "ascend-toolkit" / version
    (toolkit / f"{arch}-linux").mkdir(parents=True)
    (root / "ascend-toolkit" / "set_env.sh").touch()
    (root / "ascend-toolkit" / "latest").symlink_to(version)
    (toolkit / f"{arch}-linux" / "ascend_toolkit_install.info").write_text(
        f"package_name=Ascend-cann-toolkit\nversion={version}\ninnerversion=V100R001C23SPC001B231\n"
        "compatible_version=[V100R001C15],[V100R001C18]\narch=aarch64\nos=linux\n"
    )
    info = toolkit / "share" / "info" / "runtime"
    info.mkdir(parents=True)
    (info / "version.info").write_text("Version=7.7.T20.0.B210\nversion_dir=8.3.RC1\n")
    return toolkit


def new_toolkit(root: Path, version: str = "8.5.0", arch: str = "aarch64") -> Path:
    """A toolkit of 8.5 or later: cann-<version> with set_env.sh inside and a version.info for each package."""
    toolkit = root / f"cann-{version}"
    info = toolkit / "share" / "info" / "runtime"
    info.mkdir(parents=True)
    (toolkit / f"{arch}-linux").mkdir()
    (toolkit / "set_env.sh").touch()
    (info / "version.info").write_text(f"Version={version}\nversion_dir=cann\ntimestamp=20260122_101010123\n")
    (root / "cann").symlink_to(toolkit.name)
    return toolkit


def test_without_cann_auto_builds_none_and_says_why(select) -> None:
    answer = select()
    assert (answer.status, answer.built) == (0, [])
    for name in ALL:
        assert f"Backend {name} left out: no CANN found (name it in KVLINK_BACKENDS to build it anyway)" in answer.text


@pytest.mark.parametrize(("asked", "built"), [("all", ALL), ("hixl", ["hixl"]), ("hccl,hixl", ["hccl", "hixl"])])
def test_without_cann_what_is_named_is_built(select, asked: str, built: list[str]) -> None:
    assert select(asked).built == built


def test_none_looks_for_nothing(select, tmp_path: Path) -> None:
    answer = select("none", ASCEND_HOME_PATH=str(tmp_path / "missing"))
    assert (answer.status, answer.built) == (0, [])


def test_unknown_name(select) -> None:
    answer = select("hcll")
    assert answer.status != 0
    assert "'hcll'; known are hccl, hcomm_onesided, hixl" in answer.text


def test_8_3_gets_hccl_and_the_others_are_left_out(select, tmp_path: Path) -> None:
    answer = select(ASCEND_HOME_PATH=str(old_toolkit(tmp_path)))
    assert answer.built == ["hccl"]
    assert "CANN 8.3.RC1 at" in answer.text
    assert "Backend hcomm_onesided left out: needs CANN >= 8.5, found 8.3.RC1" in answer.text
    assert "Backend hixl left out: needs CANN >= 8.5, found 8.3.RC1" in answer.text


@pytest.mark.parametrize("version", ["8.5.0", "8.5.0-beta.1", "8.5.0.alpha001", "9.0.0", "9.1.0"])
def test_8_5_and_later_get_all(select, tmp_path: Path, version: str) -> None:
    answer = select(ASCEND_HOME_PATH=str(new_toolkit(tmp_path, version)))
    assert answer.built == ALL
    assert "left out" not in answer.text and "Warning" not in answer.text


def test_8_2_gets_none(select, tmp_path: Path) -> None:
    answer = select(ASCEND_HOME_PATH=str(old_toolkit(tmp_path, "8.2.RC1")))
    assert answer.built == []
    assert "Backend hccl left out: needs CANN >= 8.3, found 8.2.RC1" in answer.text


@pytest.mark.parametrize("name", ["hcomm_onesided", "hixl", "hccl,hixl", "all"])
def test_named_and_too_old_fails_with_both_versions(select, tmp_path: Path, name: str) -> None:
    toolkit = old_toolkit(tmp_path)
    answer = select(name, ASCEND_HOME_PATH=str(toolkit))
    assert answer.status != 0
    assert f"needs CANN >= 8.5; found CANN 8.3.RC1 at {toolkit}" in answer.text.replace("  ", " ")
    assert "-DKVLINK_CANN=none" in answer.text
    assert select(name, cann="none", ASCEND_HOME_PATH=str(toolkit)).status == 0


def test_ascend_home_path_comes_first(select, tmp_path: Path) -> None:
    new, old = new_toolkit(tmp_path / "new"), old_toolkit(tmp_path / "old")
    answer = select(ASCEND_HOME_PATH=str(old), ASCEND_TOOLKIT_HOME=str(new), defaults=str(new))
    assert answer.built == ["hccl"]
    answer = select(ASCEND_TOOLKIT_HOME=str(new), defaults=str(old))
    assert answer.built == ALL
    assert select(cann=str(new), ASCEND_HOME_PATH=str(old)).built == ALL


def test_default_roots_and_both_layouts(select, tmp_path: Path) -> None:
    new_toolkit(tmp_path / "one", "9.1.0")
    old_toolkit(tmp_path / "two")
    roots = [tmp_path / "one" / "cann", tmp_path / "two" / "ascend-toolkit" / "latest"]
    assert select(defaults=";".join(map(str, roots))).built == ALL
    assert select(defaults=";".join(map(str, reversed(roots)))).built == ["hccl"]
    old_toolkit(tmp_path / "home" / "Ascend")
    assert select().built == ["hccl"], "the user's own installation"


@pytest.mark.parametrize("variable", ["ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"])
def test_a_named_place_that_is_not_there(select, tmp_path: Path, variable: str) -> None:
    answer = select(**{variable: str(tmp_path / "gone")})
    assert answer.status != 0
    assert f"{variable} names {tmp_path}/gone, which is not a folder" in answer.text
    assert "set_env.sh" in answer.text


def test_the_internal_number_is_no_version(select, tmp_path: Path) -> None:
    """Before 8.5 a package's Version was an internal number; 7.7 there says nothing, the release is in other files."""
    toolkit = old_toolkit(tmp_path)
    (toolkit / "aarch64-linux" / "ascend_toolkit_install.info").unlink()
    (toolkit / "version.cfg").write_text(
        "# version: 1.0\nruntime_running_version=[7.7.T20.0.B210:8.3.RC1]\n"
        "hccl_running_version=[7.7.T20.0.B210:8.3.RC1]\n"
    )
    answer = select(ASCEND_HOME_PATH=str(toolkit))
    assert answer.built == ["hccl"] and "CANN 8.3.RC1 at" in answer.text
    (toolkit / "version.cfg").unlink()
    answer = select(ASCEND_HOME_PATH=str(tmp_path / "ascend-toolkit" / "latest"))
    assert answer.built == ["hccl"] and "CANN 8.3.RC1 at" in answer.text, "the folder behind the link has the release"


def test_images_of_single_packages_have_no_installer_file(select, tmp_path: Path) -> None:
    toolkit = new_toolkit(tmp_path, "8.5.0")
    assert not list(toolkit.glob("*-linux/ascend_toolkit_install.info"))
    assert select(ASCEND_HOME_PATH=str(toolkit)).built == ALL


def test_no_version_at_all_is_built_for_and_warned_about(select, tmp_path: Path) -> None:
    (tmp_path / "mystery").mkdir()
    answer = select(ASCEND_HOME_PATH=str(tmp_path / "mystery"))
    assert answer.built == ALL
    assert "cannot be read (unknown)" in answer.text and "Warning" in answer.text


def test_no_version_but_the_old_layout(select, tmp_path: Path) -> None:
    (tmp_path / "somewhere" / "toolkit").mkdir(parents=True)
    (tmp_path / "somewhere" / "set_env.sh").touch()
    home = str(tmp_path / "somewhere" / "toolkit")
    answer = select(ASCEND_HOME_PATH=home)
    assert answer.built == ["hccl"]
    assert "before 8.5 by its layout" in answer.text
    answer = select("hixl", ASCEND_HOME_PATH=home)
    assert answer.status != 0 and "needs CANN >= 8.5; found CANN unknown, before 8.5 by its layout" in answer.text


def test_newer_than_known_is_built_for_and_warned_about(select, tmp_path: Path) -> None:
    answer = select(ASCEND_HOME_PATH=str(new_toolkit(tmp_path, "12.0.0")))
    assert answer.built == ALL
    assert "CANN 12.0.0" in answer.text and "newer than any that kvlink knows" in answer.text


def test_the_other_architectures_folder_is_read_too(select, tmp_path: Path) -> None:
    assert select(ASCEND_HOME_PATH=str(old_toolkit(tmp_path, arch="x86_64"))).built == ["hccl"]


def test_files_with_odd_line_ends_and_quotes(select, tmp_path: Path) -> None:
    toolkit = new_toolkit(tmp_path)
    (toolkit / "share" / "info" / "runtime" / "version.info").write_bytes(b'\r\n Version = "9.0.0" \r\nx=1\r\n')
    answer = select(ASCEND_HOME_PATH=str(toolkit))
    assert answer.built == ALL and "CANN 9.0.0 at" in answer.text


def test_the_root_build_uses_it(tmp_path: Path) -> None:
    """The whole configuration, once without CANN, once for a toolkit without headers."""
    settings = "KVLINK_CANN_DEFAULT_ROOTS="
    env = environment({"HOME": str(tmp_path)})
    result = configure(ROOT, tmp_path / "build", settings, env=env)
    assert result.returncode == 0, result.stdout
    assert "Backend hccl left out: no CANN found" in result.stdout
    toolkit = old_toolkit(tmp_path)
    result = configure(ROOT, tmp_path / "build", settings, env={**env, "ASCEND_HOME_PATH": str(toolkit)})
    assert result.returncode == 0, result.stdout
    assert "Backend hccl is built" in result.stdout
    assert f"No vendor headers under {toolkit}" in result.stdout
    result = configure(
        ROOT, tmp_path / "build", settings, "KVLINK_BACKENDS=hixl", env={**env, "ASCEND_HOME_PATH": str(toolkit)}
    )
    assert result.returncode != 0
    assert "Backend hixl needs CANN >= 8.5; found CANN 8.3.RC1" in flat(result.stdout)
