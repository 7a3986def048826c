"""What is put around LMCache's engine: incomplete stores are told, and lost chunks count as not retrieved."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lmcache")

from kvlink_lmcache import patches  # noqa: E402
from kvlink_lmcache.pd.windows import ChunkLost  # noqa: E402


class Backend:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.ended: list[Any] = []

    def store_ended(self, spec: Any) -> None:
        self.ended.append(spec)


@pytest.fixture
def engine() -> Any:
    """An engine of a module that both patches were applied to, twice."""

    class LMCacheEngine:
        def __init__(self) -> None:
            self.storage_manager = SimpleNamespace(storage_backends={"PDBackend": Backend(), "Other": object()})

        def store(self, tokens: Any = None, **kwargs: Any) -> str:
            if tokens is None:
                raise RuntimeError("no tokens")
            return "stored"

        def retrieve(self, tokens: Any, mask: Any = None, **kwargs: Any) -> Any:
            if kwargs.get("lost"):
                raise ChunkLost("chunk 3 of 9")
            if mask is not None:
                raise ValueError("another error")
            return torch.ones(len(tokens), dtype=torch.bool)

    module = ModuleType("engine")
    module.LMCacheEngine = LMCacheEngine  # type: ignore[attr-defined]
    for _ in range(2):
        patches.engine_store(module)
        patches.engine_retrieve(module)
    return LMCacheEngine()


def test_the_backend_hears_of_every_store_once(engine: Any) -> None:
    backend = engine.storage_manager.storage_backends["PDBackend"]
    assert engine.store([1], transfer_spec="a") == "stored"
    assert engine.store([1]) == "stored"
    with pytest.raises(RuntimeError, match="no tokens"):
        engine.store(transfer_spec="b")
    assert backend.ended == ["a", None, "b"]


def test_an_engine_without_pd_stores_as_before(engine: Any) -> None:
    engine.storage_manager.storage_backends = {"LocalCPUBackend": object()}
    assert engine.store([1]) == "stored"


def test_lost_chunks_are_not_retrieved_and_other_errors_pass(engine: Any) -> None:
    assert engine.retrieve([1, 2]).tolist() == [True, True]
    assert engine.retrieve([1, 2], lost=True).tolist() == [False, False]
    with pytest.raises(ValueError, match="another error"):
        engine.retrieve([1], [True])
