"""A prefiller with short leases, a decoder and a proxy, of which some get killed and are started again."""

from __future__ import annotations

from pathlib import Path

from tools.cluster import Engine, EngineSpec, Proxy, Pull, kvlink_config

from e2e.prompts import prompt
from e2e.stage import Decoder, Stage, cores
from e2e.talk import Answer, ask, eventually

LENGTHS = (20, 33, 64, 100, 127, 128, 129, 150, 200, 257, 300, 384, 450, 600, 700)
PROMPTS = [prompt(length, seed=10) for length in LENGTHS]
MARK = prompt(21, seed=11)  # nobody else's length
CONTACT, LEASE = 2.0, 4.0
# Tokens of the reference's answers: enough for a client to leave in the middle of one.
LONG = 40


class Pair(Stage):
    """The engines; killed ones are started again by ``revive``."""

    prefill: Engine
    decoder: Decoder
    proxy: Proxy
    expected: dict[int, list[int]]

    def start(self, model: Path) -> None:
        first, second = cores()
        patience = {"kvlink_peer_timeout": 10.0, "kvlink_request_timeout": 10.0}
        producer = kvlink_config("kv_producer", kvlink_contact=CONTACT, kvlink_lease=LEASE, **patience)
        trace = str(self.folder / "pulls.jsonl")
        consumer = kvlink_config("kv_consumer", kvlink_trace_file=trace, kvlink_handoff_wait=3.0, **patience)
        self.prefill = self.start_engine(EngineSpec("prefill", model, cores=first, transfer=producer))
        self.decoder = self.start_decoder(EngineSpec("decode", model, cores=second, transfer=consumer))
        self.proxy = self.start_proxy(self.prefill, self.decoder.engine)
        self.ready()
        # The prefiller is a whole engine: a plain request to it is the reference.
        self.expected = {len(tokens): ask(self.prefill, tokens, max_tokens=LONG).ids for tokens in PROMPTS}

    @property
    def decode(self) -> Engine:
        return self.decoder.engine

    def right(self, answer: Answer, tokens: list[int]) -> bool:
        """Whether an answer is whole and its tokens, however few were asked for, are the reference's."""
        same = bool(answer.ids) and answer.ids == self.expected[len(tokens)][: len(answer.ids)]
        return same and answer.choices[0].finish_reason is not None

    def revive(self) -> None:
        """Starts what a test killed, and waits until the proxy splits requests again."""
        if self.prefill.returncode is not None:
            self.prefill = self.restart(self.prefill)
        if self.decode.returncode is not None:
            self.decoder.engine = self.restart(self.decode)
        self.ready()
        eventually("requests are split", lambda: ask(self.proxy, MARK, max_tokens=1).route == "split")
        # Its record is the last one of all that came before.
        pulls: list[Pull] = []
        while not any(pull.prompt_tokens == len(MARK) for pull in pulls):
            pulls = self.decoder.trace.take(1, timeout=20)
            assert pulls, "no record of a pull"
