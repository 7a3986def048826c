"""The small model, made once, and the ends of the servers' logs beside a failure."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHOWN = 40


@pytest.fixture(scope="session")
def model() -> Path:
    """The small model in float32; kept in build/ between runs."""
    folder = ROOT / "build" / "e2e" / "model-float32"
    subprocess.run([sys.executable, "-m", "tools.make_model", str(folder)], cwd=ROOT, check=True, timeout=300)
    return folder


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed:
        from e2e.stage import Stage

        for value in getattr(item, "funcargs", {}).values():
            stage = getattr(value, "stage", value)
            if isinstance(stage, Stage):
                for log in sorted(stage.folder.glob("*.log")):
                    lines = log.read_text(errors="replace").splitlines()[-SHOWN:]
                    report.sections.append((f"end of {log.name}", "\n".join(lines)))
    return report
