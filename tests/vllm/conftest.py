"""What the connector's tests share."""

from __future__ import annotations

import pytest
from tests.vllm.harness import FakeEngine

from kvlink.errors import KvlinkError


@pytest.fixture
def engines():
    """Makes fake engines and closes them."""
    made = []

    def make(role, **options):
        engine = FakeEngine(role, **options)
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.close()


@pytest.fixture(scope="session", autouse=True)
def _native():
    import kvlink

    try:
        kvlink.open("host").close()
    except KvlinkError as error:
        pytest.fail(f"the host provider does not open: {error}")
