"""Registration: in any process, once, before or after lmcache is imported, and without importing it."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import types

import pytest

from kvlink_lmcache import hooks, patches, versions


def run(code: str) -> str:
    """Runs code in a fresh interpreter and returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


REPLACED = """
    import lmcache.v1.gpu_connector as g, lmcache.v1.storage_backend as s, lmcache.v1.transfer_channel as t
    import lmcache.v1.storage_backend.p2p_backend as p, lmcache.v1.storage_backend.storage_manager as m
    import lmcache.v1.storage_backend.pd_backend as d
    import lmcache.v1.config as c
    for f in (g.CreateGPUConnector, s.CreateStorageBackends, t.CreateTransferChannel, p.CreateTransferChannel,
              m.CreateStorageBackends, d.CreateTransferChannel):
        assert not hasattr(f.__kvlink_original__, "__kvlink_original__"), f
    assert c.LMCacheEngineConfig.from_defaults(pd_pull_mode="true").pd_pull_mode is True
    print("ok")
"""


def test_before_lmcache_is_imported():
    """Registering imports nothing: vLLM's CPU worker dies when lmcache is in sys.modules while it starts."""
    code = """
        import sys
        from kvlink_lmcache.registration import register
        register()
        register()
        print(sorted({"lmcache", "torch", "vllm"} & set(sys.modules)))
    """
    assert run(textwrap.dedent(code) + textwrap.dedent(REPLACED)).split() == ["[]", "ok"]


def test_after_lmcache_was_imported():
    """Names that modules had imported before are rebound in them."""
    early = "import lmcache.v1.storage_backend.p2p_backend, lmcache.v1.storage_backend.pd_backend\n"
    early += "import lmcache.v1.storage_backend.storage_manager, lmcache.v1.gpu_connector\n"
    late = "from kvlink_lmcache.registration import register\nregister()\n"
    assert "ok" in run(early + late + textwrap.dedent(REPLACED))


def test_the_connectors_module_registers_too():
    """For set-ups without plugins. LMCache's own channels stay LMCache's."""
    out = run("""
        import kvlink_lmcache.vllm as v
        print(v.KVLinkLMCacheConnector.__mro__[1].__name__)
        from lmcache.v1.transfer_channel import CreateTransferChannel
        print(hasattr(CreateTransferChannel, "__kvlink_original__"))
        channel = CreateTransferChannel("mock_memory", False, "sender", 0, 0, 1, 0, "localhost:1")
        print(type(channel).__name__)
    """)
    assert out.split() == ["LMCacheConnectorV1Dynamic", "True", "MockMemoryChannel"]


def test_spawned_processes_register_themselves(tmp_path):
    """vLLM's plugin loading, in a process that multiprocessing spawned."""
    script = tmp_path / "spawning.py"
    script.write_text(
        textwrap.dedent("""
        import multiprocessing
        import sys

        def child(queue):
            from vllm.plugins import load_general_plugins
            load_general_plugins()
            before = "lmcache" in sys.modules
            import lmcache.v1.transfer_channel as t
            queue.put((before, hasattr(t.CreateTransferChannel, "__kvlink_original__")))

        if __name__ == "__main__":
            context = multiprocessing.get_context("spawn")
            queue = context.Queue()
            process = context.Process(target=child, args=(queue,))
            process.start()
            print(queue.get(timeout=100))
            process.join(30)
        """)
    )
    assert run(f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')").strip().endswith("(False, True)")


def test_a_hook_runs_once_after_its_module(tmp_path, monkeypatch):
    (tmp_path / "kvlink_hooked.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    seen = []
    hooks.after_import("kvlink_hooked", lambda module: seen.append(module.value))
    import kvlink_hooked

    assert seen == [1]
    assert type(kvlink_hooked.__loader__).__module__ != hooks.__name__
    hooks.after_import("kvlink_hooked", lambda module: seen.append(2))
    assert seen == [1, 2]
    sys.modules.pop("kvlink_hooked")


def test_a_hooks_error_is_the_imports(tmp_path, monkeypatch):
    (tmp_path / "kvlink_refused.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))

    def refuse(module):
        raise versions.VersionError("no")

    hooks.after_import("kvlink_refused", refuse)
    with pytest.raises(versions.VersionError):
        import kvlink_refused  # noqa: F401
    assert "kvlink_refused" not in sys.modules


def test_a_changed_lmcache_is_refused_by_name():
    module = types.ModuleType("lmcache.v1.transfer_channel")
    with pytest.raises(versions.VersionError, match=r"has no lmcache\.v1\.transfer_channel\.CreateTransferChannel"):
        patches.create_transfer_channel(module)
    module.CreateTransferChannel = lambda kind, buffers: None
    with pytest.raises(versions.VersionError, match=r"takes \(kind, buffers\).*Tested: 0\.4\.4, 0\.5\.6"):
        patches.create_transfer_channel(module)


def test_an_untested_version_is_named_in_the_log(monkeypatch, caplog):
    monkeypatch.setattr(versions, "lmcache_version", lambda: "0.6.0")
    monkeypatch.setattr(versions.logger, "parent", None)
    with caplog.at_level("WARNING", logger="kvlink_lmcache"):
        versions.logger.addHandler(caplog.handler)
        try:
            versions.check_lmcache()
        finally:
            versions.logger.removeHandler(caplog.handler)
    assert "LMCache 0.6.0 was not tested" in caplog.text
    assert "lmcache==0.5.6" in caplog.text


def test_every_patch_says_why_and_until_when():
    for _, patch in patches.PATCHES:
        assert "Why:" in patch.__doc__, patch
        assert "Goes away:" in patch.__doc__, patch
