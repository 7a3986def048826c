"""Caches in every layout the mover knows, each with its own plain rule for where a token's values are."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from kvlink_lmcache.mover.packing import discover
from kvlink_lmcache.mover.planes import Geometry, build_pieces


@dataclass
class Cache:
    """A paged cache and the reference's way into it.

    Attributes:
        caches: As vLLM registers them.
        geometry: What the engine says.
        packing: For packed caches.
        rules: (kind, layer, function(slot) -> the token's values as views).
    """

    caches: list
    geometry: Geometry
    blocks: int
    packing: object = None
    rules: list = field(default_factory=list)

    def pieces(self):
        return build_pieces(self.caches, self.geometry, self.packing)

    def token(self, slot: int) -> torch.Tensor:
        """All values of a token: K of all layers, then V of all layers, as float64."""
        return torch.cat([rule(slot).reshape(-1).double() for _, _, rule in sorted(self.rules, key=lambda r: r[:2])])

    def everything(self) -> torch.Tensor:
        return torch.stack([self.token(slot) for slot in range(self.blocks * self.geometry.block_size)])


def _fill(shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-999, 999, shape, generator=generator).to(dtype)


def packed(layers, blocks, heads, size, head, dtype, seed, *, shared=True, permute=False):
    """vLLM's CPU cache: [blocks, heads, block_size, 2 * head_size], packed as for "vec", or by any permutation."""
    count = size * 2 * head
    order = torch.randperm(count, generator=torch.Generator().manual_seed(7)) if permute else torch.arange(count)

    def place(token, channel, half):
        inside = channel * size + token if half == 0 else size * head + token * head + channel
        return int(order[inside])

    def write(key, value, cache):
        flat = cache.view(heads, count)
        for half, values in ((0, key), (1, value)):
            for token in range(values.shape[0]):
                where = torch.tensor([place(token, channel, half) for channel in range(head)])
                flat[:, where] = values[token]

    storage = _fill((layers, blocks, heads, size, 2 * head), dtype, seed)
    caches = [storage[layer] if shared else storage[layer].clone() for layer in range(layers)]
    packing = discover(write, heads=heads, tokens=size, head_size=head, dtype=dtype)
    made = Cache(caches, Geometry(size, heads, head, layout="HND"), blocks, packing)
    for layer, tensor in enumerate(caches):
        for half in (0, 1):
            places = [torch.tensor([place(t, c, half) for c in range(head)]) for t in range(size)]
            rows = tensor.view(blocks, heads, count)
            made.rules.append((half, layer, lambda slot, r=rows, p=places: r[slot // size][:, p[slot % size]]))
    return made


def pairs(layers, blocks, heads, size, head, dtype, seed, *, heads_first=False):
    """Ascend's (k, v) tuples of [blocks, block_size, heads, head_size], or heads first."""
    shape = (blocks, heads, size, head) if heads_first else (blocks, size, heads, head)
    caches = [(_fill(shape, dtype, seed + 2 * n), _fill(shape, dtype, seed + 2 * n + 1)) for n in range(layers)]
    made = Cache(caches, Geometry(size, heads, head, layout="HND" if heads_first else "NHD"), blocks)
    for layer, both in enumerate(caches):
        for kind, tensor in enumerate(both):
            view = tensor.transpose(1, 2) if heads_first else tensor
            made.rules.append((kind, layer, lambda slot, v=view: v[slot // size, slot % size]))
    return made


def halves(layers, blocks, heads, size, head, dtype, seed, *, second=False):
    """One tensor with a dimension of two: [2, blocks, ...] or [blocks, 2, ...]."""
    shape = (blocks, 2, size, heads, head) if second else (2, blocks, size, heads, head)
    caches = [_fill(shape, dtype, seed + n) for n in range(layers)]
    made = Cache(caches, Geometry(size, heads, head, layout="NHD"), blocks)
    for layer, tensor in enumerate(caches):
        for kind in (0, 1):
            view = tensor[:, kind] if second else tensor[kind]
            made.rules.append((kind, layer, lambda slot, v=view: v[slot // size, slot % size]))
    return made


def latent(layers, blocks, _heads, size, head, dtype, seed, *, parts=(1,), other=None):
    """MLA: one [blocks, block_size, width] tensor, or Ascend's [blocks, block_size, 1, width] each."""
    caches = []
    for layer in range(layers):
        if parts == (1,):
            caches.append(_fill((blocks, size, head), dtype, seed + layer))
        else:
            caches.append(
                tuple(
                    _fill((blocks, size, 1, head * part), other if other and n == 2 else dtype, seed + 9 * layer + n)
                    for n, part in enumerate(parts)
                )
            )
    made = Cache(caches, Geometry(size, 1, head, mla=True), blocks)
    for layer, tensors in enumerate(caches):
        for number, tensor in enumerate(tensors if isinstance(tensors, tuple) else (tensors,)):
            rank = (0, layer * 10 + number)
            made.rules.append((*rank, lambda slot, v=tensor: v[slot // size, slot % size]))
    return made


LAYOUTS = {
    "cpu packed": packed,
    "cpu packed, a storage a layer": lambda *a, **k: packed(*a, **k, shared=False),
    "cpu packed without strides": lambda *a, **k: packed(*a, **k, permute=True),
    "ascend pairs": pairs,
    "ascend pairs, heads first": lambda *a, **k: pairs(*a, **k, heads_first=True),
    "two first": halves,
    "two second": lambda *a, **k: halves(*a, **k, second=True),
    "mla": latent,
    "mla pairs": lambda *a, **k: latent(*a, **k, parts=(2, 3)),
    "sparse": lambda *a, **k: latent(*a, **k, parts=(2, 3, 4, 1)),
    "sparse, another dtype": lambda *a, **k: latent(*a, **k, parts=(2, 3, 4), other=torch.int16),
}
