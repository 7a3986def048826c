"""The library, its table, versions of both, probing and options: all before a peer exists."""

from __future__ import annotations

import os
import threading
import time

from ... import errors, registry
from ..._engine_types import Capability
from ..._native import ffi, library_path
from ..._status import Status, c_text
from ...config import validate_options
from ..context import Context
from ..endpoint import RemoteEndpoint
from ..raw import MANDATORY, POISON, TABLE_BYTES, RawEngine, Table, check_two_calls, exported_symbols, new_error
from ..suite import case, check
from ..wire import ChildProcess

_SLOTS = {
    Capability.ALLOCATE: ("mem_alloc", "mem_free"),
    Capability.COPY: ("mem_copy",),
    Capability.CANCEL: ("cancel",),
    Capability.INTERRUPT: ("link_interrupt",),
    Capability.LINK_CHECK: ("link_check",),
    Capability.STATISTICS: ("stats",),
    Capability.BUSY_POLL: ("link_busy_poll",),
}


def _engine(context: Context, table: Table | None = None) -> RawEngine:
    table = table or Table(context.spec.library_path())
    return RawEngine(table, validate_options(context.spec, context.settings.options), context.settings.device)


@case("load", "exports one symbol", profile="load")
def one_symbol(context: Context) -> None:
    """Two providers in one process must not meet by name."""
    names = exported_symbols(context.spec.library_path())
    check(names == ["kvl_provider_init"], f"the library exports {names}")


@case("load", "fills its table within the room it is given", profile="load")
def table_room(context: Context) -> None:
    """An older core has less room, a newer one more: nothing behind the room is written."""
    path = context.spec.library_path()
    table = Table(path)
    table.check_room()
    check(table.status == 0, f"init: {c_text(table.error.message)}")
    check(table.size <= TABLE_BYTES, f"the table has {table.size} bytes in a room of {TABLE_BYTES}")
    check(table.raw.abi_version == 1, f"asked for ABI version 1, got {table.raw.abi_version}")
    for slot in MANDATORY:
        check(table.has(slot), f"the mandatory function {slot} is missing")
    name = c_text(table.raw.name)
    check(name == context.settings.provider, f"the library calls itself {name!r}")
    check(c_text(table.raw.version), "the provider has no version")
    for index in range(table.raw.path_count):
        check(c_text(table.raw.path_names[index]), f"path {index} has no name")
    newer = Table(path, room=TABLE_BYTES + 512)
    newer.check_room()
    check(newer.status == 0, f"in a newer core: {c_text(newer.error.message)}")
    check(newer.size <= TABLE_BYTES + 512, f"the table has {newer.size} bytes in a room of {TABLE_BYTES + 512}")
    for room in (int(ffi.offsetof("kvl_provider", "cancel")), int(ffi.offsetof("kvl_provider", "probe")), 4):
        older = Table(path, room=room)
        older.check_room()
        if older.status == 0:
            check(older.size <= room, f"the table has {older.size} bytes in a room of {room}")
        else:
            check(c_text(older.error.message), f"refused a room of {room} bytes without a word")


@case("load", "refuses ABI versions that it does not speak", profile="load")
def abi_versions(context: Context) -> None:
    """UNSUPPORTED, so that the core can try another."""
    for version in (0, 99, 2**32 - 1):
        table = Table(context.spec.library_path(), version=version)
        check(table.status == Status.UNSUPPORTED, f"ABI version {version} was answered with status {table.status}")
        check(c_text(table.error.message), f"ABI version {version} was refused without a word")


@case("load", "probe answers", profile="load")
def probe(context: Context) -> None:
    """Usable, or the reason why not; in a child process, which it may not crash."""
    result = registry.probe(context.settings.provider, refresh=True)
    check(result.usable, f"this host cannot use it: {result.reason}")
    unknown = registry.channels()
    check(context.settings.provider in {info.name for info in unknown}, "the channel is not listed")


@case("load", "optional functions and capabilities agree", profile="load")
def slots(context: Context) -> None:
    """A claimed capability has its functions."""
    table = Table(context.spec.library_path())
    for capability, names in _SLOTS.items():
        if capability in context.capabilities:
            for name in names:
                check(table.has(name), f"{capability.name} is claimed and {name} is missing")


