"""The scheduler's half: decides what is offered and what is pulled; touches no memory and no network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.v1.request import RequestStatus

from kvlink_vllm import params as offers
from kvlink_vllm.log import get_logger
from kvlink_vllm.metadata import Hold, KVLinkHandshake, KVLinkMetadata, Read, Track
from kvlink_vllm.settings import Settings
from kvlink_vllm.stats import KVLinkStats

logger = get_logger()

_FINISHED = (RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_STOPPED)


@dataclass(frozen=True)
class _Wanted:
    """A request whose prompt lies at a prefiller and has not been pulled yet."""

    offer: offers.HandOff
    digest: bytes


class KVLinkScheduler:
    """Scheduler side of the connector.

    Args:
        vllm_config: vLLM's configuration.
        settings: The connector's.
        block_size: Tokens of a block.
    """

    def __init__(self, vllm_config: Any, settings: Settings, block_size: int) -> None:
        transfer = vllm_config.kv_transfer_config
        self._produces = bool(transfer.is_kv_producer)
        self._consumes = bool(transfer.is_kv_consumer)
        self._engine_id = str(transfer.engine_id)
        self._tp_size = int(vllm_config.parallel_config.tensor_parallel_size)
        self._block_size = block_size
        self._secret = settings.shared_secret()
        self._addresses: tuple[str, ...] = ()
        self._wanted: dict[str, _Wanted] = {}
        self._meta = KVLinkMetadata()
        self.stats = KVLinkStats()

    def set_addresses(self, handshakes: list[KVLinkHandshake]) -> None:
        """Takes the addresses of this engine's workers.

        Args:
            handshakes: One a worker.
        """
        self._addresses = tuple(item.address for item in sorted(handshakes, key=lambda item: item.rank))
        logger.info("kvlink: workers listen at %s", ", ".join(self._addresses))

    # Decoder

    def on_new_request(self, request: Any) -> None:
        """Looks at a request's parameters once, when it comes (0.18: when it is first scheduled).

        Args:
            request: vLLM's request.
        """
        params = request.kv_transfer_params
        if not offers.wants_pull(params) or request.request_id in self._wanted:
            return
        try:
            if not self._consumes:
                raise offers.ParamsError("this engine's kv_role is kv_producer")
            offer = offers.parse(params, tp_size=self._tp_size, secret=self._secret)
            digest = offers.prompt_digest(request)
            if digest is None:
                raise offers.ParamsError("a prompt of embeddings cannot be handed over")
        except offers.ParamsError as error:
            # Taking the mark off keeps every later call from looking again.
            params["do_remote_prefill"] = False
            self.stats.fail("params", request.num_prompt_tokens)
            logger.warning(
                "kvlink: request %s computes its prompt here: its kv_transfer_params are refused: %s",
                request.request_id,
                error,
            )
            return
        self._wanted[request.request_id] = _Wanted(offer, digest)
        self._meta.tracks.append(Track(request.request_id, offer.id, offer.addresses))

    def matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """Tells how many tokens beyond the local ones will be pulled: all but the last of the prompt.

        Args:
            request: vLLM's request.
            num_computed_tokens: Tokens in the local prefix cache.

        Returns:
            The count, and whether they come between steps.
        """
        self.on_new_request(request)
        if request.request_id not in self._wanted or getattr(request, "skip_reading_prefix_cache", False):
            return 0, False
        count = int(request.num_prompt_tokens) - 1 - num_computed_tokens
        return (count, True) if count > 0 else (0, False)

    def after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Orders the pull, or lets the hand-off go when nothing is to be pulled.

        Args:
            request: vLLM's request.
            blocks: All its blocks.
            num_external_tokens: Tokens to pull.
        """
        wanted = self._wanted.pop(request.request_id, None)
        if wanted is None:
            return
        request.kv_transfer_params["do_remote_prefill"] = False
        if num_external_tokens <= 0:
            self._meta.drops.append(request.request_id)
            return
        total = int(request.num_prompt_tokens) - 1
        local = total - num_external_tokens
        first = local // self._block_size
        last = -(-total // self._block_size)
        self._meta.reads.append(
            Read(
                request_id=request.request_id,
                handoff=wanted.offer.id,
                addresses=wanted.offer.addresses,
                blocks=list(blocks.get_block_ids()[0][first:last]),
                first=first,
                tokens=total,
                local_tokens=local,
                prompt_tokens=total + 1,
                digest=wanted.digest,
            )
        )

    # Prefiller

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Offers a finished prefill, and forgets a decode that ended before its pull.

        Args:
            request: vLLM's request.
            block_ids: Blocks of its computed tokens.

        Returns:
            Whether the blocks stay until the workers report the request, and the answer's parameters.
        """
        if self._wanted.pop(request.request_id, None) is not None:
            self._meta.drops.append(request.request_id)
            return False, None
        if not self._produces or not offers.wants_prefill(request.kv_transfer_params):
            return False, None
        if request.status not in _FINISHED or not block_ids or not self._addresses:
            return False, None
        digest = offers.prompt_digest(request)
        if digest is None:
            logger.warning("kvlink: request %s has a prompt of embeddings; it is not offered", request.request_id)
            return False, None
        tokens = min(int(request.num_computed_tokens), int(request.num_prompt_tokens))
        if tokens <= 0:
            return False, None
        count = -(-tokens // self._block_size)
        offer = offers.HandOff(offers.new_handoff_id(), self._engine_id, self._addresses, tokens)
        answer = offers.offer(offer, self._secret)
        self.stats.add(handoffs=1)
        # Last: a hold that the workers hear of must be one that vLLM was told to keep, and the other way round.
        self._meta.holds.append(Hold(offer.id, request.request_id, list(block_ids[:count]), tokens, digest))
        return True, answer

    # Both

    def take_metadata(self, scheduler_output: Any) -> KVLinkMetadata:
        """Returns this step's instructions and starts afresh.

        Args:
            scheduler_output: The step.
        """
        meta, self._meta = self._meta, KVLinkMetadata()
        meta.idle = not getattr(scheduler_output, "total_num_scheduled_tokens", 1)
        return meta
