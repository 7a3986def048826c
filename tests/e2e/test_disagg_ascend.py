"""The native connector over each Ascend provider, on the simulator of CANN: the tokens of a single engine.

The caches are vLLM's own on a CPU: large host buffers off every boundary. They go through the staging area, over
simulated RoCE, with none of the simulator's rules relaxed.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tools.cluster import Engine, EngineSpec, Proxy, kvlink_config

from e2e.prompts import prompt
from e2e.simulator import SIMULATED, npus, simulator
from e2e.stage import PATIENCE, Decoder, Stage, block_size, check_pull, cores, settle
from e2e.talk import ask

pytestmark = pytest.mark.engine


class Simulated(Stage):
    """The engines of one provider."""

    reference: Engine
    prefill: Engine
    decoder: Decoder
    proxy: Proxy
    block: int

    def start(self, model: Path, channel: str) -> None:
        first, second = cores()
        env = simulator(self.folder, flavour=SIMULATED[channel], devices=2)
        prefill_npus, decode_npus = npus(1)
        options: dict[str, Any] = {"transfer_channel": channel, "kvlink_host_staging": 256 << 20, "kvlink_link": "roce"}
        self.reference = self.start_engine(EngineSpec("reference", model, cores=first))
        producer = _config("kv_producer", **options)
        self.prefill = self.start_engine(
            EngineSpec("prefill", model, cores=first, transfer=producer, env={**env, **prefill_npus})
        )
        consumer = _config("kv_consumer", kvlink_trace_file=str(self.folder / "pulls.jsonl"), **options)
        self.decoder = self.start_decoder(
            EngineSpec("decode", model, cores=second, transfer=consumer, env={**env, **decode_npus})
        )
        self.proxy = self.start_proxy(self.prefill, self.decoder.engine)
        self.ready()
        self.block = block_size(self.prefill)


def _config(role: str, **options: Any) -> dict[str, Any]:
    config = kvlink_config(role, kvlink_verify=True, **PATIENCE, **options)
    config["kv_connector_extra_config"].pop("kvlink.path")  # the host provider's
    return config


@pytest.fixture(
    scope="module",
    params=[
        channel if channel == "hcomm_onesided" else pytest.param(channel, marks=pytest.mark.slow)
        for channel in SIMULATED
    ],
)
def simulated(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, model: Path
) -> Iterator[Simulated]:
    with Simulated(tmp_path_factory.mktemp(request.param)) as stage:
        stage.start(model, request.param)
        yield stage


def test_tokens_are_the_single_engines(simulated: Simulated) -> None:
    stage = simulated
    for length in (2, 127, 128, 129, 700, 2049, 6000):
        tokens = prompt(length)
        with stage.decoder.computes(1):
            answer = ask(stage.proxy, tokens)
        assert answer.route == "split", (length, answer.headers)
        assert answer.ids == ask(stage.reference, tokens).ids, length
        (pull,) = stage.decoder.pulls(1)
        check_pull(pull, tokens=length, block=stage.block, paths={pull.path})
    settle(stage.prefill, stage.decoder.engine)


def test_several_at_once(simulated: Simulated) -> None:
    stage = simulated
    prompts = [prompt(length, seed=1) for length in (50, 129, 385, 900, 1300)]
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda tokens: ask(stage.proxy, tokens, stream=True), prompts))
    assert [answer.ids for answer in answers] == [ask(stage.reference, tokens).ids for tokens in prompts]
    assert {answer.route for answer in answers} == {"split"}
    stage.decoder.pulls(len(prompts))
    settle(stage.prefill, stage.decoder.engine)
