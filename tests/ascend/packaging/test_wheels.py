"""The wheels of the Ascend providers: built without CANN, tagged by what they need, installed, and asked."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from tests.ascend.packaging.checkout import BACKENDS, native
from tests.ascend.packaging.compiling import ROOT, environment, run
from tools import wheel_tag

# The oldest host that the wheels may ask for, on the distribution that CI builds on. A change that raises one of these
# shuts hosts out: CANN's own oldest hosts (openEuler 22.03: glibc 2.34, GLIBCXX 3.4.28) have to stay in.
HIGHEST_GLIBC = (2, 34)
HIGHEST_GLIBCXX = {"hccl": (), "hcomm_onesided": (), "hixl": (3, 4, 28)}


def build(name: str, folder: Path, *arguments: str) -> Path:
    """Builds a wheel the way a user does, on a machine where no CANN is named; returns it with the tag it needs."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", *arguments, "-w", str(folder)]
    result = run([*command, str(ROOT / "backends" / name)], env=environment())
    assert result.returncode == 0, result.stdout
    (wheel,) = folder.glob(f"kvlink_{name}-*.whl")
    return wheel_tag.retag(wheel)


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The three wheels: those of `make wheels` when it ran (`make test` installs them), else built here."""
    found = {name: sorted((ROOT / "dist").glob(f"kvlink_{name}-*.whl")) for name in BACKENDS}
    if (ROOT / "dist" / "backends.stamp").is_file() and all(len(paths) == 1 for paths in found.values()):
        return {name: paths[0] for name, paths in found.items()}
    folder = tmp_path_factory.mktemp("wheels")
    return {name: build(name, folder, "--no-build-isolation") for name in BACKENDS}


@pytest.mark.parametrize("name", BACKENDS)
def test_name_content_and_entry_point(wheels: dict[str, Path], name: str) -> None:
    wheel = wheels[name]
    assert re.fullmatch(rf"kvlink_{name}-\d[\w.]*-py3-none-manylinux_2_\d+_{platform.machine()}\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        libraries = {Path(item).name for item in names if item.endswith(".so")}
        metadata = {Path(item).name: archive.read(item).decode() for item in names if ".dist-info/" in item}
    wanted = {f"libkvlink_{name}.so"} | ({"libkvlink_hixl_shim.so"} if name == "hixl" else set())
    assert libraries == wanted, "its own libraries, and neither the core's nor a vendor's"
    assert not [item for item in names if item.endswith((".cc", ".h", ".a")) or "cann_sim" in item]
    assert metadata["entry_points.txt"].split() == ["[kvlink.channels]", name, "=", f"kvlink_{name}:SPEC"]
    assert f"Tag: py3-none-{wheel.stem.split('-')[-1]}" in metadata["WHEEL"]
    assert "Requires-Dist: kvlink" in metadata["METADATA"]


@pytest.mark.parametrize("name", BACKENDS)
def test_the_tag_is_what_the_libraries_need(wheels: dict[str, Path], name: str) -> None:
    needs, machine = wheel_tag.inspect(wheels[name])
    assert needs.glibc <= HIGHEST_GLIBC
    assert needs.glibcxx <= HIGHEST_GLIBCXX[name]
    assert wheels[name].stem.endswith(needs.tag(machine))
    # Built with the shared C++ runtime, a library loads beside an engine's; without one, it must not ask for it at all.
    assert ("libstdc++.so.6" in needs.libraries) == (HIGHEST_GLIBCXX[name] != ())


@pytest.mark.parametrize("name", ["engine", "host", "hook", "limits"])
def test_the_cores_libraries_ask_for_no_newer_host(name: str) -> None:
    needs = wheel_tag.needs_of([native() / f"libkvlink_{name}.so"])
    assert needs.glibc <= HIGHEST_GLIBC
    assert needs.glibcxx == () and "libstdc++.so.6" not in needs.libraries


@pytest.mark.parametrize("name", BACKENDS)
def test_symbols(wheels: dict[str, Path], name: str, tmp_path: Path) -> None:
    """One exported symbol; no vendor symbol is defined anywhere, and only the shim asks for one."""
    with zipfile.ZipFile(wheels[name]) as archive:
        libraries = [Path(archive.extract(item, tmp_path)) for item in archive.namelist() if item.endswith(".so")]
    for library in libraries:
        defined = run(["nm", "-D", "--defined-only", str(library)]).stdout.split("\n")
        undefined = run(["nm", "-D", "--undefined-only", str(library)]).stdout
        exported = {line.split()[-1] for line in defined if line and " A " not in line}
        vendors = re.compile(r"^(acl\w*|Hccl\w*|rt[A-Z]\w*|_ZNK?(2ge|4hixl)\w*)$")
        assert not [symbol for symbol in exported if vendors.match(symbol)]
        asked = [line.split()[-1] for line in undefined.splitlines() if vendors.match(line.split()[-1])]
        if library.name == "libkvlink_hixl_shim.so":
            assert all(symbol.startswith("_ZN") for symbol in asked) and asked
            assert len(exported) == 1
        else:
            assert exported == {"kvl_provider_init"}
            assert asked == []


def test_one_string_abi_in_the_shim(wheels: dict[str, Path], tmp_path: Path) -> None:
    with zipfile.ZipFile(wheels["hixl"]) as archive:
        (item,) = [item for item in archive.namelist() if item.endswith("shim.so")]
        library = archive.extract(item, tmp_path)
    assert "__cxx11" not in run(["nm", "-D", library]).stdout


@pytest.fixture(scope="module")
def installed(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the three installed from their wheels; the core is the one that the tests run with."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    result = run([*command, *map(str, wheels.values())])
    assert result.returncode == 0, result.stdout
    return folder


def test_installed_they_are_listed_with_the_reason(installed: Path, tmp_path: Path) -> None:
    paths = [str(installed), *(entry for entry in sys.path if entry)]
    env = environment({"PYTHONPATH": os.pathsep.join(paths), "KVLINK_ASCEND_SYSROOT": str(tmp_path)})
    result = run([sys.executable, "-m", "kvlink.cli", "channels", "--json"], env=env)
    assert result.returncode == 0, result.stdout
    rows = {row["name"]: row for row in json.loads(result.stdout)}
    for name in BACKENDS:
        assert rows[name]["distribution"].replace("-", "_") == f"kvlink_{name}"
        assert rows[name]["usable"] is False
        assert "no CANN toolkit was found" in rows[name]["reason"]
    text = run([sys.executable, "-m", "kvlink.cli", "channels"], env=env).stdout
    assert all(re.search(rf"^{name} .* not usable: .*CANN", text, flags=re.M) for name in BACKENDS)
    probe = run([sys.executable, "-m", "kvlink.cli", "probe", "hccl"], env=env)
    assert probe.returncode == 1 and "no CANN toolkit was found" in probe.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKENDS)
def test_a_clean_environment_builds_and_imports_it(name: str, tmp_path: Path) -> None:
    """A fresh virtual environment and pip's isolated build, with the core's wheel beside it."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    env = {key: value for key, value in environment().items() if not key.startswith(("PYTHON", "VIRTUAL", "KVLINK"))}
    for source in (ROOT, ROOT / "backends" / name):
        command = [python, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path / "dist"), str(source)]
        result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900, check=False)
        assert result.returncode == 0, result.stderr
    made = [str(path) for path in (tmp_path / "dist").glob("*.whl")]
    assert len(made) == 2
    result = run([python, "-m", "pip", "install", "--quiet", *made], env=env)
    assert result.returncode == 0, result.stdout
    code = f"import kvlink_{name}; print(kvlink_{name}.SPEC.library_path())"
    result = run([python, "-c", code], env=env)
    assert result.returncode == 0 and str(tmp_path) in result.stdout
    result = run([str(tmp_path / "venv" / "bin" / "kvlink"), "probe", name], env=env)
    assert result.returncode == 1 and "CANN" in result.stdout


