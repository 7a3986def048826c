"""vLLM's own scheduler and block manager around the real connector; only the model is made up.

The "model" writes a value that depends on the whole prefix into every slot it computes, and its next token depends on
every slot of the request's cache as it is: a block that did not come, or came from elsewhere, changes the text.
"""

from __future__ import annotations

import itertools
import json
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch
from vllm.config import KVTransferConfig, set_current_vllm_config
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from kvlink_vllm import connector as connector_module
from kvlink_vllm.connector import KVLinkConnector

BLOCK, HEADS, HEAD, LAYERS = 32, 2, 32, 2
VOCABULARY = 50_021


def model_folder(folder: Path) -> Path:
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": HEAD,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class RealEngine:
    """One engine of one rank."""

    def __init__(
        self,
        folder: Path,
        role: str | None,
        *,
        blocks: int = 64,
        asynchronous: bool = False,
        prefix_caching: bool = False,
        batched: int = 128,
        sequences: int = 16,
        **extra: Any,
    ) -> None:
        transfer = None
        if role is not None:
            transfer = KVTransferConfig(
                kv_connector="KVLinkConnector",
                kv_connector_module_path="kvlink_vllm",
                kv_role=role,
                kv_connector_extra_config={"transfer_channel": "host", **extra},
            )
        self.config = EngineArgs(
            model=str(folder),
            skip_tokenizer_init=True,
            enforce_eager=True,
            dtype="float32",
            block_size=BLOCK,
            max_model_len=1024,
            max_num_batched_tokens=batched,
            max_num_seqs=sequences,
            enable_prefix_caching=prefix_caching,
            enable_chunked_prefill=True,
            kv_transfer_config=transfer,
        ).create_engine_config()
        self.config.scheduler_config.async_scheduling = asynchronous
        self.config.cache_config.num_gpu_blocks = blocks
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=HEADS, head_size=HEAD, dtype=torch.float32)
        names = [f"model.layers.{i}.self_attn.attn" for i in range(LAYERS)]
        caches = KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(names, spec)])
        self.cache = torch.full((LAYERS, blocks, HEADS, BLOCK, 2 * HEAD), -1.0)
        self.worker: KVLinkConnector | None = None
        with set_current_vllm_config(self.config):
            if role is not None:
                original = connector_module._tp_rank
                connector_module._tp_rank = lambda: 0
                try:
                    self.worker = KVLinkConnector(self.config, KVConnectorRole.WORKER, caches)
                finally:
                    connector_module._tp_rank = original
                self.worker.register_kv_caches({name: self.cache[i] for i, name in enumerate(names)})
            kind = AsyncScheduler if asynchronous else Scheduler
            self.scheduler = kind(
                vllm_config=self.config,
                kv_cache_config=caches,
                structured_output_manager=StructuredOutputManager(self.config),
                block_size=BLOCK,
                log_stats=True,
            )
        if self.worker is not None:
            metadata = {(0, 0): self.worker.get_handshake_metadata()}
            self.scheduler.get_kv_connector().set_xfer_handshake_metadata_pp_aware(metadata)
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(BLOCK, sha256) if prefix_caching else None
        self._depth = 2 if asynchronous else 1
        self._queue: deque[tuple[Any, ModelRunnerOutput]] = deque()
        # The worker's view of each request.
        self._tokens: dict[str, list[int]] = {}
        self._blocks: dict[str, list[int]] = {}
        self.texts: dict[str, list[int]] = {}
        self.answers: dict[str, Any] = {}
        self.reasons: dict[str, Any] = {}
        self.computed: dict[str, int] = {}
        self.stats: dict[str, Any] = {}
        self.free_at_start = self.free_blocks()

    def free_blocks(self) -> int:
        return int(self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())

    def add(self, request_id: str, prompt: list[int], params: Any = None, *, tokens: int = 8, **extra: Any) -> Request:
        sampling = SamplingParams(
            max_tokens=tokens,
            ignore_eos=True,
            temperature=0.0,
            extra_args={"kv_transfer_params": params} if params is not None else None,
            **extra,
        )
        request = Request(
            request_id=request_id,
            prompt_token_ids=prompt,
            sampling_params=sampling,
            pooling_params=None,
            block_hasher=self._hasher,
        )
        self.scheduler.add_request(request)
        self.texts[request_id] = []
        return request

    def abort(self, request_id: str) -> None:
        self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)

    def step(self) -> None:
        """What EngineCore does: with async scheduling the next step is scheduled before the last one's output is in."""
        if self.scheduler.has_requests():
            output = self.scheduler.schedule()
            self._queue.appendleft((output, self._execute(output)))
            if len(self._queue) < self._depth and self.scheduler.has_requests():
                return
        if self._queue:
            self._update(*self._queue.pop())

    def busy(self) -> bool:
        return bool(self._queue) or self.scheduler.has_requests()

    def _update(self, scheduled: Any, result: ModelRunnerOutput) -> None:
        for outputs in self.scheduler.update_from_output(scheduled, result).values():
            for output in outputs.outputs:
                self.texts[output.request_id] += output.new_token_ids
                if output.finish_reason is not None:
                    self.reasons[output.request_id] = output.finish_reason
                    self.answers[output.request_id] = output.kv_transfer_params
            stats = outputs.scheduler_stats
            for name, value in ((stats.kv_connector_stats if stats else None) or {}).items():
                if isinstance(value, int):
                    self.stats[name] = self.stats.get(name, 0) + value
                elif isinstance(value, dict):
                    for reason, count in value.items():
                        self.stats[reason] = self.stats.get(reason, 0) + count

    def _execute(self, scheduled: Any) -> ModelRunnerOutput:
        if self.worker is None:
            return self._forward(scheduled)
        self.worker.handle_preemptions(scheduled.kv_connector_metadata)
        self.worker.bind_connector_metadata(scheduled.kv_connector_metadata)
        result = self._forward(scheduled)
        self.worker.start_load_kv(None)
        self.worker.wait_for_save()
        transfers = self.worker.get_transfer_results(scheduled.finished_req_ids)
        connector = KVConnectorOutput(
            finished_sending=transfers.finished_sending,
            finished_recving=transfers.finished_recving,
            failed_recving=transfers.failed_recving,
            invalid_block_ids=self.worker.get_block_ids_with_load_errors(),
            kv_connector_stats=self.worker.get_kv_connector_stats(),
        )
        self.worker.clear_connector_metadata()
        if result is EMPTY_MODEL_RUNNER_OUTPUT:
            return ModelRunnerOutput.with_kv_conn_output_only(connector)
        result.kv_connector_output = connector
        return result

    def _forward(self, scheduled: Any) -> ModelRunnerOutput:
        for request_id in scheduled.finished_req_ids:
            self._tokens.pop(request_id, None)
            self._blocks.pop(request_id, None)
        starts: dict[str, int] = {}
        for new in scheduled.scheduled_new_reqs:
            self._tokens[new.req_id] = list(new.prompt_token_ids)
            self._blocks[new.req_id] = list(new.block_ids[0])
            starts[new.req_id] = new.num_computed_tokens
        cached = scheduled.scheduled_cached_reqs
        for index, request_id in enumerate(cached.req_ids):
            fresh = cached.new_block_ids[index]
            if request_id in cached.resumed_req_ids:
                self._blocks[request_id] = list(fresh[0])
            elif fresh is not None:
                self._blocks[request_id] += fresh[0]
            starts[request_id] = cached.num_computed_tokens[index]
        if not scheduled.num_scheduled_tokens:
            return EMPTY_MODEL_RUNNER_OUTPUT
        sampled: list[list[int]] = []
        for request_id, count in scheduled.num_scheduled_tokens.items():
            tokens = self._tokens[request_id]
            begin = starts[request_id]
            for position in range(begin, begin + count):
                self._slot(request_id, position)[:] = prefix_value(tokens[: position + 1])
            self.computed[request_id] = self.computed.get(request_id, 0) + count
            if begin + count < len(tokens):
                sampled.append([])  # a chunk of the prompt
                continue
            total = sum(
                int(self._slot(request_id, position).double().mean()) * (position + 1)
                for position in range(len(tokens))
            )
            token = total % VOCABULARY
            tokens.append(token)
            sampled.append([token])
        ids = list(scheduled.num_scheduled_tokens)
        return ModelRunnerOutput(
            req_ids=ids, req_id_to_index={one: i for i, one in enumerate(ids)}, sampled_token_ids=sampled
        )

    def _slot(self, request_id: str, position: int) -> torch.Tensor:
        return self.cache[:, self._blocks[request_id][position // BLOCK], :, position % BLOCK]

    def held(self) -> dict[str, int]:
        return {} if self.worker is None else self.worker._runner.counts()

    def close(self) -> None:
        if self.worker is not None:
            self.worker.shutdown()
        self.scheduler.shutdown()


def prefix_value(prefix: list[int]) -> float:
    total = 0
    for token in prefix:
        total = (total * 31 + token) % 65_521
    return float(total)


def run(*engines: RealEngine, until: Any = None, timeout: float = 60.0) -> None:
    deadline = time.monotonic() + timeout
    while any(engine.busy() for engine in engines) if until is None else not until():
        assert time.monotonic() < deadline, [engine.scheduler.requests for engine in engines]
        for engine in engines:
            engine.step()
        time.sleep(0.0005)


counter = itertools.count()


def prefill(engine: RealEngine, prompt: list[int]) -> dict[str, Any]:
    request_id = f"p{next(counter)}"
    engine.add(request_id, prompt, {"do_remote_decode": True, "do_remote_prefill": False}, tokens=1)
    run(engine, until=lambda: request_id in engine.answers)
    answer = engine.answers[request_id]
    assert answer is not None
    return json.loads(json.dumps(answer))
