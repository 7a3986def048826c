"""Our declarations of the vendors' interfaces against the values read off their public headers (abi_values.txt)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.ascend.packaging.compiling import DECLARATIONS, ROOT, compile_text, environment, run

HEADERS = {
    "acl": DECLARATIONS / "ascend" / "acl_types.h",
    "hccl": DECLARATIONS / "ascend" / "hccl_types.h",
    "hixl": DECLARATIONS / "hixl" / "shim" / "hixl_declarations.h",
}
NAMESPACES = {"acl": "kvlink::ascend::", "hccl": "kvlink::ascend::", "hixl": ""}
FLAGS = {"acl": (), "hccl": (), "hixl": ("-D_GLIBCXX_USE_CXX11_ABI=0",)}

# Declared by us and not in the data, each with the reason; a new name in a header must come with its value.
WITHOUT_VALUE = {
    "acl": {
        "ACL_DEV_ATTR_PHY_CHIP_ID", "ACL_DEV_ATTR_SUPER_POD_DEVIDE_ID", "ACL_DEV_ATTR_SUPER_POD_SERVER_ID",
        "ACL_DEV_ATTR_SUPER_POD_ID", "ACL_PKG_NAME_CANN", "ACL_PKG_NAME_RUNTIME", "ACL_PKG_NAME_DRIVER",
        "ACL_ERROR_COMPILING_STUB_MODE", "ACL_ERROR_RT_STREAM_CONTEXT",  # compared with the headers in the wheels
        "ACL_ERROR_RT_EVENT_SYNC_TIMEOUT",  # compared with the headers in the wheels
        "ACL_STREAM_STATUS_RESERVED",  # a sentinel, never compared with
        "RT_MEMORY_TYPE_HOST", "RT_MEMORY_TYPE_DEVICE", "RT_MEMORY_TYPE_USER",  # libruntime.so has no public header
    },
    "hccl": {"HCCL_MEM_TYPE_DEVICE", "HCCL_MEM_TYPE_HOST"},  # the data has them under their newer name, COMM_MEM_TYPE_*
    "hixl": set(),
}  # fmt: skip


def values() -> dict[str, list[str]]:
    sections: dict[str, list[str]] = {}
    for line in (Path(__file__).parent / "abi_values.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            current = sections.setdefault(line.strip("[]"), [])
        elif line and not line.startswith("#"):
            current.append(line)
    return sections


def renamed(name: str) -> str:
    """The newest headers call HcclMem CommMem."""
    return re.sub(r"^CommMem\b", "HcclMem", name)


def assertion(section: str, line: str) -> str:
    """Turns a line of the data into a static_assert over our own declarations; "" for symbols."""
    scope = NAMESPACES[section]
    if match := re.fullmatch(r"sizeof (\S+) = (\d+) alignof = (\d+)", line):
        name = scope + renamed(match[1])
        condition = f"sizeof({name}) == {match[2]} && alignof({name}) == {match[3]}"
    elif match := re.fullmatch(r"offset (\S+)\.(\w+) = (\d+) size = (\d+)", line):
        name = scope + renamed(match[1])
        condition = f"offsetof({name}, {match[2]}) == {match[3]} && sizeof({name}::{match[2]}) == {match[4]}"
    elif match := re.fullmatch(r"(?:enum \S+|const) (\S+) = (-?\d+)", line):
        condition = f"static_cast<long long>({scope}{match[1]}) == {match[2]}"
    else:
        assert line.startswith("symbol "), line
        return ""
    return f'static_assert({condition}, "{line}");'


def program(section: str, lines: list[str]) -> str:
    return f'#include "{HEADERS[section]}"\n' + "\n".join(assertion(section, line) for line in lines) + "\n"


@pytest.mark.parametrize("section", sorted(HEADERS))
def test_our_declarations_have_the_vendors_sizes_offsets_and_values(section: str, tmp_path: Path) -> None:
    lines = values()[section]
    assert len(lines) > 20
    result = compile_text(program(section, lines), tmp_path, *FLAGS[section])
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("section", sorted(HEADERS))
def test_every_value_bites(section: str, tmp_path: Path) -> None:
    """Each line with its number changed by one fails, and the compiler names exactly those lines."""
    lines = [line for line in values()[section] if not line.startswith("symbol ")]
    wrong = [re.sub(r"= (-?\d+)", lambda match: f"= {int(match[1]) + 1}", line, count=1) for line in lines]
    result = compile_text(program(section, wrong), tmp_path, "-fmax-errors=0", *FLAGS[section])
    assert result.returncode != 0
    refused = set(re.findall(r"static assertion failed: (.*)", result.stdout))
    assert refused == set(wrong)


@pytest.mark.parametrize("section", sorted(HEADERS))
def test_every_declared_value_has_its_line(section: str) -> None:
    text = re.sub(r"//[^\n]*", "", HEADERS[section].read_text(encoding="utf-8"))
    declared = set(
        re.findall(r"\b((?:[A-Z][A-Z0-9]*_)[A-Z0-9_]*|WAITING|READ|WRITE|COMPLETED|TIMEOUT|FAILED) = ", text)
    )
    known = {
        match[1] for line in values()[section] if (match := re.match(r"(?:enum|const) (?:\S*::)?.*?(\w+) =", line))
    }
    assert declared - known == WITHOUT_VALUE[section]


def test_the_shim_asks_for_the_vendors_symbols_and_no_others(tmp_path: Path) -> None:
    """What the shim leaves undefined of the vendor's namespaces is exactly what the public headers' users import."""
    target = tmp_path / "shim.o"
    shim = ROOT / "backends" / "hixl" / "shim"
    command = ["c++", "-std=c++17", "-O2", "-fPIC", "-D_GLIBCXX_USE_CXX11_ABI=0", "-c", "-o", str(target)]
    includes = [f"-I{path}" for path in (shim, DECLARATIONS, ROOT / "include", ROOT / "src")]
    result = run([*command, *includes, str(shim / "shim.cc")], env=environment())
    assert result.returncode == 0, result.stdout
    listing = run(["nm", str(target)]).stdout
    wanted = {line.split()[-1] for line in listing.splitlines() if re.search(r" [Uw] _ZNK?(2ge|4hixl)", line)}
    known = {line.split()[1] for line in values()["hixl"] if line.startswith("symbol ")}
    # A destructor may be asked for in its complete (D1) form only; nothing beyond the vendor's list.
    assert wanted <= known, wanted - known
    assert known <= wanted, f"listed as used, but not used: {known - wanted}"
    defined = [line for line in listing.splitlines() if re.search(r" [A-TV-Z] _ZNK?(2ge12AscendString|4hixl)", line)]
    assert defined == []
