"""LMCache's GPU connector over the mover: what its cache engine calls to copy chunks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lmcache.v1.gpu_connector.gpu_connectors import GPUConnectorInterface

from kvlink_lmcache import context
from kvlink_lmcache.log import get_logger
from kvlink_lmcache.mover.packing import Packing
from kvlink_lmcache.mover.planes import Geometry, build_pieces
from kvlink_lmcache.mover.transfer import Mover

logger = get_logger()

PackingOf = Callable[[torch.Tensor, Geometry], Packing | None]


class PagedConnector(GPUConnectorInterface):  # type: ignore[misc]
    """Copies chunks between vLLM's paged cache and LMCache's memory objects with plain tensor operations.

    Attributes:
        kvcaches: vLLM's caches in layer order, once they are known.
    """

    def __init__(
        self,
        metadata: Any,
        *,
        layout: str | None = None,
        block_size: int = 0,
        form: str = "blocks",
        packing_of: PackingOf | None = None,
    ) -> None:
        """Prepares for an engine whose caches do not exist yet.

        Args:
            metadata: LMCache's metadata; its ``kv_shape`` is (layers, 1 or 2, chunk, heads, head size).
            layout: LMCache's name of the cache layout, "NHD" or "HND", or None.
            block_size: Tokens of a block as vLLM's cache manager counts them, 0 where nobody said.
            form: How tokens stand in memory objects, "blocks" or "tokens" (see ``transfer``).
            packing_of: Finds out how the engine packs a cache tensor.
        """
        self._metadata = metadata
        layers, _, _, heads, head_size = metadata.kv_shape
        self._layers = int(layers)
        self._geometry = Geometry(block_size, int(heads), int(head_size), bool(metadata.use_mla), layout)
        self._form = form
        self._packing_of = packing_of
        self._mover: Mover | None = None
        self._lock = threading.Lock()
        self.kvcaches: list[Any] | None = None

    # ---- LMCache's interface ----------------------------------------------------------------------------------------
    def initialize_kvcaches_ptr(self, **kwargs: Any) -> None:
        """Takes the caches; they stay the same ones for the engine's life.

        Args:
            **kwargs: ``kvcaches``, a list of caches in layer order.
        """
        if kwargs.get("kvcaches") is not None:
            self.bind(kwargs["kvcaches"])

    def to_gpu(self, memory_obj: Any, start: int, end: int, **kwargs: Any) -> None:
        """Copies one chunk into the cache.

        Args:
            memory_obj: The chunk.
            start: Its first token in the request.
            end: Behind its last token.
            **kwargs: ``slot_mapping`` of the whole request, ``vllm_cached_tokens``, ``kvcaches``.
        """
        self.batched_to_gpu([memory_obj], [start], [end], **kwargs)

    def from_gpu(self, memory_obj: Any, start: int, end: int, **kwargs: Any) -> None:
        """Copies one chunk out of the cache.

        Args:
            memory_obj: The chunk.
            start: Its first token in the request.
            end: Behind its last token.
            **kwargs: ``slot_mapping`` of the whole request, ``kvcaches``.
        """
        self.batched_from_gpu([memory_obj], [start], [end], **kwargs)

    def batched_to_gpu(  # noqa: D102 - the interface's
        self, memory_objs: Any = None, starts: list[int] | None = None, ends: list[int] | None = None, **kwargs: Any
    ) -> None:
        began = time.perf_counter()
        mover, slots = self._prepare(kwargs)
        cached = int(kwargs.get("vllm_cached_tokens", 0) or 0)
        for memory_obj, start, end in zip(memory_objs or (), starts or (), ends or (), strict=True):
            mover.store(_bytes_of(memory_obj), slots[start:end], skip=max(0, cached - start))
        self._report("to", starts, ends, began)

    def batched_from_gpu(  # noqa: D102 - the interface's
        self, memory_objs: Sequence[Any], starts: list[int], ends: list[int], **kwargs: Any
    ) -> None:
        began = time.perf_counter()
        mover, slots = self._prepare(kwargs)
        for memory_obj, start, end in zip(memory_objs, starts, ends, strict=True):
            mover.load(_bytes_of(memory_obj), slots[start:end])
        self._report("from", starts, ends, began)

    def get_shape(self, num_tokens: int) -> torch.Size:
        """Returns the shape of a memory object.

        Args:
            num_tokens: Its tokens.
        """
        shape: torch.Size = self._metadata.get_shapes(num_tokens)[0]
        return shape

    # ---- own --------------------------------------------------------------------------------------------------------
    def bind(self, caches: Sequence[Any]) -> Mover:
        """Looks at the caches once, and makes LMCache's idea of a token's size fit them.

        Args:
            caches: Per layer a tensor, or a tuple or list of tensors.

        Returns:
            The mover for them.

        Raises:
            LayoutError: Caches of an unknown form.
            PackingError: A packing that cannot be found out.
        """
        with self._lock:
            if self._mover is None:
                packing = self._packing_of(_first_tensor(caches), self._geometry) if self._packing_of else None
                pieces = build_pieces(caches, self._geometry, packing)
                self._mover = Mover(pieces, form=self._form)
                self.kvcaches = list(caches)
                self._fit(self._mover.token_bytes)
                context.set_layout(self._mover.describe())
                logger.info(
                    "KV mover: %d layers, %d bytes a token, blocks of %d tokens, objects hold %s",
                    len(caches), self._mover.token_bytes, self._mover.block_size, self._form,
                )  # fmt: skip
            return self._mover

    def _fit(self, token_bytes: int) -> None:
        """Corrects ``kv_shape`` where a model keeps more for a token than vLLM's head size says (sparse attention)."""
        layers, parts, chunk, heads, head_size = self._metadata.kv_shape
        itemsize = self._metadata.kv_dtype.itemsize
        if layers * parts * heads * head_size * itemsize == token_bytes:
            return
        width = -(-token_bytes // (layers * parts * heads * itemsize))
        logger.info(
            "a token of this model takes %d bytes; LMCache assumed %d and is told so",
            token_bytes, layers * parts * heads * head_size * itemsize,
        )  # fmt: skip
        self._metadata.kv_shape = (layers, parts, chunk, heads, width)

    def _prepare(self, kwargs: dict[str, Any]) -> tuple[Mover, list[int]]:
        mover = self._mover
        if mover is None:
            if kwargs.get("kvcaches") is None:
                raise ValueError("the mover was not told vLLM's caches: kvcaches is missing")
            mover = self.bind(kwargs["kvcaches"])
        slots: list[int] = kwargs["slot_mapping"].tolist()
        return mover, slots

    def _report(self, way: str, starts: list[int] | None, ends: list[int] | None, began: float) -> None:
        tokens = sum(ends or ()) - sum(starts or ())
        logger.debug("mover: %d tokens %s the cache in %.2f ms", tokens, way, (time.perf_counter() - began) * 1e3)


def _first_tensor(caches: Sequence[Any]) -> torch.Tensor:
    first = caches[0]
    tensor: torch.Tensor = first[0] if isinstance(first, (tuple, list)) else first
    return tensor


def _bytes_of(memory_obj: Any) -> torch.Tensor:
    raw: torch.Tensor = memory_obj.raw_tensor
    return raw.view(torch.uint8).view(-1)[: memory_obj.get_size()]