@case("load", "wrong options are refused by name", profile="load")
def options(context: Context) -> None:
    """The provider itself refuses what it does not know; the core does too, and suggests."""
    table = Table(context.spec.library_path())
    engine = RawEngine(table, {"no_such_option_": "1"}, context.settings.device)
    check(engine.status == Status.INVALID, f"an unknown option was answered with status {engine.status}")
    check("no_such_option_" in c_text(engine.error.message), f"it is not named: {c_text(engine.error.message)}")
    endpoint = context.local()
    with context.error_text(errors.ConfigError) as caught:
        endpoint.open(options={"no_such_option_": 1})
    check("no_such_option_" in str(caught.error), f"it is not named: {caught.error}")
    for option in context.spec.options:
        if option.choices:
            bad = RawEngine(table, {option.name: "no such choice"}, context.settings.device)
            check(bad.status == Status.INVALID, f"a bad value of {option.name} was answered with status {bad.status}")
            with context.error_text(errors.ConfigError):
                endpoint.open(options={option.name: "no such choice"})


@case("load", "writes no error beyond the caller's room", profile="load")
def error_room(context: Context) -> None:
    """A caller that knows a shorter kvl_error gets a shorter one."""
    table = Table(context.spec.library_path())
    engine = RawEngine(table, {"no_such_option_": "1"}, context.settings.device)
    out = ffi.new("kvl_engine **")
    for room in (4, 16, int(ffi.offsetof("kvl_error", "message"))):
        error = new_error(room)
        status = engine.table.engine_open(engine._params, out, error)
        check(status == Status.INVALID, f"a wrong option was answered with status {status}")
        behind = bytes(ffi.buffer(error)[room:])
        check(set(behind) <= {POISON}, f"an error with room for {room} bytes was written further")


@case("load", "attributes are sound, in shorter and longer structs", profile="load")
def attributes(context: Context) -> None:
    """Limits make sense; nothing behind the caller's struct is written."""
    found = context.attributes
    check(found.capabilities & (Capability.PUT | Capability.GET), "it can neither put nor get")
    check(found.memory_kinds & 3, "it serves no kind of memory")
    check(found.max_describe > 0 and found.max_export > 0, "max_describe and max_export must be given")
    for name in ("alignment", "memory_alignment"):
        value = getattr(found, name)
        check(value & (value - 1) == 0, f"{name} {value} is no power of two")
    size = int(ffi.sizeof("kvl_attr"))
    with _engine(context) as engine:
        for room in (size, size + 64, int(ffi.offsetof("kvl_attr", "alignment"))):
            memory = ffi.new("char[]", size + 256)
            ffi.buffer(memory)[:] = bytes([POISON]) * len(memory)
            attr = ffi.cast("kvl_attr *", memory)
            attr.struct_size = room
            status = engine.table.engine_query(engine.handle, attr, new_error())
            # A struct shorter than that of version 1 has no writer: refusing it is as good as filling it.
            allowed = (0,) if room >= size else (0, Status.INVALID)
            check(status in allowed, f"engine_query with {room} bytes returned {status}")
            behind = bytes(ffi.buffer(memory)[room:])
            check(set(behind) <= {POISON}, f"engine_query wrote behind {room} bytes")


@case("load", "describe and export keep the two-call idiom", profile="load")
def two_calls(context: Context) -> None:
    """NULL, too short, exact and longer buffers; the blob stays the same and within its limit."""
    nbytes = max(65_536, context.attributes.memory_alignment)
    alignment = max(1, context.attributes.memory_alignment, context.settings.plain_alignment)
    with _engine(context) as engine:
        memory = ffi.new("char[]", 2 * nbytes)
        address = int(ffi.cast("uintptr_t", memory))
        address += -address % alignment
        kind = 0 if context.attributes.memory_kinds & 1 else 1
        if kind:
            out = ffi.new("uint64_t *")
            check(engine.table.mem_alloc(engine.handle, 1, nbytes, out, new_error()) == 0, "mem_alloc failed")
            address = int(out[0])
        desc = ffi.new(
            "kvl_mem_desc *",
            {
                "struct_size": ffi.sizeof("kvl_mem_desc"),
                "kind": kind,
                "device": -1 if kind == 0 else 0,
                "access": 3,
                "address": address,
                "length": nbytes,
            },
        )
        error = new_error()
        check(engine.table.mem_open(engine.handle, 7, desc, error) == 0, f"mem_open: {c_text(error.message)}")
        check_two_calls(
            lambda buffer, length, err: int(engine.table.mem_export(engine.handle, 7, buffer, length, err)),
            context.attributes.max_export,
            "mem_export",
        )
        for role in (0, 1):
            with engine.link(role) as link:
                check_two_calls(
                    lambda buffer, length, err: int(engine.table.link_describe(link, buffer, length, err)),
                    context.attributes.max_describe,
                    "link_describe",
                )
        check(engine.table.mem_close(engine.handle, 7, error) == 0, f"mem_close: {c_text(error.message)}")
        status = engine.table.mem_export(engine.handle, 7, ffi.NULL, ffi.new("uint64_t *"), new_error())
        check(status not in (0, Status.NO_RESOURCE), "mem_export of a closed handle succeeds")
        if kind:
            engine.table.mem_free(engine.handle, address)


