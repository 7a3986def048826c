"""Engines that do not fit each other: refused at connect by name, and the requests are computed where they are."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from tools.cluster import Engine, EngineSpec, kvlink_config

from e2e.prompts import prompt
from e2e.stage import Decoder, LogMark, Stage, block_size, cores, settle
from e2e.talk import Exchange, ask, body_of, eventually, hand_off

pytestmark = [pytest.mark.engine, pytest.mark.slow]

TOKENS = prompt(300)


class Trio(Stage):
    """A prefiller, a decoder with another block size, and one with another dtype that is told to fail."""

    prefill: Engine
    blocks: Decoder
    dtype: Decoder

    def start(self, model: Path) -> None:
        first, second = cores()
        self.prefill = self.start_engine(
            EngineSpec("prefill", model, cores=first, transfer=kvlink_config("kv_producer", kvlink_contact=2.0))
        )
        config = kvlink_config("kv_consumer", kvlink_trace_file=str(self.folder / "blocks.jsonl"))
        arguments = ("--block-size", "64")
        self.blocks = self.start_decoder(EngineSpec("blocks", model, cores=second, transfer=config, args=arguments))
        path = str(self.folder / "dtype.jsonl")
        config = kvlink_config("kv_consumer", kvlink_trace_file=path, kvlink_on_load_failure="fail")
        self.dtype = self.start_decoder(EngineSpec("dtype", model, cores=second, dtype="bfloat16", transfer=config))
        self.ready()


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Trio]:
    with Trio(tmp_path_factory.mktemp("disagg-mismatch")) as trio:
        trio.start(model)
        yield trio


def test_another_block_size_is_named_and_the_prompt_recomputed(trio: Trio) -> None:
    ours, theirs = block_size(trio.blocks.engine), block_size(trio.prefill)
    assert ours == 64 != theirs
    log = LogMark(trio.blocks.engine)
    with trio.blocks.computes(len(TOKENS)):
        answer = ask(trio.blocks.engine, TOKENS, kv_transfer_params=hand_off(trio.prefill, TOKENS))
    assert answer.ids == ask(trio.prefill, TOKENS).ids
    (pull,) = trio.blocks.pulls(1)
    assert pull.outcome == "connect"
    told = rf"WARNING.*failed in phase connect.*tokens are recomputed here: .*'block_size'.*\b{ours}\b.*\b{theirs}\b"
    assert eventually("a warning", lambda: re.search(told, log.text()), 10)
    settle(trio.prefill, trio.blocks.engine)


def test_another_dtype_is_named_and_the_request_fails_where_that_is_wanted(trio: Trio) -> None:
    log = LogMark(trio.dtype.engine)
    body = body_of(TOKENS, kv_transfer_params=hand_off(trio.prefill, TOKENS))
    answer = Exchange(trio.dtype.engine, body).read()
    assert answer.status == 500, answer.raw
    told = r"WARNING.*failed in phase connect.*the request fails.*'dtype' differs: ours is 'bfloat16'.*'float32'"
    assert eventually("a warning", lambda: re.search(told, log.text()), 10)
    assert ask(trio.dtype.engine, TOKENS).ids
    settle(trio.prefill, trio.dtype.engine)
