"""Our ACL and HCCL declarations against headers that nobody here wrote: those in the torch_npu wheels on PyPI.

Headers only: nothing of a wheel is installed, loaded or linked. The wheels are fetched with pip and kept under
build/vendor-headers, so one machine downloads them once.
"""

from __future__ import annotations

import fcntl
import platform
import re
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.ascend.packaging.compiling import ROOT, configure, copy_declarations, environment, flat, names_of, run

CACHE = ROOT / "build" / "vendor-headers"
PROJECT = ROOT / "cmake" / "vendor_headers"

# What each header set lacks of the functions that we call; all others are compared. The one-sided functions' header
# is in no wheel: those rest on abi_values.txt.
ONE_SIDED = {
    "HcclBatchPut", "HcclBatchGet", "HcclCommInitClusterInfoMemConfig", "HcclRegisterGlobalMem",
    "HcclDeregisterGlobalMem", "HcclCommBindMem", "HcclCommUnbindMem", "HcclCommPrepare", "HcclRegisterMem",
    "HcclDeregisterMem", "HcclExchangeMemDesc", "HcclEnableMemAccess", "HcclDisableMemAccess",
}  # fmt: skip
UNDECLARED = {
    "2.7.1": ONE_SIDED
    | {"aclrtStreamAbort", "aclrtPointerGetAttributes", "aclrtGetPhyDevIdByLogicDevId", "aclrtGetPhyDevIdByUserDevId"}
    | {"aclrtGetDeviceInfo", "aclsysGetVersionStr", "HcclGetErrorString"},
    "2.9.0": ONE_SIDED
    | {"aclrtGetPhyDevIdByLogicDevId", "aclrtGetPhyDevIdByUserDevId", "aclrtGetDeviceInfo", "aclsysGetVersionStr"},
    "2.13.0": ONE_SIDED | {"aclrtGetPhyDevIdByUserDevId"},
}


def headers(version: str) -> list[Path]:
    """Returns the include folders of a torch_npu wheel's headers; fetches the wheel when they are not there yet."""
    folder = CACHE / f"torch_npu-{version}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            _fetch(version, folder)
    include = folder / "torch_npu" / "include"
    third_party = include / "third_party"
    return [include, third_party / "acl" / "inc", third_party / "hccl" / "inc"]


def _fetch(version: str, folder: Path) -> None:
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    target = ["--python-version", "311", "--platform", f"manylinux_2_28_{platform.machine()}"]
    result = run([*command, *target, "--dest", str(partial), f"torch_npu=={version}"], env=environment())
    assert result.returncode == 0, f"cannot fetch the headers of torch_npu {version}: {result.stdout}"
    (wheel,) = partial.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        wanted = re.compile(r"torch_npu/include/third_party/(acl|hccl)/.*\.h")
        archive.extractall(partial, [name for name in archive.namelist() if wanted.fullmatch(name)])
    wheel.unlink()
    partial.rename(folder)


def compare(version: str, build: Path, declarations: Path | None = None) -> tuple[str, int, str]:
    """Compares; returns what the configuration printed, and the exit status and output of the compilation."""
    settings = [f"KVLINK_VENDOR_INCLUDE={';'.join(map(str, headers(version)))}"]
    if declarations is not None:
        settings.append(f"KVLINK_DECLARATIONS={declarations}")
    configured = configure(PROJECT, build, *settings)
    assert configured.returncode == 0, configured.stdout
    built = run(["cmake", "--build", str(build)])
    return configured.stdout, built.returncode, built.stdout


def listed_functions(declarations: Path) -> set[str]:
    text = "".join((declarations / "ascend" / name).read_text() for name in ("acl_functions.inc", "hccl_functions.inc"))
    return set(re.findall(r"^KVLINK_(?:ACL|HCCL)\(\w+, [^,]+, (\w+),", text, flags=re.M))