def _timed_wait(engine: RawEngine, timeout_ms: int) -> tuple[float, float]:
    start, cpu = time.monotonic(), time.thread_time()
    engine.table.wait(engine.handle, timeout_ms)
    return time.monotonic() - start, time.thread_time() - cpu


@case("load", "wait sleeps, wake wakes", profile="load")
def wait_and_wake(context: Context) -> None:
    """Wait uses no CPU, returns at its timeout, and at once when wake came before or comes meanwhile."""
    with _engine(context) as engine:
        # Events of opening the engine may end a first wait early.
        for _ in range(3):
            took, cpu = _timed_wait(engine, 300)
        check(0.2 <= took < 3.0, f"wait of 300 ms took {took * 1000:.0f} ms")
        check(cpu < 0.1, f"wait of 300 ms used {cpu * 1000:.0f} ms of CPU")
        engine.table.wake(engine.handle)
        took, _ = _timed_wait(engine, 5000)
        check(took < 2.0, f"wait after wake took {took * 1000:.0f} ms")
        timer = threading.Timer(0.1, lambda: engine.table.wake(engine.handle))
        timer.start()
        took, _ = _timed_wait(engine, 5000)
        timer.join()
        check(took < 3.0, f"wait went on {took * 1000:.0f} ms although wake came after 100 ms")


def _load(endpoint: RemoteEndpoint, variant: str) -> str:
    """Loads, in a child, a copy of the hook that hands out a table which is unusual in one way."""
    return str(
        endpoint.call(
            "load_variant",
            path=os.fspath(library_path("hook")),
            environ={"KVLINK_HOOK_TABLE": variant},
        )["name"]
    )


def _loader(context: Context) -> RemoteEndpoint:
    child = ChildProcess("kvlink.testing.agent", environ={"KVLINK_HOOK_LIBRARY": context.spec.library_path()})
    context.adopt(child)
    return context.sided(RemoteEndpoint("the loader", {}, child))


@case("load", "the loader takes a provider of an older table", profile="load", timeout=60)
def older_table(context: Context) -> None:
    """What lies behind the bytes that a provider filled is not read, however it looks."""
    endpoint = _loader(context)
    check(_load(endpoint, "older") == "hook", "the provider was not loaded")
    # The hook itself is loaded with the same variant: the environment stays.
    endpoint.call("install_hook", inner=context.settings.provider)
    options = dict(context.settings.options)
    options["hook_mask"] = "CANCEL,INTERRUPT,LINK_CHECK,STATISTICS"
    other = context.local("other", through_hook=True)
    endpoint.call("open", provider="hook", options=options, device=context.settings.device_of(1))
    address = other.open(options={"hook_mask": "CANCEL,INTERRUPT,LINK_CHECK,STATISTICS"})
    endpoint.memory("a", 1 << 16, 1, kind=context.kind)
    other.memory("b", 1 << 16, 2, kind=context.kind)
    context.round_trip(context.join(endpoint, other, address))
    endpoint.call("reset")


@case("load", "the loader refuses broken providers by name", profile="load", timeout=120)
def broken_tables(context: Context) -> None:
    """A missing function, a short table, a wrong version: an error that says so, and no crash."""
    endpoint = _loader(context)
    for variant, word in (
        ("missing:submit", "submit"),
        ("missing:wait", "wait"),
        ("truncated", "poll"),
        ("abi", "version"),
        ("refuse", "version"),
        ("nameless", "name"),
        ("unterminated", "mmmm"),
    ):
        with context.error_text(errors.ChannelUnavailableError) as caught:
            check(not _load(endpoint, variant), f"{variant}: the loader took it")
        check(word in str(caught.error), f"{variant}: the error does not say {word!r}: {caught.error}")
    try:
        # A provider that claims more than it was given room for is taken as far as the room goes, or refused.
        _load(endpoint, "oversized")
    except errors.ChannelUnavailableError as error:
        check(str(error), "oversized: refused without a word")
    for path in ("/nonexistent/libnothing.so", "/proc/self/exe"):
        with context.error_text(errors.ChannelUnavailableError):
            endpoint.call("load_library", path=path)
    with context.error_text(errors.ChannelUnavailableError) as caught:
        endpoint.call("load_library", path=os.fspath(library_path("engine")))
    check("kvl_provider_init" in str(caught.error), f"the missing symbol is not named: {caught.error}")
