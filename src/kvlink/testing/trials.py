"""Commands of the agent beside the ordinary work: odd calls, wrong calls, and calls below the channel."""

from __future__ import annotations

import base64
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

import kvlink

from .._engine import ACCEPTOR, EngineChannel, EnginePeer, EngineProvider
from ..errors import ConfigError
from . import hook, resources
from .patterns import pattern
from .storage import Storage, make_storage, open_some_memory

MAIN = "main"
"""Name of an agent's channel when it has one."""


class Trials:
    """The part of :class:`~kvlink.testing.agent.Agent` that cases of one kind need."""

    _channels: dict[str, kvlink.Channel]
    _bare: object = None
    _storage: dict[str, Storage]
    _aliases: dict[str, kvlink.Region]
    _raw: list[EnginePeer | EngineChannel]

    def _peer(self, peer: str, channel: str) -> kvlink.Peer:
        raise NotImplementedError

    def _ranges(self, peer: str, local: str, remote: str, blocks: list[list[int]], channel: str) -> Any:
        raise NotImplementedError

    def do_probe_allocation(self, *, kind: str, nbytes: int, seed: int, channel: str = MAIN) -> dict[str, int]:
        """Allocates a region, looks at it, dirties it, and closes it."""
        storage = make_storage(self._channels[channel], "probe", nbytes, kind=kind, access="rw", alignment=1)
        found = {
            "nbytes": int(storage.region.nbytes),
            "nonzero": int(np.count_nonzero(storage.read(0, nbytes))),
            "address": int(storage.region.address),
        }
        storage.fill(seed)
        storage.region.close()
        return found

    def do_copy(self, *, name: str, offset: int, length: int, to_region: bool, seed: int = 0) -> str:
        """Copies through the provider: the pattern of ``seed`` into the region, or bytes out of it, as base64."""
        region = self._storage[name].region
        engine = region._engine
        host = pattern(seed, 0, length).copy() if to_region else np.empty(length, dtype=np.uint8)
        engine.mem_copy(region.handle, offset, host, to_region=to_region)
        return base64.b64encode(host.tobytes()).decode()

    def do_alias(self, *, name: str, alias: str, offset: int, nbytes: int, channel: str = MAIN) -> None:
        """Registers a part of a region's memory under a second name."""
        address = int(self._storage[name].region.address)
        self._aliases[alias] = self._channels[channel].register(
            (address + offset, nbytes, self._storage[name].region.device), name=alias
        )

    def do_close_alias(self, *, alias: str) -> None:
        """Closes a second name."""
        self._aliases.pop(alias).close()

    def do_register_wrong(self, *, what: str, channel: str = MAIN) -> None:
        """Tries to register something that cannot be."""
        good = np.zeros(4096, dtype=np.uint8)
        register = self._channels[channel].register
        if what == "empty":
            register(good[:0], name="wrong")
        elif what == "readonly":
            good.flags.writeable = False
            register(good, name="wrong")
        elif what == "null":
            register((0, 4096, "cpu"), name="wrong")
        elif what == "strided":
            register(good[::2], name="wrong")
        elif what == "long name":
            register(good, name="x" * 201)
        elif what == "no name":
            register(good, name="")
        elif what == "access":
            register(good, name="wrong", access="x")

    def do_cycle_regions(
        self, *, kind: str, nbytes: int, warm_up: int, count: int, alignment: int, channel: str = MAIN
    ) -> dict[str, int]:
        """Registers and closes a region again and again.

        Returns:
            By how much descriptors, mappings and resident KiB of this process grew over ``count`` rounds that followed
            ``warm_up``.
        """
        opened = self._channels[channel]
        plain = np.zeros(nbytes + alignment, dtype=np.uint8)
        plain = plain[-plain.ctypes.data % alignment :][:nbytes]
        before: dict[str, int] = {}
        for index in range(warm_up + count):
            if index == warm_up:
                before = resources.usage()
            if kind == "plain":
                opened.register(plain, name="cycle").close()
            else:
                device = "cpu" if kind == "allocated" else None
                opened.allocate(nbytes, name="cycle", device=device).close()
        after = resources.usage()
        return {name: after[name] - before[name] for name in before}

    def do_put_malformed(self, *, peer: str, what: str, channel: str = MAIN) -> None:
        """Puts ranges that no caller should have made, between regions "a" and "b"."""
        ranges = self._ranges(peer, "a", "b", [[0, 0, 64], [64, 64, 64]], channel)
        if what == "dtype":
            ranges = np.zeros((2, 5), dtype=np.int64)
        elif what == "shape":
            ranges = ranges.reshape(1, 2)
        elif what == "strided":
            ranges = np.concatenate([ranges, ranges])[::2]
        elif what == "list":
            ranges = [(0, 0, 64)]
        elif what == "local handle":
            ranges["mem"] ^= 0x5A00_0001
        elif what == "remote handle":
            ranges["rmem"] ^= 0x5A00_0001
        self._peer(peer, channel).put(ranges).wait()

    def do_install_hook(self, *, inner: str) -> None:
        """Makes the channel "hook" over ``inner`` available here."""
        hook.install(inner)

    def do_load_library(self, *, path: str) -> dict[str, str]:
        """Loads a provider library through the engine."""
        provider = EngineProvider.load(path)
        return {"name": provider.name, "version": provider.version}

    def do_load_variant(self, *, path: str, environ: dict[str, str]) -> dict[str, str]:
        """Loads a fresh copy of a library, which reads these environment variables while it is loaded."""
        os.environ.update(environ)
        with tempfile.TemporaryDirectory(prefix="kvlink-variant-") as folder:
            return self.do_load_library(path=shutil.copy(path, folder))

    def do_raw_acceptor(
        self, *, path: str, options: dict[str, str], device: str, session: str, key: str, blob: str
    ) -> str:
        """Opens an engine and the accepting side of one link, without a control plane; returns the link's blob."""
        channel = EngineChannel.open(EngineProvider.load(path), options=options, device=device)
        self._bare = open_some_memory(channel, device)
        peer = channel.peer_open(ACCEPTOR, 1, bytes.fromhex(session), bytes.fromhex(key), "there", "here")
        self._raw += [peer, channel]
        if channel.attributes.connect_both:
            arguments = (base64.b64decode(blob), 30.0)
            threading.Thread(target=_outcome, args=(lambda: peer.connect(*arguments),), daemon=True).start()
        return base64.b64encode(peer.describe()).decode()

    def do_hold_gil(self, *, seconds: float) -> None:
        """Sleeps without giving the interpreter to any other thread."""
        resources.hold_gil(seconds)

    def do_close_by_threads(self, *, count: int, channel: str = MAIN) -> None:
        """Closes a channel from several threads at once."""
        opened = self._channels.pop(channel)
        failures: list[BaseException] = []

        def close() -> None:
            try:
                opened.close()
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=close) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        if failures:
            raise failures[0]
        if any(thread.is_alive() for thread in threads):
            raise ConfigError("a thread hangs in close()")

    def do_fork_and_try(self, *, peer: str, channel: str = MAIN) -> dict[str, str]:
        """Forks; the child tries the calls of channel, peer and region, and reports what each raised."""
        opened, found = self._channels[channel], self._peer(peer, channel)
        region = next(iter(opened.regions.values()))
        ranges = kvlink.ranges(region, found.regions["b"], [[0, 0, 64]])
        calls: dict[str, Callable[[], object]] = {
            "register": lambda: opened.register(np.zeros(4096, np.uint8), name="forked"),
            "connect": lambda: opened.connect(opened.address, timeout=1.0),
            "peers": opened.peers,
            "statistics": opened.statistics,
            "put": lambda: found.put(ranges),
            "get": lambda: found.get(ranges),
            "request": lambda: found.request(b"x", timeout=1.0),
            "notify": lambda: found.notify(b"x"),
            "close region": region.close,
        }
        return resources.in_fork(lambda: {name: _outcome(call) for name, call in calls.items()})


def _outcome(call: Callable[[], object]) -> str:
    try:
        call()
    except BaseException as error:
        return type(error).__name__
    return "nothing"
