"""Many threads at once, and processes that fork."""

from __future__ import annotations

import os
import threading
from typing import Any

from ... import errors
from ..._engine_types import Capability
from ..context import Context
from ..layouts import round_up, scattered
from ..suite import case, check
from .semantics import any_operation


def _run_all(*jobs: Any) -> None:
    """Runs functions in threads of their own; raises the first error."""
    failures: list[BaseException] = []

    def guard(job: Any) -> None:
        try:
            job()
        except BaseException as error:
            failures.append(error)

    threads = [
        threading.Thread(target=guard, args=(job,), name=f"kvlink-test-{index}") for index, job in enumerate(jobs)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    check(not any(thread.is_alive() for thread in threads), "a thread hangs")
    if failures:
        raise failures[0]


@case("threads", "eight threads share one connection", timeout=90)
def one_connection(context: Context) -> None:
    """Each moves its own part of the regions back and forth; every byte is where it belongs."""
    threads, rounds = 8, 30 if context.full else 10
    part = round_up(context.align(65_536), 4096)
    pair = context.pair(two_processes=True, nbytes=threads * part)
    pair.a.wait_region(pair.ab, "b")
    operation = any_operation(context)

    def work(index: int) -> None:
        blocks = [
            (index * part + local, index * part + remote, size)
            for local, remote, size in scattered(1000, 40, alignment=context.alignment, seed=index).blocks
        ]
        for _ in range(rounds):
            pair.a.transfer(operation, pair.ab, "a", "b", blocks)

    _run_all(*(lambda index=index: work(index) for index in range(threads)))
    patches = []
    for index in range(threads):
        for local, remote, size in scattered(1000, 40, alignment=context.alignment, seed=index).blocks:
            source, target = (local, remote) if operation == "put" else (remote, local)
            patches.append((index * part + target, 1 if operation == "put" else 2, index * part + source, size))
    if operation == "put":
        pair.b.verify("b", 2, patches)
    else:
        pair.a.verify("a", 1, patches)


@case("threads", "put, get, cancel, register, close and connect at once", timeout=120)
def everything(context: Context) -> None:
    """Nothing crashes, hangs or is left; what is refused is refused with a reason."""
    rounds = 60 if context.full else 20
    pair = context.pair(two_processes=True, nbytes=4 << 20)
    pair.a.wait_region(pair.ab, "b")
    address = pair.b.call("address")
    blocks = scattered(4096, 100, alignment=context.alignment).blocks
    operations = [
        name for name, flag in (("put", Capability.PUT), ("get", Capability.GET)) if flag in context.capabilities
    ]

    def transfers(operation: str) -> None:
        for _ in range(rounds * 3):
            pair.a.transfer(operation, pair.ab, "a", "b", blocks)

    def cancels() -> None:
        for _ in range(rounds):
            number = pair.a.submit(operations[0], pair.ab, "a", "b", blocks)
            pair.a.call("cancel", transfer=number)
            try:
                pair.a.wait(number)
            except errors.TransferCancelled:
                pass

    def regions() -> None:
        nbytes = round_up(65_536, max(1, context.attributes.memory_alignment))
        for index in range(rounds):
            if Capability.LATE_MEMORY in context.capabilities:
                pair.a.memory(f"late{index}", nbytes, index, kind=context.kind)
                pair.a.close_region(f"late{index}", keep=False)

    def reconnects() -> None:
        other = others[0]
        for _ in range(rounds // 4):
            peer = other.connect(address)
            other.call("close_peer", peer=peer)

    def closes() -> None:
        for index in range(rounds // 4):
            others[1].open(channel=f"short{index}")
            others[1].call("connect", address=address, channel=f"short{index}")
            others[1].close(channel=f"short{index}")

    others = [context.local("other"), context.local("third")]
    others[0].open()
    _run_all(*(lambda name=name: transfers(name) for name in operations), cancels, cancels, regions, reconnects, closes)
    pair.b.wait_peers(1)
    context.round_trip(pair)


@case("threads", "peers come and go while another streams", timeout=90)
def connect_while_streaming(context: Context) -> None:
    """A connect or a close on one link does not hold up the transfers of another."""
    pair = context.pair(two_processes=True, nbytes=4 << 20)
    pair.a.wait_region(pair.ab, "b")
    blocks = scattered(65_536, 30, alignment=context.alignment).blocks
    stream = pair.a.stream(any_operation(context), pair.ab, "a", "b", blocks, depth=2)
    other = context.remote("other")
    address = other.open()
    for _ in range(10 if context.full else 4):
        before = pair.a.stream_count(stream)
        peer = pair.a.connect(address)
        pair.a.call("close_peer", peer=peer)
        other.wait_peers(0)
        pair.a.stream_count(stream, before + 1)
    end = pair.a.stream_end(stream, timeout=10, stop=True)
    check(not end["errors"], f"the stream was disturbed: {end['errors'][:1]}")


@case("threads", "a channel closed by several threads", timeout=60)
def closed_by_many(context: Context) -> None:
    """close() from many threads, with work and a connect under way, ends once and for all of them."""
    pair = context.pair(two_processes=True, nbytes=4 << 20)
    pair.a.wait_region(pair.ab, "b")
    stream = pair.a.stream(
        any_operation(context), pair.ab, "a", "b", scattered(65_536, 30, alignment=context.alignment).blocks
    )
    pair.a.stream_count(stream, 1)
    pair.a.call("close_by_threads", count=6)
    pair.a.stream_end(stream, timeout=5.0)
    pair.b.wait_peers(0)


@case("threads", "handles after a fork", timeout=60)
def fork_guard(context: Context) -> None:
    """In the child every call raises ForkedError or does nothing; the parent does not notice."""
    pair = context.pair()
    pair.a.wait_region(pair.ab, "b")
    answers = pair.a.call("fork_and_try", peer=pair.ab)
    check(answers, "the child tried nothing")
    wrong = {name: answer for name, answer in answers.items() if answer != "ForkedError"}
    check(not wrong, f"in the child these calls did not raise ForkedError: {wrong}")
    context.round_trip(pair)
    check(os.getpid() == pair.a.pid, "the test itself runs in the child")
