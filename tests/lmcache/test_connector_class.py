"""The connector class: whose it is, and that an LMCache which did not start is no silent matter."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest

from kvlink_lmcache.registration import register

register()

from kvlink_lmcache.vllm import connector as module  # noqa: E402

ASCEND = """
import sys, types
from lmcache.integration.vllm.lmcache_connector_v1 import LMCacheConnectorV1Dynamic as Base

class LMCacheAscendConnectorV1Dynamic(Base):
    def __init__(self, vllm_config, role{third}):
        Base.__init__(self, vllm_config=vllm_config, role=role{passed})
        self.ascend = True
"""


def started(**manager):
    made = module.KVLinkLMCacheConnector.__new__(module.KVLinkLMCacheConnector)
    made._lmcache_engine = SimpleNamespace(_manager=SimpleNamespace(**manager))
    return made


def test_an_lmcache_that_did_not_start_stops_the_engine():
    """LMCache logs what went wrong and computes everything anew for ever."""
    reason = "Traceback (most recent call last):\n  File ...\nValueError: pd_buffer_size is too small\n"
    failed = started(_init_failed=True, _init_failed_reason=reason)
    with pytest.raises(module.StartError, match="could not start: ValueError: pd_buffer_size is too small"):
        failed._refuse_degraded("start")
    started(_init_failed=False, _init_failed_reason="")._refuse_degraded("start")
    started()._refuse_degraded("start")  # a manager that does not say


def test_caches_are_looked_at_before_lmcache_sizes_its_buffers(monkeypatch):
    order = []
    made = started(_init_failed=False)
    made._lmcache_engine.lmcache_engine = SimpleNamespace(gpu_connector=SimpleNamespace(bind=order.append))
    monkeypatch.setattr(module._Base, "register_kv_caches", lambda self, caches: order.append("lmcache"))
    made.register_kv_caches({"layer.0": "a", "layer.1": "b"})
    assert order == [["a", "b"], "lmcache"]


@pytest.mark.parametrize(
    ("third", "passed"), [("", ""), (", kv_cache_config=None", ", kv_cache_config=kv_cache_config")]
)
def test_over_lmcache_ascends_class_where_that_is_installed(tmp_path, third, passed):
    """Both its forms: with two arguments, which vLLM >= 0.23 refuses, and with three. Its package is stood in for."""
    folder = tmp_path / "lmcache_ascend" / "integration" / "vllm"
    folder.mkdir(parents=True)
    for level in (folder, folder.parent, folder.parent.parent):
        (level / "__init__.py").write_text("")
    (folder / "lmcache_ascend_connector_v1.py").write_text(ASCEND.format(third=third, passed=passed))
    code = """
        from types import SimpleNamespace
        from vllm.distributed.kv_transfer.kv_connector.v1 import base
        from lmcache.integration.vllm import lmcache_connector_v1 as upstream
        from kvlink_lmcache.vllm import KVLinkLMCacheConnector
        from kvlink_lmcache.vllm import checks, repairs, connector
        seen = []
        class Impl:
            def __init__(self, *given): seen.append(len(given))
            def build_connector_meta(self, scheduler_output): ...
            def request_finished(self, request, block_ids): ...
            def get_num_new_matched_tokens(self, request, computed): ...
        def start(self, vllm_config, role, kv_cache_config=None): seen.append(kv_cache_config)
        base.KVConnectorBase_V1.__init__ = start
        upstream.LMCacheConnectorV1Impl = Impl
        checks.check_engine = checks.check_lmcache_config = lambda *_: None
        repairs.install = connector._on_load_failure = lambda *_: None
        made = KVLinkLMCacheConnector(SimpleNamespace(), "role", "caches")
        print(KVLinkLMCacheConnector.__mro__[1].__name__, seen)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().splitlines()[-1] == "LMCacheAscendConnectorV1Dynamic ['caches', 3]"


def test_lmcaches_connector_tells_kvlink_first(monkeypatch):
    """Through any connector class, LMCache's own too: what vLLM knows, then the caches, then LMCache."""
    from kvlink_lmcache import context, starting

    monkeypatch.setattr(context, "engine", context.Engine())
    order = []

    class Impl:
        def __init__(self, vllm_config, role):
            order.append(context.engine.max_model_len)
            connector = SimpleNamespace(bind=lambda caches: order.append(("bind", caches)))
            self.lmcache_engine = SimpleNamespace(gpu_connector=connector)

        def register_kv_caches(self, kv_caches):
            order.append("lmcache")

    starting.install(Impl)
    starting.install(Impl)
    config = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=4096, hf_config=SimpleNamespace(to_dict=lambda: {"a": 1})),
        cache_config=SimpleNamespace(block_size=128, cache_dtype="auto"),
    )
    Impl(config, "worker").register_kv_caches({"a": 1})
    assert order == [4096, ("bind", [1]), "lmcache"]
    assert (context.engine.block_size, len(context.engine.model_digest)) == (128, 16)


def test_the_real_implementation_is_wrapped():
    from lmcache.integration.vllm.vllm_v1_adapter import LMCacheConnectorV1Impl

    assert hasattr(LMCacheConnectorV1Impl.__init__, "__wrapped__")
    assert hasattr(LMCacheConnectorV1Impl.register_kv_caches, "__wrapped__")


@pytest.mark.parametrize("policy", ["recompute", "fail"])
def test_a_failed_load_is_computed_unless_told_otherwise(policy):
    transfer = SimpleNamespace(kv_load_failure_policy="fail")
    module._on_load_failure(SimpleNamespace(kv_transfer_config=transfer), policy)
    assert transfer.kv_load_failure_policy == policy
