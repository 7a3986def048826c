// Copies between mapped memory: many small pieces or few large ones, ordinary or non-temporal stores.
#ifndef KVLINK_HOST_COPY_H
#define KVLINK_HOST_COPY_H

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>

namespace kvlink::host {

// How the whole transfer that a piece belongs to treats the caches.
enum class CopyHint { kCached, kStreaming };

// Copies to[i] <- from[i]; lengths agree pairwise.
void copy_pieces(const iovec *to, const iovec *from, size_t count, CopyHint hint);

// Which hint serves a transfer of `bytes` in pieces of `piece` bytes on average best.
CopyHint choose_hint(uint64_t bytes, uint64_t piece);

}  // namespace kvlink::host

#endif  // KVLINK_HOST_COPY_H
