"""What the two libraries of the provider define, and what they leave to the vendor's."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from .simulated import native

VENDOR = re.compile(r"^_ZN?K?(2ge|4hixl)|^(acl|rt|Hccl|Hixl)[A-Z]")
# Every name of the vendor's that the shim needs, as CANN 8.5.0 to 9.1 export them.
NEEDED = {
    "_ZN2ge12AscendStringC1EPKc",
    "_ZNK2ge12AscendStringltERKS0_",
    "_ZN4hixl4HixlC1Ev",
    "_ZN4hixl4HixlD1Ev",
    "_ZN4hixl4Hixl8FinalizeEv",
    "_ZN4hixl4Hixl10InitializeERKN2ge12AscendStringERKSt3mapIS2_S2_St4lessIS2_ESaISt4pairIS3_S2_EEE",
    "_ZN4hixl4Hixl11RegisterMemERKNS_7MemDescENS_7MemTypeERPv",
    "_ZN4hixl4Hixl13DeregisterMemEPv",
    "_ZN4hixl4Hixl7ConnectERKN2ge12AscendStringEi",
    "_ZN4hixl4Hixl10DisconnectERKN2ge12AscendStringEi",
    "_ZN4hixl4Hixl13TransferAsyncERKN2ge12AscendStringENS_10TransferOpERKSt6vectorINS_14TransferOpDescESaIS7_EE"
    "RKNS_12TransferArgsERPv",
    "_ZN4hixl4Hixl17GetTransferStatusERKPvRNS_14TransferStatusE",
}


def _names(path: Path, *options: str) -> set[str]:
    text = subprocess.run(["nm", *options, str(path)], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1].partition("@")[0] for line in text.splitlines() if line.strip()}


def _libraries() -> list[Path]:
    return sorted(native().glob("libkvlink_*.so"))


def test_libraries_are_there() -> None:
    assert {"libkvlink_hixl.so", "libkvlink_hixl_shim.so"} <= {path.name for path in _libraries()}


@pytest.mark.parametrize("path", _libraries(), ids=lambda path: path.name)
def test_no_library_defines_a_vendor_symbol(path: Path) -> None:
    defined = _names(path, "--defined-only") | _names(path, "-D", "--defined-only")
    assert not {name for name in defined if re.match(r"_ZN?K?(2ge|4hixl)", name)}


def test_the_provider_has_no_vendor_symbol_at_all() -> None:
    path = native() / "libkvlink_hixl.so"
    assert not {name for name in _names(path, "-D") | _names(path) if VENDOR.match(name)}
    needed = subprocess.run(["readelf", "-d", str(path)], capture_output=True, text=True, check=True).stdout
    assert "ascend" not in needed
    assert "hixl" not in needed.replace("libkvlink_hixl.so", "")


def test_the_shim_needs_exactly_the_known_symbols() -> None:
    path = native() / "libkvlink_hixl_shim.so"
    assert {name for name in _names(path, "-D", "--undefined-only") if VENDOR.match(name)} == NEEDED
    needed = subprocess.run(["readelf", "-d", str(path)], capture_output=True, text=True, check=True).stdout
    assert "cann_hixl" not in needed
    assert "metadef" not in needed


def test_each_library_has_one_string_abi() -> None:
    """The shim the vendor's old one, the provider today's."""
    shim = _names(native() / "libkvlink_hixl_shim.so")
    assert not {name for name in shim if "__cxx11" in name}
    provider = _names(native() / "libkvlink_hixl.so")
    assert not {name for name in provider if "6kvlink" in name and re.search(r"R?K?Ss", name)}
    assert {name for name in provider if "__cxx11" in name}


@pytest.mark.parametrize(
    ("name", "exported"),
    [("libkvlink_hixl.so", "kvl_provider_init"), ("libkvlink_hixl_shim.so", "kvlink_hixl_shim_table")],
)
def test_one_symbol_is_exported(name: str, exported: str) -> None:
    names = _names(native() / name, "-D", "--defined-only")
    assert {entry for entry in names if not entry.startswith("_") and "asan" not in entry} == {exported}
