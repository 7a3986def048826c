"""Two engines that both prefill and decode, with vLLM's defaults and a shared secret; one has hardly any cache."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tools.cluster import EngineSpec, kvlink_config

from e2e.prompts import prompt
from e2e.stage import Decoder, LogMark, Stage, cores, settle
from e2e.talk import ask, eventually, hand_off

pytestmark = [pytest.mark.engine, pytest.mark.slow]

FEW_BLOCKS = 24


class Pair(Stage):
    """The engines of this file."""

    large: Decoder
    small: Decoder

    def start(self, model: Path) -> None:
        secret = self.folder / "secret"
        secret.write_text(secrets.token_hex(32))
        first, second = cores()

        def spec(name: str, core: str, *arguments: str) -> EngineSpec:
            trace = str(self.folder / f"{name}.jsonl")
            config = kvlink_config("kv_both", kvlink_trace_file=trace, kvlink_secret_file=str(secret))
            return EngineSpec(
                name, model, cores=core, max_model_len=2048, prefix_caching=True, transfer=config, args=arguments
            )

        self.large = self.start_decoder(spec("large", first))
        self.small = self.start_decoder(spec("small", second, "--num-gpu-blocks-override", str(FEW_BLOCKS)))
        self.ready()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Pair]:
    with Pair(tmp_path_factory.mktemp("disagg-both")) as pair:
        pair.start(model)
        yield pair


@pytest.mark.parametrize(("source", "target"), [("large", "small"), ("small", "large")])
def test_either_engine_prefills_for_the_other(pair: Pair, source: str, target: str) -> None:
    prefill, decoder = getattr(pair, source).engine, getattr(pair, target)
    tokens = prompt(500 if source == "large" else 501, seed=20)
    params = hand_off(prefill, tokens)
    with decoder.computes(1):
        answer = ask(decoder.engine, tokens, kv_transfer_params=params)
    (pull,) = decoder.pulls(1)
    assert (pull.outcome, pull.pulled_tokens) == ("ok", len(tokens) - 1)
    assert answer.ids == ask(prefill, tokens).ids
    settle(prefill, decoder.engine)


def test_parameters_without_the_secrets_seal_are_refused(pair: Pair) -> None:
    tokens = prompt(300, seed=30)
    true = hand_off(pair.large.engine, tokens)
    unsealed = {name: value for name, value in true.items() if name != "kvlink_seal"}
    changed = {**true, "remote_num_tokens": 299}
    assert changed != true
    for params, word in ((unsealed, "no seal"), (changed, "seal does not fit")):
        log = LogMark(pair.small.engine)
        answer = ask(pair.small.engine, tokens, kv_transfer_params=params)
        assert answer.ids == ask(pair.large.engine, tokens).ids
        assert eventually("a warning", lambda log=log, word=word: word in log.text(), 10)
    pair.small.pulls(0)
    eventually("the hand-off expires", lambda: pair.large.engine.metric("vllm:kvlink_leases_expired_total") == 1)
    settle(pair.large.engine, pair.small.engine)


def test_preempted_requests_answer_as_they_would_alone(pair: Pair) -> None:
    """Eight answers that grow beyond the small cache together: some are preempted after they were pulled."""
    prompts = [prompt(370 + i, seed=40) for i in range(8)]
    before = pair.small.engine.metric("vllm:num_preemptions_total")

    def split(tokens: list[int]) -> list[int]:
        params = hand_off(pair.large.engine, tokens)
        return ask(pair.small.engine, tokens, max_tokens=200, kv_transfer_params=params).ids

    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(split, prompts))
    assert pair.small.engine.metric("vllm:num_preemptions_total") > before
    assert answers == [ask(pair.large.engine, tokens, max_tokens=200).ids for tokens in prompts]
    assert "ok" in {pull.outcome for pull in pair.small.pulls(len(prompts))}
    settle(pair.large.engine, pair.small.engine)
