// Copies between mapped memory: many small pieces or few large ones, ordinary or non-temporal stores.
#ifndef KVLINK_HOST_COPY_H
#define KVLINK_HOST_COPY_H

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>

namespace kvlink::host {

// kCached: memcpy, whatever it does; kStreaming: non-temporal stores, where there are any.
enum class CopyHint { kCached, kStreaming };

// Copies to[i] <- from[i]; lengths agree pairwise.
void copy_pieces(const iovec *to, const iovec *from, size_t count, CopyHint hint);

}  // namespace kvlink::host

#endif  // KVLINK_HOST_COPY_H
