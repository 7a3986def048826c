"""Random sequences of register, put, get, notify and close against a plain in-memory model."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

import kvlink

FULL = os.environ.get("KVLINK_TEST_PROFILE") == "full"
SIDES = ("one", "two")
OTHER = {"one": "two", "two": "one"}
SIZES = st.sampled_from((1, 7, 64, 4096, 5001, 70_000))
SECONDS = 20.0


class Side:
    """One channel, its real regions, and what they have to contain."""

    def __init__(self, options: dict[str, object]) -> None:
        self.channel = kvlink.open("host", options=options)
        self.regions: dict[str, kvlink.Region] = {}
        self.memory: dict[str, np.ndarray[Any, np.dtype[np.uint8]]] = {}
        self.model: dict[str, np.ndarray[Any, np.dtype[np.uint8]]] = {}
        self.heard: list[bytes] = []
        self.told: list[bytes] = []
        self.change = threading.Condition()
        self.channel.on_notify = self._on_notify

    def _on_notify(self, peer: kvlink.Peer, message: bytes) -> None:
        with self.change:
            self.heard.append(message)
            self.change.notify_all()

    def wait_heard(self) -> list[bytes]:
        with self.change:
            assert self.change.wait_for(lambda: len(self.heard) >= len(self.told), SECONDS), (self.heard, self.told)
            return list(self.heard)


class Transfers(RuleBasedStateMachine):
    """Two channels in one process; the model is a dictionary of byte arrays a side."""

    options: ClassVar[dict[str, object]] = {}
    allocate = False
    moved: ClassVar[dict[str, int]]

    def __init__(self) -> None:
        super().__init__()
        self.names = (f"r{number}" for number in itertools.count())
        self.stack = contextlib.ExitStack()
        self.sides: dict[str, Side] = {}
        self.seed = 0

    @initialize()
    def open(self) -> None:
        for name in SIDES:
            self.sides[name] = Side(self.options)
            self.stack.callback(self.sides[name].channel.close)
            self.add_region(name, 5001, "rw")
        self.connect()
        # Whatever is drawn later, every sequence moves something both ways.
        for side, put in itertools.product(SIDES, (True, False)):
            local, remote = ("r0", "r1") if side == "one" else ("r1", "r0")
            self.move(side, put, local, remote, [(1, 100, 1000), (3000, 2000, 77)], b"first" if put else None)

    def connect(self) -> None:
        one, two = (self.sides[name] for name in SIDES)
        self.peers = {"one": one.channel.connect(two.channel.address, timeout=SECONDS)}
        deadline = threading.Event()
        for _ in range(2000):
            found = [peer for peer in two.channel.peers().values() if peer.state == "connected"]
            if found:
                break
            deadline.wait(0.005)
        (self.peers["two"],) = found

    @rule(side=st.sampled_from(SIDES), size=SIZES, access=st.sampled_from(("rw", "rw", "r", "w")))
    def register(self, side: str, size: int, access: str) -> None:
        self.add_region(side, size, access)

    def add_region(self, side: str, size: int, access: str) -> None:
        self.seed += 1
        name = next(self.names)
        here = self.sides[side]
        content = np.random.default_rng(self.seed).integers(0, 256, size, dtype=np.uint8)
        if self.allocate:
            here.regions[name] = here.channel.allocate(size, name=name, access=access)
            here.memory[name] = np.frombuffer(here.regions[name].buffer(), dtype=np.uint8)[:size]
        else:
            here.memory[name] = np.empty(size, dtype=np.uint8)
            here.regions[name] = here.channel.register(here.memory[name], name=name, access=access)
        here.memory[name][:] = content
        here.model[name] = content.copy()

    def pick(self, data: st.DataObject, side: str) -> str:
        """Draws a region of a side; makes one when there is none."""
        if not self.sides[side].model:
            self.add_region(side, 4096, "rw")
        return data.draw(st.sampled_from(sorted(self.sides[side].model)))

    @rule(side=st.sampled_from(SIDES), data=st.data())
    def close_region(self, side: str, data: st.DataObject) -> None:
        here, name = self.sides[side], self.pick(data, side)
        here.regions.pop(name).close()
        np.testing.assert_array_equal(here.memory.pop(name), here.model.pop(name))

    @rule(side=st.sampled_from(SIDES), value=st.integers(0, 255), data=st.data())
    def write_own(self, side: str, value: int, data: st.DataObject) -> None:
        here, name = self.sides[side], self.pick(data, side)
        at = data.draw(st.integers(0, len(here.model[name]) - 1))
        here.memory[name][at:] = value
        here.model[name][at:] = value

    @rule(
        side=st.sampled_from(SIDES),
        put=st.booleans(),
        data=st.data(),
        count=st.integers(0, 6),
        note=st.one_of(st.none(), st.binary(max_size=20)),
    )
    def transfer(self, side: str, put: bool, data: st.DataObject, count: int, note: bytes | None) -> None:
        local, remote = self.pick(data, side), self.pick(data, OTHER[side])
        sizes = len(self.sides[side].model[local]), len(self.sides[OTHER[side]].model[remote])
        self.move(side, put, local, remote, self.draw_blocks(data, *sizes, count, put), note)

    def move(
        self, side: str, put: bool, local: str, remote: str, blocks: list[tuple[int, int, int]], note: bytes | None
    ) -> None:
        here, there = self.sides[side], self.sides[OTHER[side]]
        access = there.regions[remote].access
        peer = self.peers[side]
        remote_region = peer.wait_region(remote, SECONDS)
        assert remote_region.nbytes == len(there.model[remote])
        ranges = kvlink.ranges(here.regions[local], remote_region, np.array(blocks, dtype=np.int64).reshape(-1, 3))
        allowed = ("w" if put else "r") in access or not any(length for _, _, length in blocks)
        try:
            transfer = peer.put(ranges, notify=note) if put else peer.get(ranges)
            assert transfer.wait(SECONDS)
        except (kvlink.RangeError, kvlink.RegionRevoked):
            assert not allowed
            return
        assert allowed or not blocks
        self.moved["put" if put else "get"] += any(length for _, _, length in blocks)
        assert transfer.result().nbytes == sum(length for _, _, length in blocks)
        source, target = (here.model[local], there.model[remote]) if put else (there.model[remote], here.model[local])
        for local_offset, remote_offset, length in blocks:
            read, write = (local_offset, remote_offset) if put else (remote_offset, local_offset)
            target[write : write + length] = source[read : read + length]
        if put and note is not None:
            there.told.append(note)

    def draw_blocks(
        self, data: st.DataObject, local: int, remote: int, count: int, put: bool
    ) -> list[tuple[int, int, int]]:
        """Blocks inside both regions that do not overlap where they are written: their order is not defined."""
        blocks: list[tuple[int, int, int]] = []
        target, other = (remote, local) if put else (local, remote)
        at = 0
        for _ in range(count):
            if at >= target:
                break
            start = data.draw(st.integers(at, target - 1))
            length = data.draw(st.integers(0, min(target - start, other)))
            source = data.draw(st.integers(0, other - length))
            blocks.append((source, start, length) if put else (start, source, length))
            at = start + length
        order = data.draw(st.permutations(range(len(blocks))))
        return [blocks[index] for index in order]

    @rule(side=st.sampled_from(SIDES), message=st.binary(max_size=100))
    def notify(self, side: str, message: bytes) -> None:
        self.peers[side].notify(message)
        self.sides[OTHER[side]].told.append(message)

    @rule(side=st.sampled_from(SIDES), data=st.data())
    def refuse(self, side: str, data: st.DataObject) -> None:
        far = OTHER[side]
        here, there = self.sides[side], self.sides[far]
        local, remote = self.pick(data, side), self.pick(data, far)
        remote_region = self.peers[side].wait_region(remote, SECONDS)
        over = data.draw(st.integers(1, 2**62))
        block = data.draw(
            st.sampled_from(
                (
                    (0, len(there.model[remote]), over),
                    (len(here.model[local]), 0, over),
                    (0, 0, min(len(here.model[local]), len(there.model[remote])) + over),
                )
            )
        )
        ranges = kvlink.ranges(here.regions[local], remote_region, np.array([block], dtype=np.int64))
        with pytest.raises(kvlink.RangeError):
            self.peers[side].put(ranges)

    @rule(side=st.sampled_from(SIDES))
    def reconnect(self, side: str) -> None:
        self.check_notes()
        self.peers[side].close()
        for name in SIDES:
            assert self.peers[name] is not None
        wait = threading.Event()
        for _ in range(2000):
            if not any(self.sides[name].channel.peers() for name in SIDES):
                break
            wait.wait(0.005)
        self.connect()

    def check_notes(self) -> None:
        for side in self.sides.values():
            assert side.wait_heard() == side.told

    @invariant()
    def everything_is_as_the_model_says(self) -> None:
        for side in self.sides.values():
            for name, content in side.model.items():
                np.testing.assert_array_equal(side.memory[name], content)

    def teardown(self) -> None:
        try:
            if self.sides:
                self.check_notes()
        finally:
            for side in self.sides.values():
                side.memory.clear()
            self.stack.close()


@pytest.mark.parametrize(
    ("path", "allocate"), [("tcp", False), ("cma", False), ("shm", True), ("auto", False), ("auto", True)]
)
def test_random_sequences(path: str, allocate: bool) -> None:
    moved = {"put": 0, "get": 0}
    machine = type(f"Transfers_{path}", (Transfers,), {"options": {"path": path}, "allocate": allocate, "moved": moved})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=60 if FULL else 12,
            stateful_step_count=40 if FULL else 25,
            deadline=None,
            derandomize=not FULL,
            database=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
        ),
    )
    assert min(moved.values()) >= 10, moved
