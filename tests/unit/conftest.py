import shutil
import subprocess
import textwrap
from pathlib import Path

import pytest


class Distributions:
    """Installs fake distributions into a folder of sys.path, as pip would."""

    def __init__(self, folder):
        self.folder = folder

    def install(self, distribution, channels, module="", version="1.0"):
        """``channels``: entry-point values by name. ``module``: source of a module named after the distribution."""
        package = distribution.replace("-", "_")
        info = self.folder / f"{package}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        lines = "".join(f"{name} = {value}\n" for name, value in channels.items())
        (info / "entry_points.txt").write_text(f"[kvlink.channels]\n{lines}")
        (self.folder / f"{package}.py").write_text(textwrap.dedent(module))


@pytest.fixture
def distributions(tmp_path, monkeypatch):
    from kvlink import registry

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_specs", {})
    monkeypatch.setattr(registry, "_probes", {})
    return Distributions(tmp_path)


@pytest.fixture(scope="session")
def loop_library(tmp_path_factory):
    """The loop provider, compiled against the header that this kvlink ships."""
    from kvlink._native import get_include

    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    assert compiler, "a C compiler is needed to build the tests' provider"
    library = tmp_path_factory.mktemp("loop") / "libloop.so"
    source = Path(__file__).with_name("loop_provider.c")
    flags = ["-std=c11", "-D_GNU_SOURCE", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread"]
    subprocess.run([compiler, *flags, "-I", get_include(), "-o", library, source], check=True)
    return library