@pytest.mark.parametrize("version", sorted(UNDECLARED))
def test_declarations_match_the_headers_of_torch_npu(
    version: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed, status, output = compare(version, tmp_path / "build")
    assert status == 0, output
    checked = names_of(printed, "values compared:")
    undeclared = names_of(printed, "not declared there:")
    with capsys.disabled():
        print(f"\ntorch_npu {version}: compared {len(checked)} functions: {' '.join(sorted(checked))}")
        print(f"torch_npu {version}: not declared: {' '.join(sorted(undeclared))}")
    assert undeclared == UNDECLARED[version]
    assert checked == listed_functions(ROOT / "backends") - undeclared
    match = re.search(r"functions and (\d+) values compared", printed)
    assert match is not None and int(match[1]) >= 50


def replace(old: str, new: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        changed = text.replace(old, new, 1)
        assert changed != text, f"{old!r} is not in the file"
        return changed

    return change


def swap_config_fields(text: str) -> str:
    """Exchanges two fields of the communicator's configuration; the file's own assertions go, ours must notice."""
    text = re.sub(r"static_assert\(.*?\);", "", text, flags=re.S)
    return replace(
        "uint32_t hcclOpExpansionMode;\n  uint32_t hcclRdmaTrafficClass;",
        "uint32_t hcclRdmaTrafficClass;\n  uint32_t hcclOpExpansionMode;",
    )(text)


WRONG = {
    "a parameter of another width": (
        "acl_functions.inc", replace("aclrtMalloc, (void **, size_t,", "aclrtMalloc, (void **, uint32_t,"),
        "aclrtMalloc differs",
    ),
    "a parameter forgotten": (
        "acl_functions.inc", replace("(void *, size_t, const void *, size_t, aclrtMemcpyKind)",
                                     "(void *, const void *, size_t, aclrtMemcpyKind)"),
        "aclrtMemcpy differs",
    ),
    "constness lost": (
        "acl_functions.inc", replace("aclInit, (const char *)", "aclInit, (char *)"), "aclInit differs",
    ),
    "another result": (
        "hccl_functions.inc", replace("HcclResult, HcclCommDestroy", "int, HcclCommDestroy"), "HcclCommDestroy differs",
    ),
    "an enum taken for an int": (
        "hccl_functions.inc", replace("HcclGetCommAsyncError, (HcclComm, HcclResult *)",
                                      "HcclGetCommAsyncError, (HcclComm, int *)"),
        "HcclGetCommAsyncError differs",
    ),
    "another value": (
        "acl_types.h", replace("ACL_EVENT_RECORDED_STATUS_COMPLETE = 1", "ACL_EVENT_RECORDED_STATUS_COMPLETE = 0"),
        "ACL_EVENT_RECORDED_STATUS_COMPLETE has another value",
    ),
    "another value of a macro": (
        "acl_types.h", replace("ACL_ERROR_RT_CONTEXT_NULL = 107002", "ACL_ERROR_RT_CONTEXT_NULL = 107003"),
        "ACL_ERROR_RT_CONTEXT_NULL has another value",
    ),
    "fields of the configuration in another order": (
        "hccl_types.h", swap_config_fields, "HcclCommConfig.hcclOpExpansionMode lies elsewhere",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", sorted(WRONG))
def test_a_wrong_declaration_is_refused(what: str, tmp_path: Path) -> None:
    name, change, message = WRONG[what]
    declarations = copy_declarations(tmp_path)
    path = declarations / "ascend" / name
    path.write_text(change(path.read_text()))
    _, status, output = compare("2.13.0", tmp_path / "build", declarations)
    assert status != 0
    assert message in flat(output), output


def test_a_reserved_sentinel_may_move(tmp_path: Path) -> None:
    declarations = copy_declarations(tmp_path)
    path = declarations / "ascend" / "acl_types.h"
    path.write_text(replace("ACL_STREAM_STATUS_RESERVED = 0xFFFF", "ACL_STREAM_STATUS_RESERVED = 2")(path.read_text()))
    _, status, output = compare("2.13.0", tmp_path / "build", declarations)
    assert status == 0, output


def toolkit_with_headers(version: str, root: Path) -> Path:
    """A toolkit's folder with the headers of a wheel where a toolkit has its own."""
    include, acl, hccl = headers(version)
    (root / "include").mkdir(parents=True)
    for name, target in (("acl", acl / "acl"), ("hccl", hccl / "hccl"), ("third_party", include / "third_party")):
        (root / "include" / name).symlink_to(target)
    info = root / "share" / "info" / "runtime"
    info.mkdir(parents=True)
    (info / "version.info").write_text("Version=8.5.0\n")
    return root


def test_where_a_toolkit_has_headers_the_build_compares(tmp_path: Path) -> None:
    toolkit = toolkit_with_headers("2.9.0", tmp_path / "cann")
    env = environment({"ASCEND_HOME_PATH": str(toolkit)})
    result = configure(ROOT, tmp_path / "build", env=env)
    assert result.returncode == 0, result.stdout
    assert names_of(result.stdout, "not declared there:") == UNDECLARED["2.9.0"]
    command = ["cmake", "--build", str(tmp_path / "build"), "--target", "kvlink_vendor_headers"]
    assert run(command).returncode == 0

    declarations = copy_declarations(tmp_path)
    path = declarations / "ascend" / "acl_functions.inc"
    path.write_text(replace("aclrtSetDevice, (int32_t)", "aclrtSetDevice, (int64_t)")(path.read_text()))
    configure(ROOT, tmp_path / "build", f"KVLINK_DECLARATIONS={declarations}", env=env)
    refused = run(command)
    assert refused.returncode != 0
    assert "aclrtSetDevice differs from the vendor's declaration" in flat(refused.stdout)


def test_a_toolkit_whose_headers_are_incomplete_is_still_built_for(tmp_path: Path) -> None:
    toolkit = toolkit_with_headers("2.9.0", tmp_path / "cann")
    (toolkit / "include" / "acl").unlink()
    (toolkit / "include" / "acl").mkdir()
    (toolkit / "include" / "acl" / "acl.h").write_text('#include "not/there.h"\n')
    result = configure(ROOT, tmp_path / "build", env=environment({"ASCEND_HOME_PATH": str(toolkit)}))
    assert result.returncode == 0, result.stdout
    assert "nothing is compared with them" in flat(result.stdout)
    assert "Backend hccl is built" in result.stdout


def test_the_comparison_can_be_turned_off(tmp_path: Path) -> None:
    toolkit = toolkit_with_headers("2.9.0", tmp_path / "cann")
    env = environment({"ASCEND_HOME_PATH": str(toolkit)})
    result = configure(ROOT, tmp_path / "build", "KVLINK_VENDOR_CHECK=OFF", env=env)
    assert result.returncode == 0 and "Vendor headers" not in result.stdout