class TestTag:
    """The arithmetic of tags, and wheels that may not have one."""

    @pytest.mark.parametrize(
        ("glibc", "glibcxx", "cxxabi", "tag"),
        [
            ((2, 4), (), (), "manylinux_2_17_x86_64"),
            ((2, 34), (), (), "manylinux_2_34_x86_64"),
            ((2, 17), (3, 4, 21), (1, 3, 9), "manylinux_2_27_x86_64"),
            ((2, 34), (3, 4, 21), (1, 3, 9), "manylinux_2_34_x86_64"),
            ((2, 17), (3, 4, 30), (), "manylinux_2_35_x86_64"),
        ],
    )
    def test_tag(self, glibc: tuple[int, ...], glibcxx: tuple[int, ...], cxxabi: tuple[int, ...], tag: str) -> None:
        assert wheel_tag.Needs(glibc, glibcxx, cxxabi, frozenset()).tag("x86_64") == tag

    def test_a_runtime_from_the_future(self) -> None:
        with pytest.raises(wheel_tag.WheelError, match=r"GLIBCXX_3\.4\.99"):
            wheel_tag.Needs((2, 34), (3, 4, 99), (), frozenset()).tag("x86_64")

    @staticmethod
    def wheel(folder: Path, source: str, *flags: str) -> Path:
        """A wheel with one library made of C text."""
        (folder / "part.c").write_text(source)
        library = folder / "libpart.so"
        result = run(["cc", "-shared", "-fPIC", "-o", str(library), str(folder / "part.c"), *flags])
        assert result.returncode == 0, result.stdout
        wheel = folder / "part-1-py3-none-linux_x86_64.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.write(library, "part/libpart.so")
            archive.writestr("part-1.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-linux_x86_64\n")
            archive.writestr("part-1.dist-info/RECORD", "part-1.dist-info/WHEEL,sha256=x,1\n")
        return wheel

    def test_a_library_that_not_every_host_has(self, tmp_path: Path) -> None:
        run(["cc", "-shared", "-fPIC", "-x", "c", "/dev/null", "-o", str(tmp_path / "libforeign.so")])
        other = tmp_path / "other"
        other.mkdir()
        wheel = self.wheel(other, "int f(void) { return 1; }", f"-L{tmp_path}", "-Wl,--no-as-needed", "-lforeign")
        with pytest.raises(wheel_tag.WheelError, match=r"libforeign\.so"):
            wheel_tag.retag(wheel)
        assert wheel.is_file(), "a wheel that cannot be tagged stays as it was"

    def test_metadata_of_a_tagged_wheel(self, tmp_path: Path) -> None:
        wheel = wheel_tag.retag(self.wheel(tmp_path, "int f(void) { return 1; }"))
        assert wheel.name == "part-1-py3-none-manylinux_2_17_x86_64.whl"
        assert [path.name for path in tmp_path.glob("*.whl")] == [wheel.name]
        with zipfile.ZipFile(wheel) as archive:
            assert "Tag: py3-none-manylinux_2_17_x86_64\n" in archive.read("part-1.dist-info/WHEEL").decode()
            record = archive.read("part-1.dist-info/RECORD").decode()
        assert re.search(r"WHEEL,sha256=[\w-]{43},\d\d\n", record)
        assert wheel_tag.retag(wheel) == wheel, "again changes nothing"

    def test_a_pure_wheel_needs_none(self, tmp_path: Path) -> None:
        path = tmp_path / "pure-1-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("pure.py", "")
        with pytest.raises(wheel_tag.WheelError, match="no shared library"):
            wheel_tag.retag(path)
        shutil.copy(path, tmp_path / "copy-1-py3-none-any.whl")
        assert wheel_tag.main([str(path)]) == 1
