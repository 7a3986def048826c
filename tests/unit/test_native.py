import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvlink import _native
from kvlink._native import declarations, ffi, get_include, lib, library_path
from kvlink.errors import ChannelUnavailableError


def test_declarations_keep_only_what_cffi_parses():
    header = """/* first
 * second */
#ifndef X_H
#define X_H
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif
enum { A = 1 }; /* why */
int f(int x);
#ifdef __cplusplus
}
#endif
#endif /* X_H */
"""
    assert declarations(header).split() == ["enum", "{", "A", "=", "1", "};", "int", "f(int", "x);"]


def test_include_folder_holds_the_header():
    assert Path(get_include(), "kvlink", "provider.h").is_file()


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_cffi_and_the_compiler_agree_on_every_struct(tmp_path):
    """A field that cffi reads at another offset than C writes it would corrupt silently."""
    structs = [
        "kvl_error",
        "kvl_attr",
        "kvl_option",
        "kvl_engine_params",
        "kvl_mem_desc",
        "kvl_range",
        "kvl_completion",
        "kvl_link_params",
        "kvl_stat",
        "kvl_provider",
        "kve_channel_params",
        "kve_statistics",
        "kve_result",
    ]
    lines, expected = [], []
    for struct in structs:
        lines.append(f'printf("%zu\\n", sizeof({struct}));')
        expected.append(ffi.sizeof(struct))
        for field, _ in ffi.typeof(struct).fields:
            lines.append(f'printf("%zu\\n", offsetof({struct}, {field}));')
            expected.append(ffi.offsetof(struct, field))
    engine_header = _native.find_header("_native/engine.h", "src/engine/engine.h")
    source = tmp_path / "layout.c"
    source.write_text(
        f'#include <stdio.h>\n#include "{engine_header}"\nint main(void) {{\n' + "\n".join(lines) + "\nreturn 0; }\n"
    )
    program = tmp_path / "layout"
    subprocess.run(["cc", "-std=c11", "-I", get_include(), "-o", program, source], check=True)
    answer = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    assert [int(line) for line in answer.split()] == expected
    assert ffi.sizeof("void *") == ctypes.sizeof(ctypes.c_void_p)


def test_missing_library_says_where_and_how_to_build(tmp_path, monkeypatch):
    monkeypatch.setenv("KVLINK_NATIVE_DIR", str(tmp_path))
    with pytest.raises(ChannelUnavailableError) as caught:
        library_path("engine")
    assert str(tmp_path) in str(caught.value)
    assert "cmake" in str(caught.value)


def test_native_dir_wins(tmp_path, monkeypatch):
    (tmp_path / "libkvlink_host.so").touch()
    monkeypatch.setenv("KVLINK_NATIVE_DIR", str(tmp_path))
    assert library_path("host") == (tmp_path / "libkvlink_host.so").resolve()


@pytest.mark.parametrize("content", [b"", b"not a library"])
def test_unloadable_engine_is_a_clear_error(tmp_path, monkeypatch, content):
    (tmp_path / "libkvlink_engine.so").write_bytes(content)
    monkeypatch.setenv("KVLINK_NATIVE_DIR", str(tmp_path))
    with pytest.raises(ChannelUnavailableError, match="cannot load"):
        _native._Engine().kve_submit  # noqa: B018


def test_unknown_function_names_the_library():
    with pytest.raises(ChannelUnavailableError, match="another version"):
        lib.kve_no_such_function  # noqa: B018


def test_importing_the_core_loads_no_library(tmp_path):
    """Listing and checking work in a tree that was never built."""
    code = "import kvlink.registry, kvlink.config, kvlink._engine; print([i.name for i in kvlink.registry.channels()])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"KVLINK_NATIVE_DIR": str(tmp_path), "PYTHONPATH": ":".join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "host" in done.stdout
